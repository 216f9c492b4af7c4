"""
What prompts and rows keep, and the memory that it takes: the keys and values of what prompts begin with (`Prefix`) and of a
row's own tokens (`RowCache`).
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
    Keys and values of the tokens that prompts begin with.

    Attributes:
        ids (`list[int]`):
            The tokens; an image is `num_image_tokens` times the image token's id.
        keys, values (`list[torch.Tensor]`, one per layer, of shape `(num_kv_heads, num_tokens, head_dim)`):
            Empty until they are computed.
        features (`list[torch.Tensor]`):
            Features `[num_image_tokens, hidden]` of the images among the tokens, until keys and values are computed.
    """

    ids: list[int]
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values, in bytes."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def cut(self, num_tokens: int) -> "Prefix":
        """A view of the first `num_tokens` tokens; nothing is copied."""
        return Prefix(
            self.ids[:num_tokens],
            [keys[:, :num_tokens] for keys in self.keys],
            [values[:, :num_tokens] for values in self.values],
        )


def common_length(first: list[int], second: list[int]) -> int:
    """How many tokens two lists have in common at their beginning."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)


def longest_match(prefixes: list[Prefix | None], ids: list[int]) -> Prefix | None:
    """
    The longest beginning of `ids` that one of the prefixes holds, one token of `ids` at least being left over.

    A tokenizer may join what was two tokens, so the ids of the whole prompt decide, never its pieces.
    """
    lengths = [common_length(prefix.ids, ids[:-1]) if prefix else 0 for prefix in prefixes]
    length = max(lengths)
    prefix = prefixes[lengths.index(length)]
    if length == 0:
        return None
    return prefix if length == len(prefix.ids) else prefix.cut(length)


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
        length = len(prefix.ids) if prefix and copies else 0
        self.lengths.append(length)
        self.prefixes.append(None if copies else prefix)
        self.reserve(length)
        for layer, states in enumerate(zip(prefix.keys, prefix.values) if length else []):
            for buffer, tensor in zip(self.buffers(layer, *(state[None] for state in states)), states):
                buffer[len(self.lengths) - 1, :, :length] = tensor

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

    def take(self, row: int, ids: list[int]) -> Prefix:
        """The slot's tokens `ids`, as a view: no other row may use the slot again."""
        keys, values = ([tensor[row, :, : len(ids)] for tensor in tensors] for tensors in (self.keys, self.values))
        return Prefix(ids, keys, values)


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
