"""Messages as any loader gives them, made plain lists and dicts: one rule for processor, predictor and training rows."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


_IMAGE_KEYS = ("image", "url", "path", "base64", "image_url", "image_path", "image_file", "img", "file_name")
"""Keys under which an image item may hold its image; the first one that is there counts."""


def plain_messages(messages: Any) -> Any:
    """
    Messages, or a batch of them, as new lists and dicts; what is neither is returned as it is.

    NumPy arrays and Arrow lists become lists, JSON text in the place of a list or dict is read, keys that hold `None` (`datasets`
    gives every item of a table the same keys) and text items without a text are dropped, `from` and `value` become `role` and
    `content`, and an image item, also OpenAI's `image_url`, becomes `{"type": "image", "image": …}`.
    """
    if not isinstance(messages, dict):
        messages = as_list(_read_json(getattr(messages, "messages", messages)))  # the attribute: a pipeline's `Chat`
    if isinstance(messages, list):
        return [plain_messages(message) for message in messages]
    if not isinstance(messages, Mapping):
        return messages
    message = _without_none(messages)
    for name, of_llava in (("role", "from"), ("content", "value")):
        if of_llava in message and name not in message:
            message[name] = message.pop(of_llava)
    content = as_list(message.get("content"))
    if isinstance(content, list):
        message["content"] = [item for item in map(_plain_item, content) if item != {"type": "text"}]
    return message


def turn_weight(message: Mapping) -> int | None:
    """
    0 where `weight`, `loss` or `train` of a message says that it is not to be learned, 1 where one says that it is.

    Raises:
        ValueError: one of them says something else.
    """
    given = {name: message[name] for name in ("weight", "loss", "train") if message.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):
            raise ValueError(f"{name}={value!r}: 0 and 1 (or false and true) are known")
    return int(all(given.values())) if given else None


def as_list(value: Any) -> Any:
    """A list of what a sequence, a NumPy array of objects or an Arrow list holds; anything else as it is."""
    if isinstance(value, (list, str, bytes, bytearray, memoryview)):
        return value
    if hasattr(value, "to_pylist") or hasattr(value, "as_py"):
        value = value.to_pylist() if hasattr(value, "to_pylist") else value.as_py()
    elif hasattr(value, "tolist") and (getattr(value, "ndim", 1) == 1 or value.dtype == object):  # not an image
        value = value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _plain_item(item: Any) -> Any:
    item = _read_json(item)
    if not isinstance(item, Mapping):
        return item
    item = _without_none(item)
    key = next((key for key in _IMAGE_KEYS if key in item), None)
    if item.get("type") not in ("image", "image_url") or key is None:
        return item
    image = item[key]
    if key == "image_url" and isinstance(image, Mapping):
        image = image.get("url")
    elif key == "base64" and isinstance(image, str) and not image.startswith("data:"):
        image = f"data:;base64,{image}"
    others = {name: value for name, value in item.items() if name not in _IMAGE_KEYS}
    return {**others, "type": "image", "image": image}


def _without_none(values: Mapping) -> dict:
    return {key: value for key, value in values.items() if value is not None}


def _read_json(value: Any) -> Any:
    """What a JSON text says, in a place where a text cannot stand."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            pass
    return value
