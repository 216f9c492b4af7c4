"""
Short answers: VQA's soft accuracy (Antol et al., 2015) over ten people's answers, and exact match where there is one.

Questions are the official pair of files (`{"questions": [{"question_id", "image_id", "question"}]}` and
`{"annotations": [{"question_id", "answers": [{"answer"}], "answer_type"}]}`), or JSONL rows `{"question_id", "image",
"question" | "text", "answers": […] | "answer", "category"}`.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence

from .benchmark import Benchmark, question_sample
from .results import Scored, hash_files, id_of, interval_of, read_json, read_jsonl, scores_by_group, text_of


INSTRUCTION = "Answer the question using a single word or phrase."
COCO_IMAGE_NAME = "COCO_val2014_{image_id:012d}.jpg"

_NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(), map(str, [0, *range(11)])))
_ARTICLES = {"a", "an", "the"}
# The official script's: a word that lacks one of these apostrophes is this word. (Its capitals, "Im", never match.)
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd've he's how'd
    how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
    'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've he'd
""".split()
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED for i, character in enumerate(word) if character == "'"
} | {"somebody'd": "somebodyd"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalise(answer: str) -> str:
    """
    The form in which answers are compared, that of the official script (`vqaEval.py`): lower case; no articles; number words
    as digits; contractions with their apostrophe. A punctuation mark is dropped everywhere if it stands beside a blank
    anywhere, or if the answer has a number like 1,000; else it becomes a blank. Dots go, but for those before a digit.

    Differs from the official script: a typographic apostrophe is an apostrophe.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").replace("\u2019", "'").strip()
    text = answer
    for mark in _PUNCTUATION:
        dropped = f"{mark} " in answer or f" {mark}" in answer or re.search(r"\d,\d", answer)
        text = text.replace(mark, "" if dropped else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(answer: str, people: Sequence[str]) -> float:
    """
    VQA's accuracy, 0 to 1: for each person, the answer is compared with the nine others and counts min(matches / 3, 1); the
    mean over the people. A single reference answer is compared by exact match.

    Differs from the official script, which leaves the people's answers as they are where all ten are the same text.
    """
    said, references = normalise(answer), [normalise(person) for person in people]
    if len(references) == 1:
        return float(said == references[0])
    matches = Counter(references)[said]
    return sum(min((matches - (reference == said)) / 3, 1.0) for reference in references) / len(references)


def read_questions(
    questions: str | os.PathLike,
    annotations: str | os.PathLike | None = None,
    image_name: str = COCO_IMAGE_NAME,
) -> list[dict]:
    """
    Questions with the people's answers: `{"id", "image", "text", "answers", "category"}`.

    Args:
        questions (`str` or `os.PathLike`): JSONL with the answers in it, or the official questions file.
        annotations (`str` or `os.PathLike`, *optional*): The official annotations, for the official questions.
        image_name (`str`): Name of the image `image_id` of the official files.

    Raises:
        ValueError: a missing or wrong field, or a question without an annotation. File and row are named.
    """
    if annotations is None:
        return [_row(row, f"{questions}, row {number},") for number, row in enumerate(read_jsonl(questions), 1)]
    answers_of = {}
    for number, row in enumerate(_official(annotations, "annotations"), 1):
        place = f"{annotations}, annotation {number},"
        answers = row.get("answers")
        if isinstance(answers, list):
            answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
        answers_of[id_of(row, place)] = {"answers": _answers(answers, row, place), "category": row.get("answer_type")}
    read = []
    for number, row in enumerate(_official(questions, "questions"), 1):
        place = f"{questions}, question {number},"
        question_id = id_of(row, place)
        if question_id not in answers_of:
            raise ValueError(f"{place} has the question_id {question_id}, which {annotations} does not have.")
        if "image_id" not in row:
            raise ValueError(f"{place} has no 'image_id'; its fields are {', '.join(row)}.")
        try:
            image = image_name.format(image_id=row["image_id"])
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{place} has the image_id {row['image_id']!r}, of which the image name {image_name!r} makes no name "
                f"({error!r}). A name is like COCO_val2014_{{image_id:012d}}.jpg."
            ) from None
        read.append(_row({**row, **answers_of[question_id], "image": image}, place))
    return read


def make_benchmark(
    questions: list[dict],
    image_folder: str | os.PathLike,
    *,
    instruction: str | None = INSTRUCTION,
    files: Sequence[str | os.PathLike] = (),
) -> Benchmark:
    """Questions with short answers as a [`Benchmark`]."""
    return Benchmark(
        name="vqa",
        samples=[question_sample(row["id"], row["image"], row["text"], instruction) for row in questions],
        score=lambda answers: score(questions, answers),
        data={"files": hash_files(files)},
        settings={"instruction": instruction},
        image_folder=os.fspath(image_folder),
        max_new_tokens=16,
    )


def score(questions: list[dict], answers: dict[str, str]) -> Scored:
    """Soft accuracy and exact match (with any of the people's answers), for each category and over all."""
    rows = []
    for question in questions:
        if question["id"] not in answers:
            continue
        text = answers[question["id"]]
        rows.append(
            {
                "id": question["id"],
                "question": question["text"],
                "answer": text,
                "expected": Counter(question["answers"]).most_common(1)[0][0],
                "score": soft_accuracy(text, question["answers"]),
                "exact": float(normalise(text) in map(normalise, question["answers"])),
                "groups": [*([question["category"]] if question["category"] else []), "all"],
            }
        )

    def table(some):
        return {
            "accuracy": interval_of([row["score"] for row in some]),
            "exact_match": interval_of([row["exact"] for row in some]),
        }

    metrics = scores_by_group(rows, (question["category"] for question in questions if question["category"]), table)
    return Scored(rows, metrics, "accuracy", {"empty": sum(not normalise(row["answer"]) for row in rows)})


def _official(path: str | os.PathLike, key: str) -> list[dict]:
    content = read_json(path)
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not an official file: it has no list {key!r} of objects.")
    return rows


def _row(row: dict, place: str) -> dict:
    category = row.get("category")
    return {
        "id": id_of(row, place),
        "image": text_of(row, "image", place),
        "text": text_of(row, "question" if "question" in row or "text" not in row else "text", place),
        "answers": _answers(row.get("answers", [row["answer"]] if "answer" in row else None), row, place),
        "category": category if category is None else text_of(row, "category", place),
    }


def _answers(answers, row: dict, place: str) -> list[str]:
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(
            f"{place} has no 'answers', a list of texts, and no 'answer', a text; its fields are {', '.join(row)}."
        )
    return answers


__all__ = ["INSTRUCTION", "make_benchmark", "normalise", "read_questions", "score", "soft_accuracy"]
