"""
ScienceQA: the official files or the Hub dataset → questions, and answers → the table of LLaVA's §5.2 (Table 7).

Official files: `problems.json` (`{id: {question, choices, answer, hint, image, task, grade, subject, topic, category,
skill, lecture, solution, split}}`), `pid_splits.json` (`{split: [id, …]}`) and `images/<split>/<id>/image.png`.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .benchmark import Benchmark
from .published import SCIENCEQA_COLUMNS
from .results import Scored, hash_files, interval_of, read_json
from .scienceqa_answers import ANSWER_RULE, find_letter


LETTERS = "ABCDEFGHIJ"
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
NO_CONTEXT = "N/A"
DIRECT_ANSWER = "Answer with the option's letter from the given choices directly."
"""How LLaVA-1.5's evaluation of ScienceQA asks for the letter alone."""


@dataclass(frozen=True)
class Problem:
    """
    One question.

    Attributes:
        id (`str`), split (`str`)
        question, hint, lecture, solution (`str`): Text; all but the question may be empty. The hint is the context.
        choices (`tuple[str, ...]`), answer (`int`): The right choice is `choices[answer]`.
        image: A path relative to the image folder, a picture, or `None`.
        subject (`str`), grade (`int`)
    """

    id: str
    split: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str = ""
    image: Any = None
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
    The problems of one split, in its order.

    Args:
        problems, splits (`str` or `os.PathLike`): `problems.json`, `pid_splits.json`.
        split (`str`): `train`, `val`, `test`, `minival`, `minitest`, … as the splits file names them.
        images (`str` or `os.PathLike`, *optional*):
            Folder with `<split>/<id>/image.png`, or with `<id>/image.png`. Without it images keep the official path.

    Raises:
        ValueError: a file that is not of its form, an unknown split, a split that names an unknown problem, a problem
            with a missing or wrong field. Each names the file and the problem.
        FileNotFoundError: a file or, all at once, images that are not there.
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
            f"{splits}: the split {split!r} names {len(unknown)} of {len(ids)} problems that {problems} does not have, "
            f"the first being {unknown[0]!r}. Do the two files belong together?"
        )
    if len(set(ids)) < len(ids):
        twice = next(problem_id for problem_id in ids if ids.count(problem_id) > 1)
        raise ValueError(f"{splits}: the split {split!r} names the problem {twice!r} more than once.")
    read = [_problem(problem_id, by_id[problem_id], os.fspath(problems)) for problem_id in ids]
    return read if images is None else _with_image_paths(read, Path(images))


def read_hub_problems(rows: Iterable[dict], split: str) -> list[Problem]:
    """The problems of a `datasets` split in the form of the Hub's ScienceQA; ids are `split-number`."""
    return [_problem(f"{split}-{number}", {"split": split, **row}, "the dataset") for number, row in enumerate(rows)]


def parse_answer(text: str, num_choices: int) -> int | None:
    """
    The choice that an answer names, or `None` if it names none, several, or one that does not exist.

    The rule, the first that applies:

    1. "The answer is X" anywhere, or a line "Answer: X" or "Answer: X. …". Several such statements must name the same
       letter, and none may name two ("B or C"). The letter may stand in brackets, quotes, backticks or asterisks and is
       followed by the end, a line break, a punctuation mark or "because"; a letter other than A and I also by a blank
       ("The answer is a dog" names no choice).
    2. The whole answer, or its first line, is a letter: "B", "(B)", "B.".
    3. It begins with a letter and a mark: "B. Ohio", "(B) Ohio", "B: Ohio"; also after "Answer:" or "Option". A list of
       choices ("A. … B. …", a line each, or "(A) … (B) …") names none of them.

    Differs from the original, which read "X. …" at the beginning before (1), took "The answer is Apple" for A and
    "The answer is B or C" for B, knew no other spelling, and drew a choice by chance where it read none (in later versions:
    counted it among the wrong ones without a word).

    Args:
        text (`str`): The answer.
        num_choices (`int`): Choices of the question.

    Returns:
        `int | None`: index of the choice, from 0.
    """
    letter = find_letter(text)
    choice = num_choices if letter is None else ord(letter) - ord("A")
    return choice if choice < num_choices else None


def question_text(problem: Problem, order: str = "QCM") -> str:
    """
    What is asked: question (Q), context (C) and choices (M) in this order, each on a line of its own. An L or E gives away
    the lecture or the explanation (the upper bounds of the ScienceQA paper).

        Which figure of speech is used in this text?
        Context: Sing, O goddess, the anger of Achilles …
        Options: (A) chiasmus (B) apostrophe
    """
    choices = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem.choices))
    parts = {
        "Q": f"Question: {problem.question}",
        "C": f"Context: {problem.hint.strip() or NO_CONTEXT}",
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
    """
    What LLaVA-1.5 is asked: the context where there is one, the question, a choice a line, and the instruction.

        Context: Sing, O goddess, the anger of Achilles …
        Which figure of speech is used in this text?
        A. chiasmus
        B. apostrophe
        Answer with the option's letter from the given choices directly.
    """
    context = [f"Context: {problem.hint.strip()}"] if problem.hint.strip() else []
    choices = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, problem.choices)]
    return single_spaced("\n".join([*context, problem.question, *choices, DIRECT_ANSWER]))


def reasons_of(problem: Problem) -> dict[str, str]:
    """Lecture (L) and explanation (E). Some line breaks of the official file are a backslash and an n."""
    return {"L": problem.lecture.replace("\\n", "\n"), "E": problem.solution.replace("\\n", "\n")}


def single_spaced(text: str) -> str:
    """Two blanks become one and the ends are stripped, as in the original's training data."""
    return text.replace("  ", " ").strip()


def to_sample(problem: Problem, order: str = "QCM", direct: bool = False) -> dict:
    """A problem as the predictor takes it; `direct` as in [`direct_question`], whatever the order."""
    text = direct_question(problem) if direct else question_text(problem, order)
    images = [] if problem.image is None else [problem.image]
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    return {"id": problem.id, "messages": [{"role": "user", "content": content}], "images": images}


def columns_of(problem: Problem) -> list[str]:
    """The columns of the paper's table that a problem counts in. With a hint and an image it counts in TXT and IMG."""
    columns = [SUBJECTS[problem.subject]] if problem.subject in SUBJECTS else []
    columns += ["TXT"] if problem.hint.strip() else []
    columns += ["IMG"] if problem.image is not None else []
    columns += ["NO"] if not problem.hint.strip() and problem.image is None else []
    columns += ["G1-6"] if 1 <= problem.grade <= 6 else ["G7-12"] if 7 <= problem.grade <= 12 else []
    return [*columns, "average"]


def score(problems: list[Problem], answers: dict[str, str]) -> Scored:
    """
    Accuracy in every column, over the problems that have an answer.

    An answer that cannot be read, or names a choice that does not exist, is wrong; both are counted apart
    (`counts["unparsed"]`, `counts["invalid_letter"]`).
    """
    rows = []
    for problem in problems:
        if problem.id not in answers:
            continue
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
    return tabulate(rows)


def make_benchmark(
    problems: list[Problem],
    *,
    image_folder: str | os.PathLike | None = None,
    order: str = "QCM",
    direct: bool = False,
    files: Iterable[str | os.PathLike] = (),
) -> Benchmark:
    """ScienceQA over `problems`, asked in an order or as [`direct_question`]. `files` are those that they were read from."""
    return Benchmark(
        name="scienceqa",
        samples=[to_sample(problem, order, direct) for problem in problems],
        score=lambda answers: score(problems, answers),
        data={
            "files": hash_files(files),
            "split": ", ".join(sorted({problem.split for problem in problems})),
        },
        settings={"order": "direct" if direct else order, "answer_rule": ANSWER_RULE},
        image_folder=None if image_folder is None else os.fspath(image_folder),
        max_new_tokens=16 if direct else 1024,
    )


def tabulate(rows: list[dict]) -> Scored:
    """The table over per-sample rows that have `score` and `groups`."""
    metrics = {}
    for column in SCIENCEQA_COLUMNS:
        scores = [row["score"] for row in rows if column in row["groups"]]
        name = "accuracy" if column == "average" else f"accuracy/{column}"
        metrics[name] = interval_of(scores)
    statuses = [row["status"] for row in rows]
    counts = {status: statuses.count(status) for status in ("unparsed", "invalid_letter")}
    return Scored(rows, metrics, "accuracy", counts)


def _problem(problem_id: str, row: dict, source: str) -> Problem:
    def wrong(what: str) -> ValueError:
        return ValueError(f"{source}: problem {problem_id!r} {what}.")

    missing = [name for name in ("question", "choices", "answer") if name not in row]
    if missing:
        raise wrong(f"has no {', '.join(missing)}; its fields are {', '.join(row)}")
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, (list, tuple)) or not all(isinstance(choice, str) for choice in choices):
        raise wrong(f"has choices that are not a list of strings: {choices!r}")
    if not 2 <= len(choices) <= len(LETTERS):
        raise wrong(f"has {len(choices)} choices; 2 to {len(LETTERS)} are possible")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise wrong(
            f"has the answer {answer!r}, which is not the number of one of its {len(choices)} choices (from 0)"
        )
    texts = {name: row.get(name) or "" for name in ("question", "hint", "lecture", "solution", "subject", "grade")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise wrong(f"has a {name} that is not text: {text!r}")
    grade = texts.pop("grade")
    number = re.fullmatch(r"grade\s*(\d+)", grade)
    if grade and number is None:
        raise wrong(f"has the grade {grade!r}; it should be like 'grade7'")
    split, image = str(row.get("split") or ""), row.get("image")
    if isinstance(image, str):
        image = f"{split}/{problem_id}/{image}" if split else f"{problem_id}/{image}"
    return Problem(
        id=problem_id,
        split=split,
        choices=tuple(choices),
        answer=answer,
        image=image or None,
        grade=int(number[1]) if number else 0,
        **texts,
    )


def _with_image_paths(problems: list[Problem], folder: Path) -> list[Problem]:
    """The same problems; images are looked up as `<split>/<id>/<name>`, then as `<id>/<name>`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"The image folder {folder} is not there.")
    found, missing = [], []
    for problem in problems:
        if isinstance(problem.image, str):
            short = problem.image.removeprefix(f"{problem.split}/")
            path = next((name for name in (problem.image, short) if (folder / name).is_file()), None)
            if path is None:
                missing.append(problem.image)
            problem = Problem(**{**problem.__dict__, "image": path})
        found.append(problem)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the images are not in {folder}, the first being {missing[0]!r}. The official layout is "
            "<split>/<id>/image.png; unpack all of train.zip, val.zip and test.zip there."
        )
    return found


__all__ = [
    "Problem",
    "columns_of",
    "direct_question",
    "find_letter",
    "make_benchmark",
    "parse_answer",
    "question_text",
    "read_hub_problems",
    "read_problems",
    "reasons_of",
    "score",
    "to_sample",
]
