"""
ScienceQA (LLaVA §5.2): the official files or the Hub dataset → questions and training data; answers → the table of the paper.

Official files: `problems.json` (`{id: {question, choices, answer, hint, image, task, grade, subject, topic, category,
skill, lecture, solution, split}}`), `pid_splits.json` (`{split: [id, …]}`) and `images/<split>/<id>/image.png`.

An order is written as in the ScienceQA paper: what is given, a hyphen, what is learned. Q question, C context, M choices, A
answer, L lecture, E explanation. `QCM-LEA` reasons first, `QCM-ALE` answers first; `QCM-LEPA` is LLaVA's own form with a
heading for each part. Orders with L or E before the hyphen give away the reasons (an upper bound).

Differs from the original: its `AL` learned the explanation and its `AE` the lecture, and an answer without reasons began with a
space.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .benchmark import Benchmark
from .results import Scored, hash_files, read_json, score_of
from .scienceqa_answers import ANSWER_RULE, find_letter, parse_answer


LETTERS = "ABCDEFGHIJ"
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
DIRECT_ANSWER = "Answer with the option's letter from the given choices directly."
"""How LLaVA-1.5's evaluation of ScienceQA asks for the letter alone."""
INPUT_ORDERS = ("QCM", "CQM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")
OUTPUT_ORDERS = ("A", "AL", "AE", "ALE", "AEL", "LA", "EA", "LEA", "ELA", "LEPA")

# Published results, in percent, checked against the text of the paper.
SCIENCEQA_COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "average")
"""Subject (natural, social, language science), context (text, image, none), grade, and all questions."""

SCIENCEQA = {
    "Human": (90.23, 84.97, 87.48, 89.60, 87.50, 88.10, 91.59, 82.42, 88.40),
    "GPT-3.5": (74.64, 69.74, 76.00, 74.44, 67.28, 77.42, 76.80, 68.89, 73.97),
    "GPT-3.5 with CoT": (75.44, 70.87, 78.09, 74.68, 67.43, 79.93, 78.23, 69.68, 75.17),
    "LLaMA-Adapter": (84.37, 88.30, 84.36, 83.72, 80.32, 86.90, 85.83, 84.05, 85.19),
    "MM-CoT base": (87.52, 77.17, 85.82, 87.88, 82.90, 86.83, 84.65, 85.37, 84.91),
    "MM-CoT large": (95.91, 82.00, 90.82, 95.26, 88.80, 92.89, 92.44, 90.31, 91.68),
    "GPT-4, text only": (84.06, 73.45, 87.36, 81.87, 70.75, 90.73, 84.69, 79.10, 82.69),
    "LLaVA-13B": (90.36, 95.95, 88.00, 89.49, 88.00, 90.66, 90.93, 90.90, 90.92),
    "LLaVA-13B + GPT-4, complement": (90.36, 95.50, 88.55, 89.05, 87.80, 91.08, 92.22, 88.73, 90.97),
    "LLaVA-13B + GPT-4, judge": (91.56, 96.74, 91.09, 90.62, 88.99, 93.52, 92.73, 92.16, 92.53),
}
"""Test split. LLaVA (Liu et al., 2023), Table 7."""


@dataclass(frozen=True)
class Problem:
    """One question."""

    id: str
    split: str
    question: str
    choices: tuple[str, ...]
    answer: int  # the index of the right choice
    hint: str = ""  # the context
    image: Any = None  # a path relative to the image folder, or a `PIL.Image.Image`
    lecture: str = ""
    solution: str = ""
    subject: str = ""
    grade: int = 0

    @property
    def letter(self) -> str:
        """Of the right choice."""
        return LETTERS[self.answer]


def read_problems(
    problems: str | os.PathLike, splits: str | os.PathLike, split: str, images: str | os.PathLike | None = None
) -> list[Problem]:
    """
    The problems of one split (`train`, `val`, `test`, `minival`, …), in its order. `images` is a folder with
    `<split>/<id>/image.png` or `<id>/image.png`; without it images keep the official path. Errors name file and problem.
    """
    by_id, split_ids = read_json(problems), read_json(splits)
    if not isinstance(split_ids, dict) or not all(isinstance(ids, list) for ids in split_ids.values()):
        raise ValueError(f"{splits} is not a splits file: it must be {{split: [id, …]}}.")
    if not isinstance(by_id, dict) or not all(isinstance(row, dict) for row in by_id.values()):
        raise ValueError(f"{problems} is not a problems file: it must be {{id: {{question, choices, answer, …}}}}.")
    if split not in split_ids:
        raise ValueError(f"{splits} has no split {split!r}; it has {', '.join(sorted(split_ids))}.")
    ids = [str(problem_id) for problem_id in split_ids[split]]
    unknown = [problem_id for problem_id in ids if problem_id not in by_id]
    if unknown:
        raise ValueError(
            f"{splits}: {len(unknown)} of {len(ids)} problems of the split {split!r} are not in {problems}, "
            f"such as {unknown[0]!r}. Do the two files belong together?"
        )
    read = [_problem(problem_id, by_id[problem_id], os.fspath(problems)) for problem_id in ids]
    return read if images is None else _with_image_paths(read, Path(images))


def read_hub_problems(rows: Iterable[dict], split: str) -> list[Problem]:
    """The problems of a `datasets` split in the form of the Hub's ScienceQA; ids are `split-number`."""
    return [_problem(f"{split}-{number}", {"split": split, **row}, "the dataset") for number, row in enumerate(rows)]


def question_text(problem: Problem, order: str = "QCM") -> str:
    """
    What is asked: question (Q), context (C) and choices (M) in this order, a line each; L and E give away the reasons.

        Which figure of speech is used in this text?
        Context: Sing, O goddess, the anger of Achilles …
        Options: (A) chiasmus (B) apostrophe
    """
    choices = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem.choices))
    parts = {
        "Q": f"Question: {problem.question}",
        "C": f"Context: {problem.hint.strip() or 'N/A'}",
        "M": f"Options: {choices}",
    }
    reasons = reasons_of(problem)
    lines = [
        parts.get(part) or "BECAUSE: " + " ".join(reasons[letter] for letter in part)
        for part in re.findall("[LE]+|[QCM]", order)
    ]
    text = single_spaced("\n".join(lines)).removesuffix("BECAUSE:").strip()
    return text.removeprefix("Question: ")


def direct_question(problem: Problem) -> str:
    """What LLaVA-1.5 is asked: the context if there is one, the question, a choice per line ("A. …"), and the instruction."""
    context = [f"Context: {problem.hint.strip()}"] if problem.hint.strip() else []
    choices = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, problem.choices)]
    return single_spaced("\n".join([*context, problem.question, *choices, DIRECT_ANSWER]))


def reasons_of(problem: Problem) -> dict[str, str]:
    """Lecture (L) and explanation (E). Some line breaks of the official file are a backslash and an n."""
    return {"L": problem.lecture.replace("\\n", "\n"), "E": problem.solution.replace("\\n", "\n")}


def single_spaced(text: str) -> str:
    """Pairs of spaces become one space and the ends are stripped, as in the original's training data."""
    return text.replace("  ", " ").strip()


def split_order(order: str) -> tuple[str, str]:
    """`"QCM-LEA"` → (`"QCM"`, `"LEA"`); a `ValueError` if it is not a published order."""
    given, _, learned = order.partition("-")
    if given not in INPUT_ORDERS or learned not in OUTPUT_ORDERS:
        raise ValueError(
            f"The order {order!r} is not known. Before the hyphen: {', '.join(INPUT_ORDERS)}; after it: "
            f"{', '.join(OUTPUT_ORDERS)}; such as QCM-LEA (reasoning first) or QCM-ALE (answer first)."
        )
    return given, learned


def answer_text(problem: Problem, order: str = "LEA") -> str:
    """
    What is learned: "The answer is X." with lecture and explanation before it, or after it and "BECAUSE:".

        LEPA    LECTURE: …
                SOLUTION: …
                ###
                ANSWER: X.
    """
    reasons = reasons_of(problem)
    if order == "LEPA":
        headings = {"LECTURE": reasons["L"], "SOLUTION": reasons["E"]}
        lines = [f"{heading}: {text}\n" for heading, text in headings.items() if text.strip()]
        return single_spaced(f"{''.join(lines)}###\nANSWER: {problem.letter}.")
    statement = f"The answer is {problem.letter}."
    if order.startswith("A"):
        text = f"{statement} BECAUSE: {' '.join(reasons[letter] for letter in order[1:])}" if order[1:] else statement
        return single_spaced(text).removesuffix("BECAUSE:").strip()
    return single_spaced(" ".join([*(reasons[letter] for letter in order[:-1]), statement]))


def to_llava_rows(problems: Iterable[Problem], order: str) -> Iterator[dict]:
    """Rows of LLaVA's JSON; image paths are relative to the image folder."""
    given, learned = split_order(order)
    for problem in problems:
        row: dict = {"id": problem.id}
        question = question_text(problem, given)
        if problem.image is not None:
            row["image"] = problem.image
            question = f"{question}\n<image>"
        row["conversations"] = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": answer_text(problem, learned)},
        ]
        yield row


def to_sample(problem: Problem, order: str = "QCM", direct: bool = False) -> dict:
    """A problem as the predictor takes it; `direct` asks [`direct_question`], whatever the order."""
    text = direct_question(problem) if direct else question_text(problem, order)
    images = [] if problem.image is None else [problem.image]
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    return {"id": problem.id, "messages": [{"role": "user", "content": content}], "images": images}


def columns_of(problem: Problem) -> list[str]:
    """The columns of the paper's table that a problem counts in; with a hint and an image, both TXT and IMG."""
    columns = [SUBJECTS[problem.subject]] if problem.subject in SUBJECTS else []
    columns += ["TXT"] if problem.hint.strip() else []
    columns += ["IMG"] if problem.image is not None else []
    columns += ["NO"] if not problem.hint.strip() and problem.image is None else []
    columns += ["G1-6"] if 1 <= problem.grade <= 6 else ["G7-12"] if 7 <= problem.grade <= 12 else []
    return [*columns, "average"]


def score(problems: list[Problem], answers: dict[str, str]) -> Scored:
    """Accuracy in every column. An answer that names no choice, or one that does not exist, is wrong and counted."""
    rows = []
    for problem in problems:
        text = answers[problem.id]
        letter, choice = find_letter(text), parse_answer(text, len(problem.choices))
        rows.append(
            {
                "id": problem.id,
                "question": question_text(problem),
                "answer": text,
                "choice": choice,
                "expected": problem.answer,
                "score": float(choice == problem.answer),
                "status": "read" if choice is not None else "unparsed" if letter is None else "invalid_letter",
                "groups": columns_of(problem),
            }
        )
    scores = {}
    for column in SCIENCEQA_COLUMNS:
        name = "accuracy" if column == "average" else f"accuracy/{column}"
        scores[name] = score_of([row["score"] for row in rows if column in row["groups"]])
    statuses = [row["status"] for row in rows]
    counts = {status: statuses.count(status) for status in ("unparsed", "invalid_letter")}
    return Scored(rows, scores, "accuracy", counts)


def make_benchmark(
    problems: list[Problem],
    *,
    image_folder: str | os.PathLike | None = None,
    order: str = "QCM",
    direct: bool = False,
    files: Iterable[str | os.PathLike] = (),
) -> Benchmark:
    """ScienceQA over `problems`, which were read from `files`; asked in an order or by [`direct_question`]."""
    return Benchmark(
        name="scienceqa",
        samples=[to_sample(problem, order, direct) for problem in problems],
        score=lambda answers: score([problem for problem in problems if problem.id in answers], answers),
        data={"files": hash_files(files), "split": ", ".join(sorted({problem.split for problem in problems}))},
        settings={"order": "direct" if direct else order, "answer_rule": ANSWER_RULE},
        image_folder=None if image_folder is None else os.fspath(image_folder),
        max_new_tokens=16 if direct else 1024,
    )


def _problem(problem_id: str, row: dict, source: str) -> Problem:
    choices, answer, grade = row.get("choices"), row.get("answer"), row.get("grade") or ""
    texts = {name: row.get(name) or "" for name in ("question", "hint", "lecture", "solution", "subject")}
    has_choices = isinstance(choices, (list, tuple)) and all(isinstance(choice, str) for choice in choices)
    number = re.fullmatch(r"(?:grade\s*(\d+))?", grade) if isinstance(grade, str) else None
    is_right = {
        "choices": has_choices and 2 <= len(choices) <= len(LETTERS),
        "answer": has_choices and isinstance(answer, int) and answer in range(len(choices)),
        "grade": number is not None,
        **{name: isinstance(text, str) for name, text in texts.items()},
        "question": isinstance(texts["question"], str) and texts["question"].strip(),
    }
    for name, right in is_right.items():
        if not right:
            raise ValueError(
                f"{source}: problem {problem_id!r} has {name} = {row.get(name)!r}. 'choices' are 2 to {len(LETTERS)} texts, "
                "'answer' is the number of the right one (from 0), 'grade' is like 'grade7', the rest is text."
            )
    split, image = str(row.get("split") or ""), row.get("image")
    if isinstance(image, str) and image:
        image = "/".join(filter(None, (split, problem_id, image)))
    grade = int(number[1] or 0)
    return Problem(problem_id, split, choices=tuple(choices), answer=answer, image=image or None, grade=grade, **texts)


def _with_image_paths(problems: list[Problem], folder: Path) -> list[Problem]:
    """The same problems; images are looked up as `<split>/<id>/<name>`, then as `<id>/<name>`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"The image folder {folder} does not exist.")
    found, missing = [], []
    for problem in problems:
        if isinstance(problem.image, str):
            names = (problem.image, problem.image.removeprefix(f"{problem.split}/"))
            path = next((name for name in names if (folder / name).is_file()), None)
            missing += [problem.image] if path is None else []
            problem = replace(problem, image=path)
        found.append(problem)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} images are not in {folder}, such as {missing[0]!r}. The official layout is "
            "<split>/<id>/image.png; unpack all of train.zip, val.zip and test.zip there."
        )
    return found
