"""A scripted responder: it answers the data engine's requests in place of a language model.

Like the language-only model of the paper (LLaVA §3) it is told of a image in captions and boxes and never sees it:
colours and the place come from the captions, positions, sizes and numbers from the boxes. It stands behind the same
interface as the client of OpenAI-compatible endpoints, so what is made with it went the way of real data.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

from ..data_engine.prompts import load_prompts
from ..endpoint.chat import Message, Reply, RequestFault
from .scenes import CATEGORIES, COLOURS, COLUMNS, PLACES, ROWS, SIZES, article


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
class SeenThing:
    """One thing as it follows from captions and boxes."""

    category: str
    colour: str
    size: str
    row: str
    column: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.category}"


@dataclass(frozen=True)
class SeenScene:
    """A image as it follows from captions and boxes. `things` are in the boxes' order, the largest first."""

    place: str
    things: tuple[SeenThing, ...]


@dataclass(frozen=True)
class Question:
    """A question about a image with its only right answer. `kind` groups questions in reports."""

    kind: str
    text: str
    answer: str
    about: tuple[str, ...]
    """Names ("red star") of the things that decide the answer."""


def read_context(text: str) -> SeenScene:
    """Understands what the data engine says of a image: captions, an empty line, boxes.

    Raises:
        ValueError: there is no box, or the captions do not say the colour of a box's category or the place.
    """
    captions = BOX_LINE.sub("", text)
    things = []
    for category, *corners in BOX_LINE.findall(text):
        x1, y1, x2, y2 = map(float, corners)
        colour = re.search(rf"\b({'|'.join(COLOURS)}) {re.escape(category)}\b", captions)
        if colour is None:
            raise ValueError(f"No caption says which colour the {category} has: {captions.strip()!r}")
        column = COLUMNS[min(int((x1 + x2) / 2 * len(COLUMNS)), len(COLUMNS) - 1)]
        row = ROWS[min(int((y1 + y2) / 2 * len(ROWS)), len(ROWS) - 1)]
        between = (SIZES["large"][0] + SIZES["small"][1]) / 2
        things.append(SeenThing(category, colour[1], "large" if x2 - x1 > between else "small", row, column))
    where = re.search("|".join(PLACES.values()), captions, re.IGNORECASE)
    if not things or where is None:
        raise ValueError(f"Captions and boxes do not say what the picture shows: {text!r}")
    return SeenScene(where[0].lower(), tuple(things))


def list_questions(scene: SeenScene, rng: random.Random) -> list[Question]:
    """Every question with a definite answer that the responder can think of, by kind and thing."""
    names = tuple(thing.name for thing in scene.things)
    number = len(names)
    questions = [Question("place", "Where was the picture taken?", f"It was taken {scene.place}.", ())]
    if number > 1:
        questions.append(
            Question("count", "How many things are there?", f"There are {NUMBERS[number]} things.", names)
        )
    absent = rng.choice([name for name in CATEGORIES if name not in {thing.category for thing in scene.things}])
    questions.append(Question("presence", f"Is there {article(absent)}?", f"No, there is no {absent}.", ()))
    for thing in scene.things:
        about, category = (thing.name,), thing.category
        questions += [
            Question("presence", f"Is there {article(category)}?", f"Yes, there is {article(thing.name)}.", about),
            Question("colour", f"What colour is the {category}?", f"The {category} is {thing.colour}.", about),
            Question("size", f"Is the {category} large or small?", f"The {category} is {thing.size}.", about),
            Question("object", f"What is the {thing.colour} thing?", f"It is {article(category)}.", about),
            Question(
                "position", f"Where is the {category}?", f"The {category} is at the {thing.row} {thing.column}.", about
            ),
        ]
    large = [thing for thing in scene.things if thing.size == "large"]
    if number > 1 and len(large) == 1:
        questions.append(Question("largest", "Which thing is the largest?", f"It is the {large[0].name}.", names))
    return questions


def list_reasoning(scene: SeenScene) -> list[Question]:
    """Questions that need the image and what is known about things in general."""
    questions = []
    for thing in scene.things:
        text, answer = KNOWLEDGE[thing.category]
        questions.append(Question("reasoning", text, answer.format(thing=thing.name), (thing.name,)))
    return questions


def write_description(scene: SeenScene) -> str:
    """A detailed description: place, number, and each thing with size, colour and position."""
    number = len(scene.things)
    sentences = [f"The picture was taken {scene.place}, and it shows {NUMBERS[number]} thing{'s' * (number > 1)}."]
    for thing in scene.things:
        sentences.append(f"There is {article(f'{thing.size} {thing.name}')} at the {thing.row} {thing.column}.")
    return " ".join(sentences)


def _blocks(questions: list[Question]) -> str:
    return "\n===\n".join(f"Question:\n{question.text}\n===\nAnswer:\n{question.answer}" for question in questions)


class ScriptedResponder:
    """Answers the requests that the data engine makes with the tiny world's prompts; a `ChatModel`."""

    name = "scripted-responder"

    def __init__(self, seed: int = 0, turns: int = 6):
        self.seed, self.turns = seed, turns
        self._kinds = {prompt.system: kind for kind, prompt in load_prompts(PROMPTS).items()}

    def answer(self, messages: list[Message]) -> str:
        """The reply's text.

        Raises:
            ValueError: the system message is none of the tiny world's prompts, or no message holds a context.
        """
        kind = self._kinds.get(messages[0]["content"])
        contexts = [message["content"] for message in messages if message["role"] == "user"]
        contexts = [text for text in contexts if BOX_LINE.search(text)]
        if kind is None or not contexts:
            raise ValueError("The scripted responder knows the tiny world's prompts and contexts only.")
        scene = read_context(contexts[-1])
        rng = random.Random(f"{self.seed}:{kind}:{contexts[-1]}")
        if kind == "detail":
            return write_description(scene)
        if kind == "complex":
            return _blocks([rng.choice(list_reasoning(scene))])
        return _blocks(choose_questions(list_questions(scene, rng), rng, self.turns))

    async def complete(
        self,
        messages: list[Message],
        *,
        max_tokens: int,
        temperature: float | None,
        seed: int | None = None,
        request_id: str | None = None,
    ) -> Reply:
        """See `ChatModel`. Tokens are not counted: the responder costs nothing."""
        try:
            return Reply(self.answer(messages), model=self.name)
        except ValueError as error:
            raise RequestFault("not_understood", str(error)) from error


def choose_questions(questions: list[Question], rng: random.Random, number: int) -> list[Question]:
    """Some of the questions in random order, each text once."""
    chosen = {question.text: question for question in rng.sample(questions, len(questions))}
    return list(chosen.values())[:number]
