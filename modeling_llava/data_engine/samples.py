"""The samples of a data set as they follow from the ledger: which are kept, which are left out, and why."""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..constants import IMAGE_TOKEN
from ..endpoint import Ledger
from .contexts import Context
from .near_duplicates import QuestionIndex, count_question_words
from .replies import Turn, parse_description, parse_turns
from .run import RunFolder


@dataclass
class OutputSettings:
    """How the data is written.

    Attributes:
        question_repeats: How many nearly equal questions are kept across the whole set; `None` keeps all. Descriptions
            are exempt: their questions come from a list.
        similarity: From which overlap of words on (Jaccard) questions are nearly equal.
        parquet: Whether to write the `datasets` folder, which holds the images.
        card: Whether to write the card, its plots and `summary.json`.
        drop: Ids of samples to leave out (marked in the report).
        report_samples: Samples in the HTML report; 0 writes none.
    """

    question_repeats: int | None = 1
    similarity: float = 0.8
    parquet: bool = True
    card: bool = True
    drop: frozenset[str] = frozenset()
    report_samples: int = 200


@dataclass
class Sample:
    """One conversation of the data set.

    Attributes:
        id: Its name: the context's and the type's.
        context: What the model was told.
        type: `"conversation"`, `"detail"` or `"complex"`.
        turns: Questions and answers.
        image_first: Whether the image stands before the first question (else after it; LLaVA draws the order).
    """

    id: str
    context: Context
    type: str
    turns: list[Turn]
    image_first: bool

    def llava_row(self) -> dict[str, Any]:
        """The sample as a row of LLaVA's JSON."""
        conversations = []
        for i, (question, answer) in enumerate(self.turns):
            if i == 0:
                parts = [IMAGE_TOKEN, question] if self.image_first else [question, IMAGE_TOKEN]
                question = "\n".join(parts)
            conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": self.id, "image": self.context.image, "type": self.type, "conversations": conversations}

    def messages(self) -> list[dict[str, Any]]:
        """The sample as messages of the HF form."""
        messages = []
        for i, (question, answer) in enumerate(self.turns):
            content: list[dict[str, Any]] = [{"type": "text", "text": question}]
            if i == 0:
                content.insert(0 if self.image_first else 1, {"type": "image", "text": None})
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return messages


@dataclass
class OutputSummary:
    """What was written.

    Attributes:
        samples: Samples, by type.
        turns: Pairs of question and answer, by type.
        images: Different images.
        answer_words: Histogram of the answers' words, by type: words → answers.
        near_duplicates: Turns left out because their question repeats another, by type.
        emptied: Samples left out because no turn was left.
        dropped: Samples left out by hand.
        rejected: Replies rejected, by type and reason.
        missing_images: Samples left out of the `datasets` folder because their image is gone or is none.
        fingerprint: Of the content of the `datasets` folder; empty where none was written.
        files: Files written.
        notes: What could not be written, and why.
    """

    samples: Counter = field(default_factory=Counter)
    turns: Counter = field(default_factory=Counter)
    images: int = 0
    answer_words: dict[str, Counter] = field(default_factory=dict)
    near_duplicates: Counter = field(default_factory=Counter)
    emptied: int = 0
    dropped: int = 0
    rejected: dict[str, Counter] = field(default_factory=dict)
    missing_images: int = 0
    fingerprint: str = ""
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def accepted_samples(folder: RunFolder, ledger: Ledger, limit: int | None = None) -> Iterator[Sample]:
    """The samples whose replies were accepted, in the order of the contexts, as the model wrote them."""
    seed = folder.config.seed
    for task_id, stored, kind in folder.plan(limit):
        state = ledger.state(task_id)
        if not state.accepted:
            continue
        context = stored.load()
        text = ledger.reply_at(state.replies[-1])["text"]
        if kind == "detail":
            turns = [(folder.prompts[kind].question(context, seed), parse_description(text)[0][1])]
        else:
            turns = parse_turns(text)
        yield Sample(task_id, context, kind, turns, random.Random(f"{seed}:order:{task_id}").random() < 0.5)


def kept_samples(
    folder: RunFolder,
    ledger: Ledger,
    settings: OutputSettings,
    summary: OutputSummary,
    leave_out: Callable[[dict[str, Any]], None] | None = None,
    limit: int | None = None,
) -> Iterator[Sample]:
    """The samples of the data set: accepted, not dropped by hand, without repeated questions."""
    leave_out = leave_out or (lambda row: None)
    index = None
    if settings.question_repeats is not None:
        questions = (
            question
            for sample in accepted_samples(folder, ledger, limit)
            if sample.type != "detail" and sample.id not in settings.drop
            for question, _ in sample.turns
        )
        index = QuestionIndex(count_question_words(questions), settings.similarity, settings.question_repeats)
    for sample in accepted_samples(folder, ledger, limit):
        if sample.id in settings.drop:
            summary.dropped += 1
            leave_out({"id": sample.id, "type": sample.type, "reason": "dropped_by_hand", "turns": sample.turns})
            continue
        if index is not None and sample.type != "detail":
            turns = []
            for question, answer in sample.turns:
                repeated = index.add(question, f"{sample.id}: {question}")
                if repeated is None:
                    turns.append((question, answer))
                else:
                    summary.near_duplicates[sample.type] += 1
                    row = {"id": sample.id, "type": sample.type, "reason": "near_duplicate_question"}
                    leave_out({**row, "detail": repeated, "turns": [(question, answer)]})
            if not turns:
                summary.emptied += 1
                continue
            sample.turns = turns
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
    """The file of an image; `None` if it is absent or would lie outside the image folder."""
    if PurePosixPath(name).is_absolute() or ".." in re.split(r"[/\\]", name):
        return None
    path = images / name
    return path if path.is_file() else None
