"""
The vision tower's layers after the one whose output is selected (LLaVA takes the last but one): nothing reads what they
give, so they need not be computed.
"""

from contextlib import contextmanager

import torch
from torch import nn

from ..compat import forward_hooks, is_capturing
from .exchange import Kernel, can_exchange, exchange, original_class


@contextmanager
def without_later_layers(vision_tower: nn.Module, feature_layer: int | list[int]):
    """
    The tower's layers after `feature_layer` hand on what they get, for the duration: what is selected stays the same. Not if something
    takes part in their computation: a trained parameter, or a hook, be it somebody's own or that of an engine that shards the weights.

    Args:
        vision_tower: Of transformers. One without `encoder.layers` (also below `vision_model`) is left as it is.
        feature_layer (`int` or `list[int]`): Of `hidden_states`, which begin with the embeddings.
    """
    encoder = getattr(getattr(vision_tower, "vision_model", vision_tower), "encoder", None)
    layers = list(getattr(encoder, "layers", []))
    selected = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    last = max(index if index >= 0 else len(layers) + 1 + index for index in selected)
    later = [layer for layer in layers[last:] if can_exchange(layer)]
    if any(_is_awaited(module) for layer in later for module in layer.modules()):
        later = []
    try:
        for layer in later:
            exchange(layer, SkippedLayer)
        yield
    finally:
        for layer in later:
            layer.__class__ = original_class(layer)  # another thread's call may have been first


def _is_awaited(module: nn.Module) -> bool:
    is_trained = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters(recurse=False))
    return is_trained or any(not is_capturing(hook) for hook in forward_hooks(module))


class SkippedLayer(Kernel):
    prefix = "Skipped"

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states
