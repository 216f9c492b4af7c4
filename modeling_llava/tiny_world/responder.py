"""A scripted responder: it answers the data engine's requests in place of a language model.

Like the language-only model of the paper (LLaVA §3) it reads captions and boxes and never sees an image: colours and the
place come from the captions, positions, sizes and numbers from the boxes.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

from ..data_engine.prompts import load_prompts
from ..endpoint.chat import Message, Reply, RequestFault
from .scenes import CATEGORIES, COLOURS, COLUMNS, PLACES, ROWS, SIZES, Scene, Thing, article


PROMPTS = Path(__file__).parent / "prompts"
"""The tiny world's own prompts, in the form of the original's folders."""

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
BOX_LINE = re.compile(r"^(.+): \[([\d.]+), ([\d.]+), ([\d.]+), ([\d.]+)\]$", re.MULTILINE)
KNOWLEDGE = {
    "ball": ("What could roll down a hill, and why?", "The {thing} could roll, because it is round."),
    "star": ("What belongs in the sky, and why?", "The {thing} does, because stars shine at night."),
    "heart": ("What is a sign of love, and why?", "The {thing} is, because a heart stands for love."),
    "house": ("Where could a family live, and why?", "In the {thing}, because it has rooms and a roof."),
    "car": ("What could drive along a road, and why?", "The {thing} could, because it has wheels."),
    "boat": ("What could cross a lake, and why?", "The {thing} could, because it has sails."),
    "fish": ("What lives in the water, and why?", "The {thing} does, because it can swim."),
    "flower": ("What would a bee visit, and why?", "The {thing}, because bees look for nectar."),
}
"""A question about each category that needs general knowledge, and its answer."""


@dataclass(frozen=True)
class Question:
    """A question about an image with its only right answer."""

    kind: str  # groups questions in reports
    text: str
    answer: str
    about: tuple[str, ...]  # names ("red star") of the things that decide the answer


def read_context(text: str) -> Scene:
    """The scene that captions and boxes describe, its things in the order of the boxes; a `ValueError` if there is no box, or
    if no caption names the place or the colour of a box's category."""
    captions = BOX_LINE.sub("", text)
    things = []
    for category, *corners in BOX_LINE.findall(text):
        x1, y1, x2, y2 = map(float, corners)
        x, y = centre = ((x1 + x2) / 2, (y1 + y2) / 2)
        colour = re.search(rf"\b({'|'.join(COLOURS)}) {re.escape(category)}\b", captions)
        if colour is None:
            raise ValueError(f"No caption names the colour of the {category}: {captions.strip()!r}")
        column = COLUMNS[min(int(x * len(COLUMNS)), len(COLUMNS) - 1)]
        row = ROWS[min(int(y * len(ROWS)), len(ROWS) - 1)]
        size = "large" if x2 - x1 > (SIZES["large"][0] + SIZES["small"][1]) / 2 else "small"
        things.append(Thing(category, colour[1], size, row, column, centre, x2 - x1))
    place = next((place for place, where in PLACES.items() if where in captions.lower()), None)
    if not things or place is None:
        raise ValueError(f"Captions and boxes do not describe a scene: {text!r}")
    return Scene(place, tuple(things))


def list_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Every question with a definite answer, by kind and thing."""
    names = tuple(thing.name for thing in scene.things)
    number = len(names)
    questions = [Question("place", "Where was the picture taken?", f"It was taken {PLACES[scene.place]}.", ())]
    if number > 1:
        count = f"There are {NUMBERS[number]} things."
        questions.append(Question("count", "How many things are there?", count, names))
    absent = rng.choice([name for name in CATEGORIES if name not in {thing.category for thing in scene.things}])
    questions.append(Question("presence", f"Is there {article(absent)}?", f"No, there is no {absent}.", ()))
    for thing in scene.things:
        about, name = (thing.name,), thing.category
        questions += [
            Question("presence", f"Is there {article(name)}?", f"Yes, there is {article(thing.name)}.", about),
            Question("colour", f"What colour is the {name}?", f"The {name} is {thing.colour}.", about),
            Question("size", f"Is the {name} large or small?", f"The {name} is {thing.size}.", about),
            Question("object", f"What is the {thing.colour} thing?", f"It is {article(name)}.", about),
            Question("position", f"Where is the {name}?", f"The {name} is at the {thing.row} {thing.column}.", about),
        ]
    large = [thing for thing in scene.things if thing.size == "large"]
    if number > 1 and len(large) == 1:
        questions.append(Question("largest", "Which thing is the largest?", f"It is the {large[0].name}.", names))
    return questions


def list_reasoning(scene: Scene) -> list[Question]:
    """Questions that need the image and general knowledge."""
    return [
        Question("reasoning", text, answer.format(thing=thing.name), (thing.name,))
        for thing in scene.things
        for text, answer in [KNOWLEDGE[thing.category]]
    ]


def write_description(scene: Scene) -> str:
    """A detailed description: place, number, and each thing with size, colour and position."""
    number = len(scene.things)
    shown = f"{NUMBERS[number]} thing{'s' * (number > 1)}"
    sentences = [f"The picture was taken {PLACES[scene.place]}, and it shows {shown}."]
    for thing in scene.things:
        sentences.append(f"There is {article(f'{thing.size} {thing.name}')} at the {thing.row} {thing.column}.")
    return " ".join(sentences)


def _blocks(questions: list[Question]) -> str:
    return "\n===\n".join(f"Question:\n{question.text}\n===\nAnswer:\n{question.answer}" for question in questions)


class ScriptedResponder:
    """Answers the data engine's requests with the tiny world's prompts; a `ChatModel`."""

    name = "scripted-responder"

    def __init__(self, seed: int = 0, turns: int = 6):
        self.seed, self.turns = seed, turns
        self._kinds = {prompt.system: kind for kind, prompt in load_prompts(PROMPTS).items()}

    def answer(self, messages: list[Message]) -> str:
        """The reply's text; a `ValueError` if it was not asked with the tiny world's prompts and a context."""
        kind = self._kinds.get(messages[0]["content"])
        contexts = [message["content"] for message in messages if message["role"] == "user"]
        contexts = [text for text in contexts if BOX_LINE.search(text)]
        if kind is None or not contexts:
            raise ValueError("The scripted responder answers the tiny world's prompts and contexts only.")
        scene = read_context(contexts[-1])
        rng = random.Random(f"{self.seed}:{kind}:{contexts[-1]}")
        if kind == "detail":
            return write_description(scene)
        if kind == "complex":
            return _blocks([rng.choice(list_reasoning(scene))])
        return _blocks(choose_questions(list_questions(scene, rng), rng, self.turns))

    async def complete(self, messages: list[Message], **options) -> Reply:
        """See `ChatModel`. Tokens are not counted."""
        try:
            return Reply(self.answer(messages), model=self.name)
        except ValueError as error:
            raise RequestFault("not_understood", str(error)) from error


def choose_questions(questions: list[Question], rng: random.Random, number: int) -> list[Question]:
    """Some of the questions in random order, each text once."""
    chosen = {question.text: question for question in rng.sample(questions, len(questions))}
    return list(chosen.values())[:number]
