"""Mixing conversations by type: the paper samples its three types uniformly in training (LLaVA §4.2)."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler


class TypeMixtureSampler(Sampler[int]):
    """
    Draws samples by type: each draw first picks a type by weight, then the next sample of that type.

    Within an epoch a type's samples are drawn in random order without repetition until all were drawn, then again in
    a new order. An epoch has as many draws as there are samples whose type has a weight above 0. The draws depend on
    `seed` and epoch alone, so that they are the same on every process and after a resume.

    Args:
        types (`Sequence[str]`):
            Type of each sample.
        weights (`dict[str, float]`):
            Weight of each type, on any scale; 0 leaves a type out.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws.

    Raises:
        ValueError: a type without a weight, or a weight for a type that no sample has.

    Example: 58 conversations, 23 details and 77 complex questions with weights 1 : 1 : 1 give 158 draws, about 53 of
    each type: most conversations once, each detail twice or three times.
    """

    def __init__(self, types: Sequence[str | None], weights: dict[str, float], seed: int = 0):
        counts = Counter(types)
        unweighted = {kind: number for kind, number in counts.items() if kind not in weights}
        if unweighted:
            raise ValueError(
                f"type_weights has no weight for {_listed(unweighted)}. Give every type one (0 leaves it out), "
                "or choose types with only_types."
            )
        unused = sorted(kind for kind, weight in weights.items() if weight > 0 and not counts[kind])
        if unused:
            raise ValueError(
                f"type_weights names {', '.join(unused)}, but no sample has that type: there are {_listed(counts)}."
            )
        self.kinds = sorted(kind for kind in counts if weights[kind] > 0)
        self.indices = {kind: torch.tensor([i for i, t in enumerate(types) if t == kind]) for kind in self.kinds}
        self.weights = torch.tensor([float(weights[kind]) for kind in self.kinds], dtype=torch.float64)
        self.seed = seed
        self.epoch = 0

    @classmethod
    def from_dataset(cls, dataset: Any, weights: dict[str, float], seed: int = 0) -> "TypeMixtureSampler":
        """A sampler for a dataset of conversations, by their field `type`."""
        return cls(conversation_types(dataset), weights, seed)

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


def conversation_types(dataset: Any) -> list[str | None]:
    """The field `type` of every conversation, without decoding an image."""
    types = getattr(dataset, "types", None)
    if types is not None:
        return list(types)
    return [dataset[i].get("type") for i in range(len(dataset))]


def _listed(counts: dict[str | None, int]) -> str:
    return ", ".join(f"{kind} ({number} samples)" for kind, number in sorted(counts.items(), key=lambda i: str(i[0])))


__all__ = ["TypeMixtureSampler", "conversation_types"]
