"""
Chat templates: the original's conversation formats, and any language model's own with the image token inserted; and messages as any
loader gives them, made plain lists and dicts: one rule for processor, predictor and training rows.
"""

import functools
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from ..constants import IMAGE_TOKEN


logger = logging.get_logger(__name__)

CHAT_TEMPLATES = ("chatml", "llama_2", "llava_v1", "plain", "v0_mmtag", "v1_mmtag", "vicuna_v0", "vicuna_v1")
_FOLDER = Path(__file__).parent / "templates"
_IMAGE_LINE = "{%- set image = '<image>' -%}"


def load_chat_template(name: str, *, image_token: str = IMAGE_TOKEN, image_wrap: tuple[str, str] | None = None) -> str:
    """
    One of the project's chat templates, as one self-contained Jinja text that stock transformers renders.

    All have `{% generation %}` around what is supervised: the answer with the space in front of it, and its stop. They take string
    content and content lists, an optional system message (in place of the format's own; an empty one means none), several images
    in a turn and turns without images. In a turn with images, these come first, each followed by a line break, and the text is
    stripped; the template variable `keep_image_order=True` keeps the order (see [`modeling_llava.data.labels`]). None writes the
    first `<s>`: the tokenizer does.

    | name | original's name | ends an answer with |
    |---|---|---|
    | `plain` | plain (pretraining; the question is left out) | `"\\n"` |
    | `vicuna_v0` | v0 | `"\\n###"` |
    | `vicuna_v1` | v1 (LLaVA-1.5) | eos |
    | `llava_v1` | llava_v1 | eos |
    | `llama_2` | llava_llama_2 | `" "` and eos |
    | `v0_mmtag` | v0_mmtag | `"\\n###"` |
    | `v1_mmtag` | v1_mmtag | eos |
    | `chatml` | – | `<\\|im_end\\|>` |

    Args:
        name (`str`): One of the names above.
        image_token (`str`, *optional*, defaults to `"<image>"`): Text of the image token.
        image_wrap (`tuple[str, str]`, *optional*):
            Text before and after every image token: `("<im_start>", "<im_end>")` for an original checkpoint with
            `mm_use_im_start_end`. The original tokenizes the text after an image on its own, so a SentencePiece tokenizer puts a
            space in front; one with `legacy=False` does not when the prompt is tokenized whole, and requires `("", " ")` or
            `("<im_start>", "<im_end> ")` for the original's ids.

    Raises:
        ValueError: there is no template of that name.
    """
    if name not in CHAT_TEMPLATES:
        raise ValueError(f"There is no chat template {name!r}; the templates are {', '.join(CHAT_TEMPLATES)}.")
    return _set_image(read_template(name), image_token, image_wrap)


def insert_image_token(
    chat_template: str, *, image_token: str = IMAGE_TOKEN, image_wrap: tuple[str, str] | None = None
) -> str:
    """
    A language model's own chat template, made to write the image token for `{"type": "image"}` items: content lists become strings
    before the template sees them, by the rule of our own templates ([`load_chat_template`]). Text-only conversations are rendered as
    before. The template has no `{% generation %}` marks: `encode_conversation` finds the answers.

    Args:
        chat_template (`str`): Jinja text of a template, such as `tokenizer.chat_template`.
        image_token, image_wrap: See [`load_chat_template`].

    Raises:
        ValueError: the template does not write a user's text where it can be found again.
    """
    changed = _set_image(read_template("_own"), image_token, image_wrap) + chat_template
    probes = [
        [{"role": "user", "content": "First question"}],
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "First question"}]}],
    ]
    variables = {"bos_token": "", "eos_token": "", "add_generation_prompt": True}
    before, after, with_image = (
        render_jinja_template(conversations=[probe], chat_template=template, **variables)[0][0]
        for template, probe in [(chat_template, probes[0]), (changed, probes[0]), (changed, probes[1])]
    )
    expected = before.replace("First question", f"{image_token.join(image_wrap or ('', ''))}\nFirst question")
    if before != after or before.count("First question") != 1 or with_image != expected:
        raise ValueError(
            f"This chat template does not write a user's text as it is: 'First question' becomes {before!r}, and with an "
            f"image {with_image!r}. Choose one of ours instead: {', '.join(CHAT_TEMPLATES)}."
        )
    return changed


def choose_chat_template(chat_template: str, tokenizer, image_wrap: tuple[str, str] | None = None) -> str:
    """
    A chat template by name ([`load_chat_template`]), `"own"` (the tokenizer's, with the image token put in), Jinja text or
    the file that holds it.
    """
    if os.path.isfile(chat_template):
        chat_template = Path(chat_template).read_text("utf-8")
    if chat_template == "own":
        own = tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own
        if own is None:
            raise ValueError(
                f"The language model has no chat template of its own. Choose one of: {', '.join(CHAT_TEMPLATES)}."
            )
        return insert_image_token(own, image_token=tokenizer.image_token, image_wrap=image_wrap)
    template = chat_template
    if "{" not in chat_template:
        template = load_chat_template(chat_template, image_token=tokenizer.image_token, image_wrap=image_wrap)
    if tokenizer.eos_token is None and "eos_token" in template:
        raise ValueError(f"The tokenizer has no eos token, with which chat template {chat_template!r} ends an answer.")
    if chat_template == "chatml" and len(tokenizer.encode("<|im_end|>", add_special_tokens=False)) > 1:
        logger.warning(
            'Chat template "chatml" ends an answer with <|im_end|>, which this tokenizer splits into several tokens. '
            'If the language model was not made for it, take another template, such as "vicuna_v1".'
        )
    return template


def with_image_token(chat_template: Any, image_token: str) -> Any:
    """A template that writes the image token: the one given, or, if it is a language model's own, with the token put in."""
    if not isinstance(chat_template, str):
        return chat_template
    probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A question"}]}]
    try:
        if image_token in render_jinja_template([probe], chat_template=chat_template)[0][0]:
            return chat_template
    except (jinja2.TemplateError, TypeError):  # it takes no lists
        pass
    try:
        return insert_image_token(chat_template, image_token=image_token)
    except (jinja2.TemplateError, TypeError, ValueError):  # it is told when the template is used
        return chat_template


def warn_of_joined_texts(messages: list[dict], chat_template: str, keep_image_order: bool = False) -> None:
    """Warn when our templates, which put the images of a turn first as the original does, join the texts around one without a space."""
    if keep_image_order or "images_and_text_of" not in chat_template:
        return
    for message in messages:
        content = message.get("content")
        if message.get("role") == "user" and isinstance(content, (list, tuple)):
            turn = "".join(item.get("text", "\0") for item in content if isinstance(item, dict))
            if re.search(r"[^\s\0]\0+[^\s\0]", turn):
                logger.warning_once(
                    "A user's texts on both sides of an image are joined without a space, since the chat template puts images "
                    "first. Write the space into the text, or pass keep_image_order=True."
                )


def render_with_spans(messages: list[dict], chat_template: str, **variables) -> tuple[str, list[tuple[int, int]]]:
    """
    A conversation as text, and the spans of characters that its template marks with `{% generation %}`. transformers keeps the spans in
    the compiled template, which all threads share: one thread at a time renders, by a template text that nothing else renders.
    """
    with _ONE_AT_A_TIME:
        texts, spans = render_jinja_template(
            [messages], chat_template="{{ '' }}" + chat_template, return_assistant_tokens_mask=True, **variables
        )
    return texts[0], spans[0]


_ONE_AT_A_TIME = threading.Lock()
if hasattr(os, "register_at_fork"):  # a worker that is forked while another thread renders would wait for ever
    os.register_at_fork(
        before=_ONE_AT_A_TIME.acquire, after_in_parent=_ONE_AT_A_TIME.release, after_in_child=_ONE_AT_A_TIME.release
    )


@functools.lru_cache
def has_generation_marks(chat_template: str) -> bool:
    """Whether a template marks what the assistant writes with `{% generation %}`."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", chat_template) is not None


def chat_template_of(processor) -> str:
    """
    A processor's chat template, or its tokenizer's; the default one of several.

    Raises:
        ValueError: neither has one.
    """
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        raise ValueError(
            "The processor has no chat template. Set one: processor.chat_template = "
            f"modeling_llava.processing_llava.load_chat_template(name), with name one of {', '.join(CHAT_TEMPLATES)}."
        )
    return template


@functools.lru_cache
def read_template(name: str) -> str:
    """The text of a file in `templates/`, with what it includes."""

    def included(match: re.Match) -> str:
        return (_FOLDER / match[1]).read_text("utf-8")

    text = (_FOLDER / f"{name}.jinja").read_text("utf-8")
    return re.sub(r"\{%- include '(\w+\.jinja)' -%\}\n", included, text)


def _set_image(template: str, image_token: str, image_wrap: tuple[str, str] | None) -> str:
    before, after = image_wrap or ("", "")
    image = (before + image_token + after).replace("\\", "\\\\").replace("'", "\\'")
    return template.replace(_IMAGE_LINE, f"{{%- set image = '{image}' -%}}")


# Messages


_IMAGE_KEYS = ("image", "url", "path", "base64", "image_url", "image_path", "image_file", "img", "file_name")
"""Keys under which an image item may hold its image; the first one that is there counts."""


def plain_messages(messages: Any) -> Any:
    """
    Messages, or a batch of them, as new lists and dicts: NumPy arrays, Arrow lists and JSON text become lists and dicts, keys that hold
    `None` (`datasets` gives every item of a table the same keys) and text items without a text are dropped, `from` and `value` become
    `role` and `content`, and an image item, also OpenAI's `image_url`, becomes `{"type": "image", "image": …}`.
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
    if isinstance(item, str):
        return {"type": "text", "text": item}
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
    return {key: value for key, value in values.items() if not is_absent(value)}


def is_absent(value: Any) -> bool:
    """Whether a value is `None`, or the NaN that pandas puts in its place."""
    return value is None or isinstance(value, float) and value != value


def _read_json(value: Any) -> Any:
    """What a JSON text says, in a place where a text cannot stand."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            pass
    return value
