"""What a person types, pastes or drags where an image is asked for: paths in every terminal's spelling, and URLs."""

import os
import re
import urllib.parse
from dataclasses import dataclass

from PIL import Image

from ..data.images import load_image
from ..data.schema import BadSampleError
from ..io.images import download


SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic")

_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


@dataclass(frozen=True)
class NamedImage:
    """An image and what the person calls it.

    Attributes:
        name (`str`): Path or URL; for an upload, the file's name.
        image (`PIL.Image.Image` or `bytes`): Upright, RGB; or the bytes of an image file, where many are kept.
    """

    name: str
    image: Image.Image | bytes


def split_references(text: str, windows: bool = os.name == "nt") -> list[str]:
    """
    The paths and URLs of a line, as terminals and file managers write them when a file is dragged or pasted.

    Quotes, `file://` URLs, PowerShell's `& '…'` and `~` are taken off; `\\ ` is a space, but a backslash in a Windows path
    is a backslash. A line that is the path of a file as it stands is one path, whatever it holds.

    Args:
        text (`str`): One line.
        windows (`bool`, *optional*): Whether every backslash parts folders; by default, as on this machine.

    Example:

    ```python
    >>> split_references(r"'my cat.jpg' /home/me/a\\ dog.png file:///home/me/a%20bird.png")
    ['my cat.jpg', '/home/me/a dog.png', '/home/me/a bird.png']
    ```"""
    text = text.strip().removeprefix("& ").strip()
    if os.path.isfile(_clean(text)):
        return [_clean(text)]
    words, word, quote, begun = [], "", "", False
    characters = iter(text)
    for character in characters:
        if quote:
            quote, word = ("", word) if character == quote else (quote, word + character)
        elif character in "'\"":
            quote, begun = character, True
        elif character.isspace():
            if begun:
                words.append(word)
            word, begun = "", False
        elif character == "\\" and not windows and not re.match(r"[A-Za-z]:", word):
            word, begun = word + next(characters, "\\"), True
        else:
            word, begun = word + character, True
    if quote:  # an apostrophe in a name
        return [_clean(part) for part in text.split()]
    return [_clean(part) for part in [*words, word] if part]


def are_images(text: str) -> bool:
    """
    Whether a line holds nothing but images, so that it need not be asked about: URLs, files with an image's ending,
    or paths (with a folder) that end as an image's would.
    """
    if "\n" in text.strip():
        return False
    references = split_references(text)
    return bool(references) and all(
        is_url(reference)
        or reference.lower().endswith(SUFFIXES)
        and (os.path.isfile(reference) or os.path.dirname(reference) or _DRIVE.match(reference))
        for reference in references
    )


def is_url(reference: str) -> bool:
    return reference.lower().startswith(("http://", "https://"))


def read_image(reference: str) -> NamedImage:
    """
    Read one image from a path or an `http(s)` URL.

    Raises:
        ValueError: it is not there, not an image, damaged, too large, or cannot be downloaded; in one line.
    """
    reference = reference if is_url(reference) else _clean(reference)
    if not reference.strip():
        raise ValueError("An image's path is empty.")
    if "://" in reference and not is_url(reference):
        raise ValueError(f"{reference} is neither a path nor an http(s) URL.")
    try:
        return NamedImage(reference, load_image(download(reference) if is_url(reference) else reference))
    except BadSampleError as error:
        raise ValueError(_about(reference, error.message)) from None


def _about(reference: str, message: str) -> str:
    """The collator's sentence about a sample, as one about a file."""
    for name in (repr(reference), "an embedded image"):
        found = message.removeprefix(f"has the image {name}, which ")
        if found != message:
            here = f" (looked in {os.getcwd()})" if found == "is not there." and not os.path.isabs(reference) else ""
            return f"{reference} {found.rstrip('.')}{here}."
    return f"{reference}: {message}"


def _clean(word: str) -> str:
    if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"":
        word = word[1:-1]
    if word.lower().startswith("file://"):
        path = urllib.parse.unquote(urllib.parse.urlsplit(word.replace("\\", "/")).path)
        word = path[1:] if re.match(r"/[A-Za-z]:", path) else path
    word = os.path.expanduser(word)
    if os.name != "nt" and _DRIVE.match(word) and os.path.isdir(f"/mnt/{word[0].lower()}"):  # Linux under Windows
        word = f"/mnt/{word[0].lower()}/" + word[3:].replace("\\", "/")
    return word


__all__ = ["NamedImage", "are_images", "is_url", "read_image", "split_references"]
