"""The tiny world's scenes: which things there are, how a scene is drawn at random, and its annotations.

A scene is a place and one to three things. Each thing has a category, a colour, a size and a cell of a 3×2 grid; within a
scene categories and colours do not repeat, so that every question about it has one answer. The data engine gets its
annotations, as COCO has them: a few captions and one box per thing.
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


@dataclass(frozen=True)
class Scene:
    """A place (a key of `PLACES`) and its things. `seed` fixes the image's texture and jitter."""

    place: str
    things: tuple[Thing, ...]
    seed: int = 0


def article(noun_phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


def draw_scene(rng: random.Random, held_out: bool = False, most_things: int = 3) -> Scene:
    """Draws a random scene."""
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
    *first, last = [article(thing.name) for thing in sorted(scene.things, key=lambda thing: thing.centre[0])]
    listed, where = f"{', '.join(first)} and {last}" if first else last, PLACES[scene.place]
    return [
        f"{listed[0].upper()}{listed[1:]} {where}.",
        f"There {'are' if first else 'is'} {listed} {where}.",
        f"{where[0].upper()}{where[1:]}, {listed}.",
    ]


def box_of(thing: Thing, width: int, height: int) -> list[float]:
    """COCO's box of a thing: [x, y, width, height] in pixels, from the top left corner."""
    (x, y), side = thing.centre, thing.side
    box = [(x - side / 2) * width, (y - side / 2) * height, side * width, side * height]
    return [round(value, 2) for value in box]
