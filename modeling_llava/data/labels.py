"""From a conversation to `input_ids` and `labels` (the label mask): one render, one tokenization.

[`encode_conversation`] makes both. Text inside `{% generation %}` of the chat template is supervised; all else is -100.

How a line break next to an image is written
============================================

A LLaVA row marks an image by `<image>` inside the text of a human turn. In `messages` the image is an item of its own
and **the line break next to it is written by the chat template, never stored**:

    row                                           messages (content of the user turn)
    "<image>\\nWhat is this?"                      [image] [text "What is this?"]
    "What is this?\\n<image>"                      [text "What is this?"] [image]
    "<image>\\n   What is this?  "                 [image] [text "What is this?"]
    "<image>"                                     [image]
    "Compare <image> with <image>, please."       [text "Compare "] [image] [text " with "] [image] [text ", please."]
    "No picture   here. "                         [text "No picture   here. "]

Row → messages, for a human turn that holds markers: cut the text at every marker, strip the white space at the two ends
of the turn, and drop pieces that are empty. A turn without a marker, and every answer, is kept to the letter.

Messages → text, by every template of ours, for a user turn that holds images:

* default: the images come first, each followed by one line break, then the joined text pieces, stripped. No line break
  follows when there is no text. This is what the original's `preprocess_multimodal` did with every turn (the field
  `normalised` of the golden files).
* with the template variable `keep_image_order=True`: the items stay in their order. One line break is written between an
  image and its neighbour, unless a neighbouring text already has one on that side; two texts are joined as they are. The
  paper's first turn (LLaVA §4.1: question and image in random order) is rendered so.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
import torch
from transformers import ProcessorMixin
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from ..constants import IGNORE_INDEX
from ..processing_llava import num_image_tokens as tokens_per_image
from ..text.chat_templates import (
    CHAT_TEMPLATES,
    chat_template_of,
    has_generation_marks,
    render_with_spans,
    turn_weight,
    warn_of_joined_texts,
)
from ..text.control_tokens import ControlTokens
from ..text.stops import stop_is_unmarked, teaches_no_stop
from .schema import (
    BAD_MARKERS,
    BAD_ROLES,
    BAD_ROW,
    NOTHING_SUPERVISED,
    TOO_LONG,
    BadSampleError,
    count_images,
)


logger = logging.get_logger(__name__)


def encode_conversation(
    messages: Sequence[dict[str, Any]],
    processor: ProcessorMixin,
    *,
    num_image_tokens: int | Sequence[int] | None = None,
    max_length: int | None = None,
    overflow: Literal["error", "drop", "truncate_text"] = "error",
    sample_id: Any = None,
    keep_image_order: bool = False,
) -> dict[str, torch.Tensor] | None:
    """
    Ids and labels of one conversation, from one render and one tokenization. No image is opened.

    What the template marks with `{% generation %}` is supervised: in our templates the answer and its stop (LLaVA §4.2,
    Table 2). In a template without marks `_find_answers` locates the answers. Every image token is then
    repeated to its number of tokens.

        <s> A chat … USER: <image> <image> … \n What is it ? ASSISTANT:  A cat . </s>
        -100  …                                            -100       |  A cat . </s>

    Differs from the original: it tokenized every turn again to count its tokens, wiped the labels of a sample where the
    count was off, and cut a long sample anywhere. In `vicuna_v0` it supervised parts of the headers and lost parts of
    later answers.

    Args:
        messages (`list[dict]`):
            `[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": …}]}, …]`. Not changed.
        processor (`ProcessorMixin`): A [`LlavaProcessor`], ours or stock.
        num_image_tokens (`int` or `list[int]`, *optional*):
            Tokens per image, or one number for each. Defaults to the processor's.
        max_length (`int`, *optional*): Maximum tokens, images included. No limit by default.
        overflow (`str`, *optional*, defaults to `"error"`):
            What becomes of a longer conversation: `"error"` raises, `"drop"` returns `None` (the caller counts),
            `"truncate_text"` cuts tokens off its end, but never a part of an image.
        sample_id (*optional*): Names the sample in errors.
        keep_image_order (`bool`, *optional*, defaults to `False`): See the top of this file.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` and `labels`, both int64 `[sequence]`; `IGNORE_INDEX` where nothing is
        supervised, so also at every image token. Or `None` (see `overflow`).

    Raises:
        BadSampleError: nothing is supervised; the conversation is too long; its images and the image tokens of the
            template differ in number; the template refuses it. It is a `ValueError` with the reason for counting.
        ValueError: there is no chat template, or one in which the answers cannot be found.
    """
    if overflow not in ("error", "drop", "truncate_text"):
        raise ValueError(f'overflow must be "error", "drop" or "truncate_text", not {overflow!r}.')
    _warn_if_endless(processor)
    encoded = _encode(messages, processor, keep_image_order, sample_id)
    image_token_id = encoded.image_token_id
    input_ids = np.array(encoded.ids, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    for start, end in encoded.supervised:
        labels[start:end] = input_ids[start:end]
    if encoded.num_images:
        is_image = input_ids == image_token_id
        labels[is_image] = IGNORE_INDEX
        repeats = np.ones_like(input_ids)
        repeats[is_image] = _image_lengths(encoded, processor, num_image_tokens, sample_id)
        input_ids, labels = input_ids.repeat(repeats), labels.repeat(repeats)

    length = len(input_ids)
    if max_length is not None and length > max_length:
        if overflow == "drop":
            return None
        in_images = int((input_ids == image_token_id).sum())
        if overflow == "error":
            what = f"has {length} tokens ({in_images} of them for its {encoded.num_images} images)"
            fix = 'Raise max_length, shorten the text, or set overflow="truncate_text" or "drop".'
            raise _bad(sample_id, TOO_LONG, f"{what}, max_length is {max_length}. {fix}")
        kept = int((input_ids[:max_length] == image_token_id).sum())
        if kept < in_images:
            raise _bad(
                sample_id,
                TOO_LONG,
                f"has {length} tokens, {in_images} of them for its {encoded.num_images} images, of which a cut to "
                f'max_length={max_length} would keep {kept}. Raise max_length, or set overflow="drop".',
            )
        if IGNORE_INDEX not in labels[max_length - 1 : max_length + 1]:
            logger.warning_once(
                f"Conversations longer than max_length={max_length} tokens are cut within an answer "
                '(overflow="truncate_text"): such an answer is learned without its stop. `llava data check` lists them.'
            )
        # Copies: a view would keep the whole row alive.
        input_ids, labels = input_ids[:max_length].copy(), labels[:max_length].copy()

    if not (labels != IGNORE_INDEX).any():
        answers = [message for message in messages if message.get("role") == "assistant"]
        cause = "it has no answer from the assistant"
        if encoded.supervised:
            cause = f"its answers lie beyond max_length={max_length} and were cut off"
        elif answers and all(turn_weight(answer) == 0 for answer in answers):
            cause = "a weight, loss or train of 0 excludes all its answers"
        elif answers:
            cause = "the chat template has no {% generation %} marks around its answers"
        what = f"has nothing to learn from: {cause}. Add an answer or leave the sample out."
        raise _bad(sample_id, NOTHING_SUPERVISED, what)
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}


def conversation_length(
    messages: Sequence[dict[str, Any]],
    processor: ProcessorMixin,
    *,
    num_image_tokens: int | Sequence[int] | None = None,
    sample_id: Any = None,
    keep_image_order: bool = False,
) -> int:
    """Tokens of a conversation, images included, as [`encode_conversation`] would give. No image is opened."""
    encoded = _encode(messages, processor, keep_image_order, sample_id)
    if not encoded.num_images:
        return len(encoded.ids)
    return len(encoded.ids) - encoded.num_images + sum(_image_lengths(encoded, processor, num_image_tokens, sample_id))


_KNOWN_TO_STOP: set[str] = set()


def _warn_if_endless(processor) -> None:
    """Say once of a template that it teaches no stop, as that of `llava-hf/llava-1.5-7b-hf` does not."""
    template = chat_template_of(processor)
    if template in _KNOWN_TO_STOP:
        return
    _KNOWN_TO_STOP.add(template)
    if teaches_no_stop(processor):
        logger.warning(
            "The chat template ends an answer with white space alone, so a model trained with it does not learn to stop. "
            "`llava train` puts the EOS token there (modeling_llava.text.stops.end_answers_with_eos); or take a template that "
            'has it: processor.chat_template = load_chat_template("vicuna_v1").'
        )


class _Encoded(NamedTuple):
    ids: list[int]  # one per image
    supervised: list[tuple[int, int]]  # (start, end) indices into `ids`
    num_images: int
    image_token_id: int


def _bad(sample_id: Any, reason: str, message: str) -> ValueError:
    if sample_id is None:
        return ValueError(f"the conversation {message}")
    return BadSampleError(sample_id, reason, message)


def _encode(messages, processor, keep_image_order: bool, sample_id) -> _Encoded:
    """Render, tokenize once with one token per image, and carry the supervised spans from characters to tokens."""
    tokenizer = processor.tokenizer
    control = ControlTokens.of(tokenizer, processor.image_token)
    text, spans, marks = _render(messages, processor, control, keep_image_order, sample_id)
    bos = tokenizer.bos_token
    # If the template writes the BOS token itself, the tokenizer must not add one (as in apply_chat_template).
    has_bos = bos is not None and text.startswith(bos)
    if marks is not None:
        text, tokenizer = marks.rename(text), marks.tokenizer(tokenizer)
    backend = tokenizer.backend_tokenizer
    # What an earlier call of the tokenizer has set.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens:
        backend.encode_special_tokens = False
    try:
        encoding = backend.encode(text, add_special_tokens=False)
    except TypeError as error:  # what the tokenizers library says of half a surrogate pair
        raise _bad(
            sample_id, BAD_ROW, "contains a lone surrogate (half of a character such as an emoji). Remove it."
        ) from error
    ids, offsets = encoding.ids, encoding.offsets

    prefix, suffix = ([], []) if has_bos else (control.prefix, control.suffix)
    supervised = []
    for start, end in spans:
        # A token is supervised if it shares a character with the span.
        first = bisect_right(offsets, start, key=itemgetter(1))
        last = bisect_left(offsets, end, key=itemgetter(0))
        if first < last:
            supervised.append((first + len(prefix), last + len(prefix)))
    num_images = count_images(messages)
    num_slots = ids.count(control.image_token_id)
    if num_slots != num_images:
        raise _bad(
            sample_id,
            BAD_MARKERS,
            f"has {num_images} images but the chat template wrote {num_slots} {processor.image_token}. Take a template "
            f"that knows images ({', '.join(CHAT_TEMPLATES)}), or put the image token into a language model's own: "
            'LlavaProcessor.from_vision_language_pretrained(..., chat_template="own").',
        )
    return _Encoded([*prefix, *ids, *suffix], supervised, num_images, control.image_token_id)


def _image_lengths(encoded: _Encoded, processor, num_image_tokens, sample_id) -> list[int]:
    """Tokens of each image, in the order of the text."""
    if num_image_tokens is None:
        num_image_tokens = tokens_per_image(processor)
    if isinstance(num_image_tokens, int):
        return [num_image_tokens] * encoded.num_images
    if len(num_image_tokens) != encoded.num_images:
        what = f"has {encoded.num_images} images but num_image_tokens tells of {len(num_image_tokens)}."
        raise _bad(sample_id, BAD_MARKERS, what)
    return list(num_image_tokens)


def _render(messages, processor, control: ControlTokens, keep_image_order: bool, sample_id):
    """The conversation as text, the character spans that are supervised, and the marks in it (or `None`)."""
    template = chat_template_of(processor)
    if not messages:
        raise _bad(sample_id, BAD_ROW, "has no messages.")
    answers = [message for message in messages if message.get("role") == "assistant"]
    learned = [turn_weight(answer) != 0 for answer in answers]
    if not all(learned):  # one text, and so one span, for each answer
        messages = [
            {**m, "content": [{"type": "text", "text": _text_of(m)}]} if m.get("role") == "assistant" else m
            for m in messages
        ]
    warn_of_joined_texts(messages, template, keep_image_order)
    (messages,), marks = control.mark(messages, template=template)
    variables = dict(processor.tokenizer.special_tokens_map)
    if keep_image_order:
        variables["keep_image_order"] = True
    try:
        if has_generation_marks(template):
            text, spans = render_with_spans(messages, template, **variables)
            if stop_is_unmarked(processor):  # the stop is learned wherever the marks end
                spans = [(start, control.find_stop(text, end) or end) for start, end in spans]
        else:
            text, spans = _find_answers(messages, control, {**variables, "chat_template": template}, sample_id)
    except jinja2.TemplateError as error:
        raise _bad(sample_id, BAD_ROLES, f"does not fit the chat template: {error}") from error
    except TypeError as error:
        raise ValueError(
            f"The chat template does not know content lists ({error}). It is a language model's own: put the image token "
            "into it with modeling_llava.text.chat_templates.insert_image_token(template)."
        ) from error
    if not all(learned):
        if len(spans) != len(learned):
            raise _bad(
                sample_id,
                NOTHING_SUPERVISED,
                f"excludes an answer from training, but the chat template marks {len(spans)} spans for its "
                f"{len(learned)} answers, so they cannot be matched. Leave out the sample or its weights.",
            )
        spans = [span for span, is_learned in zip(spans, learned) if is_learned]
    return text, spans, marks


def _text_of(message: dict) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(item.get("text") or "" for item in content)


def _find_answers(messages, control: ControlTokens, variables: dict, sample_id) -> tuple[str, list[tuple[int, int]]]:
    """
    Render by a template that does not say where the answers are, and find them: each is framed by two private-use characters,
    which leave the text again; rendering without them shows that they changed nothing. A span begins where the template's
    own generation prompt ends, so that what it writes before the answer (a space, Qwen3's empty `<think>`) is learned too;
    the control token that follows the answer is its stop.
    """
    opening, closing = _unused_characters(messages)
    framed, prompts, leading_spaces = [], [], []
    for number, message in enumerate(messages):
        if message.get("role") == "assistant":
            prompts.append(messages[:number])
            content = _text_of(message)
            # Inside of the white space at its ends, so that a template can strip it.
            core = content.strip()
            framed_core = opening + core + closing
            content = content.replace(core, framed_core, 1) if core else content + framed_core
            message = {**message, "content": content}
            leading_spaces.append(content[: content.index(opening)])
        framed.append(message)
    (plain, text), _ = render_jinja_template([messages, framed], **variables)

    answers = list(re.finditer(f"{opening}(.*?){closing}", text, re.DOTALL))
    unframed = text.replace(opening, "").replace(closing, "")
    fix = (
        "Give the template {% generation %} marks around each answer and its stop, or take one that has them: "
        f"{', '.join(CHAT_TEMPLATES)}."
    )
    if unframed != plain or len(answers) != len(leading_spaces):
        raise _bad(
            sample_id,
            NOTHING_SUPERVISED,
            "does not fit the chat template, which has no {% generation %} marks and changes the answers: "
            f"{len(answers)} of {len(leading_spaces)} are found in its text. {fix}",
        )
    spans = []
    for i, (match, prompt, leading_space) in enumerate(zip(answers, prompts, leading_spaces)):
        start = match.start() - 2 * i
        end = match.end() - 2 * (i + 1)
        prompt_end = _end_of_prompt(prompt, plain[:start], variables)
        if prompt_end is not None:
            start = prompt_end
        elif plain[:start].endswith(leading_space):
            start -= len(leading_space)
        stop = control.find_stop(plain, end)
        if stop is None:
            raise _bad(
                sample_id,
                NOTHING_SUPERVISED,
                "does not fit the chat template, which has no {% generation %} marks and no special token after an "
                f"answer ({plain[end : end + 20]!r} follows), so its stop is not known. {fix}",
            )
        spans.append((start, stop))
    return plain, spans


def _end_of_prompt(messages, before_answer: str, variables: dict) -> int | None:
    """Where the template's prompt for an answer to `messages` ends in `before_answer`, if it has one and it is there."""
    if not messages:
        return None
    prompt = render_jinja_template([messages], add_generation_prompt=True, **variables)[0][0]
    if not before_answer.startswith(prompt):
        return None
    # A template without a generation prompt ends in the middle of a turn's header, or right before the answer.
    if before_answer[len(prompt) :].strip() and prompt == render_jinja_template([messages], **variables)[0][0]:
        return None
    return len(prompt)


def _unused_characters(messages) -> tuple[str, str]:
    """Two private-use characters that do not occur in the messages' texts."""
    used = set().union(*map(_text_of, messages))
    free = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in used)
    return next(free), next(free)


def render_sample(processor: ProcessorMixin, input_ids: list[int], labels: list[int]):
    """
    A sample as `rich.text.Text`, to the letter: what is supervised bold green, the rest dim, special tokens that are not
    supervised cyan, and each run of image tokens as `<image> × 576`.

    Args:
        processor ([`~transformers.ProcessorMixin`]): A LLaVA processor.
        input_ids (`list[int]`): Token ids, image tokens expanded.
        labels (`list[int]`): As long; `IGNORE_INDEX` where nothing is learned.
    """
    from rich.text import Text

    tokenizer = processor.tokenizer
    special = set(tokenizer.all_special_ids) | {processor.image_token_id}
    text = Text()
    position = 0
    while position < len(input_ids):
        token, learned = input_ids[position], labels[position] != IGNORE_INDEX
        end = position + 1
        while end < len(input_ids) and (labels[end] != IGNORE_INDEX) == learned:
            if token in special and input_ids[end] != token or token not in special and input_ids[end] in special:
                break
            end += 1
        if token == processor.image_token_id:
            text.append(f"{processor.image_token} × {end - position}", "cyan")
        elif token in special:
            text.append(tokenizer.convert_ids_to_tokens(token) * (end - position), "bold green" if learned else "cyan")
        else:
            # Decoded after what precedes it: a SentencePiece decoder drops the space at the start of a text.
            start = position
            while start > 0 and input_ids[start - 1] not in special and position - start < 8:
                start -= 1
            before = _decode(tokenizer, input_ids[start:position])
            piece = _decode(tokenizer, input_ids[start:end])
            piece = piece[len(before) :] if piece.startswith(before) else _decode(tokenizer, input_ids[position:end])
            text.append(piece, "bold green" if learned else "dim")
        position = end
    return text


def _decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
