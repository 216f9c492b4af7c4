"""
LLaVA-Bench (COCO) and (In-the-Wild), LLaVA §5.1: a judge scores a LLaVA's answers and those of a language-only model that is
given a text in place of the image. Reported is the relative score, 100 · Σ own / Σ reference.

    questions    {"question_id", "image", "category": "conv" | "detail" | "complex", "text"}
    contexts     {"image", "captions": […], "instances": [{"category", "bbox"}]}    (COCO)
                 {"image", "caption"}, a text or a list of texts                      (In-the-Wild)
    references   {"question_id", "text"}

All are JSONL.
"""

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..endpoint import ChatModel, Task
from .benchmark import Benchmark, question_sample
from .judge import Asked, accept_review, accept_text, ask_all, parse_scores, review_task, rule_for, rules_hash
from .results import Scored, fields_of, hash_files, id_of, read_rows, score_of, text_of


REFERENCE_INSTRUCTION = (
    "You are shown a picture by a text that stands for it: sentences that describe it and, where they are given, the objects "
    "in it with their places as (left, top, right, bottom), in fractions of its width and height. Answer the user's question "
    "as if you saw the picture itself; do not mention the text."
)
REFERENCE, SWAPPED = "reference first", "reference second"

# Published results, in percent, checked against the text of the paper.
LLAVA_BENCH_COLUMNS = ("conv", "detail", "complex", "all")

LLAVA_BENCH_COCO = {
    "LLaVA-13B": (83.1, 75.3, 96.5, 85.1),
    "detail and complex only": (81.5, 73.3, 90.8, 81.9),
    "conversation only": (76.5, 59.8, 84.9, 73.8),
    "no instruction tuning": (22.0, 24.0, 18.5, 21.5),
}
"""Relative to text-only GPT-4, which saw captions and boxes; judge: GPT-4 (March 2023). LLaVA, Table 4."""

LLAVA_BENCH_WILD = {
    "OpenFlamingo": (19.3, 19.0, 19.1, 19.1),
    "BLIP-2": (54.6, 29.1, 32.9, 38.1),
    "LLaVA-13B": (57.3, 52.5, 81.7, 67.3),
}
"""Means of three runs. LLaVA, Table 5."""


@dataclass(frozen=True)
class Question:
    """One question, the text that describes its image to the judge, and the reference answer."""

    id: str
    image: str
    category: str
    text: str
    context: str  # the image in words
    has_boxes: bool  # whether the context has boxes (COCO)
    reference: str | None = None  # the language-only model's answer


def read_questions(
    questions: str | os.PathLike,
    contexts: str | os.PathLike,
    references: str | os.PathLike | None = None,
    image_folder: str | os.PathLike | None = None,
) -> list[Question]:
    """
    Reads the three files and joins them; without `references` see [`ask_references`]. In `image_folder` images may have COCO's
    names (`COCO_val2014_000000460149.jpg`). A `ValueError` names file and row of what is missing or wrong.
    """
    context_of = {text_of(row, "image", place): _context(row, place) for row, place in read_rows(contexts)}
    reference_of: dict[str, str] = {}
    for row, place in read_rows(references) if references is not None else ():
        question_id, text = id_of(row, place), text_of(row, "text", place)
        if reference_of.setdefault(question_id, text) != text:
            raise ValueError(f"{place} has another answer to question_id {question_id} than an earlier row.")
    read: dict[str, Question] = {}
    for row, place in read_rows(questions):
        question_id = id_of(row, place)
        image, category, text = (text_of(row, key, place) for key in ("image", "category", "text"))
        if image not in context_of:
            raise ValueError(f"{place} has the image {image!r}, for which {contexts} has no context.")
        if references is not None and question_id not in reference_of:
            raise ValueError(f"{place} has the question_id {question_id}, for which {references} has no answer.")
        if question_id in read:
            raise ValueError(f"{place} has the question_id {question_id} of an earlier row.")
        context, has_boxes = context_of[image]
        coco_name = f"COCO_val2014_{image}"
        if image_folder is not None and not (Path(image_folder) / image).is_file():
            image = coco_name if (Path(image_folder) / coco_name).is_file() else image
        reference = reference_of.get(question_id)
        read[question_id] = Question(question_id, image, category, text, context, has_boxes, reference)
    return list(read.values())


def ask_references(
    questions: Sequence[Question],
    model: ChatModel,
    folder: Path,
    *,
    max_tokens: int = 1024,
    partial: bool = False,
    **asking: Any,
) -> list[Question]:
    """
    The questions with the answers of a language-only model, which is given captions and boxes in place of the image. A question
    without a reply raises ([`Asked.require_all`]); with `partial` its reference is `None`, as it is after two empty replies.
    `asking`: options of [`ask_all`].
    """
    tasks, system = [], {"role": "system", "content": REFERENCE_INSTRUCTION}
    for question in questions:
        messages = [system, {"role": "user", "content": f"{question.context}\n\n{question.text}"}]
        tasks.append(Task(question.id, messages, max_tokens, temperature=0.0))
    asked = ask_all(tasks, model, folder, "references", accept=accept_text, **asking)
    asked.require_all(len(tasks), "questions", folder, partial=partial)
    return [replace(question, reference=asked.replies.get(question.id)) for question in questions]


def make_benchmark(
    questions: list[Question],
    image_folder: str | os.PathLike,
    score: Callable[[dict[str, str]], Scored],
    files: Sequence[str | os.PathLike] = (),
) -> Benchmark:
    """The questions as a [`Benchmark`]; `score` asks the judge."""
    return Benchmark(
        name="llava-bench-coco" if any(question.has_boxes for question in questions) else "llava-bench-in-the-wild",
        samples=[question_sample(question.id, question.image, question.text) for question in questions],
        score=score,
        data={"files": hash_files(files)},
        image_folder=os.fspath(image_folder),
        max_new_tokens=1024,
    )


@dataclass(frozen=True)
class JudgeSettings:
    """How answers are judged."""

    rules: dict  # from `read_rules`
    # Judge each pair a second time with the answers swapped, and take the mean: judges prefer one side. Published results
    # have the reference first only.
    both_orders: bool = False
    repeats: int = 1  # how often everything is judged; the spread is reported
    temperature: float | None = 0.2  # as in the published evaluation; `None`: the endpoint's default
    max_tokens: int = 1024  # of a review

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {self.repeats}.")

    @property
    def orders(self) -> tuple[str, ...]:
        return (REFERENCE, SWAPPED) if self.both_orders else (REFERENCE,)


@dataclass
class Reviews:
    """The judge's reviews, by [`review_id`]."""

    asked: Asked
    texts: dict[str, str] = field(default_factory=dict)  # also those without scores
    pairs: dict[str, tuple[float, float]] = field(default_factory=dict)  # (reference, own)


def review_id(question: Question, repeat: int, order: str) -> str:
    """The name of one review of a question."""
    return f"{question.id}/{repeat}/{order}"


def judge_answers(
    questions: Sequence[Question],
    answers: dict[str, str],
    judge: ChatModel,
    folder: Path,
    how: JudgeSettings,
    *,
    partial: bool = False,
    **asking: Any,
) -> Reviews:
    """Has every answered question with a reference reviewed; resumes. `partial` and `asking` as in [`ask_references`]."""
    tasks = []
    for question in questions:
        if question.id not in answers or question.reference is None:
            continue
        rule = rule_for(how.rules, question.category, question.has_boxes)
        for repeat in range(how.repeats):
            # The seed makes repeats different requests, which a caching endpoint answers one by one.
            sampling = {"temperature": how.temperature, "seed": repeat, "max_tokens": how.max_tokens}
            for order in how.orders:
                texts = [question.reference, answers[question.id]]
                texts = texts[::-1] if order == SWAPPED else texts
                name = review_id(question, repeat, order)
                tasks.append(review_task(name, question.text, question.context, *texts, rule, **sampling))
    asked = ask_all(tasks, judge, folder, "reviews", accept=accept_review, **asking)
    asked.require_all(len(tasks), "reviews", folder, refused=False, partial=partial)
    reviews = Reviews(asked, {**asked.replies, **asked.rejected})
    for name, text in reviews.texts.items():
        if (pair := parse_scores(text)) is not None:
            reviews.pairs[name] = pair[::-1] if name.endswith(SWAPPED) else pair
    return reviews


def score(
    questions: Sequence[Question], answers: dict[str, str], reviews: Reviews, judge: ChatModel, how: JudgeSettings
) -> Scored:
    """Relative scores by category and over all. With both orders a repeat counts for a question only if both have scores."""
    rows, per_repeat = [], [[] for _ in range(how.repeats)]
    for question in questions:
        if question.id not in answers:
            continue
        valid = []
        for repeat in range(how.repeats):
            pairs = [reviews.pairs.get(review_id(question, repeat, order)) for order in how.orders]
            if None not in pairs:
                valid.append(tuple(statistics.fmean(side) for side in zip(*pairs)))
                per_repeat[repeat].append((question.category, *valid[-1]))
        reference, own = [statistics.fmean(side) for side in zip(*valid)] if valid else (None, None)
        rows.append(
            {
                "id": question.id,
                "image": question.image,
                "category": question.category,
                "question": question.text,
                "answer": answers[question.id],
                "reference": question.reference,
                "score": own,
                "out_of": reference,
                "reviews": [
                    {"repeat": repeat, "order": order, "text": reviews.texts.get(review_id(question, repeat, order))}
                    for repeat in range(how.repeats)
                    for order in how.orders
                ],
                "groups": [question.category, "all"],
            }
        )
    scores = {}
    for category in [*dict.fromkeys(question.category for question in questions), "all"]:
        counted = [row for row in rows if category in row["groups"] and row["score"] is not None]
        name = "relative" if category == "all" else f"relative/{category}"
        scores[name] = score_of([row["score"] for row in counted], [row["out_of"] for row in counted])
        scores[name] |= _spread([[p for p in pairs if category in (p[0], "all")] for pairs in per_repeat])
    expected = sum(question.id in answers for question in questions) * how.repeats * len(how.orders)
    counts = {
        "reviews": expected,
        "reviews_with_scores": len(reviews.pairs),
        "reviews_without_scores": len(reviews.texts) - len(reviews.pairs),
        "reviews_without_reply": expected - len(reviews.texts),
        "questions_without_score": sum(row["score"] is None for row in rows),
    }
    described = {
        "name": judge.name,
        "answered_by": sorted(reviews.asked.models),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "prompt_hash": rules_hash(how.rules),
        "both_orders": how.both_orders,
        "repeats": how.repeats,
        "temperature": None if "temperature" in reviews.asked.left_out else how.temperature,
    }
    return Scored(rows, scores, "relative", counts, {"judge": described})


def _spread(repeats: list[list[tuple[str, float, float]]]) -> dict:
    """Mean and standard deviation of the relative score over the repeats; nothing for a single one."""
    values = [100 * sum(p[2] for p in pairs) / sum(p[1] for p in pairs) for pairs in repeats if pairs]
    if len(values) < 2:
        return {}
    return {"repeats": values, "repeat_mean": statistics.fmean(values), "repeat_std": statistics.stdev(values)}


def _context(row: dict, place: str) -> tuple[str, bool]:
    """The text that describes an image, and whether it has boxes."""
    key = "caption" if "caption" in row else "captions"
    captions, instances = row.get(key), row.get("instances")
    captions = [captions] if key == "caption" and isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(
            f"{place} has neither 'caption' nor 'captions', a list of texts; its fields are {fields_of(row)}."
        )
    if key == "caption":
        return "\n".join(captions), False
    try:
        boxes = [f"{instance['category']}: {list(instance['bbox'])}" for instance in instances or []]
    except (KeyError, TypeError):
        raise ValueError(f"{place} has instances that are not of the form {{'category', 'bbox'}}.") from None
    return "\n".join(captions) + "\n\n" + "\n".join(boxes), True
