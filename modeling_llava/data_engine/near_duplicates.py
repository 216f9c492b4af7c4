"""Finds near-duplicate questions across a whole data set, exactly, without comparing each with each.

Two questions are near duplicates when the sets of their words overlap by `threshold` (Jaccard: shared words over all
words). Of two such sets, the rarest few words of one share a word with the rarest few of the other: only those are compared.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable

from .validate import normalise


# "What is on the table in this photo?" asks what "What is on the table?" asks.
FRAMING = re.compile(
    r"\b(?:in|of|from|on|within|throughout) (?:the|this) (?:image|photo|photograph|picture|scene|shot)\b"
)


def question_words(question: str) -> frozenset[str]:
    """The words by which a question is compared."""
    text = normalise(question)
    return frozenset(FRAMING.sub(" ", text).split() or text.split())


class QuestionIndex:
    """Tells of one question after the other whether it is new.

    Args:
        frequencies: How often each word occurs in all questions; it only sets the speed. Absent words count as the rarest.
        threshold: Overlap from which two questions are near duplicates, in (0, 1].
        repeats: Maximum near duplicates of each other that are kept, at least 1.
    """

    def __init__(self, frequencies: Counter[str], threshold: float = 0.8, repeats: int = 1):
        if not 0 < threshold <= 1 or repeats < 1:
            raise ValueError(f"threshold must be in (0, 1] and repeats at least 1, got {threshold} and {repeats}.")
        self.threshold, self.repeats = threshold, repeats
        ranked = sorted(frequencies, key=lambda word: (frequencies[word], word))
        self._rank = {word: rank for rank, word in enumerate(ranked, 1)}
        self._kept: list[tuple[frozenset[str], str]] = []
        self._postings: dict[str, list[int]] = {}

    def add(self, question: str, name: str = "") -> str | None:
        """Keeps a new question and returns `None`; returns the name of a kept one that it repeats once too often."""
        words = question_words(question)
        if not words:
            return None
        ordered = sorted(words, key=lambda word: (self._rank.get(word, 0), word))
        prefix = ordered[: len(words) - math.ceil(self.threshold * len(words) - 1e-9) + 1]
        candidates = {index for word in prefix for index in self._postings.get(word, ())}
        alike = sorted(index for index in candidates if self._overlap(words, self._kept[index][0]))
        if len(alike) >= self.repeats:
            return self._kept[alike[0]][1]
        for word in prefix:
            self._postings.setdefault(word, []).append(len(self._kept))
        self._kept.append((words, name))
        return None

    def _overlap(self, a: frozenset[str], b: frozenset[str]) -> bool:
        shared = len(a & b)
        return shared >= self.threshold * (len(a) + len(b) - shared) - 1e-9


def count_question_words(questions: Iterable[str]) -> Counter[str]:
    """In how many questions each word occurs."""
    return Counter(word for question in questions for word in question_words(question))
