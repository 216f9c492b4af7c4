"""The samples of a data set, as the ledger gives them: which are kept, which are left out, and why."""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..constants import IMAGE_TOKEN
from ..endpoint import Ledger
from .contexts import Context
from .prompts import draw
from .replies import Turn, parse_description, parse_turns
from .run import RunFolder
from .validate import normalise


@dataclass
class OutputSettings:
    """How the data is written."""

    question_repeats: int | None = 1  # near-duplicate questions to keep (not in descriptions); `None` keeps all
    parquet: bool = True  # whether to write the `datasets` folder, which contains the images
    card: bool = True  # whether to write the card, its plot and `summary.json`
    drop: frozenset[str] = frozenset()  # ids of samples to leave out (marked in the report)
    report_samples: int = 200  # samples in the HTML report; 0 writes none


@dataclass
class Sample:
    """One conversation of the data set."""

    id: str  # the context's and the type's
    context: Context
    type: str
    turns: list[Turn]
    image_first: bool  # whether the image comes before the first question; LLaVA draws the order

    def llava_row(self) -> dict[str, Any]:
        """The sample as a row of LLaVA's JSON."""
        (question, answer), *later = self.turns
        asked = "\n".join([IMAGE_TOKEN, question] if self.image_first else [question, IMAGE_TOKEN])
        conversations = [
            {"from": role, "value": text}
            for turn in [(asked, answer), *later]
            for role, text in zip(("human", "gpt"), turn)
        ]
        return {"id": self.id, "image": self.context.image, "type": self.type, "conversations": conversations}

    def messages(self) -> list[dict[str, Any]]:
        """The sample as messages of the HF form."""
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for turn in self.turns
            for role, text in zip(("user", "assistant"), turn)
        ]
        messages[0]["content"].insert(0 if self.image_first else 1, {"type": "image", "text": None})
        return messages


@dataclass
class OutputSummary:
    """What was written and what was left out; counters are by type of data."""

    samples: Counter = field(default_factory=Counter)
    turns: Counter = field(default_factory=Counter)  # pairs of question and answer
    images: int = 0  # different ones
    answer_words: dict[str, Counter] = field(default_factory=dict)  # words of an answer → answers
    near_duplicates: Counter = field(default_factory=Counter)  # turns whose question repeats another
    emptied: int = 0  # samples without a turn left
    dropped: int = 0  # samples left out by hand
    rejected: dict[str, Counter] = field(default_factory=dict)  # reason → replies
    missing_images: int = 0  # samples not in the `datasets` folder, their image missing or unreadable
    fingerprint: str = ""  # of the `datasets` folder; empty if none was written
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be written, and why


def accepted_samples(folder: RunFolder, ledger: Ledger, limit: int | None = None) -> Iterator[Sample]:
    """The samples whose replies were accepted, in the order of the contexts, as the model wrote them."""
    seed = folder.config.seed
    for task_id, row, kind in folder.plan(limit):
        state = ledger.state(task_id)
        if not state.accepted:
            continue
        context = Context.from_dict(row)
        text = ledger.reply_at(state.replies[-1])["text"]
        if kind == "detail":
            question = draw(folder.prompts[kind].questions, seed, context.id)
            turns = [(question, parse_description(text)[0][1])]
        else:
            turns = parse_turns(text)
        yield Sample(task_id, context, kind, turns, random.Random(f"{seed}:order:{task_id}").random() < 0.5)


def kept_samples(
    folder: RunFolder,
    ledger: Ledger,
    settings: OutputSettings,
    summary: OutputSummary | None = None,
    leave_out: Callable[[dict[str, Any]], None] = lambda row: None,
    limit: int | None = None,
) -> Iterator[Sample]:
    """The samples of the data set: accepted, not dropped by hand, without repeated questions.

    What is left out is counted in `summary`, and `leave_out` is called with a row of `rejected.jsonl` for it.
    """
    summary = summary or OutputSummary()
    index = None
    if settings.question_repeats is not None:
        questions = (
            question
            for sample in accepted_samples(folder, ledger, limit)
            if sample.type != "detail" and sample.id not in settings.drop
            for question, _ in sample.turns
        )
        index = QuestionIndex(count_question_words(questions), repeats=settings.question_repeats)
    for sample in accepted_samples(folder, ledger, limit):
        row = {"id": sample.id, "type": sample.type}
        if sample.id in settings.drop:
            summary.dropped += 1
            leave_out({**row, "reason": "dropped_by_hand", "turns": sample.turns})
            continue
        if index is not None and sample.type != "detail":
            kept = []
            for question, answer in sample.turns:
                repeated = index.add(question, f"{sample.id}: {question}")
                if repeated is None:
                    kept.append((question, answer))
                    continue
                summary.near_duplicates[sample.type] += 1
                reason = {"reason": "near_duplicate_question", "detail": repeated}
                leave_out({**row, **reason, "turns": [(question, answer)]})
            if not kept:
                summary.emptied += 1
                continue
            sample.turns = kept
        yield sample


def rejected_replies(folder: RunFolder, ledger: Ledger, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Every rejected reply, in the order of the contexts, with its reason."""
    for task_id, _, kind in folder.plan(limit):
        for position in ledger.state(task_id).replies:
            event = ledger.reply_at(position)
            if event["reason"] is not None:
                row = {"id": task_id, "type": kind, "attempt": event["attempt"], "reason": event["reason"]}
                yield {**row, "detail": event["detail"], "reply": event["text"]}


def find_image(images: Path, name: str) -> Path | None:
    """The file of an image; `None` if it is missing or would lie outside the image folder."""
    if PurePosixPath(name).is_absolute() or ".." in re.split(r"[/\\]", name):
        return None
    path = images / name
    return path if path.is_file() else None


OVERLAP = 0.8
"""Of the words of two questions (Jaccard: shared words over all words), from which they are near duplicates."""

# "What is on the table in this photo?" asks what "What is on the table?" asks.
FRAMING = re.compile(
    r"\b(?:in|of|from|on|within|throughout) (?:the|this) (?:image|photo|photograph|picture|scene|shot)\b"
)


def question_words(question: str) -> frozenset[str]:
    """The words by which a question is compared."""
    text = normalise(question)
    return frozenset(FRAMING.sub(" ", text).split() or text.split())


class QuestionIndex:
    """Says for each question, one after the other, whether it is new, exactly and without comparing all pairs: of two near
    duplicates, the rarest few words of one include one of the rarest few of the other.

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
