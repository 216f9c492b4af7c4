"""What makes a step fast, each with its plain equivalent; [`apply_kernels`] is the one entry."""

from dataclasses import dataclass, field

from torch import nn


@dataclass
class KernelReport:
    """
    What [`apply_kernels`] exchanged.

    Attributes:
        exchanged (`dict[str, int]`): Class as `print(model)` shows it → number of modules.
        left (`dict[str, int]`): Class of modules whose forward is bound on the instance (accelerate's hooks, Liger), which were
            left as they are → number.
    """

    exchanged: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{count} × {name}" for name, count in self.exchanged.items()] or ["none"]
        left = [f"{count} × {name}" for name, count in self.left.items()]
        return "Kernels: " + ", ".join(parts) + (f"; hooked, so left as they are: {', '.join(left)}" if left else "")


def apply_kernels(model: nn.Module) -> KernelReport:
    """
    Exchange the modules of a LLaVA by kernels that compute the same training step with less time and memory, in place.

    To be called after freezing and adding adapters, and before hooks: a hooked module keeps its forward. `restore(model)` of
    `kernels/exchange.py` takes it back. Answers in `eval()` are not affected.

    Args:
        model ([`LlavaForConditionalGeneration`], ours or stock, or a `PeftModel` around it):
            Its language model gets efficient norms, MLPs, attention and LoRA layers where a probe forward shows that they compute
            the same.

    Returns:
        [`KernelReport`]
    """
    from .efficient_layers import make_efficient
    from .exchange import Kernel

    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    report = KernelReport()
    for module in core.modules():
        if "forward" in vars(module):
            name = type(module).__name__
            report.left[name] = report.left.get(name, 0) + 1
    make_efficient(core.model.language_model)
    for module in core.modules():
        if isinstance(module, Kernel):
            name = type(module).__name__
            report.exchanged[name] = report.exchanged.get(name, 0) + 1
    return report


__all__ = ["KernelReport", "apply_kernels"]
