"""Finds questions that are nearly the same, across a whole data set, exactly and in memory linear in what is kept.

Two questions are near duplicates when the sets of their words overlap by `threshold` (Jaccard: shared words over all
words). Comparing each with each is avoided by prefixes: of two sets that overlap so far, the rarest few words of one
share a word with the rarest few of the other.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable

from .validate import normalise


# "What is on the table in this photo?" asks what "What is on the table?" asks.
FRAMING = re.compile(
    r"\b(?:in|of|from|on|within|throughout) "
    r"(?:the|this) (?:image|photo|photograph|picture|scene|shot)\b"
)


def question_words(question: str) -> frozenset[str]:
    """The words by which a question is compared."""
    text = normalise(question)
    return frozenset((FRAMING.sub(" ", text).split()) or text.split())


class QuestionIndex:
    """Says of one question after the other whether it is new.

    Args:
        frequencies: How often each word occurs in all questions (`count_words`); it only sets the speed. Words that are
            absent from it are taken as the rarest.
        threshold: Overlap from which two questions are near duplicates, in (0, 1].
        repeats: How many near duplicates of each other are kept.
    """

    def __init__(self, frequencies: Counter[str], threshold: float = 0.8, repeats: int = 1):
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}; an overlap is in (0, 1].")
        if repeats < 1:
            raise ValueError(f"repeats is {repeats}; at least one of near duplicates is kept.")
        self.threshold, self.repeats = threshold, repeats
        ranked = sorted(frequencies, key=lambda word: (frequencies[word], word))
        self._rank = {word: rank for rank, word in enumerate(ranked, 1)}
        self._kept: list[frozenset[str]] = []
        self._names: list[str] = []
        self._postings: dict[str, list[int]] = {}

    def add(self, question: str, name: str = "") -> str | None:
        """Keeps a new question and returns `None`; returns the name of a kept one that it repeats once too often."""
        words = question_words(question)
        if not words:
            return None
        ordered = sorted(words, key=lambda word: (self._rank.get(word, 0), word))
        prefix = ordered[: len(words) - math.ceil(self.threshold * len(words) - 1e-9) + 1]
        candidates = {index for word in prefix for index in self._postings.get(word, ())}
        alike = sorted(index for index in candidates if self._overlap(words, self._kept[index]))
        if len(alike) >= self.repeats:
            return self._names[alike[0]]
        for word in prefix:
            self._postings.setdefault(word, []).append(len(self._kept))
        self._kept.append(words)
        self._names.append(name)
        return None

    def _overlap(self, a: frozenset[str], b: frozenset[str]) -> bool:
        shared = len(a & b)
        return shared >= self.threshold * (len(a) + len(b) - shared) - 1e-9


def count_question_words(questions: Iterable[str]) -> Counter[str]:
    """In how many questions each word occurs."""
    frequencies: Counter[str] = Counter()
    for question in questions:
        frequencies.update(question_words(question))
    return frequencies
