"""
Exchange a module's class for one that computes the same with less: what `print(model)` shows is what runs.

A kernel is a class that is put before the original class:

    LlamaRMSNorm   →   EfficientLlamaRMSNorm(EfficientNorm, LlamaRMSNorm)

In training its `compute` runs, in `eval()` the original's `forward`, so that answers are the stock ones to the last bit. Parameters,
buffers, hooks and `isinstance` stay as they are. A pickle holds the original class, so that it is read in a process without this
package; copies and the replicas of `nn.DataParallel` keep the exchanged one.
"""

import copy
import functools

from torch import nn

from ..compat import is_under_functorch


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
