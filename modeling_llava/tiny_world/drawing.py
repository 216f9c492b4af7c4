"""Draws a scene of the tiny world with PIL: anti-aliased things with an outline and a light, in a textured place."""

import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .scenes import Scene, Thing


SCENE_SIZE = 160
"""Side of an image in pixels."""

SUPERSAMPLING = 3
"""Things are drawn this many times larger and scaled down: PIL's own drawing is not anti-aliased."""

RIM = [min(255, 8 * alpha) for alpha in range(256)]
SHADOW = [round(0.4 * alpha) for alpha in range(256)]
"""Opacity of a thing's white rim and of its shadow by the opacity of what they are made from, 0..255."""

PAINT = {
    "red": (222, 43, 52),
    "orange": (250, 135, 20),
    "yellow": (250, 216, 40),
    "green": (38, 160, 70),
    "blue": (42, 98, 224),
    "purple": (126, 52, 178),
    "pink": (250, 132, 190),
}
SKIES = {
    "meadow": ((140, 205, 250), (222, 243, 255)),
    "beach": ((120, 210, 245), (255, 240, 214)),
    "snow": ((176, 194, 222), (236, 242, 250)),
    "night": ((12, 14, 44), (58, 52, 104)),
}
GROUNDS = {
    "meadow": ((164, 214, 112), (118, 182, 84)),
    "beach": ((244, 222, 168), (226, 194, 130)),
    "snow": ((250, 252, 255), (220, 230, 244)),
    "night": ((44, 46, 74), (24, 26, 48)),
}


def shade(colour: tuple[int, int, int], amount: float) -> tuple[int, int, int]:
    """The colour mixed with white (amount > 0) or with black (amount < 0); |amount| is 0..1."""
    target = 255 if amount > 0 else 0
    return tuple(round(channel + (target - channel) * abs(amount)) for channel in colour)


def draw_place(place: str, rng: np.random.Generator, size: int = SCENE_SIZE) -> Image.Image:
    """A place without things: sky, horizon and ground with their texture. Returns an RGB image of `size` pixels."""
    horizon = round(size * rng.uniform(0.46, 0.56))
    rows = np.arange(size)[:, None] / size
    sky_mix, ground_mix = rows * size / horizon, (rows - horizon / size) / (1 - horizon / size)
    sky = np.array(SKIES[place][0]) * (1 - sky_mix) + np.array(SKIES[place][1]) * sky_mix  # [size, 3]
    ground = np.array(GROUNDS[place][0]) * (1 - ground_mix) + np.array(GROUNDS[place][1]) * ground_mix
    pixels = np.repeat(np.where(rows < horizon / size, sky, ground)[:, None, :], size, axis=1)  # [size, size, 3]
    grain = rng.normal(0, 1, (size, size, 1))
    pixels += grain * np.where(rows[:, :, None] < horizon / size, 1.5, 5.0 if place in ("beach", "meadow") else 3.0)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image, "RGBA")

    def points(count, top, bottom):
        return zip(rng.integers(0, size, count).tolist(), rng.integers(top, bottom, count).tolist())

    if place == "meadow":
        for x, y in points(130, horizon, size):
            length = 2 + 5 * (y - horizon) / (size - horizon)
            draw.line([x, y, x + rng.uniform(-2, 2), y - length], fill=(70, 140, 50, 120))
        for x, y in points(3, 8, horizon // 2):
            for offset, radius in ((-8, 5), (0, 8), (8, 6)):
                draw.ellipse(
                    [x + offset - radius, y - radius, x + offset + radius, y + radius * 0.6], fill=(255, 255, 255, 150)
                )
    elif place == "beach":
        shore = min(size - 20, horizon + round(size * 0.16))
        draw.rectangle([0, horizon, size, shore], fill=(60, 170, 205, 255))
        for x, y in points(26, horizon + 2, shore):
            draw.line([x, y, x + 10, y], fill=(220, 245, 250, 150))
        draw.line([0, shore, size, shore], fill=(255, 255, 255, 210), width=2)
    elif place == "snow":
        for centre, height in ((0.2, 0.30), (0.55, 0.38), (0.88, 0.26)):
            x, peak = size * (centre + rng.uniform(-0.08, 0.08)), horizon - size * height
            draw.polygon([x - size * 0.32, horizon, x, peak, x + size * 0.32, horizon], fill=(136, 154, 186, 255))
            cap = size * 0.1
            draw.polygon([x - cap * 0.84, peak + cap, x, peak, x + cap * 0.84, peak + cap], fill=(248, 250, 255, 255))
        for x, y in points(70, 0, size):
            draw.ellipse([x - 1, y - 1, x + 1, y + 1], fill=(255, 255, 255, 220))
    else:
        for x, y in points(60, 0, horizon - 10):
            draw.point([x, y], fill=(255, 255, 235, 230))
        x = 0
        while x < size:
            width, height = rng.integers(12, 26), rng.integers(8, 34)
            draw.rectangle([x, horizon - height, x + width, horizon], fill=(26, 26, 58, 255))
            for window_x in range(int(x) + 3, int(x + width) - 2, 5):
                for window_y in range(int(horizon - height) + 3, horizon - 3, 6):
                    if rng.random() < 0.45:
                        draw.rectangle([window_x, window_y, window_x + 1, window_y + 2], fill=(250, 220, 130, 220))
            x += width + 1
    return image


def _star(points: int = 5, inner: float = 0.45) -> list[tuple[float, float]]:
    """Corners of a star in the unit circle, the first one at the top."""
    corners = [((1.0, inner)[index % 2], math.radians(180 * index / points - 90)) for index in range(2 * points)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in corners]


def draw_thing(thing: Thing, rng: random.Random, scale: int) -> Image.Image:
    """One thing on a transparent square of `scale` pixels, drawn in coordinates −1..1 (x to the right, y down)."""
    tile = Image.new("RGBA", (scale, scale), (0, 0, 0, 0))
    draw = ImageDraw.Draw(tile)
    body, dark, light = PAINT[thing.colour], shade(PAINT[thing.colour], -0.55), shade(PAINT[thing.colour], 0.5)
    pen = max(2, scale // 26)

    def at(points):  # the rim of `make_sticker` needs a little room
        return [((0.97 * x + 1) / 2 * (scale - 1), (0.97 * y + 1) / 2 * (scale - 1)) for x, y in points]

    def polygon(points, fill, outline=dark):
        corners = at(points)
        draw.polygon(corners, fill=fill)
        draw.line([*corners, corners[0], corners[1]], fill=outline, width=pen, joint="curve")

    def ellipse(left, top, right, bottom, fill, outline=dark):
        (x0, y0), (x1, y1) = at([(left, top), (right, bottom)])
        draw.ellipse([x0, y0, x1, y1], fill=fill, outline=outline, width=pen if outline else 0)

    if thing.category == "ball":
        ellipse(-0.95, -0.95, 0.95, 0.95, body)
        (x0, y0), (x1, y1) = at([(-0.55, -0.93), (0.55, 0.93)])
        draw.arc([x0, y0, x1, y1], 90, 270, fill=light, width=pen * 2)
        ellipse(-0.1, -0.65, 0.45, -0.25, shade(body, 0.75), None)
    elif thing.category == "star":
        polygon([(x * 0.97, y * 0.97 + 0.06) for x, y in _star()], body)
        draw.polygon(at([(x * 0.5, y * 0.5 + 0.06) for x, y in _star()]), fill=light)
    elif thing.category == "heart":
        curve = []
        for step in range(72):
            t = 2 * math.pi * step / 72
            y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            curve.append((0.97 * math.sin(t) ** 3, -(y + 2.5) / 15.5))
        polygon(curve, body)
        ellipse(-0.62, -0.62, -0.22, -0.28, light, None)
    elif thing.category == "house":
        polygon([(-0.7, -0.1), (0.7, -0.1), (0.7, 0.93), (-0.7, 0.93)], body)
        polygon([(-0.95, -0.08), (0, -0.93), (0.95, -0.08)], shade(body, -0.3))
        polygon([(-0.18, 0.3), (0.2, 0.3), (0.2, 0.93), (-0.18, 0.93)], shade(body, -0.65))
        for left in (-0.55, 0.34):
            polygon([(left, 0.12), (left + 0.24, 0.12), (left + 0.24, 0.4), (left, 0.4)], (255, 246, 190))
    elif thing.category == "car":
        polygon([(-0.52, -0.02), (-0.34, -0.5), (0.36, -0.5), (0.6, -0.02)], (216, 238, 250))
        polygon([(-0.95, 0.0), (0.8, 0.0), (0.95, 0.16), (0.95, 0.5), (-0.95, 0.5)], body)
        for centre in (-0.5, 0.5):
            ellipse(centre - 0.26, 0.26, centre + 0.26, 0.78, (38, 38, 44), (20, 20, 24))
            ellipse(centre - 0.1, 0.42, centre + 0.1, 0.62, (210, 210, 214), None)
    elif thing.category == "boat":
        polygon([(-0.95, 0.34), (0.95, 0.34), (0.62, 0.9), (-0.62, 0.9)], body)
        draw.line(at([(0, 0.34), (0, -0.93)]), fill=(110, 76, 44), width=pen * 2)
        polygon([(0.1, -0.88), (0.1, 0.18), (0.8, 0.18)], shade(body, 0.55))
        polygon([(-0.1, -0.6), (-0.1, 0.18), (-0.66, 0.18)], shade(body, 0.75))
    elif thing.category == "fish":
        polygon([(0.42, 0.0), (0.95, -0.48), (0.95, 0.48)], shade(body, -0.2))
        polygon([(-0.2, -0.4), (0.1, -0.72), (0.3, -0.3)], shade(body, -0.2))
        ellipse(-0.95, -0.48, 0.6, 0.48, body)
        ellipse(-0.66, -0.22, -0.38, 0.06, (255, 255, 255), None)
        ellipse(-0.6, -0.14, -0.46, 0.0, (20, 20, 24), None)
        (x0, y0), (x1, y1) = at([(-0.3, -0.34), (0.2, 0.34)])
        draw.arc([x0, y0, x1, y1], -70, 70, fill=light, width=pen)
    else:  # flower
        draw.line(at([(0, 0), (0.06, 0.95)]), fill=(46, 120, 50), width=pen * 2)
        for step in range(6):
            angle = math.radians(60 * step + 30)
            x, y = 0.46 * math.cos(angle), -0.22 + 0.46 * math.sin(angle)
            ellipse(x - 0.29, y - 0.29, x + 0.29, y + 0.29, body)
        ellipse(-0.26, -0.48, 0.26, 0.04, (120, 74, 34), None)
    if rng.random() < 0.5:
        tile = tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return tile


def make_sticker(tile: Image.Image) -> Image.Image:
    """The tile with a white rim around its thing, which is visible on every ground."""
    outline = tile.getchannel("A").filter(ImageFilter.BoxBlur(tile.width / 40)).point(RIM)
    sticker = Image.new("RGBA", tile.size, (255, 255, 255, 0))
    sticker.putalpha(outline)
    sticker.alpha_composite(tile)
    return sticker


def draw_image(scene: Scene, size: int = SCENE_SIZE) -> Image.Image:
    """The image of a scene: RGB, `size` × `size` pixels. The same scene gives the same pixels."""
    rng = random.Random(scene.seed)
    image = draw_place(scene.place, np.random.default_rng(scene.seed), size)
    for thing in scene.things:
        side = round(thing.side * size)
        tile = make_sticker(draw_thing(thing, rng, side * SUPERSAMPLING))
        tile = tile.resize((side, side), Image.Resampling.LANCZOS)
        left, top = (round(centre * size - side / 2) for centre in thing.centre)
        margin = side // 6  # room for the shadow's blur
        shade_of = Image.new("L", (side + 2 * margin, side + 2 * margin))
        shade_of.paste(tile.getchannel("A").point(SHADOW), (margin, margin))
        shade_of = shade_of.filter(ImageFilter.GaussianBlur(side / 26))
        image.paste((10, 10, 30), (left - margin + side // 24, top - margin + side // 16), shade_of)
        image.paste(tile, (left, top), tile)
    return image
