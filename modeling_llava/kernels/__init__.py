"""
What makes a step fast, each with its plain equivalent; [`apply_kernels`] is the one entry.

Exchange a module's class for one that computes the same with less: what `print(model)` shows is what runs.

A kernel is a class that is put before the original class:

    LlamaRMSNorm   →   EfficientLlamaRMSNorm(EfficientNorm, LlamaRMSNorm)

In training its `compute` runs, in `eval()` the original's `forward`, so that answers are the stock ones to the last bit. Parameters,
buffers, hooks and `isinstance` stay as they are. A pickle holds the original class, so that it is read in a process without this
package; copies and the replicas of `nn.DataParallel` keep the exchanged one.
"""

import copy
import functools
from collections import Counter
from dataclasses import dataclass

from torch import nn

from ..compat import is_under_functorch


@dataclass
class KernelReport:
    """
    What [`apply_kernels`] exchanged: class as `print(model)` shows it → number of modules; and what it left, since its forward is
    bound on the instance (accelerate's hooks, Liger).
    """

    exchanged: dict[str, int]
    left: dict[str, int]

    def __str__(self) -> str:
        parts = [f"{count} × {name}" for name, count in self.exchanged.items()] or ["none"]
        left = [f"{count} × {name}" for name, count in self.left.items()]
        return "Kernels: " + ", ".join(parts) + (f"; hooked, so left as they are: {', '.join(left)}" if left else "")


def apply_kernels(model: nn.Module) -> KernelReport:
    """
    Exchange the modules of a LLaVA's language model by kernels that compute the same training step with less time and memory, in
    place, where a probe forward shows that they do: norms, MLPs, attention, LoRA layers.

    To be called after freezing and adding adapters, and before hooks: a hooked module keeps its forward. `restore(model)` of
    this module takes it back. Answers in `eval()` are not affected.

    Args:
        model ([`LlavaForConditionalGeneration`], ours or stock, or a `PeftModel` around it)

    Returns:
        [`KernelReport`]
    """
    from .efficient_layers import make_efficient

    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    left = Counter(type(module).__name__ for module in core.modules() if "forward" in vars(module))
    make_efficient(core.model.language_model)
    exchanged = Counter(type(module).__name__ for module in core.modules() if isinstance(module, Kernel))
    return KernelReport(dict(exchanged), dict(left))


class Kernel:
    """Base of the classes that are put before a module's own."""

    prefix: str
    """Of the name of the exchanged class."""
    original_class: type[nn.Module]

    def forward(self, *args, **kwargs):
        is_efficient = self.training and not is_under_functorch()
        return self.compute(*args, **kwargs) if is_efficient else self.compute_plainly(*args, **kwargs)

    def compute_plainly(self, *args, **kwargs):
        """The original's `forward`, by which a kernel computes what it does not know."""
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        _, _, *rest = super().__reduce_ex__(2)
        return object.__new__, (self.original_class,), *rest

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied


def exchange(module: nn.Module, kernel: type[Kernel]) -> None:
    """
    Let `module` compute by `kernel`, in place.

    Raises:
        ValueError: its forward is bound on the instance (accelerate's hooks, Liger): it would still run the original's.
    """
    if not can_exchange(module):
        raise ValueError(
            f"The forward of this {type(module).__name__} is replaced on the instance (by a hook of accelerate, or by Liger). "
            "Exchange modules before they are hooked."
        )
    module.__class__ = exchanged_class(type(module), kernel)


def can_exchange(module: nn.Module) -> bool:
    """Whether nothing is bound on the instance, and no other kernel is there."""
    return "forward" not in vars(module) and not isinstance(module, Kernel)


def restore(module: nn.Module) -> None:
    """Give every exchanged module below `module` its original class back."""
    for part in module.modules():
        part.__class__ = original_class(part)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, as it was before an exchange."""
    return module.original_class if isinstance(module, Kernel) else type(module)


@functools.cache
def exchanged_class(original: type[nn.Module], kernel: type[Kernel]) -> type[nn.Module]:
    """The class of a kernel before an original class; made once for each pair."""
    name = f"{kernel.prefix}{original.__name__}"
    return type(name, (kernel, original), {"original_class": original, "__module__": kernel.__module__})


__all__ = ["KernelReport", "apply_kernels"]
