"""Example images of the page."""

import os
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from ..chat import IMAGE_SUFFIXES, read_named_image


QUESTION = "What is shown in this picture?"
MAX_EXAMPLES = 12
MAX_SIDE = 1024
"""In pixels: examples are sent to every visitor."""


def collect_examples(source: str | os.PathLike | None, folder: str | os.PathLike) -> list[tuple[str, str]]:
    """
    Small copies, without metadata, of the first images in `source`; or two drawn ones.

    Args:
        source (`str` or `os.PathLike`, *optional*): A folder with images.
        folder (`str` or `os.PathLike`): Where to write the copies.

    Returns:
        `list[tuple[str, str]]`: path and question of each.

    Raises:
        ValueError: there is no image in `source`, or one cannot be read.
    """
    if source is None:
        images = {"three.png": _balls("#d2382d", "#e8b92e", "#2f62c9"), "two.png": _balls("#2e9e4f", "#2f62c9")}
        questions = {"three.png": "How many balls are there, and what colour are they?"}
    else:
        if not Path(source).is_dir():
            raise ValueError(f"{source} has no images: it is not a folder.")
        names = sorted(path for path in Path(source).glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)[:MAX_EXAMPLES]
        if not names:
            raise ValueError(f"{source} has no images ({', '.join(IMAGE_SUFFIXES)}).")
        images = {f"{path.name}.png": read_named_image(str(path)).image for path in names}
        questions = {}
    place = Path(folder, "examples")
    place.mkdir(parents=True, exist_ok=True)
    examples = []
    for name, image in images.items():
        if max(image.size) > MAX_SIDE:
            image = ImageOps.contain(image, (MAX_SIDE, MAX_SIDE))
        Image.frombytes("RGB", image.size, image.tobytes()).save(place / name)
        examples.append((str(place / name), questions.get(name, QUESTION)))
    return examples


def _balls(*colours: str) -> Image.Image:
    image = Image.new("RGB", (480, 360), (236, 232, 222))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 250, 480, 360), fill=(178, 142, 104))
    for colour, (x, y, radius) in zip(colours, ((120, 240, 62), (375, 228, 74), (255, 262, 40))):
        draw.ellipse((x - radius, y + radius - 8, x + radius, y + radius + 10), fill=(140, 110, 80))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return image


__all__ = ["collect_examples"]
