"""
An image in any form, as an upright RGB one: what processor, pipeline, predictor and training all read images with.

Errors that name a sample are in `data/schema.py`.
"""

import base64
import contextlib
import functools
import io
import os
import re
import stat
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


BAD_ROW = "unreadable row"
MISSING_IMAGE = "missing image"
OUTSIDE_IMAGE = "image outside the image folder"
CORRUPT_IMAGE = "corrupt image"

MAX_DOWNLOAD_BYTES = 50 * 2**20
DOWNLOAD_TIMEOUT = 20
"""Seconds without a byte from the server."""

_ORIENTATION = 0x0112  # EXIF tag
# An image this long would take gigabytes once it is padded to a square or resized by its shorter side.
_LONGEST_SIDE = 65_535  # pixels: the most that a JPEG holds
_LONGEST_RATIO = 1_000
_EMBEDDED = re.compile(r"\s*(?i:data:)[^,]*,|\s*(?=(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/=\s]{100,}\Z)")
"""What stands before an image in base64; without `data:…,` it is known by how PNG, JPEG, GIF and WebP begin."""

_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_OTHER_FORMATS = {
    b"%PDF": "a PDF",
    b"<svg": "a drawing (SVG)",
    b"ftyphei": "HEIC",
    b"ftypmif1": "HEIC",
    b"PK\x03\x04": "an archive",
}
"""What a file that Pillow does not open has among its first bytes → what it is."""


class ImageError(ValueError):
    """An image that cannot be read: the reason, for counting; its name; and what is wrong, as in "The image {name} {what}."."""

    def __init__(self, reason: str, name: str, what: str):
        super().__init__(f"The image {name} {what}.")
        self.reason, self.name, self.what = reason, name, what


def read_image(reference: Any) -> Image.Image:
    """
    Read one image.

    Args:
        reference (`str`, `os.PathLike`, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `bytes` or `dict`):
            A path, an `http(s)`, `file` or `data` URL, base64 text, an image, an array of 8 or 16 bits or of floating point
            from 0 to 1 or 0 to 255, the bytes of an image file, or `{"bytes", "path"}`, as `datasets` holds an image.

    Returns:
        `PIL.Image.Image` of mode RGB, upright.

    Raises:
        ValueError: the image is not there or cannot be read.
    """
    if isinstance(reference, Mapping) and reference.get("bytes") is None:
        reference = reference.get("path")
    if isinstance(reference, str) and reference.lower().startswith(("http://", "https://")):
        reference = download(reference)
    return open_image(*find_image(reference))


def find_image(
    reference: Any, folder: str | os.PathLike | None = None, follow_symlinks: bool = False
) -> tuple[Any, str]:
    """
    What Pillow can open (an image, a path or a file of bytes), and the image's name for errors.

    Raises:
        ImageError: it is no image, not there, outside of `folder`, or a URL that a row, not `datasets`, gave.
    """
    if isinstance(reference, Image.Image):
        return reference, f"given as a PIL image ({reference.mode})"
    if getattr(reference, "ndim", 0) > 1:
        name = f"given as {type(reference).__name__} of shape {tuple(reference.shape)}"
        with _explained(reference, name):
            return _of_array(reference), name
    path, name = None, f"given as {type(reference).__name__}"
    if isinstance(reference, Mapping):
        path, data = reference.get("path"), reference.get("bytes")
        name = f"given by the keys {sorted(reference)}"
        reference = path if data is None else data
    if isinstance(reference, (bytes, bytearray, memoryview)):
        name = f"{os.fspath(path)!r} (embedded)" if path else "given as bytes"
        if not len(reference):
            raise ImageError(CORRUPT_IMAGE, name, "is empty (0 bytes)")
        return io.BytesIO(reference), name
    if not isinstance(reference, (str, os.PathLike)) or not os.fspath(reference):
        raise ImageError(
            BAD_ROW, name, "is not one: give a path, a PIL image, an array, bytes, or {'bytes': …, 'path': …}"
        )
    text = os.fspath(reference)
    name = repr(text) if len(text) < 200 else f"{text[:40]!r}…"
    if embedded := _EMBEDDED.match(text):
        try:
            return io.BytesIO(base64.urlsafe_b64decode(urllib.parse.unquote(text[embedded.end() :]) + "==")), name
        except ValueError as error:
            raise ImageError(CORRUPT_IMAGE, name, f"is not base64: {error}") from None
    if text.lower().startswith("file://"):
        text = urllib.request.url2pathname(urllib.parse.urlsplit(text).path)
    if "://" in text:
        if path is None or folder is not None:  # a row's own text is never followed to the network
            raise ImageError(MISSING_IMAGE, name, "is a URL: download the images first and give their paths")
        return _fetch(text, name), name
    if "\0" in text or re.search("[\ud800-\udfff]", text) and not os.path.exists(text):
        raise ImageError(MISSING_IMAGE, name, "has a name with a null byte or half of a character")
    if folder is not None:
        text = inside(text, os.fspath(folder), follow_symlinks)
    _require_file(text, name, folder)
    return text, name


def is_not_path(text: str) -> bool:
    """Whether a text in an image's place is a URL, the image itself in base64, or nothing."""
    return not text or "://" in text or _EMBEDDED.match(text) is not None


def inside(path: str, folder: str, follow_symlinks: bool) -> str:
    """
    `folder/path`.

    Raises:
        ImageError: it is not below `folder`, or, without `follow_symlinks`, not where the folder's links lead.
    """
    joined = os.path.normpath(os.path.join(folder, path))
    is_below = _is_below(os.path.abspath(joined), os.path.abspath(folder))
    if is_below if follow_symlinks else _is_below(os.path.realpath(joined), _real_folder(folder)):
        return joined
    fix = " by a symbolic link: pass follow_symlinks=True if the link is yours"
    fix = fix if is_below else ": give paths relative to it, or a folder that holds them all"
    raise ImageError(OUTSIDE_IMAGE, repr(path), f"leaves the image folder {folder!r}{fix}")


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


@functools.lru_cache(maxsize=64)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _require_file(path: str, name: str, folder) -> None:
    try:
        info = os.stat(path)
    except FileNotFoundError:
        raise ImageError(MISSING_IMAGE, name, f"is not there{where_looked(path, folder)}") from None
    except OSError as error:
        raise ImageError(MISSING_IMAGE, name, f"cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(info.st_mode):
        raise ImageError(MISSING_IMAGE, name, "is not a file")
    if info.st_size == 0:
        raise ImageError(CORRUPT_IMAGE, name, "is empty (0 bytes)")


def _fetch(url: str, name: str) -> io.BytesIO:
    """The bytes behind a URL that a `datasets` stream gave."""
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return io.BytesIO(file.read())
    except Exception as error:  # each protocol has its own
        raise ImageError(MISSING_IMAGE, name, f"cannot be read: {error}") from error


def open_image(source: Any, name: str) -> Image.Image:
    """An image, or a file that Pillow opens, as an upright image of mode RGB. ImageError if it is damaged."""
    with _explained(source, name), contextlib.ExitStack() as stack:
        image = source if isinstance(source, Image.Image) else stack.enter_context(Image.open(source))
        check_size(image)
        return to_rgb(upright(image))


def open_size(source: Any, name: str) -> tuple[int, int]:
    """
    `(width, height)` in pixels from the file's header, before the EXIF orientation. A JPEG or PNG without its end marker
    is decoded after all, since it is most likely cut off.
    """
    if isinstance(source, Image.Image):
        return source.size
    with _explained(source, name), Image.open(source) as image:
        check_size(image)
        size = image.size
        if image.format in _END_MARKERS and _END_MARKERS[image.format] not in _ends(source)[1]:
            image.load()
        return size


@contextlib.contextmanager
def _explained(source: Any, name: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # the plug-ins of Pillow raise a dozen types on broken files
        raise ImageError(CORRUPT_IMAGE, name, _why_unreadable(error, source)) from error


def _why_unreadable(error: Exception, source: Any) -> str:
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"has more pixels than Pillow opens ({error}). If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS"
    if isinstance(error, UnidentifiedImageError):
        head = _ends(source)[0]
        kind = next((kind for mark, kind in _OTHER_FORMATS.items() if mark in head), None)
        hint = f". That is {kind}: save it as PNG or JPEG" if kind else ""
        if not kind and head.lstrip()[:1] == b"<":
            hint = ". That looks like a web page saved in the image's place: download it again"
        return f"is not an image: it begins with {head!r}{hint}"
    if isinstance(error, PermissionError):
        return "may not be read by this user"
    if "truncated" in str(error).lower() or isinstance(error, EOFError):
        return f"is cut off ({error}): copy or download it again"
    return f"cannot be decoded ({type(error).__name__}: {error})"


def _ends(source: Any) -> tuple[bytes, bytes]:
    """The first 24 and the last 4,096 bytes; cameras and editors write a few more after the end marker."""
    with io.BytesIO(source.getvalue()) if isinstance(source, io.BytesIO) else open(source, "rb") as file:
        head = file.read(24)
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        return head, file.read()


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


# Pixels


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
        is_deep = mode != "I" or image.format in ("PNG", "PPM")  # another 32-bit file does not say its range
        return Image.fromarray(_eight_bits(np.asarray(image), is_deep)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _of_array(values: Any) -> Image.Image:
    """An array or a tensor `[H, W]`, `[H, W, channels]` or `[channels, H, W]` as an image."""
    if hasattr(values, "detach"):  # NumPy has no bfloat16
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    if values.ndim == 3 and values.shape[0] in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    values = values.squeeze(2) if values.shape[2:] == (1,) else values
    return Image.fromarray(np.ascontiguousarray(_eight_bits(values)))


def _eight_bits(values: np.ndarray, is_deep: bool = False) -> np.ndarray:
    """Values of 1, 8, 16 (`is_deep`, or above 255) or 32 bits or floating point as uint8. Pillow would clip them."""
    low, high = values.min(), values.max()
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * 255
    if values.dtype.kind == "f":
        if not np.isfinite([low, high]).all() or low < 0 or high > 255:
            raise ValueError(
                f"floating-point values from {low:g} to {high:g}: 0 to 1 or 0 to 255 would have a meaning"
            )
        return np.rint(values * 255 if high <= 1 else values).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(f"integer values from {low} to {high}: 0 to 65535 would have a meaning")
    if high <= 255 and not is_deep:
        return values.astype(np.uint8)
    return (values.astype(np.uint32) >> 8).astype(np.uint8)


# Paths that are not there


def where_looked(path: str, folder: str | os.PathLike | None = None) -> str:
    """The end of an error's sentence about a missing path, and the sentence about what was probably meant."""
    where = "" if os.path.isabs(path) else f" (looked in {os.getcwd()!r})"
    if folder is not None:
        where, path = f" in the image folder {os.fspath(folder)!r}", os.path.relpath(path, folder)
    near = _near_path(path, folder or "")
    if near is not None:
        looks_alike = unicodedata.normalize("NFC", near) == unicodedata.normalize("NFC", path)
        return f"{where}. There is {ascii(near) if looks_alike else repr(near)} instead"
    return f"{where}{'. Write / in place of its backslashes' if chr(92) in path else ''}"


def _near_path(path: str, folder: str | os.PathLike) -> str | None:
    """
    The path, relative to `folder` if that is not empty, that is there when case, backslashes, the form of Unicode
    characters and the suffix do not count.
    """
    found = os.path.join(folder, "")
    for part in path.replace("\\", "/").split("/"):
        if part and not os.path.lexists(found + part):
            names = _names(found or ".", os.stat(found or ".").st_mtime_ns) if os.path.isdir(found or ".") else {}
            part = names.get(_plain(part)) or names.get(_plain(os.path.splitext(part)[0]) + ".")
            if part is None:
                return None
        found += part + "/"
    return found[len(os.path.join(folder, "")) : -1]


@functools.lru_cache(maxsize=8)
def _names(folder: str, changed: int) -> dict[str, str]:
    """The names in a folder by their plain form, and by their stem and a dot."""
    names = sorted(os.listdir(folder)) if os.access(folder, os.R_OK) else []
    return {_plain(os.path.splitext(name)[0]) + ".": name for name in names} | {_plain(name): name for name in names}


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
