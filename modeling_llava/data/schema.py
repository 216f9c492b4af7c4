"""
One conversation, in one form, whatever it was read from.

Every source row becomes a plain dict (see [`Conversation`]); everything after this file reads that form only. What is
wrong with a row is found here, by one check, and said in one sentence that names the sample.
"""

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from PIL import Image

from ..constants import IMAGE_TOKEN
from ..io.images import (
    BAD_ROW,
    CORRUPT_IMAGE,
    MISSING_IMAGE,
    OUTSIDE_IMAGE,
    ImageError,
    find_image,
    open_image,
    open_size,
)
from ..text.chat_templates import as_list, is_absent, plain_messages, turn_weight


logger = logging.getLogger(__name__)

# The reasons for which a sample can be bad, as they appear in counts and reports; those of images are in io/images.py.
BAD_ROLES = "roles out of order"
EMPTY_ANSWER = "empty answer"
BAD_MARKERS = "image markers do not match images"
UNREAD_IMAGE = "image or video that is not read"
TOO_LONG = "too long"
NOTHING_SUPERVISED = "nothing supervised"
REASONS = (
    BAD_ROW, BAD_ROLES, EMPTY_ANSWER, BAD_MARKERS, UNREAD_IMAGE, MISSING_IMAGE, OUTSIDE_IMAGE, CORRUPT_IMAGE, TOO_LONG,
    NOTHING_SUPERVISED,
)  # fmt: skip

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot"), "assistant"),
    "system": "system",
}
_SYSTEM_KEYS = ("system", "system_prompt", "system_message")
_MEMBER = re.compile(r"(.*\.)?(jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)
"""The key of an image in a WebDataset's sample."""

_OTHER_IMAGE_KEYS = (
    *("image_path", "image_paths", "image_file", "image_files", "image_url", "image_urls", "img", "imgs", "img_path"),
    *("file_name", "picture", "pictures", "photo", "photos"),
)
"""Read as images where there is neither `image` nor `images`; the last line where a value looks like one."""
_READ_KEYS = {"id", "type", "conversations", "messages", "role", "content"}
NEITHER_ROW = "neither a LLaVA row ('conversations') nor an HF row ('messages')"
_VIDEO_TOKEN = "<video>"
_MEDIUM = re.compile(
    r"data:(image|video)/|.*\.(jpe?g|png|gif|webp|bmp|tiff?|avif|heic|mp4|m4v|mov|avi|mkv|webm)([?#].*)?\Z",
    re.IGNORECASE,
)
"""A path or URL of an image or a video."""

# JSON can write them, but no tokenizer takes them.
_SURROGATE = re.compile("[\ud800-\udfff]")


class Conversation(TypedDict):
    """
    The form that all of `modeling_llava.data` works on.

    `id` (`str`): what errors and reports call this sample; the row number where the source has none.
    `messages` (`list[dict]`): `{"role": "system" | "user" | "assistant", "content": [item, …]}` with items
        `{"type": "image"}` and `{"type": "text", "text": str}`; an optional system message, then user and assistant in
        turn, the last one an assistant. The i-th image item is filled by the i-th of `images`.
    `images` (`list`): undecoded references: a path, a `PIL.Image`, or `{"bytes": bytes | None, "path": str | None}`.
    `type` (`str`, *optional*): conversation, detail or complex (LLaVA §3), or any other name to weight by.
    """

    id: str
    messages: list[dict]
    images: list[Any]
    type: str | None


PLACEHOLDER_SAMPLE: Conversation = {"id": "nothing", "messages": [], "images": []}
"""Stands for a sample that is not there, where processes must have equally many: nothing is learned from it."""


class BadSampleError(ValueError):
    """
    A sample that cannot be used.

    Args:
        sample_id (`str`): The sample.
        reason (`str`): One of `REASONS`, for counting.
        message (`str`): What is wrong and how to fix it, as the rest of a sentence that begins with the sample's name.
    """

    def __init__(self, sample_id: str, reason: str | None = None, message: str | None = None):
        if message is None:
            # A DataLoader raises a worker's error again from one text, which ends in the error's own line.
            super().__init__(sample_id.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())
            sample_id = ""
        else:
            super().__init__(f"sample {sample_id!r} {message}")
        self.sample_id = sample_id
        self.reason = reason
        self.message = message

    @classmethod
    def of_image(cls, sample_id: str, error: ImageError) -> "BadSampleError":
        return cls(sample_id, error.reason, f"has the image {error.name}, which {error.what}.")

    def __reduce__(self):  # an exception of three arguments crosses process borders only with this
        return type(self), (self.sample_id, self.reason, self.message) if self.message is not None else self.args


def from_row(row: Mapping, index: int | str = 0, type: str | None = None) -> Conversation:
    """
    Read a row of LLaVA's JSON, `{"id", "image": str | list, "conversations": [{"from", "value"}]}`, of the HF form,
    `{"messages": [{"role", "content": str | list}], "images": list}`, of any mixture of the two, or of a WebDataset.

    `<image>` in a user's text marks an image where the row has images; in an answer it is text. A content that is a list
    holds its images as items, and `<image>` in its texts is text. Where the row has no `images`, each image item holds its
    own: `{"type": "image", "image" | "path" | "url": …}`, or as OpenAI does: `{"type": "image_url", "image_url": {"url": …}}`.
    A `system` prompt of the row becomes the first message; a turn whose `weight`, `loss` or `train` is 0 is not learned.

    Args:
        row (`Mapping`):
            The row. `image` (or `images`, or a common name such as `image_path`) is a path, a `PIL.Image`, an array, a
            `{"bytes", "path"}`, or a list. Image items with an `index` name the image that stands there.
        index (`int` or `str`): The row's number (from 0), its `id` if it has none.
        type (`str`, *optional*): The type of a row that names none.

    Raises:
        BadSampleError: Unknown role, roles out of order, an empty answer, markers that do not match the images, or an
            image or a video under a key that is not read.
    """
    if not isinstance(row, Mapping):
        raise BadSampleError(str(index), BAD_ROW, f"is {NEITHER_ROW}: {_short(row)}.")
    row = {key: None if is_absent(value) else value for key, value in _of_webdataset(row).items()}
    sample_id = str(index if row.get("id") is None else row["id"])
    try:
        messages, images = _read(row)
        type = _checked(messages, row.get("type") or type)
        messages = _with_system(row, messages)
    except _Bad as error:
        raise BadSampleError(sample_id, *error.args) from None
    require_an_image_for_each_place(sample_id, messages, images)
    return {"id": sample_id, "messages": messages, "images": images, "type": type}


from_llava_row = from_messages_row = from_row


class _Bad(Exception):
    """Reason and message of a [`BadSampleError`] whose sample is known further up."""


def _read(row: Mapping) -> tuple[list[dict], list]:
    """The messages and the image references of a row."""
    key = next((key for key in ("conversations", "messages") if row.get(key) is not None), None)
    if key is None:
        raise _Bad(BAD_ROW, f"is {NEITHER_ROW}: its keys are {sorted(row)}.")
    turns = plain_messages(row[key])
    if not isinstance(turns, list):
        raise _Bad(BAD_ROW, f"has {key!r} that are not a list: {_short(turns)}.")
    images, own, places, messages = _images(row), [], [], []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            known = "neither {'from': …, 'value': …} nor {'role': …, 'content': …}"
            raise _Bad(BAD_ROW, f"has a turn {number} that is {known}: {_short(turn)}.")
        role, content = _role(turn["role"]), turn["content"]
        if isinstance(content, str):
            content = _cut(content) if images and role == "user" else _text(content)
        elif isinstance(content, list):
            items = [item for item in content if isinstance(item, Mapping)]
            own += [item["image"] for item in items if item.get("image") is not None]
            places += [item.get("index") for item in items if item.get("type") == "image"]
            content = [_item(item, role, number) for item in content]
        else:
            raise _Bad(BAD_ROW, f"has a turn {number} whose content is neither text nor a list: {_short(content)}.")
        messages.append({"role": role, "content": content, **_weight(turn, role, number)})
    if all(place in range(len(images)) for place in places) and len(set(places)) == len(images):
        images = [images[int(place)] for place in places]  # the items say which image of the row stands where
    images = images or own
    _require_all_read(row, turns, images)
    return messages, images


def _of_webdataset(row: Mapping) -> Mapping:
    """The conversation in a WebDataset's `json`, with the sample's own images."""
    content = plain_messages(row.get("json"))
    if "__key__" not in row or not isinstance(content, (list, Mapping)):
        return row
    content = content if isinstance(content, Mapping) else {"conversations": content}
    members = sorted((key for key in row if _MEMBER.fullmatch(key)), key=lambda key: (len(key), key))
    images = [row[key] for key in members if row[key] is not None]
    names = {"image", "images", *_OTHER_IMAGE_KEYS} if images else ()
    content = {key: value for key, value in content.items() if value is not None and key not in names}
    return {"id": row["__key__"], "images": images or None, **content}


def _weight(turn: Mapping, role: str, number: int) -> dict:
    try:
        weight = turn_weight(turn)
    except ValueError as error:
        raise _Bad(BAD_ROW, f"has in turn {number} {error}.") from None
    if weight and role != "assistant":
        raise _Bad(BAD_ROW, f"has a weight in turn {number}, the {role}'s: only answers are learned. Remove it.")
    return {} if weight or weight is None else {"weight": 0}


def _with_system(row: Mapping, messages: list[dict]) -> list[dict]:
    """The messages after the system prompt that the row holds next to its turns, if it does."""
    given = {key: row[key] for key in _SYSTEM_KEYS if row.get(key)}
    if not given:
        return messages
    (key, text), *others = given.items()
    message = {"role": "system", "content": [{"type": "text", "text": text}]}
    if messages[:1] == [message]:
        return messages
    if others or not isinstance(text, str) or any(message["role"] == "system" for message in messages):
        raise _Bad(BAD_ROW, f"has a system prompt as {key!r} and another one, or not as text: keep one.")
    return [message, *messages]


class DropCounter:
    """
    Counts dropped samples by reason and says each reason once. The counts lie in shared memory, one row for each worker of a
    `DataLoader`, so that the main process sees them all.
    """

    MAX_WORKERS = 256

    def __init__(self):
        self._counts = torch.zeros(self.MAX_WORKERS + 1, len(REASONS), dtype=torch.int64).share_memory_()

    def add(self, error: BadSampleError, what: str) -> None:
        """Count one dropped sample; the first one of a reason is logged, with its error, as a warning."""
        column = REASONS.index(error.reason)
        info = torch.utils.data.get_worker_info()
        worker = 0 if info is None else 1 + info.id % self.MAX_WORKERS
        first = not self._counts[:, column].any()
        self._counts[worker, column] += 1
        if first:
            logger.warning(
                "%s drops samples (on_bad_sample or overflow is 'drop'). The first for the reason '%s': %s "
                "Further ones are counted, not printed.",
                what,
                error.reason,
                error,
            )

    def as_dict(self) -> dict[str, int]:
        """`{reason: samples}` of the reasons that occurred."""
        totals = self._counts.sum(0).tolist()
        return {reason: total for reason, total in zip(REASONS, totals) if total}


def summarize_drops(counts: Mapping[str, int]) -> str:
    """`"3 samples dropped: 2 missing image, 1 empty answer"`."""
    total = sum(counts.values())
    parts = ", ".join(f"{count} {reason}" for reason, count in Counter(counts).most_common())
    return f"{total} sample{'' if total == 1 else 's'} dropped: {parts}"


def _role(name: Any) -> str:
    role = _ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise _Bad(BAD_ROLES, f"has the unknown role {name!r}; the roles are {', '.join(sorted(_ROLES))}.")
    return role


def _images(row: Mapping) -> list:
    """The image references of a row, one or many; none where they are null or empty."""
    given = {key: _image_list(row[key]) for key in ("image", "images") if key in row}
    if not any(given.values()):
        others = [key for key in _OTHER_IMAGE_KEYS if key in row and (key.startswith("im") or _is_medium(row[key]))]
        given = {key: _image_list(row[key]) for key in others}
    keys = [key for key, images in given.items() if images]
    if len(keys) > 1:
        raise _Bad(BAD_ROW, f"has both {keys[0]!r} and {keys[1]!r}: keep one of them.")
    images = given[keys[0]] if keys else []
    for image in images:
        if isinstance(image, (int, float, list)):  # `datasets` stores an array as lists, unless its feature is Image
            give = "give a path, a PIL image, an array, bytes, or {'bytes': …, 'path': …}"
            raise _Bad(BAD_ROW, f"has the image {_short(image)}: {give}.")
    return images


def _image_list(value: Any) -> list:
    """Without what is absent: null, an empty text, or the NaN that pandas fills a column with."""
    images = list(value) if getattr(value, "ndim", 0) == 4 else as_list(value)  # a batch
    if not isinstance(images, list):
        images = [] if isinstance(images, str) and not images else [images]
    return [image for image in images if not is_absent(image)]


def _is_medium(value: Any) -> bool:
    """Whether a value is an image or a video, or names one."""
    if isinstance(value, str):
        return _MEDIUM.match(value) is not None
    value = as_list(value)
    if isinstance(value, list):
        return any(map(_is_medium, value))
    if isinstance(value, Mapping):
        return "bytes" in value or _is_medium(value.get("path"))
    return isinstance(value, (bytes, bytearray, memoryview, Image.Image, os.PathLike))


def _require_all_read(row: Mapping, turns: list[Mapping], images: list) -> None:
    """A row must not be trained on without the image that it names: refuses keys and markers of images that are not read."""
    videos = [key for key in ("video", "videos") if _image_list(row.get(key))]
    if images and not videos:
        return
    texts = [turn["content"] for turn in turns if _role(turn["role"]) != "assistant"]
    markers = [token for token in (_VIDEO_TOKEN, IMAGE_TOKEN) if any(isinstance(t, str) and token in t for t in texts)]
    if images and _VIDEO_TOKEN not in markers:
        return
    unread = videos or [
        key for part in (row, *turns) for key, value in part.items() if key not in _READ_KEYS and _is_medium(value)
    ]
    if unread:
        raise _Bad(
            UNREAD_IMAGE,
            f"names an image or a video by the key {unread[0]!r}, which is not read: give images as 'image' or 'images' of "
            f"the row, each marked by {IMAGE_TOKEN} in its text (of a video, its frames), or take the key out.",
        )
    if markers:
        raise _Bad(
            BAD_MARKERS,
            f"has {markers[0]} in its text but no image: its keys are {sorted(row)}. Give the image as 'image', several (or "
            f"a video's frames) as 'images'. If {markers[0]} is meant as text, write the row in HF form, where it is: "
            "{'role': 'user', 'content': [{'type': 'text', 'text': …}]}.",
        )


def _text(value: str) -> list[dict]:
    return [{"type": "text", "text": value}] if value else []


def _cut(value: str) -> list[dict]:
    """Content items of a human turn: cut at every marker, without the white space at the two ends of the turn."""
    pieces = value.split(IMAGE_TOKEN)
    if len(pieces) == 1:
        return _text(value)
    for order, strip in ((range(len(pieces)), str.lstrip), (range(len(pieces) - 1, -1, -1), str.rstrip)):
        for i in order:
            pieces[i] = strip(pieces[i])
            if pieces[i]:
                break
    content = _text(pieces[0])
    for piece in pieces[1:]:
        content += [{"type": "image"}, *_text(piece)]
    return content


def _item(item: Any, role: str, number: int) -> dict:
    """One item of a content list."""
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}
    if kind == "image" and role == "user":
        return {"type": "image"}
    if kind == "image":
        raise _Bad(BAD_MARKERS, f"has an image in message {number}, which is the {role}'s: images belong to the user.")
    raise _Bad(BAD_ROW, f"has an item in message {number} that is neither an image nor a text: {_short(item)}.")


def _checked(messages: list[dict], type: Any) -> str | None:
    """The type, if the roles alternate and the answers are not empty."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise _Bad(
            BAD_ROLES,
            f"has its roles out of order ({', '.join(roles[:8]) or 'no turn at all'}{', …' if len(roles) > 8 else ''}): "
            "after an optional system message, user and assistant must take turns, and the last turn is an answer.",
        )
    for number, message in enumerate(messages):
        for item in message["content"]:
            half = _SURROGATE.search(item.get("text", ""))
            if half:
                what = f"has {half[0]!r}, half of a character, in turn {number}: the text was cut within an emoji"
                raise _Bad(BAD_ROW, f"{what}. Take it out.")
        if message["role"] == "assistant" and not any(item["text"].strip() for item in message["content"]):
            raise _Bad(EMPTY_ANSWER, f"has an empty answer in turn {number}: there is nothing to learn from it.")
    type = None if type is None else str(type)
    if type is not None and _SURROGATE.search(type):
        raise _Bad(BAD_ROW, f"has the type {type!r}, with half of a character. Take it out.")
    return type


def count_images(messages: Sequence[Mapping]) -> int:
    """Content items that are images."""
    contents = [message.get("content") or () for message in messages]
    items = [item for content in contents if not isinstance(content, str) for item in content]
    return sum(item.get("type") in ("image", "image_url") for item in items)


def require_an_image_for_each_place(sample_id: str, messages: Sequence[Mapping], images: Any) -> None:
    """Raises [`BadSampleError`] if `images` is not a list, or not as long as the messages have places for images."""
    if not isinstance(as_list(images), list):
        raise BadSampleError(sample_id, BAD_ROW, f"has images that are not a list: {_short(images)}.")
    texts = [message.get("content") for message in messages if message.get("role") != "assistant"]
    if not len(images) and any(isinstance(text, str) and IMAGE_TOKEN in text for text in texts):
        give = "give 'images', and content items as load_conversations does"
        raise BadSampleError(sample_id, BAD_MARKERS, f"has {IMAGE_TOKEN} in its text but no image: {give}.")
    places = count_images(messages)
    if places != len(images):
        raise BadSampleError(
            sample_id,
            BAD_MARKERS,
            f"marks {places} image{'' if places == 1 else 's'} in its user turns but comes with {len(images)}: write one "
            f"{IMAGE_TOKEN} (or one image item) for each image, and give each image in 'images' (or in its item).",
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


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
    return _read_image(open_image, reference, image_folder, sample_id, follow_symlinks)


def read_image_size(
    reference: Any,
    image_folder: str | os.PathLike | None = None,
    sample_id: str = "",
    *,
    follow_symlinks: bool = False,
) -> tuple[int, int]:
    """`(width, height)` in pixels from the file's header. Arguments and errors as in [`load_image`]."""
    return _read_image(open_size, reference, image_folder, sample_id, follow_symlinks)


def _read_image(read: Callable, reference: Any, folder, sample_id: str, follow_symlinks: bool) -> Any:
    try:
        return read(*find_image(reference, folder, follow_symlinks))
    except ImageError as error:
        raise BadSampleError.of_image(sample_id, error) from error.__cause__


def require_image_folder(image_folder: str | os.PathLike | None) -> None:
    if image_folder is not None and not os.path.isdir(image_folder):
        raise FileNotFoundError(f"the image folder {os.fspath(image_folder)!r} is not there.")


def image_key(reference: Any) -> tuple:
    """A hashable that is equal for two references to the same image: by path, by bytes, or by object."""
    if isinstance(reference, Mapping):
        reference = reference["bytes"] if reference.get("bytes") is not None else reference.get("path")
    if isinstance(reference, (bytes, bytearray, memoryview)):
        return "bytes", hashlib.blake2b(reference, digest_size=16).digest()
    if isinstance(reference, (str, os.PathLike)):
        return "path", os.path.normpath(reference)
    return "object", id(reference)
