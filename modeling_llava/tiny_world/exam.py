"""The quickstart's exam: questions about unseen scenes, and proof that the model looks at the images.

The same questions are asked with their image, with a blank image, and with the images shuffled. The scores are compared with
the majority answer: for every question, the answer that is right most often in the training data.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..constants import IMAGE_TOKEN
from ..data_engine.contexts import read_contexts
from ..data_engine.validate import normalise
from .responder import Question, list_questions, list_reasoning, read_context
from .scenes import HELD_OUT


KINDS = ("place", "count", "presence", "colour", "object", "size", "position", "largest", "reasoning")
HELD_OUT_NAMES = frozenset(f"{colour} {category}" for colour, category in HELD_OUT)


@dataclass(frozen=True)
class ExamItem:
    """A question about an image. `answer` is the only right one."""

    id: str
    image: Path
    kind: str
    question: str
    answer: str


def set_exam(split: Path, seed: int, held_out: bool = False) -> list[ExamItem]:
    """Questions about a split's images, one of each kind that an image has, from captions and boxes."""
    items = []
    for context in read_contexts(split / "captions.json", split / "instances.json"):
        rng = random.Random(f"{seed}:exam:{context.id}")
        scene = read_context(f"{context.caption_text}\n\n{context.box_text}")
        by_kind: dict[str, list[Question]] = defaultdict(list)
        for question in [*list_questions(scene, rng), *list_reasoning(scene)]:
            if not held_out or (len(question.about) == 1 and question.about[0] in HELD_OUT_NAMES):
                by_kind[question.kind].append(question)
        for kind in KINDS:
            if by_kind[kind]:
                question = _draw_fairly(by_kind[kind], rng)
                image = split / "images" / context.image
                items.append(ExamItem(f"{context.id}:{kind}", image, kind, question.text, question.answer))
    return items


def _draw_fairly(questions: list[Question], rng: random.Random) -> Question:
    # "Is there …?" is answered by no as often as by yes: a model that always says yes gets one half.
    no = [question for question in questions if question.answer.startswith("No,")]
    return rng.choice(no if no and rng.random() < 0.5 else [q for q in questions if q not in no] or no)


def blank_image(like: Path) -> Image.Image:
    """A grey image of the same size."""
    with Image.open(like) as image:
        return Image.new("RGB", image.size, (127, 127, 127))


def shuffle_images(items: list[ExamItem], seed: int) -> list[Path]:
    """For each item the image of another scene."""
    scenes = sorted({item.image for item in items})
    random.Random(f"{seed}:shuffle").shuffle(scenes)
    other = dict(zip(scenes, [*scenes[1:], scenes[0]]))  # a cycle through all of them
    return [other[item.image] for item in items]


def answer_items(predictor, items: list[ExamItem], images: Iterable, batch_size: int = 64) -> list[str]:
    """The model's answers, greedy, in the items' order."""
    samples = []
    for number, (item, image) in enumerate(zip(items, images)):
        content = [{"type": "image"}, {"type": "text", "text": item.question}]
        samples.append({"id": number, "messages": [{"role": "user", "content": content}], "images": [image]})
    answers = predictor.answer_many(samples, batch_size=batch_size, max_new_tokens=32)
    found = {answer.id: answer.text for answer in answers}
    return [found[number] for number in range(len(samples))]


def is_right(item: ExamItem, answer: str) -> bool:
    """Whether an answer is the right one, word by word; case, punctuation and spaces do not count."""
    return normalise(answer) == normalise(item.answer)


def score(items: list[ExamItem], answers: list[str]) -> dict[str, float]:
    """Fraction of right answers, 0..1: `all`, and by kind."""
    right = defaultdict(list)
    for item, answer in zip(items, answers):
        for kind in ("all", item.kind):
            right[kind].append(is_right(item, answer))
    return {kind: sum(right[kind]) / len(right[kind]) for kind in ("all", *KINDS) if right[kind]}


def answer_by_majority(items: list[ExamItem], training: Iterable[tuple[str, str]]) -> list[str]:
    """For each question the commonest answer to the same text in the training data; empty if it is not there."""
    counts: dict[str, Counter] = defaultdict(lambda: Counter({"": 0}))
    for question, answer in training:
        counts[normalise(question)][answer] += 1
    return [counts[normalise(item.question)].most_common(1)[0][0] for item in items]


def read_turns(rows: list[dict]) -> list[tuple[str, str]]:
    """Questions and answers of rows in LLaVA's form, without the image token."""
    turns = []
    for row in rows:
        texts = [message["value"].replace(IMAGE_TOKEN, "").strip() for message in row["conversations"]]
        turns += zip(texts[::2], texts[1::2])
    return turns
