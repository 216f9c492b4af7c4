"""
Packing: several samples in one row, so that no position is spent on padding.

    padded                                   packed
    a a a a a a a . . . .                    input_ids     a a a a a a a b b b c c c c c c c c c c c
    b b b . . . . . . . .                    position_ids  0 1 2 3 4 5 6 0 1 2 0 1 2 3 4 5 6 7 8 9 10
    c c c c c c c c c c c                    cu_seq_lens   0             7     10                    21

What goes into one row is decided here, by length alone: best-fit-decreasing where all lengths are known
([`best_fit_packs`]), or the best fit within a bounded look-ahead for a stream ([`PackedStream`]). The collator then
writes the row ([`pack_sequences`]), and `kernels/packed_attention.py` keeps its samples apart.
"""

import bisect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..constants import IGNORE_INDEX


logger = logging.getLogger(__name__)


class PackPlan(Sequence):
    """
    Which samples go into which pack: a sequence of lists of sample indices.

    Attributes:
        capacity (`int`): Most positions of a pack.
        num_samples (`int`): Samples in all packs together.
        num_positions (`int`): Positions that they fill.
    """

    def __init__(self, indices: np.ndarray, ends: np.ndarray, num_positions: int, capacity: int):
        self._indices = indices  # [num_samples], packs behind one another
        self._ends = ends  # [num_packs]
        self.num_positions = num_positions
        self.capacity = capacity

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, pack: int) -> list[int]:
        if not -len(self) <= pack < len(self):
            raise IndexError(f"pack {pack} of {len(self)}")
        pack %= len(self)
        start = self._ends[pack - 1] if pack else 0
        return self._indices[start : self._ends[pack]].tolist()

    @property
    def num_samples(self) -> int:
        return len(self._indices)

    @property
    def utilization(self) -> float:
        """Share of the packs' capacity that is filled, in [0, 1]."""
        return self.num_positions / (len(self) * self.capacity) if len(self) else 0.0

    def summary(self) -> str:
        """One line for people: packs, samples per pack, utilisation."""
        return (
            f"{self.num_samples:,} samples in {len(self):,} packs of up to {self.capacity:,} positions: "
            f"{self.num_samples / max(len(self), 1):.2f} samples per pack, {self.utilization:.1%} filled"
        )


def best_fit_packs(lengths: Sequence[int] | np.ndarray, capacity: int, seed: int | None = None) -> PackPlan:
    """
    Pack by best-fit-decreasing: longest sample first, each into the fullest pack that still has room for it.

    Takes about a second per million samples: packs are kept by the room they have left, and the smallest sufficient
    room is found in one bit mask.

    Args:
        lengths (`Sequence[int]` of length `num_samples`):
            Length of each sample, in positions of the language model (image tokens included).
        capacity (`int`):
            Most positions of a pack.
        seed (`int`, *optional*):
            Draws which of several equally long samples comes first, and the order of the packs. The data's order
            decides by default.

    Returns:
        [`PackPlan`]: every sample in exactly one pack.

    Raises:
        ValueError: a sample is longer than `capacity`, or has no position at all.

    Example:

    ```python
    >>> list(best_fit_packs([3, 7, 5, 2, 4], capacity=10))
    [[1, 0], [2, 4]]   # 7 + 3 and 5 + 4; 2 does not fit any more
    ```
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size == 0:
        return PackPlan(np.empty(0, np.int64), np.empty(0, np.int64), 0, capacity)
    longest, shortest = int(lengths.argmax()), int(lengths.argmin())
    if lengths[longest] > capacity:
        raise ValueError(
            f"Sample number {longest} has {lengths[longest]} positions, but a pack holds {capacity}. Raise the packs' "
            'length, or let overflow="drop" or "truncate_text" shorten samples before they are packed.'
        )
    if lengths[shortest] < 1:
        raise ValueError(f"Sample number {shortest} has {lengths[shortest]} positions: there is nothing to pack.")

    generator = None if seed is None else np.random.default_rng(seed)
    order = np.arange(len(lengths)) if generator is None else generator.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]

    packs_by_room: list[list[int]] = [[] for _ in range(capacity)]  # [room] → open packs with that room
    bits = [1 << room for room in range(capacity)]
    open_rooms = 0  # bit `room` is set where such a pack is open
    pack_of, num_packs = [], 0
    for length in lengths[order].tolist():
        sufficient = open_rooms >> length
        if sufficient:
            room = length + (sufficient & -sufficient).bit_length() - 1  # the smallest sufficient room
            packs = packs_by_room[room]
            pack = packs.pop()
            if not packs:
                open_rooms ^= bits[room]
        else:
            pack, room = num_packs, capacity
            num_packs += 1
        pack_of.append(pack)
        room -= length
        if room:
            packs_by_room[room].append(pack)
            open_rooms |= bits[room]

    pack_of = np.array(pack_of, dtype=np.int64)
    if generator is not None:
        pack_of = generator.permutation(num_packs)[pack_of]
    by_pack = np.argsort(pack_of, kind="stable")
    ends = np.bincount(pack_of, minlength=num_packs).cumsum()
    return PackPlan(order[by_pack], ends, int(lengths.sum()), capacity)


class PackedDataset(torch.utils.data.Dataset):
    """
    A dataset whose items are packs: lists of samples of another one. Random access, so that samplers, resuming and
    sharing among processes work as for any dataset.

    Args:
        dataset: Samples by index.
        plan ([`PackPlan`]): From [`best_fit_packs`].
    """

    def __init__(self, dataset: Any, plan: PackPlan):
        self.dataset = dataset
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, pack: int) -> list[Any]:
        return [self.dataset[index] for index in self.plan[pack]]


_END = object()


class PackedStream(torch.utils.data.IterableDataset):
    """
    Packs from a stream, with a look-ahead of `look_ahead` samples and no more.

    The oldest sample of the look-ahead opens the pack, so that none waits for longer than `look_ahead` packs; those
    that fill it best follow. The same stream gives the same packs.

    Args:
        stream (`Iterable`):
            Samples. Where processes and workers share the data, each must be given its own part of it
            (`load_conversations(streaming=True)` does that).
        length_of (`Callable`):
            A sample's length in positions; 0 leaves it out. It must not need the image; see
            [`LlavaDataCollator.length`].
        capacity (`int`):
            Most positions of a pack.
        look_ahead (`int`, *optional*, defaults to 256):
            Samples that are held at a time.

    Raises:
        ValueError: a sample is longer than `capacity`, or a stream that is resumed ends before the place to go on from.
    """

    def __init__(
        self,
        stream: Iterable,
        length_of: Callable[[Any], int],
        capacity: int,
        look_ahead: int = 256,
    ):
        if look_ahead < 1:
            raise ValueError(f"look_ahead={look_ahead} samples: at least 1 is needed.")
        self.stream = stream
        self.length_of = length_of
        self.capacity = capacity
        self.look_ahead = look_ahead
        self._epoch = 0
        self._resumed: dict | None = None
        self._reset()

    def _reset(self):
        self._waiting: list[tuple[int, int]] = []  # (length, number of the sample), in ascending order
        self._lengths: dict[int, int] = {}  # number → length
        self._samples: dict[int, Any] = {}  # number → sample; the first key is the oldest
        self._next_number = 0  # of all samples that were read
        self._read = 0  # samples of the stream that were read in this epoch
        self._filled = self._packs = 0

    @property
    def utilization(self) -> float:
        """Share of the capacity that was filled so far (in this process or worker), in [0, 1]."""
        return self._filled / (self._packs * self.capacity) if self._packs else 0.0

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the stream, which reorders itself by it."""
        self._epoch = epoch
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)

    def state_dict(self) -> dict:
        """
        Where the stream stands between two packs. It holds the samples that wait (images are paths there); what was
        read before is skipped on resuming, or not read at all if the stream has a `state_dict` of its own.
        """
        state = {
            "epoch": self._epoch, "read": self._read, "filled": self._filled, "packs": self._packs,
            "waiting": [(length, self._samples[number]) for length, number in sorted(self._waiting, key=_number)],
        }  # fmt: skip
        if hasattr(self.stream, "state_dict"):
            state["stream"] = self.stream.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        """The next `iter()` goes on behind the last pack that was given before `state_dict()`."""
        self._resumed = state

    def __iter__(self) -> Iterator[list]:
        for sample in self._begin():
            self._read += 1
            length = self.length_of(sample)
            if length:
                self._add(length, sample)
            # One more than is waited for: a pack is given before the look-ahead grows beyond its bound.
            if len(self._samples) > self.look_ahead:
                yield self._pop_pack()
        while self._samples:
            yield self._pop_pack()

    def _begin(self) -> Iterator:
        state, self._resumed = self._resumed, None
        self._reset()
        if state is None:
            return iter(self.stream)
        self.set_epoch(state["epoch"])
        self._filled, self._packs = state["filled"], state["packs"]
        for length, sample in state["waiting"]:
            self._add(length, sample)
        if "stream" in state:
            self.stream.load_state_dict(state["stream"])
            self._read = state["read"]
            return iter(self.stream)
        source = iter(self.stream)
        for number in range(state["read"]):
            if next(source, _END) is _END:
                raise ValueError(
                    f"{state['read']} samples of the stream were read when its state was kept, but now it ends after "
                    f"{number}. Resume with the data, processes and workers of before."
                )
        self._read = state["read"]
        return source

    def _add(self, length: int, sample: Any) -> None:
        if length > self.capacity:
            name = f"sample {sample['id']!r}" if isinstance(sample, dict) and "id" in sample else "A sample"
            raise ValueError(
                f"{name} has {length} positions, but a pack holds {self.capacity}. Raise the packs' length, or let "
                'overflow="drop" or "truncate_text" shorten samples before they are packed.'
            )
        number = self._next_number
        self._next_number += 1
        bisect.insort(self._waiting, (length, number))
        self._lengths[number] = length
        self._samples[number] = sample

    def _pop_pack(self) -> list:
        oldest = next(iter(self._samples))
        length = self._lengths[oldest]
        del self._waiting[bisect.bisect_left(self._waiting, (length, oldest))]
        # One long sample, or several of about equal length: whatever leaves the least room. Taking the longest that
        # fits alone would pair samples that are better taken three by three (81 % against 88 % filled at 2,048).
        fillings = [self._fill(self.capacity - length, parts) for parts in (1, 2, 3)]
        room, places = min(fillings, key=lambda filling: filling[0])
        numbers = [oldest, *(self._waiting[place][1] for place in places)]
        for place in sorted(places, reverse=True):
            del self._waiting[place]
        for number in numbers:
            del self._lengths[number]
        self._filled += self.capacity - room
        self._packs += 1
        return [self._samples.pop(number) for number in numbers]

    def _fill(self, room: int, parts: int) -> tuple[int, list[int]]:
        """Places in `_waiting` that fill `room`, the first ones with `1 / parts` of it each; and the room left."""
        places: list[int] = []
        while room:
            place = bisect.bisect_right(self._waiting, (room // parts, self._next_number)) - 1
            while place in places:
                place -= 1
            if place < 0:
                break
            places.append(place)
            room -= self._waiting[place][0]
            parts = max(parts - 1, 1)
        return room, places


def _number(waiting: tuple[int, int]) -> int:
    return waiting[1]


def pack_sequences(input_ids: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> dict[str, torch.Tensor | int]:
    """
    Write samples behind one another in one row.

    Args:
        input_ids (`Sequence[torch.LongTensor]`, each of shape `(length_i,)`):
            Token ids, image tokens expanded. At least one sample, none of them empty.
        labels (`Sequence[torch.LongTensor]`, each of shape `(length_i,)`):
            As long as their `input_ids`.

    Returns:
        `dict`: with T the sum of the lengths,

        - `input_ids`, `labels`, `position_ids` (`torch.LongTensor` of shape `(1, T)`): positions restart at 0 with each
          sample; the first label of each is `IGNORE_INDEX`, since the position before it belongs to another sample;
        - `cu_seq_lens_q`, `cu_seq_lens_k` (`torch.IntTensor` of shape `(num_samples + 1,)`): where samples begin, and T;
        - `max_length_q`, `max_length_k` (`int`): positions of the longest sample.

        The names are transformers' `FlashAttentionKwargs`. There is no `attention_mask`: nothing is padding.

    Example:

    ```python
    >>> pack_sequences([tensor([1, 8, 9]), tensor([1, 7])], [tensor([-100, 8, 9]), tensor([-100, 7])])
    {"input_ids":     [[1, 8, 9, 1, 7]],
     "labels":        [[-100, 8, 9, -100, 7]],
     "position_ids":  [[0, 1, 2, 0, 1]],
     "cu_seq_lens_q": [0, 3, 5], "cu_seq_lens_k": [0, 3, 5], "max_length_q": 3, "max_length_k": 3}
    ```
    """
    if not input_ids:
        raise ValueError("A pack needs at least one sample.")
    lengths = [len(ids) for ids in input_ids]
    if any(len(row) != length for row, length in zip(labels, lengths)) or not all(lengths):
        raise ValueError(f"Samples of {lengths} positions came with labels of {[len(row) for row in labels]}.")
    packed_labels = torch.cat(tuple(labels))  # a copy: the samples' own labels stay as they are
    cu_seq_lens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    packed_labels[cu_seq_lens[:-1].long()] = IGNORE_INDEX
    longest = max(lengths)
    return {
        "input_ids": torch.cat(tuple(input_ids))[None],
        "labels": packed_labels[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


__all__ = ["PackPlan", "PackedDataset", "PackedStream", "best_fit_packs", "pack_sequences"]
