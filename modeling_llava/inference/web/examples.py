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
        images = {"balls.png": _balls(), "house.png": _house()}
        questions = {"balls.png": "How many balls are there, and what colour are they?"}
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


def _balls() -> Image.Image:
    image = Image.new("RGB", (480, 360), (236, 232, 222))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 250, 480, 360), fill=(178, 142, 104))
    for x, y, radius, colour in ((120, 240, 62, "#d2382d"), (255, 262, 40, "#2f62c9"), (375, 228, 74, "#e8b92e")):
        draw.ellipse((x - radius, y + radius - 8, x + radius, y + radius + 10), fill=(140, 110, 80))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return image


def _house() -> Image.Image:
    image = Image.new("RGB", (480, 360), (150, 200, 238))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 260, 480, 360), fill=(98, 160, 78))
    draw.ellipse((380, 30, 440, 90), fill=(250, 214, 70))
    draw.rectangle((140, 160, 320, 290), fill=(240, 226, 200))
    draw.polygon(((120, 160), (230, 80), (340, 160)), fill=(176, 62, 50))
    draw.rectangle((210, 215, 250, 290), fill=(110, 70, 44))
    for x in (160, 268):
        draw.rectangle((x, 185, x + 32, 217), fill=(120, 170, 210), outline=(90, 90, 90))
    draw.rectangle((388, 210, 402, 290), fill=(104, 70, 42))
    draw.ellipse((352, 130, 438, 226), fill=(54, 118, 52))
    return image


__all__ = ["collect_examples"]
