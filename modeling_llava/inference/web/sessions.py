"""Who talks to the model through the browser, and what they may upload."""

import io
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ...data.images import load_image
from ...data.schema import BadSampleError
from ..chat import Chat, Conversation
from ..image_references import Picture


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What a browser shows and Pillow decodes by itself, told by a file's content. Not, for one, EPS, which starts a program."""


class Tab:
    """
    One browser tab: its chat, and which upload the chat is about.

    Args:
        chat ([`Chat`]): Of its own.
    """

    def __init__(self, chat: Chat):
        self.chat = chat
        self.shown: Path | None = None
        self._lock = threading.Lock()

    def look(self, path: Path | None, max_bytes: int, max_pixels: int) -> bool:
        """
        Begins a conversation about an upload, unless it is about it already.

        Returns:
            `bool`: whether it was begun.

        Raises:
            ValueError: as [`read_upload`]; the conversation before is over all the same, and there is no picture.
        """
        with self._lock:
            if path == self.shown:
                return False
            self.chat.stop()
            self.shown = path
            self.chat.conversation = Conversation()
            self.chat.show([] if path is None else [read_upload(path, max_bytes, max_pixels)])
            return True

    def reset(self) -> None:
        """Begins a new conversation about the same picture."""
        with self._lock:
            self.chat.stop()
            self.chat.reset()


class Sessions:
    """
    The [`Tab`]s, by their keys, over one model.

    A picture's keys and values stay in memory for the tabs that asked last; those that wait longer keep their conversation,
    and their picture is encoded again with their next question.

    Args:
        make_chat (`Callable[[], Chat]`): Makes a tab's chat.
        max_encoded (`int`, defaults to 4): Tabs whose pictures stay encoded (7B in 16 bits: 0.3 GB each, and more as they
            talk).
        max_sessions (`int`, defaults to 256): Tabs that are remembered at all.
    """

    def __init__(self, make_chat: Callable[[], Chat], max_encoded: int = 4, max_sessions: int = 256):
        self.make_chat, self.max_encoded, self.max_sessions = make_chat, max_encoded, max_sessions
        self._tabs: OrderedDict[str, Tab] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tabs)

    def __getitem__(self, key: str) -> Tab:
        """The tab of that key, made if it is new."""
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

    def leave(self, key: str) -> None:
        """A tab was closed, or its machine sleeps: an answer that is being written ends; the conversation is kept."""
        with self._lock:
            tab = self._tabs.get(key)
        if tab is not None:
            tab.chat.stop()


def read_upload(path: Path, max_bytes: int, max_pixels: int) -> Picture:
    """
    Read an uploaded picture. Its format and its size are looked at before anything is decoded.

    Raises:
        ValueError: not a picture of `FORMATS`, more bytes or pixels than allowed, or damaged.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path.name} has {size / 2**20:.1f} MiB; at most {max_bytes / 2**20:.1f} are taken.")
    content = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                pixels = image.width * image.height
    except Image.DecompressionBombError:
        raise ValueError(f"{path.name} has far more than {max_pixels / 1e6:.1f} million pixels.") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):  # what Pillow's readers raise on broken headers
        raise ValueError(f"{path.name} is not a picture of the kinds {', '.join(FORMATS)}.") from None
    if pixels > max_pixels:
        raise ValueError(
            f"{path.name} has {pixels / 1e6:.1f} million pixels; at most {max_pixels / 1e6:.1f} are taken."
        )
    try:
        load_image(content)
    except BadSampleError:
        raise ValueError(f"{path.name} is damaged: its beginning is a picture, the rest cannot be read.") from None
    return Picture(
        path.name, content
    )  # as it was sent: a decoded one takes ten times as much for as long as a tab is open


__all__ = ["FORMATS", "Sessions", "Tab", "read_upload"]
