"""The concept-balanced choice of captions (LLaVA, appendix "Data").

Noun phrases that fewer than `least` captions hold are skipped, as rare combinations whose parts other captions cover.
From the rarest of the others up, the captions that hold a phrase are taken; of a phrase that more than `most` captions
hold, a random `most` of them.

The random choice is the `most` captions with the smallest hash of (seed, phrase, row). So it does not depend on the order
of anything, parts of the captions can be looked at apart and put together, and the choice is the same bit for bit on one
core, on many, and on a cluster.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass


Phrases = tuple[str, ...]
"""The different noun phrases of one caption."""

MASK = 2**64 - 1


@dataclass(frozen=True)
class ConceptSettings:
    """How captions are chosen.

    Attributes:
        least: Frequency (captions that hold a phrase) below which a phrase is skipped.
        most: Most captions that one phrase contributes.
        seed: Of the random choice.
        target: Stop with the phrase, from the rarest up, with which so many captions are chosen; `None` takes all phrases.
    """

    least: int = 3
    most: int = 100
    seed: int = 0
    target: int | None = None

    def __post_init__(self):
        if self.least < 1 or self.most < self.least:
            raise ValueError(f"1 ≤ least ≤ most is needed; least is {self.least} and most is {self.most}.")
        if self.target is not None and self.target < 1:
            raise ValueError(f"target is {self.target}; it is a number of captions.")


def phrase_key(phrase: str, seed: int) -> int:
    """64 bits of a phrase, different for each seed."""
    salt = (seed % 2**64).to_bytes(8, "big")
    return int.from_bytes(hashlib.blake2b(phrase.encode(), digest_size=8, salt=salt).digest(), "big")


def row_hash(key: int, row: int) -> int:
    """64 bits of a row for a phrase's key. For one key no two rows share them: each step can be undone (splitmix64)."""
    x = (key + row * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def count_phrases(captions: Iterable[Phrases]) -> Counter[str]:
    """In how many captions each phrase occurs."""
    counts: Counter[str] = Counter()
    for phrases in captions:
        counts.update(phrases)
    return counts


def smallest_hashes(rows: Iterable[tuple[int, Phrases]], keys: dict[str, int], most: int) -> dict[str, list[int]]:
    """The `most` smallest row hashes of each phrase of `keys`, as heaps of negated numbers (the largest hash first)."""
    heaps: dict[str, list[int]] = {}
    for row, phrases in rows:
        for phrase in phrases:
            key = keys.get(phrase)
            if key is not None:
                push_smallest(heaps.setdefault(phrase, []), row_hash(key, row), most)
    return heaps


def push_smallest(heap: list[int], value: int, most: int) -> None:
    """Keeps the `most` smallest values in a heap of negated numbers."""
    if len(heap) < most:
        heapq.heappush(heap, -value)
    elif -value > heap[0]:
        heapq.heapreplace(heap, -value)


class Chooser:
    """Says of a caption whether it is chosen, once all phrases are counted.

    Memory is linear in the distinct phrases: a count and a rank for each, `most` hashes for each frequent one while the
    thresholds are found.
    """

    def __init__(self, counts: Counter[str], settings: ConceptSettings):
        self.settings = settings
        taken = [phrase for phrase, count in counts.items() if count >= settings.least]
        taken.sort(key=lambda phrase: (counts[phrase], phrase))
        self.rank = {phrase: rank for rank, phrase in enumerate(taken)}
        """Place of each phrase that is not skipped, the rarest first."""
        self.keys = {phrase: phrase_key(phrase, settings.seed) for phrase in taken if counts[phrase] > settings.most}
        """Hash keys of the phrases that contribute a random part of their captions."""
        self.threshold: dict[str, int] = {}
        self.last_rank = len(taken)

    def set_thresholds(self, heaps: dict[str, list[int]]) -> None:
        """Takes the largest hash that still belongs to each frequent phrase's random part."""
        self.threshold = {phrase: -heap[0] for phrase, heap in heaps.items()}

    def first_rank(self, row: int, phrases: Phrases) -> int | None:
        """Rank of the rarest phrase through which a caption is chosen; `None` if it is not."""
        best = None
        for phrase in phrases:
            rank = self.rank.get(phrase)
            if rank is None or (best is not None and rank >= best):
                continue
            key = self.keys.get(phrase)
            if key is None or row_hash(key, row) <= self.threshold[phrase]:
                best = rank
        return best

    def set_target(self, ranks: Counter[int]) -> None:
        """Finds the phrase with which the target is reached.

        Args:
            ranks: Captions by `first_rank`.
        """
        if self.settings.target is None:
            return
        chosen = 0
        for rank in sorted(ranks):
            chosen += ranks[rank]
            if chosen >= self.settings.target:
                self.last_rank = rank
                return

    def chooses(self, row: int, phrases: Phrases) -> bool:
        """Whether a caption is chosen."""
        rank = self.first_rank(row, phrases)
        return rank is not None and rank <= self.last_rank


def make_chooser(
    captions: Callable[[], Iterable[Phrases]], settings: ConceptSettings, counts: Counter[str] | None = None
) -> Chooser:
    """Reads the phrases of all captions two or three times and returns what says which are chosen."""
    chooser = Chooser(count_phrases(captions()) if counts is None else counts, settings)
    if chooser.keys:
        chooser.set_thresholds(smallest_hashes(enumerate(captions()), chooser.keys, settings.most))
    if settings.target is not None:
        ranks: Counter[int] = Counter()
        for row, phrases in enumerate(captions()):
            rank = chooser.first_rank(row, phrases)
            if rank is not None:
                ranks[rank] += 1
        chooser.set_target(ranks)
    return chooser


def choose_captions(captions: Callable[[], Iterable[Phrases]], settings: ConceptSettings) -> Iterator[bool]:
    """Whether each caption is chosen, in order."""
    chooser = make_chooser(captions, settings)
    for row, phrases in enumerate(captions()):
        yield chooser.chooses(row, phrases)
