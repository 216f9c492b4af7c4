"""
A model whose weights stay in their files, for checks of models that are larger than the memory.

transformers' own modules run, in float32; their linear layers and token embeddings read the weights while they are used.
"""

from collections.abc import Callable, Mapping

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn import functional as F

from .tensors import LazyTensor


class StreamedLinear(nn.Module):
    """`nn.Linear` over a lazy weight `[out, in]`: a few rows at a time."""

    def __init__(self, weight: LazyTensor, bias: LazyTensor | None):
        super().__init__()
        self.lazy_weight, self.lazy_bias = weight, bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = x.new_empty(*x.shape[:-1], self.out_features)
        start = 0
        for rows in self.lazy_weight.row_pieces():
            output[..., start : start + rows.shape[0]] = F.linear(x, rows.float())
            start += rows.shape[0]
        return output if self.lazy_bias is None else output + self.lazy_bias.tensor().float()


class StreamedEmbedding(nn.Module):
    """`nn.Embedding` over a lazy weight `[tokens, hidden]`: only the rows that are asked for."""

    def __init__(self, weight: LazyTensor):
        super().__init__()
        self.lazy_weight = weight
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        unique, places = ids.unique(return_inverse=True)
        rows = torch.cat([self.lazy_weight.rows(i, i + 1) for i in unique.tolist()])
        return rows.float()[places]


def streamed(
    build: Callable[[], nn.Module], tensors: Mapping[str, LazyTensor], rename: Callable[[str], str] = str
) -> nn.Module:
    """
    A model in evaluation mode whose weights are read while it runs.

    Raises:
        KeyError: a parameter without a tensor.
    """
    with init_empty_weights(include_buffers=False):
        model = build()
    tied = getattr(model, "all_tied_weights_keys", None) or {}

    saved = set(model.state_dict())

    def find(name: str) -> LazyTensor:
        key = rename(name)
        return tensors[rename(tied[name]) if name in tied and key not in tensors else key]

    for name, module in list(model.named_modules()):
        prefix = f"{name}." if name else ""
        if type(module) in (
            nn.Linear,
            nn.Embedding,
        ):  # of others, such as attention's own, more is used than the product
            weight = find(f"{prefix}weight")
            if isinstance(module, nn.Linear):
                new = StreamedLinear(weight, find(f"{prefix}bias") if module.bias is not None else None)
            elif _is_small(weight):
                new = nn.Embedding.from_pretrained(weight.tensor().float())
            else:
                new = StreamedEmbedding(weight)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
            continue
        for key, _ in list(module.named_parameters(recurse=False)):
            value = find(f"{prefix}{key}").tensor().float()
            module.register_parameter(key, nn.Parameter(value, requires_grad=False))
        for key, _ in list(module.named_buffers(recurse=False)):
            if f"{prefix}{key}" in saved:
                module.register_buffer(key, find(f"{prefix}{key}").tensor().float())
    return model.eval()


def _is_small(weight: LazyTensor) -> bool:
    """Tables of positions are read whole: their module is also asked for its `weight`."""
    return weight.nbytes <= 2**20 * 8
