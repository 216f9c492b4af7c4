"""
What nobody reads is not computed: a prompt's last layer gives its keys and values to the cache, and of its output only
the last token's is read.
"""

from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def prune_last_layer(language_model, tokens: torch.Tensor, num_tokens: int):
    """
    The output of the last layer is that of `tokens`, and meaningless for the others, for the duration: the layer's output
    projection and its MLP, which treat each token apart, are computed for `tokens` only. Keys and values are all there.

    Args:
        language_model: A decoder of transformers. One whose last layer has neither `mlp` nor `self_attn.o_proj` is left as it is.
        tokens (`torch.Tensor` of shape `(num_read,)`): Indices into the pass of `num_tokens` tokens.
        num_tokens (`int`)
    """
    layer = (getattr(language_model, "layers", None) or [None])[-1]
    modules = [getattr(layer, "mlp", None), getattr(getattr(layer, "self_attn", None), "o_proj", None)]

    def choose(module, args):
        return args[0][:, tokens.to(args[0].device)], *args[1:]  # the layer may lie on another device

    def place(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        whole = first.new_zeros(first.shape[0], num_tokens, *first.shape[2:])
        whole[:, tokens.to(first.device)] = first
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    with ExitStack() as hooks:
        for module in modules:
            if module is not None:
                hooks.callback(module.register_forward_pre_hook(choose).remove)
                hooks.callback(module.register_forward_hook(place).remove)
        yield


__all__ = ["prune_last_layer"]
