"""Example images of the page."""

import os
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from ..chat import IMAGE_SUFFIXES, read_named_image


MAX_EXAMPLES = 12
MAX_SIDE = 1024
"""In pixels: examples are sent to every visitor."""


def collect_examples(source: str | os.PathLike | None, folder: str | os.PathLike) -> list[tuple[str, str]]:
    """
    Writes small copies, without metadata, of the first images in a folder, or two drawn ones; returns `(path, question)` each.

    Raises:
        ValueError: there is no image in `source`, or one cannot be read.
    """
    if source is None:
        images = {"three": _balls("#d2382d", "#e8b92e", "#2f62c9"), "two": _balls("#2e9e4f", "#2f62c9")}
    else:
        paths = sorted(path for path in Path(source).glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)[:MAX_EXAMPLES]
        if not paths:
            raise ValueError(f"{source} has no images ({', '.join(IMAGE_SUFFIXES)}).")
        images = {path.name: read_named_image(str(path)).image for path in paths}
    question = "How many balls are there?" if source is None else "What is shown in this image?"
    examples = []
    for name, image in images.items():
        path = Path(folder, "examples", f"{name}.png")
        path.parent.mkdir(exist_ok=True)
        small = ImageOps.contain(image, (MAX_SIDE, MAX_SIDE)) if max(image.size) > MAX_SIDE else image
        Image.frombytes("RGB", small.size, small.tobytes()).save(path)
        examples.append((str(path), question))
    return examples


def _balls(*colours: str) -> Image.Image:
    image = Image.new("RGB", (480, 360), (236, 232, 222))
    draw = ImageDraw.Draw(image)
    for colour, (x, y, radius) in zip(colours, ((120, 240, 62), (375, 228, 74), (255, 262, 40))):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return image
