"""The concept-balanced choice of captions (LLaVA, appendix "Data").

Noun phrases that occur in fewer than `least` captions are skipped. From the rarest of the others up, the captions with a
phrase are chosen; of a phrase in more than `most` captions, a random `most` of them: those with the smallest hash of (seed,
phrase, row), so that the choice is the same on every machine and in every order of reading.
"""

import hashlib
import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass


Phrases = tuple[str, ...]
"""The different noun phrases of one caption."""

MASK = 2**64 - 1


@dataclass(frozen=True)
class ConceptSettings:
    """How captions are chosen."""

    least: int = 3  # captions with a phrase; rarer phrases are skipped
    most: int = 100  # captions that one phrase contributes
    seed: int = 0
    target: int | None = None  # stop with the phrase, from the rarest up, at which this many captions are chosen

    def __post_init__(self):
        if not 1 <= self.least <= self.most:
            raise ValueError(f"least must be at least 1 and at most `most`, got least={self.least}, most={self.most}.")
        if self.target is not None and self.target < 1:
            raise ValueError(f"target must be a number of captions from 1 up, got {self.target}.")


def phrase_key(phrase: str, seed: int) -> int:
    """64 bits of a phrase, different for each seed."""
    salt = (seed % 2**64).to_bytes(8, "big")
    return int.from_bytes(hashlib.blake2b(phrase.encode(), digest_size=8, salt=salt).digest(), "big")


def row_hash(key: int, row: int) -> int:
    """64 bits of a row for a phrase's key (splitmix64, a bijection: no two rows share them)."""
    x = (key + row * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def count_phrases(captions: Iterable[Phrases]) -> Counter[str]:
    """The number of captions of each phrase."""
    return Counter(phrase for phrases in captions for phrase in phrases)


def choose_captions(
    captions: Callable[[], Iterable[Phrases]], settings: ConceptSettings, counts: Counter[str] | None = None
) -> list[bool]:
    """Whether each caption is chosen, in order. Memory: `most` hashes per frequent phrase, eight bytes per caption.

    `captions` gives the phrases of each caption and is called up to three times; `counts` are those of `count_phrases`.
    """
    counts = count_phrases(captions()) if counts is None else counts
    taken = [phrase for phrase, count in counts.items() if count >= settings.least]
    taken.sort(key=lambda phrase: (counts[phrase], phrase))
    rank_of = {phrase: rank for rank, phrase in enumerate(taken)}  # the rarest first
    keys = {phrase: phrase_key(phrase, settings.seed) for phrase in taken if counts[phrase] > settings.most}
    threshold = _largest_chosen_hash(captions(), keys, settings.most) if keys else {}

    def chosen_by(phrase: str, row: int) -> bool:
        return phrase not in keys or row_hash(keys[phrase], row) <= threshold[phrase]

    nothing = len(taken)
    first_rank = array("q")  # of the rarest phrase by which a caption is chosen
    for row, phrases in enumerate(captions()):
        ranks = (rank_of[phrase] for phrase in phrases if phrase in rank_of and chosen_by(phrase, row))
        first_rank.append(min(ranks, default=nothing))
    last = nothing - 1
    if settings.target is not None:
        chosen = 0
        for rank, number in sorted(Counter(first_rank).items()):
            chosen += number
            if chosen >= settings.target:
                last = min(rank, last)
                break
    return [rank <= last for rank in first_rank]


def _largest_chosen_hash(captions: Iterable[Phrases], keys: dict[str, int], most: int) -> dict[str, int]:
    """The `most`-th smallest row hash of each phrase of `keys`."""
    heaps: dict[str, list[int]] = {phrase: [] for phrase in keys}  # of negated hashes, the largest hash first
    for row, phrases in enumerate(captions):
        for phrase in phrases:
            if phrase in keys:
                push = heapq.heappush if len(heaps[phrase]) < most else heapq.heappushpop
                push(heaps[phrase], -row_hash(keys[phrase], row))
    return {phrase: -heap[0] for phrase, heap in heaps.items()}
