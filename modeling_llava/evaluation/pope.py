"""
POPE (Li et al., 2023): does the model see objects that are not there? Questions are JSONL rows `{"question_id", "image",
"text", "label": "yes" | "no"}`, one file per way in which the object is chosen: random, popular, adversarial.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from .benchmark import Benchmark, question_benchmark
from .results import Scored, id_of, read_rows, score_of, scores_by_group, text_of


CATEGORIES = ("random", "popular", "adversarial")
INSTRUCTION = "Answer the question using a single word or phrase."
"""The line that LLaVA-1.5 is given after the question."""

ANSWER_RULE = (
    "no: the first sentence has the word no or not, or a word in n't; yes: it has the word yes and none of those; anything "
    "else is unparsed and wrong"
)


def read_questions(files: Sequence[str | os.PathLike]) -> list[dict]:
    """
    The questions of all files; `category` is the row's, or the word of [`CATEGORIES`] in the file's name. A `ValueError` names
    file and row of what is missing or wrong.
    """
    questions = []
    for path in files:
        of_file = next((name for name in CATEGORIES if name in Path(path).stem.lower()), None)
        for number, (row, place) in enumerate(read_rows(path), 1):
            image, text, label = (text_of(row, key, place) for key in ("image", "text", "label"))
            category = text_of(row, "category", place) if row.get("category") else of_file
            label = label.strip().lower()
            if label not in ("yes", "no"):
                raise ValueError(f"{place} has the label {row['label']!r}; it must be yes or no.")
            if category is None:
                raise ValueError(
                    f"{place} has no category, and the file's name contains none of {', '.join(CATEGORIES)}."
                )
            name = f"{category}/{id_of(row, place) if 'question_id' in row else number}"
            questions.append({"id": name, "image": image, "text": text, "label": label, "category": category})
    return questions


def parse_yes_no(text: str) -> str | None:
    """
    `"yes"`, `"no"` or `None`, by [`ANSWER_RULE`].

    Differs from the original script, which reads everything that is not "no" as "yes".
    """
    sentence = re.split(r"[.!?\n]", text.strip().lower().replace("\u2019", "'"), maxsplit=1)[0]
    words = {word.strip("'") for word in re.findall(r"[a-z']+", sentence)}
    if words & {"no", "not"} or any(word.endswith("n't") for word in words):
        return "no"
    return "yes" if "yes" in words else None


def make_benchmark(
    questions: list[dict], image_folder: str | os.PathLike, *, instruction: str | None = INSTRUCTION, files=()
) -> Benchmark:
    """POPE as a [`Benchmark`]."""
    settings = {"instruction": instruction, "answer_rule": ANSWER_RULE}
    return question_benchmark("pope", questions, image_folder, score, files=files, **settings)


def score(questions: list[dict], answers: dict[str, str]) -> Scored:
    """
    Accuracy, precision, recall, F1 and yes-ratio (positive class "yes", in percent), for each category and over all. An
    unparsed answer is wrong and not a "yes".
    """
    rows = []
    for question in questions:
        said = parse_yes_no(answers[question["id"]])
        rows.append(
            {
                "id": question["id"],
                "question": question["text"],
                "answer": answers[question["id"]],
                "said": said,
                "expected": question["label"],
                "score": float(said == question["label"]),
                "groups": [question["category"], "all"],
            }
        )
    scores = scores_by_group(rows, (question["category"] for question in questions), _table)
    return Scored(rows, scores, "accuracy", {"unparsed": sum(row["said"] is None for row in rows)})


def _table(rows: list[dict]) -> dict[str, dict]:
    said_yes = [row for row in rows if row["said"] == "yes"]
    are_yes = [row for row in rows if row["expected"] == "yes"]
    right_yes = sum(row["expected"] == "yes" for row in said_yes)
    # F1 = 2·TP / (2·TP + FP + FN) = 2·TP / (said yes + are yes), also where precision or recall is 0 or undefined.
    both = len(said_yes) + len(are_yes)
    return {
        "accuracy": score_of([row["score"] for row in rows]),
        "precision": score_of([row["score"] for row in said_yes]),
        "recall": score_of([row["score"] for row in are_yes]),
        "f1": {"value": 200 * right_yes / both if both else None, "interval": None, "count": len(rows)},
        "yes_ratio": score_of([float(row["said"] == "yes") for row in rows]),
    }
