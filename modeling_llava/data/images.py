"""From a sample's image reference to an upright RGB image, or to one clear error that names the sample."""

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from ..io.images import ImageError, find_image, open_image, open_size
from .schema import BadSampleError


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
            A path, a `file` or `data` URL, base64 text, an image, the bytes of an image file, or `{"bytes", "path"}`.
        image_folder (`str`, *optional*): Paths are relative to it and must not leave it.
        sample_id (`str`, *optional*): For the error.
        follow_symlinks (`bool`, defaults to `False`): Allow links inside `image_folder` to lead out of it.

    Returns:
        `PIL.Image.Image` of mode RGB.

    Raises:
        BadSampleError: The image is missing, outside the folder, or cannot be read.
    """
    return _read(open_image, reference, image_folder, sample_id, follow_symlinks)


def read_image_size(
    reference: Any,
    image_folder: str | os.PathLike | None = None,
    sample_id: str = "",
    *,
    follow_symlinks: bool = False,
) -> tuple[int, int]:
    """`(width, height)` in pixels from the file's header. Arguments and errors as in [`load_image`]."""
    return _read(open_size, reference, image_folder, sample_id, follow_symlinks)


def _read(read: Callable, reference: Any, folder, sample_id: str, follow_symlinks: bool) -> Any:
    try:
        return read(*find_image(reference, folder, follow_symlinks))
    except ImageError as error:
        raise BadSampleError.of_image(sample_id, error) from error.__cause__


def image_key(reference: Any) -> tuple:
    """A hashable that is equal for two references to the same image: by path, by bytes, or by object."""
    if isinstance(reference, Mapping):
        reference = reference["bytes"] if reference.get("bytes") is not None else reference.get("path")
    if isinstance(reference, (bytes, bytearray, memoryview)):
        return "bytes", hashlib.blake2b(reference, digest_size=16).digest()
    if isinstance(reference, (str, os.PathLike)):
        return "path", os.path.normpath(reference)
    return "object", id(reference)
