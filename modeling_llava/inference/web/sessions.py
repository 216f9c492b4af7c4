"""The browser tabs, each with a chat of its own, and their uploads."""

import io
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ...io.images import read_image
from ..chat import Chat, Conversation, NamedImage


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Recognized by content. Not EPS, for example, for which Pillow starts a program."""


class Tab:
    """A browser tab: its [`Chat`], and the upload that the chat is about."""

    def __init__(self, chat: Chat):
        self.chat = chat
        self.shown: Path | None = None
        self._lock = threading.Lock()

    def look(self, path: Path | None, max_pixels: int) -> bool:
        """
        Starts a conversation about an upload, unless the conversation is about it already. Returns whether it did.

        Raises:
            ValueError: as [`read_upload`]; the earlier conversation ends too, and there is no image.
        """
        with self._lock:
            if path == self.shown:
                return False
            self.chat.stop()
            self.shown = path
            self.chat.conversation = Conversation()
            self.chat.show([] if path is None else [read_upload(path, max_pixels)])
            return True

    def reset(self) -> None:
        """Starts a new conversation about the same image."""
        with self._lock:
            self.chat.stop()
            self.chat.reset()


class Sessions:
    """
    The [`Tab`]s of one model, by key. The most recent tabs keep their image encoded; others keep their conversation, and their
    image is encoded again with the next question.

    Args:
        make_chat (`Callable[[], Chat]`): Makes a tab's chat.
        max_encoded (`int`, defaults to 4): Tabs that keep their image encoded (7B in 16 bits: 0.3 GB each, plus their
            conversation).
        max_sessions (`int`, defaults to 256): Tabs that are kept; the least recent is dropped.
    """

    def __init__(self, make_chat: Callable[[], Chat], max_encoded: int = 4, max_sessions: int = 256):
        self.make_chat, self.max_encoded, self.max_sessions = make_chat, max_encoded, max_sessions
        self._tabs: OrderedDict[str, Tab] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: str) -> bool:
        return key in self._tabs

    def __getitem__(self, key: str) -> Tab:
        """The tab of that key; a new one if there is none."""
        with self._lock:
            if key not in self._tabs:
                self._tabs[key] = Tab(self.make_chat())
            self._tabs.move_to_end(key)
            while len(self._tabs) > self.max_sessions:
                self._tabs.popitem(last=False)
            tab, waiting = self._tabs[key], list(self._tabs.values())[: -self.max_encoded]
        for other in waiting:
            if other.chat.encoded and not other.chat.answering:
                other.chat.release()
        return tab


def read_upload(path: Path, max_pixels: int) -> NamedImage:
    """
    Reads an uploaded image. Format and size are checked before anything is decoded.

    Raises:
        ValueError: not an image of `FORMATS`, more pixels than allowed, or damaged.
    """
    content = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                pixels = image.width * image.height
    except Image.DecompressionBombError:
        raise ValueError(f"{path.name} has far more than {max_pixels / 1e6:.1f} million pixels.") from None
    except (OSError, SyntaxError, ValueError):  # what Pillow's readers raise on broken headers
        raise ValueError(f"{path.name} is not an image of the formats {', '.join(FORMATS)}.") from None
    if pixels > max_pixels:
        raise ValueError(f"{path.name} has {pixels / 1e6:.1f} million pixels; the limit is {max_pixels / 1e6:.1f}.")
    try:
        read_image(content)
    except ValueError:
        raise ValueError(f"{path.name} is damaged: its header is that of an image, the rest cannot be read.") from None
    return NamedImage(path.name, content)  # not decoded, which would take ten times the memory while the tab is open
