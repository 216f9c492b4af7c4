"""
Hooks by which transformers collects a vision tower's hidden states: put in early, and left out of a pickle.

transformers puts them in during the first call, under a lock that `torch.compile` cannot trace; so ours are there from
the beginning. They are local functions, which pickle refuses. Leaving them out and putting them in again afterwards
lets a whole model be pickled: `torch.save(model)`, a process that is spawned, Ray and `joblib`.
"""

from collections import OrderedDict

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import (
    _CAN_RECORD_REGISTRY,
    install_output_capuring_hook,
    maybe_install_capturing_hooks,
)


_FLAG = "_output_capturing_hooks_installed"


def install_capturing_hooks(model: PreTrainedModel) -> None:
    """Hook the vision tower of `model`, once. Unpickling calls no constructor, where transformers notes what every
    part can collect: that is noted here too."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            _CAN_RECORD_REGISTRY[module] = module._can_record_outputs
    maybe_install_capturing_hooks(model.vision_tower)


def without_capturing_hooks(module: nn.Module) -> nn.Module:
    """`module` itself if nothing in it is hooked, else a shallow copy, with the same tensors, that is not."""
    children = {name: child and without_capturing_hooks(child) for name, child in module._modules.items()}
    hooks = OrderedDict((i, hook) for i, hook in module._forward_hooks.items() if not is_capturing(hook))
    unchanged = len(hooks) == len(module._forward_hooks) and _FLAG not in module.__dict__
    if unchanged and all(child is module._modules[name] for name, child in children.items()):
        return module
    copied = object.__new__(type(module))
    copied.__dict__ = {**module.__dict__, "_modules": children, "_forward_hooks": hooks}
    copied.__dict__.pop(_FLAG, None)
    return copied


def is_capturing(hook) -> bool:
    """Whether a forward hook is one of these."""
    return getattr(hook, "__qualname__", "").startswith(f"{install_output_capuring_hook.__name__}.<locals>")


__all__ = ["install_capturing_hooks", "is_capturing", "without_capturing_hooks"]
