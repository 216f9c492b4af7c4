"""
What prompts and rows keep, and the memory that it takes: the keys and values of tokens that are shared (`Prefix`) and of a
row's own (`RowCache`).
"""

from dataclasses import dataclass, field

import psutil
import torch


MARGIN = 0.1
"""Share of the free memory that is left alone: fragmentation, what else computes on the device."""

WORKING_BYTES = 2**28
"""What a pass takes besides its activations: attention scores, logits, the vision tower on a few images."""

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
            What stands before it. A conversation is a chain: the image, then each turn.
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
    """
    The longest part of a chain that `ids` begins with, one token of `ids` at least being left over, as a view.

    A tokenizer may join what was two tokens, so the ids of the whole prompt decide, never its pieces.
    """
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
    Keys and values of the rows' own tokens: per layer `[num_slots, num_kv_heads, capacity, head_dim]`, where `capacity` grows
    to `max_length`. Row `i` has `lengths[i]` tokens, at the front of slot `i`, after the shared `prefixes[i]`.
    """

    def __init__(self, num_layers: int):
        self.num_slots = self.capacity = self.max_length = 0
        self.lengths: list[int] = []
        self.prefixes: list[Prefix | None] = []
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

    def add(self, prefix: Prefix | None, copies: bool) -> None:
        """Takes the next free slot for a row after a prefix, which it shares, or `copies` to the front of the slot."""
        self.lengths.append(prefix.end if prefix and copies else 0)
        self.prefixes.append(None if copies else prefix)
        self.reserve(self.lengths[-1])
        for link in prefix.chain() if prefix and copies else []:
            for layer, (keys, values) in enumerate(zip(link.keys, link.values)):
                for buffer, tensor in zip(self.buffers(layer, keys[None], values[None]), (keys, values)):
                    buffer[len(self.lengths) - 1, :, link.start : link.end] = tensor

    def remove(self, row: int) -> None:
        """Frees a slot; the last row moves into it."""
        last = len(self.lengths) - 1
        if row != last:
            length = self.lengths[last]
            for tensor in (*self.keys, *self.values):
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

    def take(self, row: int, ids: list[int], parent: Prefix | None) -> Prefix:
        """The row's last `len(ids)` tokens as a link after `parent`; a copy, for the slot will be used again."""
        own = slice(self.lengths[row] - len(ids), self.lengths[row])
        return Prefix(
            ids,
            parent.end if parent else 0,
            parent,
            [keys[row, :, own].clone() for keys in self.keys],
            [values[row, :, own].clone() for values in self.values],
        )


def free_memory(device: torch.device) -> int:
    """
    Bytes that can be allocated: of a GPU what it has free, within this process's share of it
    (`set_per_process_memory_fraction`), and the segments of PyTorch's allocator that hold nothing. On the CPU, and where
    a GPU shares its memory (MPS), what the machine has available.
    """
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return psutil.virtual_memory().available
    free, total = module.mem_get_info(device)
    stats = module.memory_stats(device)
    reserved, active, split = (
        stats.get(f"{name}_bytes.all.current", 0) for name in ("reserved", "active", "inactive_split")
    )
    if hasattr(module, "get_per_process_memory_fraction"):
        free = min(free, int(module.get_per_process_memory_fraction(device) * total) - reserved)
    return free + reserved - active - split


def key_value_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers of a language model."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize


def pass_bytes(config, dtype: torch.dtype, num_tokens: int) -> int:
    """Bytes that a pass over so many new tokens takes at most: one layer's activations, a 4-bit matrix in 16 bits."""
    hidden = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    return (num_tokens * (4 * intermediate + 8 * hidden) + hidden * intermediate) * dtype.itemsize + WORKING_BYTES
