"""Finds near-duplicate questions across a whole data set, exactly, without comparing all pairs.

Two questions are near duplicates when the sets of their words overlap by `OVERLAP` (Jaccard: shared words over all words).
The rarest few words of one then include one of the rarest few of the other: only such pairs are compared.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable

from .validate import normalise


OVERLAP = 0.8
# "What is on the table in this photo?" asks what "What is on the table?" asks.
FRAMING = re.compile(
    r"\b(?:in|of|from|on|within|throughout) (?:the|this) (?:image|photo|photograph|picture|scene|shot)\b"
)


def question_words(question: str) -> frozenset[str]:
    """The words by which a question is compared."""
    text = normalise(question)
    return frozenset(FRAMING.sub(" ", text).split() or text.split())


class QuestionIndex:
    """Says for each question, one after the other, whether it is new.

    Args:
        frequencies: How often each word occurs in all questions; it only sets the speed. Absent words count as the rarest.
        repeats: Maximum near duplicates of each other that are kept, at least 1.
    """

    def __init__(self, frequencies: Counter[str], repeats: int = 1):
        self.repeats = repeats
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
        prefix = ordered[: len(words) - math.ceil(OVERLAP * len(words) - 1e-9) + 1]
        candidates = {index for word in prefix for index in self._postings.get(word, ())}
        alike = sorted(index for index in candidates if _are_alike(words, self._kept[index][0]))
        if len(alike) >= self.repeats:
            return self._kept[alike[0]][1]
        for word in prefix:
            self._postings.setdefault(word, []).append(len(self._kept))
        self._kept.append((words, name))
        return None


def _are_alike(a: frozenset[str], b: frozenset[str]) -> bool:
    return len(a & b) >= OVERLAP * len(a | b) - 1e-9


def count_question_words(questions: Iterable[str]) -> Counter[str]:
    """In how many questions each word occurs."""
    return Counter(word for question in questions for word in question_words(question))
