"""
An image in any form, as an upright RGB one: what processor, pipeline, predictor and training all read images with.

The paths of training data, and errors that name a sample, are in `data/images.py`.
"""

import base64
import io
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .paths import where_looked


MAX_DOWNLOAD_BYTES = 50 * 2**20
DOWNLOAD_TIMEOUT = 20
"""Seconds without a byte from the server."""

_ORIENTATION = 0x0112  # EXIF tag
# An image this long would take gigabytes once it is padded to a square or resized by its shorter side.
_LONGEST_SIDE = 65_535  # pixels: the most that a JPEG holds
_LONGEST_RATIO = 1_000
EMBEDDED = re.compile(r"data:[^,]*,|(?=(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/=\s]{100,}\Z)")
"""What stands before an image in base64; without `data:…,` it is known by how PNG, JPEG, GIF and WebP begin."""


def read_image(reference: Any) -> Image.Image:
    """
    Read one image.

    Args:
        reference (`str`, `os.PathLike`, `PIL.Image.Image`, `bytes` or `dict`):
            A path, an `http(s)`, `file` or `data` URL, base64 text, an image, the bytes of an image file, or
            `{"bytes", "path"}`, as `datasets` holds an image.

    Returns:
        `PIL.Image.Image` of mode RGB, upright.

    Raises:
        ValueError: the image is not there or cannot be read.
    """
    if isinstance(reference, Mapping):
        reference = reference["bytes"] if reference.get("bytes") is not None else reference.get("path")
    source, name = reference, "given"
    if isinstance(reference, (str, os.PathLike)):
        source = os.fspath(reference)
        name = repr(source if len(source) < 200 else f"{source[:40]}…")
        if source.lower().startswith(("http://", "https://")):
            source = download(source)
    if not isinstance(source, (str, bytes, bytearray, memoryview, Image.Image)) or not source:
        raise ValueError(
            f"An image is given as {type(source).__name__}: give a PIL image, an array, a path, a URL or the bytes of a file."
        )
    try:
        source = embedded_or_path(source) if isinstance(source, str) else source
        return open_upright(io.BytesIO(source) if isinstance(source, (bytes, bytearray, memoryview)) else source)
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise ValueError(f"The image {name} is not there{where_looked(source)}") from error
    except Exception as error:  # the plug-ins of Pillow raise a dozen types on broken files
        raise ValueError(f"The image {name} cannot be read: {error}") from error


def embedded_or_path(text: str) -> bytes | str:
    """The bytes of an image that is written out in base64, or the path that the text (or `file:` URL) is."""
    embedded = EMBEDDED.match(text)
    if embedded:
        return base64.b64decode(text[embedded.end() :])
    if text.lower().startswith("file://"):
        return urllib.request.url2pathname(urllib.parse.urlsplit(text).path)
    return text


def open_upright(source: Any) -> Image.Image:
    """An image, or a file that Pillow opens, as an upright image of mode RGB. Broken files raise errors of any type."""
    if isinstance(source, Image.Image):
        check_size(source)
        return to_rgb(upright(source))
    with Image.open(source) as image:
        check_size(image)
        return to_rgb(upright(image))


def download(url: str) -> bytes:
    """
    Raises:
        ValueError: the server cannot be reached, refuses, or sends more than `MAX_DOWNLOAD_BYTES`.
    """
    quoted = urllib.parse.quote(url, safe=":/?#[]@!$&'()*+,;=%~")  # names are typed as they are read
    try:
        request = urllib.request.Request(quoted, headers={"User-Agent": "modeling-llava", "Accept": "image/*,*/*"})
        with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
            content = response.read(MAX_DOWNLOAD_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} cannot be downloaded: the server says {error.code} ({error.reason}).") from None
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"{url} cannot be downloaded: {getattr(error, 'reason', None) or error}.") from None
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise ValueError(f"{url} is larger than {MAX_DOWNLOAD_BYTES >> 20} MiB. Download it and make it smaller.")
    return content


def check_size(image: Image.Image) -> None:
    short, long = sorted(image.size)
    if not short:
        raise ValueError(f"it has {image.width}×{image.height} pixels, none")
    if long > _LONGEST_SIDE or long > _LONGEST_RATIO * short:
        raise ValueError(f"{image.width}×{image.height} pixels are too long and thin to be a picture")


def upright(image: Image.Image) -> Image.Image:
    """The image, turned as its EXIF orientation says."""
    image.load()
    return ImageOps.exif_transpose(image) if _orientation(image) > 1 else image


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1, upright, where there is none or the EXIF block cannot be read (the pixels can)."""
    if not any(key in image.info for key in ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")):
        if not hasattr(image, "tag_v2"):  # TIFF keeps it among its own tags
            return 1
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the parser raises whatever the broken block makes it raise
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Transparency is laid on white, 16-bit values are divided by 256; an RGB image is returned as it is."""
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    if mode.startswith("I") or mode == "F":
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Grey values of 16 bits, 32 bits or floating point as `[H, W]` uint8. Pillow's own conversion would clip them."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not np.isfinite([low, high]).all() or low < 0 or high > 255:
            raise ValueError(
                f"floating-point values from {low:g} to {high:g}: 0 to 1 or 0 to 255 would have a meaning"
            )
        return np.rint(values * 255 if high <= 1 else values).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(f"integer values from {low} to {high}: 0 to 65535 would have a meaning")
    if image.mode == "I" and high <= 255 and image.format not in ("PNG", "PPM"):
        return values.astype(np.uint8)  # a 32-bit file does not say its range; those two are of 16 bits
    return (values.astype(np.uint32) >> 8).astype(np.uint8)


__all__ = ["EMBEDDED", "check_size", "download", "embedded_or_path", "open_upright", "read_image", "to_rgb", "upright"]
