"""From messages to the ids of a prompt, and from a benchmark's samples to rows: same images together, encoded once."""

import os
from collections.abc import Iterator
from itertools import islice

from PIL import Image

from ..data.schema import image_key, load_image, require_an_image_for_each_place
from ..processing_llava import num_image_tokens
from ..text.chat_templates import plain_messages
from ..text.control_tokens import ControlTokens
from .decoding import Decoder, Row
from .prefix_cache import Prefix, common_length


WINDOW_BATCHES = 8
"""So many batches of samples are looked at together, to group them by image and to order them by length."""

MAX_GROUPS = 8
"""Groups of samples whose images are encoded at one time: bounds the memory of the vision tower."""


def encode_prompt(messages: list[dict], processor, **template_variables) -> list[int]:
    """
    The ids of a prompt that asks for an answer, exactly those that the processor gives, without touching the images: rendered
    once, tokenized once, then `num_image_tokens` image tokens per image. What a user typed that looks like a control token
    (`<image>`, `</s>`) is ordinary text.

    Args:
        messages (`list[dict]`):
            `{"role", "content": [{"type": "image"} | {"type": "text", "text": …}]}`, a user's turn last.
        processor: Ours or stock's.
        template_variables: For the chat template, such as `keep_image_order=True`.

    Raises:
        ValueError: the processor has no chat template.
    """
    template = processor.chat_template or processor.tokenizer.chat_template
    if template is None:
        raise ValueError(
            "The processor has no chat template, so a question cannot be put. Give one: processor.chat_template = "
            'load_chat_template("vicuna_v1") (modeling_llava.text.chat_templates), by the format that the model was trained in.'
        )
    tokenizer = processor.tokenizer
    control = ControlTokens.of(tokenizer, processor.image_token)
    (messages,), marks = control.mark(messages, template=template)
    text = processor.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, **template_variables
    )
    begins_itself = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    if marks is not None:
        text, tokenizer = marks.rename(text), marks.tokenizer(tokenizer)
    ids = []
    for token in tokenizer(text, add_special_tokens=not begins_itself)["input_ids"]:
        ids += [token] * (num_image_tokens(processor) if token == processor.image_token_id else 1)
    return ids


def system_message(text: str | None) -> list[dict]:
    """The messages before a conversation: one, or none where there is no system message."""
    return [] if text is None else [{"role": "system", "content": [{"type": "text", "text": text}]}]


def messages_of_turns(turns: list[tuple[str, str | None]], num_images: int) -> list[dict]:
    """The messages of questions and answers; the images stand before the first question, `None` is an answer to come."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        images = [{"type": "image"} for _ in range(num_images)] if number == 0 else []
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": question}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def rows_of_samples(
    samples: Iterator[dict],
    decoder: Decoder,
    processor,
    *,
    system: str | None,
    batch_size: int,
    image_folder: str | os.PathLike | None,
    follow_symlinks: bool,
    template_variables: dict,
) -> Iterator[Row]:
    """Rows to be answered, read as they are needed; see [`LlavaPredictor.answer_many`] for arguments and errors."""
    own = system_message(system)
    while window := list(islice(samples, WINDOW_BATCHES * batch_size)):
        groups: dict[tuple, list[tuple[dict, list[int]]]] = {}
        for sample in window:
            sample = _checked_sample(sample)
            messages = sample["messages"]
            ids = encode_prompt(
                messages if messages[0]["role"] == "system" else [*own, *messages], processor, **template_variables
            )
            # A sample without an image shares nothing: a group of its own.
            key = tuple(map(image_key, sample["images"])) or (id(sample),)
            groups.setdefault(key, []).append((sample, ids))
        # The longest first: the first batch makes the buffers as large as they will ever be.
        ordered = sorted(groups.values(), key=lambda group: -max(len(ids) for _, ids in group))
        step = min(batch_size, MAX_GROUPS)
        for start in range(0, len(ordered), step):
            yield from _rows_of_groups(
                ordered[start : start + step], decoder, processor, image_folder, follow_symlinks
            )


def encode_images(images: list[Image.Image], decoder: Decoder, processor) -> list:
    """The features `[num_image_tokens, hidden]` of each image."""
    if not images:
        return []
    return decoder.encode_images(processor.image_processor(images=images, return_tensors="pt")["pixel_values"])


def _rows_of_groups(groups, decoder: Decoder, processor, image_folder, follow_symlinks: bool) -> Iterator[Row]:
    images = [
        [
            load_image(reference, image_folder, str(group[0][0]["id"]), follow_symlinks=follow_symlinks)
            for reference in group[0][0]["images"]
        ]
        for group in groups
    ]
    features = iter(encode_images([image for some in images for image in some], decoder, processor))
    for group, some in zip(groups, images):
        own_features = list(islice(features, len(some)))
        prefix = _group_prefix([ids for _, ids in group], own_features, decoder, processor.image_token_id)
        for sample, ids in group:
            yield Row(sample["id"], ids, prefix, [] if prefix else own_features)


def _group_prefix(prompts: list[list[int]], features, decoder: Decoder, image_token_id: int) -> Prefix | None:
    """
    What all prompts of a group begin with, if that holds their images and is worth a pass of its own; computed when the
    first of its rows is.
    """
    if len(prompts) < 2 or not features or not decoder.shares_prefixes:
        return None
    first = prompts[0]
    length = min(min(common_length(first, ids) for ids in prompts), min(map(len, prompts)) - 1)
    if image_token_id in first[length:]:
        return None
    return Prefix(first[:length], features=features)


def _checked_sample(sample: dict) -> dict:
    missing = [key for key in ("id", "messages", "images") if key not in sample]
    if missing:
        raise ValueError(f"A sample has no {', '.join(missing)}; its keys are {', '.join(map(str, sample))}.")
    sample = {**sample, "messages": plain_messages(sample["messages"])}
    if not sample["messages"]:
        raise ValueError(f"sample {sample['id']!r} has no message; nothing is asked.")
    for message in sample["messages"]:
        content = message.get("content")
        if not isinstance(content, list):
            form = 'a list of {"type": "image"} and {"type": "text", "text": …}'
            raise ValueError(f"sample {sample['id']!r} has a message whose content is {content!r:.80}; give {form}.")
    require_an_image_for_each_place(sample["id"], sample["messages"], sample["images"])
    if sample["messages"][-1]["role"] != "user":
        raise ValueError(
            f"sample {sample['id']!r} ends with the {sample['messages'][-1]['role']}'s turn; nothing is asked."
        )
    return sample
