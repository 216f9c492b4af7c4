"""What makes a step fast, each with its plain equivalent; [`apply_kernels`] is the one entry."""

from collections import Counter
from dataclasses import dataclass

from torch import nn


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
    `kernels/exchange.py` takes it back. Answers in `eval()` are not affected.

    Args:
        model ([`LlavaForConditionalGeneration`], ours or stock, or a `PeftModel` around it)

    Returns:
        [`KernelReport`]
    """
    from .efficient_layers import make_efficient
    from .exchange import Kernel

    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    left = Counter(type(module).__name__ for module in core.modules() if "forward" in vars(module))
    make_efficient(core.model.language_model)
    exchanged = Counter(type(module).__name__ for module in core.modules() if isinstance(module, Kernel))
    return KernelReport(dict(exchanged), dict(left))


__all__ = ["KernelReport", "apply_kernels"]
