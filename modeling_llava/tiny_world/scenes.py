"""The facts of the tiny world: which things there are, how a scene is drawn by lot, and what its annotators write.

A scene is a place and one to three things. Each thing has a category, a colour, a size and a cell of a 3×2 grid; within a
scene categories and colours do not repeat, so that every question about it has one answer. What a scene shows is
published the way COCO does it — a few captions and one box per thing — and nothing else of it reaches the data engine.
"""

import random
from dataclasses import dataclass


CATEGORIES = ("ball", "star", "heart", "house", "car", "boat", "fish", "flower")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
PLACES = {"meadow": "in a meadow", "beach": "on a beach", "snow": "in the snow", "night": "in the night"}
ROWS = ("top", "bottom")
COLUMNS = ("left", "middle", "right")
SIZES = {"large": (0.36, 0.40), "small": (0.24, 0.27)}
"""Side of a thing's square, as a fraction of the image's side."""

HELD_OUT = frozenset({("blue", "star"), ("green", "heart"), ("orange", "boat"), ("purple", "ball")})
"""Pairs of colour and category that are in no training scene and in no training text; each half of them is common."""


@dataclass(frozen=True)
class Thing:
    """One thing of a scene. `centre` and `side` are fractions of the image's side, x to the right and y down."""

    category: str
    colour: str
    size: str
    row: str
    column: str
    centre: tuple[float, float]
    side: float

    @property
    def name(self) -> str:
        """Colour and category, e.g. "red star"."""
        return f"{self.colour} {self.category}"

    @property
    def is_held_out(self) -> bool:
        return (self.colour, self.category) in HELD_OUT


@dataclass(frozen=True)
class Scene:
    """A place and its things, in the order in which they were drawn by lot. `seed` fixes texture and jitter."""

    place: str
    things: tuple[Thing, ...]
    seed: int


def article(noun_phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


def capitalise(sentence: str) -> str:
    """The sentence with a large first letter; the rest is left as it is."""
    return sentence[0].upper() + sentence[1:]


def join_words(parts: list[str]) -> str:
    """One phrase for all parts: "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def draw_scene(rng: random.Random, held_out: bool = False, most_things: int = 3) -> Scene:
    """Draws one scene by lot."""
    count = rng.choice([number for number in (1, 2, 2, 3, 3) if number <= most_things])
    while True:
        pairs = list(zip(rng.sample(COLOURS, count), rng.sample(CATEGORIES, count)))
        if held_out:
            pairs[0] = rng.choice(sorted(HELD_OUT))
        distinct = len({colour for colour, _ in pairs}) == len({category for _, category in pairs}) == count
        if distinct and [pair in HELD_OUT for pair in pairs] == [held_out, *[False] * (count - 1)]:
            break
    cells = rng.sample([(row, column) for row in ROWS for column in COLUMNS], count)
    # At most one thing is large, so "the largest thing" is never a matter of pixels.
    large = rng.choice((None, *range(count), *range(count)))
    things = []
    for index, ((colour, category), (row, column)) in enumerate(zip(pairs, cells)):
        size = "large" if index == large else "small"
        side = rng.uniform(*SIZES[size])
        x = (COLUMNS.index(column) + 0.5) / 3 + rng.uniform(-0.03, 0.03)
        y = (0.27, 0.73)[ROWS.index(row)] + rng.uniform(-0.06, 0.06)
        x = min(max(x, side / 2 + 0.01), 1 - side / 2 - 0.01)
        things.append(Thing(category, colour, size, row, column, (x, y), side))
    return Scene(rng.choice(sorted(PLACES)), tuple(things), rng.getrandbits(32))


def write_captions(scene: Scene) -> list[str]:
    """Three captions of a scene, each worded differently, as COCO's annotators give five.

    They name colours, categories (from left to right) and the place; positions, sizes and numbers are left to the boxes.
    """
    names = [article(thing.name) for thing in sorted(scene.things, key=lambda thing: thing.centre[0])]
    listed, where = join_words(names), PLACES[scene.place]
    return [
        f"{capitalise(listed)} {where}.",
        f"There {'is' if len(names) == 1 else 'are'} {listed} {where}.",
        f"{capitalise(where)}, {listed}.",
    ]


def box_of(thing: Thing, width: int, height: int) -> list[float]:
    """COCO's box of a thing: [x, y, width, height] in pixels, from the top left corner."""
    x, y = thing.centre
    return [
        round((x - thing.side / 2) * width, 2),
        round((y - thing.side / 2) * height, 2),
        round(thing.side * width, 2),
        round(thing.side * height, 2),
    ]
