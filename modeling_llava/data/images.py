"""From a sample's image reference to an upright RGB image, or to one clear error that names the sample."""

import functools
import hashlib
import io
import os
import stat
from collections.abc import Mapping
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..io.images import EMBEDDED, check_size, embedded_or_path, open_upright
from ..io.paths import where_looked
from .schema import BAD_ROW, CORRUPT_IMAGE, MISSING_IMAGE, OUTSIDE_IMAGE, BadSampleError


_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_LONGEST_PATH = 4_096  # characters: what file systems allow
_OTHER_FORMATS = {
    b"%PDF": "a PDF",
    b"<svg": "a drawing (SVG)",
    b"ftyphei": "HEIC",
    b"ftypmif1": "HEIC",
    b"PK\x03\x04": "an archive",
}
"""What a file that Pillow does not open has among its first bytes → what it is."""


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
            A path, a `file` or `data` URL, base64 text, an image (left as it is), the bytes of an image file, or
            `{"bytes", "path"}`.
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
        return open_upright(source)
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
            check_size(image)
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
    return not reference or "://" in reference or EMBEDDED.match(reference) is not None


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
    try:
        reference = embedded_or_path(os.fspath(reference))
    except ValueError as error:
        raise BadSampleError(
            sample_id, CORRUPT_IMAGE, f"has the image {name[:40]}…, which is not base64: {error}."
        ) from None
    if isinstance(reference, bytes):
        return io.BytesIO(reference), f"{name[:40]}…"
    if len(name) > _LONGEST_PATH:
        raise BadSampleError(
            sample_id,
            MISSING_IMAGE,
            f"has the image {name[:40]}…, which cannot be opened: these {len(name) - 2:,} characters are neither a path "
            "nor an image in base64.",
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
        fix = "pass follow_symlinks=True if the link is yours" if how else "give paths relative to it"
        raise BadSampleError(
            sample_id, OUTSIDE_IMAGE, f"has the image {path!r}, which leaves the image folder {folder!r}{how}: {fix}."
        )
    return joined


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder if folder.endswith(os.sep) else folder + os.sep)


def _require_file(path: str, name: str, image_folder, sample_id: str) -> None:
    where = "" if image_folder is None else f" in the image folder {os.fspath(image_folder)!r}"
    try:
        info = os.stat(path)
    except FileNotFoundError:
        where = where_looked(path, image_folder)
        raise BadSampleError(sample_id, MISSING_IMAGE, f"has the image {name}, which is not there{where}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
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


__all__ = ["image_key", "is_no_path", "load_image", "read_image_size"]
