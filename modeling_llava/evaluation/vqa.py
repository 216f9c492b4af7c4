"""
Short answers: VQA's soft accuracy (Antol et al., 2015) over ten people's answers, and exact match where there is one.

Questions are JSONL rows `{"question_id", "image", "question" | "text", "answers": […] | "answer", "category"}` or official
files: of VQAv2 and OK-VQA the pair `{"questions": [{"question_id", "image_id", "question"}]}` and `{"annotations":
[{"question_id", "answers": [{"answer"}], "answer_type"}]}`, of TextVQA `{"data": [{"question_id", "image_id", …}]}`, of GQA
`{question_id: {"imageId", "question", "answer"}}`, of VizWiz `[{"image", "question", "answers": [{"answer"}]}]`. Questions of
one form and answers (`annotations`) of another are joined by their `question_id`; LLaVA's own questions of TextVQA, which are
named by their image, by image and question.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from .benchmark import Benchmark, question_benchmark
from .results import Scored, fields_of, id_of, read_json, read_rows, score_of, scores_by_group, text_of


INSTRUCTION = "Answer the question using a single word or phrase."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
"""The line that LLaVA-1.5 is asked before the instruction where a question may have no answer (VizWiz)."""
COCO_IMAGE_NAME = "COCO_val2014_{image_id:0>12}.jpg"

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
    The form in which answers are compared, that of the official script (`vqaEval.py`): lower case, no articles, number words as
    digits, contractions with their apostrophe. A punctuation mark is removed if it is next to a space anywhere, or if the
    answer has a number like 1,000; otherwise it becomes a space. Dots are removed, except before a digit.

    Differs from the official script: a typographic apostrophe counts as an apostrophe.
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
    VQA's accuracy, 0 to 1: the mean over the people of min(matches with the nine others / 3, 1). A single reference answer is
    compared by exact match.

    Differs from the official script, which does not normalise the people's answers if all ten are equal.
    """
    said, references = normalise(answer), [normalise(person) for person in people]
    if len(references) == 1:
        return float(said == references[0])
    matches = Counter(references)[said]
    return sum(min((matches - (reference == said)) / 3, 1.0) for reference in references) / len(references)


def read_questions(
    questions: str | os.PathLike,
    annotations: str | os.PathLike | None = None,
    image_name: str | None = None,
) -> list[dict]:
    """
    Questions with the people's answers: `{"id", "image", "text", "answers", "category"}`. `annotations` has the answers if they
    are not with the questions; `image_name` is that of an `image_id`, by default COCO's (val2014) for VQAv2, else
    `{image_id}.jpg`. A `ValueError` names file and row of what is missing or wrong.
    """
    read = _rows(questions, image_name)
    if annotations is not None:
        answers_of, id_at = {}, {}
        for row, place in _rows(annotations, image_name):
            question_id = id_of(row, place)
            answers_of[question_id] = {"answers": _answers(row, place), "answer_type": row.get("answer_type")}
            id_at[str(row.get("image_id")), str(row.get("question")).lower()] = question_id
        for number, (row, place) in enumerate(read):
            question_id = id_of(row, place)
            if question_id not in answers_of:  # LLaVA's of TextVQA; OCR tokens are on the second line
                question_id = id_at.get((question_id, str(row.get("text")).partition("\n")[0].lower()), question_id)
            if question_id not in answers_of:
                raise ValueError(f"{place} has the question_id {question_id}, which {annotations} does not have.")
            read[number] = ({**answers_of[question_id], **row, "question_id": question_id}, place)
    return [_question(row, place) for row, place in read]


def _rows(path: str | os.PathLike, image_name: str | None) -> list[tuple[dict, str]]:
    """The rows of a file in any form, with image names in place of image ids, and the place of each row."""
    name, content = image_name or "{image_id}.jpg", None
    with suppress(ValueError):  # JSON lines, or not JSON, of which `read_rows` names the line
        content = read_json(path)
    if isinstance(content, dict) and "image" not in content:  # else JSON lines of one line
        kind = next((kind for kind in ("questions", "annotations", "data") if kind in content), "row")
        if kind == "questions":
            name = image_name or COCO_IMAGE_NAME
        found = content.get(kind)
        if found is None and all(isinstance(row, dict) and "imageId" in row for row in content.values()):  # GQA
            found = [{"question_id": key, "image_id": row["imageId"], **row} for key, row in content.items()]
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise ValueError(
                f"{path} is not an official file of VQAv2, GQA, TextVQA or VizWiz, nor JSONL, one question per line."
            )
        found = [(row, f"{path}, {kind.removesuffix('s')} {number}") for number, row in enumerate(found, 1)]
    else:
        found = read_rows(path)
    return [(_with_image(row, name, place), place) for row, place in found]


def _with_image(row: dict, name: str, place: str) -> dict:
    """A row with the name of its image, and with that as its id where it has none (VizWiz: one question per image)."""
    if "image" not in row and "image_id" in row:
        try:
            row = {**row, "image": name.format(image_id=row["image_id"])}
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{place} has the image_id {row['image_id']!r}, which does not fit --image-name {name!r} ({error!r}). A name "
                "is like COCO_val2014_{image_id:0>12}.jpg."
            ) from None
    return {"question_id": row["image"], **row} if "image" in row else row


def instruction_for(questions: list[dict]) -> str:
    """What LLaVA-1.5 is given after such questions; VizWiz has answers of the type "unanswerable"."""
    categories = {question["category"] for question in questions}
    return f"{UNANSWERABLE}\n{INSTRUCTION}" if "unanswerable" in categories else INSTRUCTION


def make_benchmark(
    questions: list[dict], image_folder: str | os.PathLike, *, instruction: str | None = INSTRUCTION, files=()
) -> Benchmark:
    """Questions with short answers as a [`Benchmark`]."""
    return question_benchmark("vqa", questions, image_folder, score, instruction=instruction, files=files)


def score(questions: list[dict], answers: dict[str, str]) -> Scored:
    """Soft accuracy and exact match (with any of the people's answers), for each category and over all."""
    rows = []
    for question in questions:
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
            "accuracy": score_of([row["score"] for row in some]),
            "exact_match": score_of([row["exact"] for row in some]),
        }

    scores = scores_by_group(rows, (question["category"] for question in questions if question["category"]), table)
    return Scored(rows, scores, "accuracy", {"empty": sum(not normalise(row["answer"]) for row in rows)})


def _question(row: dict, place: str) -> dict:
    kind = next((kind for kind in ("category", "answer_type") if row.get(kind) is not None), None)
    return {
        "id": id_of(row, place),
        "image": text_of(row, "image", place),
        "text": text_of(row, "question" if "question" in row or "text" not in row else "text", place),
        "answers": _answers(row, place),
        "category": kind and text_of(row, kind, place),
    }


def _answers(row: dict, place: str) -> list[str]:
    answers = row.get("answers", [row["answer"]] if "answer" in row else None)
    if isinstance(answers, list):
        answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(
            f"{place} has no 'answers', a list of texts, and no 'answer', a text; its fields are {fields_of(row)}. Give answers "
            "in another file by --annotations."
        )
    return answers
