"""
The order of samples: grouped by length and modality, as the original's `group_by_modality_length`, or mixed by conversation
type. It depends on seed, epoch and the size of a global batch alone: with any number of processes, and after a resume, every
optimizer step sees the same samples.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler


class GroupedSampler(Sampler[int]):
    """
    Indices in an order in which each global batch holds samples of similar length and of one modality.

    An epoch's samples are shuffled, split into stretches of 50 global batches, sorted by length within a stretch, split
    into global batches, and these are shuffled. Samples that do not fill a global batch of their modality go into the
    last, mixed ones. The first global batch holds the longest sample: a run that lacks memory fails at once.

    Within a global batch, longer samples come first: micro-batches cut from it in order are of similar lengths too,
    and processes that take turns get nearly equal work.

    Args:
        lengths (`Sequence[int]` of length `num_samples`): Of each sample, in tokens.
        global_batch_size (`int`):
            Samples of an optimizer step, over all processes and accumulated micro-batches.
        has_image (`Sequence[bool]` of length `num_samples`, *optional*): Group by modality as well.
        seed (`int`, *optional*, defaults to 0): Of the order, together with the epoch.
    """

    STRETCH = 50
    """Global batches within which samples are sorted; more make batches more uniform and less random."""

    def __init__(
        self,
        lengths: Sequence[int],
        global_batch_size: int,
        has_image: Sequence[bool] | None = None,
        seed: int = 0,
    ):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.has_image = np.ones(len(lengths), dtype=bool) if has_image is None else np.asarray(has_image, dtype=bool)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = self._order(np.random.default_rng((self.seed, self.epoch)))
        self.epoch += 1
        return iter(order.tolist())

    def _order(self, generator: np.random.Generator) -> np.ndarray:
        size = self.global_batch_size
        batches, rest = [], []
        for modality in (True, False):
            indices = generator.permutation(np.flatnonzero(self.has_image == modality))
            full = len(indices) - len(indices) % size
            rest.append(indices[full:])
            for start in range(0, full, size * self.STRETCH):
                stretch = self._sorted(indices[start : min(start + size * self.STRETCH, full)])
                batches.extend(stretch.reshape(-1, size))
        batches = [batches[i] for i in generator.permutation(len(batches))]
        if batches:
            longest = max(range(len(batches)), key=lambda i: self.lengths[batches[i][0]])
            batches[0], batches[longest] = batches[longest], batches[0]
        # Mixed batches keep their samples, in sorted order
        rest = generator.permutation(np.concatenate(rest))
        batches.extend(self._sorted(rest[start : start + size]) for start in range(0, len(rest), size))
        return np.concatenate(batches) if batches else np.empty(0, dtype=np.int64)

    def _sorted(self, indices: np.ndarray) -> np.ndarray:
        return indices[np.argsort(-self.lengths[indices], kind="stable")]


class TypeMixtureSampler(Sampler[int]):
    """
    Draws samples by type, as the paper mixes its three types uniformly (LLaVA §4.2): each draw first picks a type by
    weight, then the next sample of that type.

    Within an epoch a type's samples are drawn in random order without repetition until all were drawn, then again in
    a new order. An epoch has as many draws as there are samples whose type has a weight above 0. The draws depend on
    `seed` and epoch alone, so that they are the same on every process and after a resume.

    Args:
        types (`Sequence[str]`): Type of each sample.
        weights (`dict[str, float]`): Weight of each type, on any scale; 0 leaves a type out.
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Raises:
        ValueError: a type without a weight, or a weight for a type that no sample has.

    Example: 58 conversations, 23 details and 77 complex questions with weights 1 : 1 : 1 give 158 draws, about 53 of
    each type: most conversations once, each detail twice or three times.
    """

    def __init__(self, types: Sequence[str | None], weights: dict[str, float], seed: int = 0):
        counts = Counter(types)
        unweighted = {kind: number for kind, number in counts.items() if kind not in weights}
        if unweighted:
            fix = "Give every type one (0 leaves it out), or choose types with only_types"
            raise ValueError(f"type_weights has no weight for {_listed(unweighted)}. {fix}.")
        unused = sorted(kind for kind, weight in weights.items() if weight > 0 and not counts[kind])
        if unused:
            names = ", ".join(unused)
            raise ValueError(f"type_weights names {names}, but no sample has that type: there are {_listed(counts)}.")
        self.kinds = sorted(kind for kind in counts if weights[kind] > 0)
        self.indices = {kind: torch.tensor([i for i, t in enumerate(types) if t == kind]) for kind in self.kinds}
        self.weights = torch.tensor([float(weights[kind]) for kind in self.kinds], dtype=torch.float64)
        self.seed = seed
        self.epoch = 0

    @classmethod
    def from_dataset(cls, dataset: Any, weights: dict[str, float], seed: int = 0) -> "TypeMixtureSampler":
        """A sampler for a dataset of conversations, by their field `type`, without decoding an image."""
        types = getattr(dataset, "types", None)
        if types is None:
            types = [dataset[i].get("type") for i in range(len(dataset))]
        return cls(types, weights, seed)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(len(indices) for indices in self.indices.values())

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        drawn = torch.multinomial(self.weights, len(self), replacement=True, generator=generator)
        order = torch.empty(len(self), dtype=torch.long)
        for number, kind in enumerate(self.kinds):
            positions = (drawn == number).nonzero().squeeze(1)
            indices = self.indices[kind]
            rounds = -(-len(positions) // len(indices))
            shuffled = [indices[torch.randperm(len(indices), generator=generator)] for _ in range(rounds)]
            if shuffled:
                order[positions] = torch.cat(shuffled)[: len(positions)]
        self.epoch += 1
        return iter(order.tolist())


def _listed(counts: dict[str | None, int]) -> str:
    return ", ".join(f"{kind} ({number} samples)" for kind, number in sorted(counts.items(), key=lambda i: str(i[0])))
