"""From an image reference to an upright RGB picture, or to one clear error that names the sample."""

import functools
import hashlib
import io
import os
import stat
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .schema import BAD_ROW, CORRUPT_IMAGE, MISSING_IMAGE, OUTSIDE_IMAGE, BadSampleError


_ORIENTATION = 0x0112  # EXIF tag
_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
# A picture this long would take gigabytes once it is padded to a square or resized by its shorter side.
_LONGEST_SIDE = 65_535  # pixels: the most that a JPEG holds
_LONGEST_RATIO = 1_000
_LONGEST_PATH = 4_096  # characters: what file systems allow
_OTHER_FORMATS = {
    b"%PDF": "a PDF",
    b"<svg": "a drawing (SVG)",
    b"ftyphei": "HEIC",
    b"ftypmif1": "HEIC",
    b"PK\x03\x04": "an archive",
}
"""What a file that Pillow does not open has among its first bytes → what it is."""
_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".JPG", ".JPEG", ".PNG")


def load_image(
    reference: Any,
    image_folder: str | os.PathLike | None = None,
    sample_id: str = "",
    *,
    follow_symlinks: bool = False,
) -> Image.Image:
    """
    Read one image.

    The file's content decides its format, not its name. The EXIF orientation is applied, as transformers does (the
    original code ignored it); transparency is laid on white; of an animation the first frame is taken; 16-bit values
    are divided by 256; CMYK, palettes, grey and 1-bit images are converted.

    Args:
        reference (`str`, `PIL.Image.Image`, `bytes` or `dict`):
            A path, an image (left as it is), the bytes of an image file, or `{"bytes", "path"}`.
        image_folder (`str`, *optional*):
            Paths are relative to it and must not leave it, by `..`, as absolute paths, or by a symbolic link.
        sample_id (`str`, *optional*): For the error.
        follow_symlinks (`bool`, defaults to `False`): Allow links inside `image_folder` to lead out of it.

    Returns:
        `PIL.Image.Image` of mode RGB.

    Raises:
        BadSampleError: The image is missing, outside the folder, or cannot be read.
    """
    source, name = _locate(reference, image_folder, sample_id, follow_symlinks)
    try:
        if isinstance(source, Image.Image):
            _check_size(source)
            return _upright_rgb(source)
        with Image.open(source) as image:
            _check_size(image)
            return _upright_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # the plug-ins of Pillow raise a dozen types on broken files
        raise _unreadable(error, source, name, sample_id) from error


def read_image_size(
    reference: Any,
    image_folder: str | os.PathLike | None = None,
    sample_id: str = "",
    *,
    follow_symlinks: bool = False,
) -> tuple[int, int]:
    """
    `(width, height)` in pixels from the file's header, before the EXIF orientation; nothing is decoded.

    A JPEG or PNG without its end marker is decoded after all, since it is most likely cut off. Arguments and errors as
    in [`load_image`].
    """
    source, name = _locate(reference, image_folder, sample_id, follow_symlinks)
    if isinstance(source, Image.Image):
        return source.size
    try:
        with Image.open(source) as image:
            _check_size(image)
            size = image.size
            if image.format in _END_MARKERS and not _ends_with(source, _END_MARKERS[image.format]):
                image.load()
            return size
    except MemoryError:
        raise
    except Exception as error:
        raise _unreadable(error, source, name, sample_id) from error


def image_key(reference: Any) -> tuple:
    """A hashable that is equal for two references to the same image: by path, by bytes, or by object."""
    if isinstance(reference, Mapping):
        reference = reference["bytes"] if reference.get("bytes") is not None else reference.get("path")
    if isinstance(reference, (bytes, bytearray, memoryview)):
        return "bytes", hashlib.blake2b(reference, digest_size=16).digest()
    if isinstance(reference, (str, os.PathLike)):
        return "path", os.path.normpath(reference)
    return "object", id(reference)


def is_no_path(reference: str) -> bool:
    """Whether a text in an image's place is a URL, the image itself in base64, or nothing."""
    return not reference or "://" in reference or reference.startswith("data:")


def _locate(reference, image_folder, sample_id: str, follow_symlinks: bool) -> tuple[Any, str]:
    """What Pillow can open, and the image's name for errors."""
    if isinstance(reference, Image.Image):
        return reference, f"given as a PIL image ({reference.mode})"
    path = keys = None
    if isinstance(reference, Mapping):
        keys, path, reference = list(reference), reference.get("path"), reference.get("bytes")
        if reference is None:
            reference = path
    if isinstance(reference, (bytes, bytearray, memoryview)):
        name = f"{os.fspath(path)!r} (embedded)" if path else "an embedded image"
        if not len(reference):
            raise BadSampleError(sample_id, CORRUPT_IMAGE, f"has the image {name}, which is empty (0 bytes).")
        return io.BytesIO(reference), name
    if not isinstance(reference, (str, os.PathLike)) or not os.fspath(reference):
        what = f"reference of type {type(reference).__name__}"
        if isinstance(reference, str):
            what = "path of no characters"
        elif keys is not None:
            what = f"with neither 'bytes' nor 'path' (its keys are {keys})"
        raise BadSampleError(
            sample_id,
            BAD_ROW,
            f"has an image {what}: give a path, a PIL image, bytes, or {{'bytes': …, 'path': …}}.",
        )
    name = repr(os.fspath(reference))
    if os.fspath(reference).startswith("data:") or len(name) > _LONGEST_PATH:
        raise BadSampleError(
            sample_id,
            MISSING_IMAGE,
            f"has the image {name[:40]}…, which cannot be opened: these {len(name) - 2:,} characters are no path. If they "
            "are the image itself, in base64, give its bytes: base64.b64decode(text), without what stands before a comma.",
        )
    if "://" in os.fspath(reference):
        return _fetch(os.fspath(reference), path is not None, image_folder, sample_id), name
    path = os.fspath(reference)
    try:
        is_path = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:  # half of an emoji, which JSON can write
        is_path = False
    if not is_path:
        raise BadSampleError(
            sample_id, MISSING_IMAGE, f"has the image {name}, whose name holds a null byte or half of a character."
        )
    if image_folder is not None:
        path = _inside(path, os.fspath(image_folder), sample_id, follow_symlinks)
    _require_file(path, name, image_folder, sample_id)
    return path, name


def _fetch(url: str, from_datasets: bool, image_folder, sample_id: str) -> io.BytesIO:
    """The bytes behind a URL that a `datasets` stream gave; a row's own text is never followed to the network."""
    if not from_datasets or image_folder is not None:
        raise BadSampleError(
            sample_id, MISSING_IMAGE, f"has the image {url!r}, a URL: download the images first and give their paths."
        )
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return io.BytesIO(file.read())
    except Exception as error:  # each protocol has its own
        raise BadSampleError(
            sample_id, MISSING_IMAGE, f"has the image {url!r}, which cannot be read: {error}"
        ) from error


@functools.lru_cache(maxsize=64)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _inside(path: str, folder: str, sample_id: str, follow_symlinks: bool) -> str:
    """`folder/path`, if that is inside `folder`."""
    joined = os.path.normpath(os.path.join(folder, path))
    real_folder = _real_folder(folder)
    if follow_symlinks:
        inside = _is_below(os.path.abspath(joined), os.path.abspath(folder))
        how = ""
    else:
        inside = _is_below(os.path.realpath(joined), real_folder)
        how = "" if not _is_below(os.path.abspath(joined), os.path.abspath(folder)) else ", by a symbolic link"
    if not inside:
        mend = "pass follow_symlinks=True if the link is yours" if how else "give paths relative to it"
        raise BadSampleError(
            sample_id, OUTSIDE_IMAGE, f"has the image {path!r}, which leaves the image folder {folder!r}{how}: {mend}."
        )
    return joined


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder if folder.endswith(os.sep) else folder + os.sep)


def _require_file(path: str, name: str, image_folder, sample_id: str) -> None:
    where = "" if image_folder is None else f" in the image folder {os.fspath(image_folder)!r}"
    try:
        info = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        stem = os.path.splitext(path)[0]
        others = [
            stem + suffix for suffix in _SUFFIXES if isinstance(error, OSError) and os.path.exists(stem + suffix)
        ]
        hint = f" There is {os.path.basename(others[0])!r} instead." if others else ""
        if isinstance(error, FileNotFoundError):
            raise BadSampleError(
                sample_id, MISSING_IMAGE, f"has the image {name}, which is not there{where}.{hint}"
            ) from None
        raise BadSampleError(
            sample_id, MISSING_IMAGE, f"has the image {name}, which cannot be opened: {error}."
        ) from error
    if not stat.S_ISREG(info.st_mode):
        raise BadSampleError(sample_id, MISSING_IMAGE, f"has the image {name}{where}, which is not a file.")
    if info.st_size == 0:
        raise BadSampleError(sample_id, CORRUPT_IMAGE, f"has the image {name}{where}, which is empty (0 bytes).")


def _unreadable(error: Exception, source: Any, name: str, sample_id: str) -> BadSampleError:
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        what = f"has more pixels than Pillow opens ({error}). If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS"
    elif isinstance(error, UnidentifiedImageError):
        head = _first_bytes(source)
        what = f"is not an image: it begins with {head!r}"
        kind = next((kind for mark, kind in _OTHER_FORMATS.items() if mark in head), None)
        if kind is not None:
            what += f". That is {kind}: save it as PNG or JPEG"
        elif head.lstrip()[:1] == b"<":
            what += ". That looks like a web page saved in the image's place: download it again"
    elif isinstance(error, PermissionError):
        what = "may not be read by this user"
    elif "truncated" in str(error) or isinstance(error, (EOFError,)):
        what = f"is cut off ({error}): copy or download it again"
    else:
        what = f"cannot be decoded ({type(error).__name__}: {error})"
    return BadSampleError(sample_id, CORRUPT_IMAGE, f"has the image {name}, which {what}.")


def _first_bytes(source: Any) -> bytes:
    if isinstance(source, io.BytesIO):
        return source.getvalue()[:24]
    with open(source, "rb") as file:
        return file.read(24)


def _ends_with(source: Any, marker: bytes) -> bool:
    """Whether the end marker is among the last bytes; cameras and editors write a few more after it."""
    if isinstance(source, io.BytesIO):
        return marker in source.getvalue()[-4096:]
    with open(source, "rb") as file:
        file.seek(max(0, os.path.getsize(source) - 4096))
        return marker in file.read()


def _check_size(image: Image.Image) -> None:
    short, long = sorted(image.size)
    if not short:
        raise ValueError(f"it has {image.width}×{image.height} pixels, none")
    if long > _LONGEST_SIDE or long > _LONGEST_RATIO * short:
        raise ValueError(f"{image.width}×{image.height} pixels are too long and thin to be a picture")


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if _orientation(image) > 1:
        image = ImageOps.exif_transpose(image)
    return _to_rgb(image)


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


def _to_rgb(image: Image.Image) -> Image.Image:
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


__all__ = ["image_key", "is_no_path", "load_image", "read_image_size"]
