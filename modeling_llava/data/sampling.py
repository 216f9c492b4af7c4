"""
Batches of samples that are alike: in length, and in whether they have an image. For training without packing.

The original groups by `group_by_modality_length`: a batch has either images in all samples or in none, and within
that its samples are of similar length. Ours does the same, and depends on seed, epoch and the size of a global batch
alone: with any number of processes, and after a resume, every optimizer step sees the same samples.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class GroupedSampler(Sampler[int]):
    """
    Indices in an order in which each global batch holds samples of similar length and of one modality.

    An epoch's samples are shuffled, cut into stretches of 50 global batches, sorted by length within a stretch, cut
    into global batches, and these are shuffled. Samples that do not fill a global batch of their modality go into the
    last, mixed ones. The first global batch holds the longest sample, so that a lack of memory shows at once.

    Within a global batch, longer samples come first: micro-batches cut from it in order are of similar lengths too,
    and processes that take them in turn get nearly equal work.

    Args:
        lengths (`Sequence[int]` of length `num_samples`):
            Length of each sample, in positions.
        global_batch_size (`int`):
            Samples of an optimizer step, over all processes and accumulated micro-batches.
        has_image (`Sequence[bool]` of length `num_samples`, *optional*):
            Group by modality as well.
        seed (`int`, *optional*, defaults to 0):
            Of the order, together with the epoch.

    Raises:
        ValueError: the arguments are not of the same length, or `global_batch_size` is below 1.
    """

    STRETCH = 50
    """Global batches within which samples are sorted; more of them make batches more even and less random."""

    def __init__(
        self,
        lengths: Sequence[int],
        global_batch_size: int,
        has_image: Sequence[bool] | None = None,
        seed: int = 0,
    ):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.has_image = np.ones(len(lengths), dtype=bool) if has_image is None else np.asarray(has_image, dtype=bool)
        if len(self.has_image) != len(self.lengths):
            raise ValueError(f"{len(self.lengths)} lengths came with {len(self.has_image)} entries of has_image.")
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size={global_batch_size} samples: at least 1 is needed.")
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
        # Mixed batches are sorted one by one: only their order within a batch is free, not what they hold.
        rest = generator.permutation(np.concatenate(rest))
        batches.extend(self._sorted(rest[start : start + size]) for start in range(0, len(rest), size))
        return np.concatenate(batches) if batches else np.empty(0, dtype=np.int64)

    def _sorted(self, indices: np.ndarray) -> np.ndarray:
        return indices[np.argsort(-self.lengths[indices], kind="stable")]


__all__ = ["GroupedSampler"]
