"""What prompts and rows keep: the keys and values of tokens that are shared (`Prefix`) and of a row's own (`RowCache`)."""

from dataclasses import dataclass, field

import torch


MIN_GROWTH = 64
"""Tokens by which the buffers of the rows grow at least."""


@dataclass(eq=False)
class Prefix:
    """
    Keys and values of tokens that rows share.

    Attributes:
        ids (`list[int]`):
            The tokens; an image is `num_image_tokens` times the image token's id.
        start (`int`):
            Position of the first token: 0, or the number of tokens of all parents.
        parent (`Prefix`, *optional*):
            What stands before it. A conversation is a parent (the image) and a child (the turns so far).
        keys, values (`list[torch.Tensor]`, one per layer, of shape `(num_kv_heads, num_tokens, head_dim)`):
            Empty until they are computed.
        features (`list[torch.Tensor]`):
            Features `[num_image_tokens, hidden]` of the images among the tokens, until keys and values are computed.
    """

    ids: list[int]
    start: int = 0
    parent: "Prefix | None" = None
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)

    def chain(self) -> list["Prefix"]:
        """All links, the first one first."""
        return [*(self.parent.chain() if self.parent else []), self]

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.ids)

    @property
    def nbytes(self) -> int:
        """Memory of this link's keys and values, in bytes."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def cut(self, num_tokens: int) -> "Prefix":
        """A view of the first `num_tokens` tokens of this link; nothing is copied."""
        return Prefix(
            self.ids[:num_tokens],
            self.start,
            self.parent,
            [keys[:, :num_tokens] for keys in self.keys],
            [values[:, :num_tokens] for values in self.values],
        )


def common_length(first: list[int], second: list[int]) -> int:
    """How many tokens two lists have in common at their beginning."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)


def match_chain(prefix: Prefix | None, ids: list[int]) -> Prefix | None:
    """The longest part of a chain that `ids` begins with, one token of `ids` at least being left over, as a view.

    A tokenizer may join what was two tokens; so it is the ids of the whole prompt that decide, never its pieces."""
    matched = None
    for link in prefix.chain() if prefix else []:
        length = common_length(link.ids, ids[link.start : len(ids) - 1])
        if length:
            matched = link if length == len(link.ids) else link.cut(length)
        if length < len(link.ids):
            break
    return matched


class RowCache:
    """
    Keys and values of the rows' own tokens: per layer `[num_slots, num_kv_heads, capacity, head_dim]`. Row `i` has
    `lengths[i]` tokens, at the front of slot `i`; the active rows are the first `len(lengths)` slots.
    """

    def __init__(self, num_layers: int):
        self.num_slots = 0
        self.max_length = 0
        """Most tokens that a slot will ever hold: what `capacity` grows to."""
        self.lengths: list[int] = []
        self.prefixes: list[Prefix | None] = []
        self.capacity = 0
        self.keys: list[torch.Tensor | None] = [None] * num_layers
        self.values: list[torch.Tensor | None] = [None] * num_layers

    @property
    def nbytes(self) -> int:
        """Memory of the buffers, in bytes."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values) if tensor is not None)

    def shape_for(self, num_rows: int, max_length: int) -> tuple[int, int]:
        """Slots, and tokens of each, when so many rows grow to `max_length`: those of now where they suffice."""
        suffices = num_rows <= self.num_slots and max_length <= self.max_length
        return (self.num_slots, self.max_length) if suffices else (num_rows, max_length)

    def fit(self, num_rows: int, max_length: int) -> None:
        """Takes that shape (the tensors do when they are next written)."""
        self.num_slots, self.max_length = self.shape_for(num_rows, max_length)
        self.capacity = min(self.capacity, self.max_length)

    def add(self, length: int, prefix: Prefix | None) -> int:
        """Takes the next free slot for a row whose own tokens are about to be computed."""
        self.lengths.append(length)
        self.prefixes.append(prefix)
        return len(self.lengths) - 1

    def remove(self, row: int) -> None:
        """Frees a slot; the last row moves into it."""
        last = len(self.lengths) - 1
        if row != last:
            length = self.lengths[last]
            for tensor in (*self.keys, *self.values):
                if tensor is not None:
                    tensor[row, :, :length] = tensor[last, :, :length]
            self.lengths[row], self.prefixes[row] = length, self.prefixes[last]
        self.lengths.pop()
        self.prefixes.pop()

    def reserve(self, length: int) -> None:
        """Makes room for `length` tokens in every slot (the tensors grow when they are next written)."""
        if length > self.capacity:
            grown = max(length, self.capacity + max(MIN_GROWTH, self.capacity // 4))
            self.capacity = min(grown, self.max_length)

    def buffers(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The layer's keys and values, with the reserved capacity. `key`, `value` `[1, num_kv_heads, _, head_dim]`, where
        values may have another head_dim than keys (latent attention).
        """
        for tensors, like in ((self.keys, key), (self.values, value)):
            old = tensors[layer]
            if old is not None and (old.shape[0], old.shape[2]) == (self.num_slots, self.capacity):
                continue
            shape = (self.num_slots, like.shape[1], self.capacity, like.shape[3])
            tensors[layer] = torch.zeros(shape, dtype=like.dtype, device=like.device)
            if old is not None:
                rows, length = min(old.shape[0], self.num_slots), min(old.shape[2], self.capacity)
                tensors[layer][:rows, :, :length] = old[:rows, :, :length]
        return self.keys[layer], self.values[layer]

    def take(self, row: int, ids: list[int]) -> Prefix:
        """The row's own tokens as a link after its prefix; a copy, for the slot will be used again."""
        parent = self.prefixes[row]
        own = slice(0, len(ids))
        return Prefix(
            list(ids),
            parent.end if parent else 0,
            parent,
            [keys[row, :, own].clone() for keys in self.keys],
            [values[row, :, own].clone() for values in self.values],
        )


def join(prefix: Prefix) -> Prefix:
    """A chain of more than two links as two: the first (an image) as it is, the others (turns) joined."""
    first, *others = prefix.chain()
    if len(others) < 2:
        return prefix
    return Prefix(
        [token for link in others for token in link.ids],
        first.end,
        first,
        [torch.cat(layer, dim=1) for layer in zip(*(link.keys for link in others))],
        [torch.cat(layer, dim=1) for layer in zip(*(link.values for link in others))],
    )


__all__ = ["Prefix", "RowCache", "common_length", "join", "match_chain"]
