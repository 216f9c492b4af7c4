"""From a list of conversations to one batch of model inputs."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import ProcessorMixin

from ..configuration_llava import count_image_tokens
from ..constants import IGNORE_INDEX
from ..processing_llava import num_image_tokens
from .labels import conversation_length, encode_conversation
from .schema import (
    PLACEHOLDER_SAMPLE,
    TOO_LONG,
    BadSampleError,
    Conversation,
    DropCounter,
    image_key,
    load_image,
    require_an_image_for_each_place,
    require_image_folder,
)


GIVE_UP_AFTER = 64
"""Samples: when so many have been dropped and not one could be used, the data or a setting is wrong."""


class LlavaDataCollator:
    r"""
    Turns conversations into a padded or packed batch: tokens, labels and pixels.

    **Input**: a list of conversations (see [`Conversation`]), as `load_conversations` gives them; with `packing=True`
    also a list of packs, each a list of conversations. They are not changed.

    **Output**, a dict with

    - `input_ids` (`torch.LongTensor` of shape `(batch_size, sequence_length)`): padded on the right; each image takes
      `processor.num_image_tokens` tokens.
    - `attention_mask` (`torch.LongTensor` of shape `(batch_size, sequence_length)`): 1 for samples, 0 for padding.
    - `labels` (`torch.LongTensor` of shape `(batch_size, sequence_length)`): −100 (`IGNORE_INDEX`) wherever there is
      nothing to learn: system text, questions, images, padding.
    - `pixel_values` (`torch.FloatTensor` of shape `(num_images, 3, height, width)`): the images of all samples, in the
      order of their places in the text. Absent where no sample has an image.
    - `image_indices` (`torch.LongTensor` of shape `(num_places,)`): only where an image occurs more than once in the
      batch, which our model then encodes once: `image_indices[i]` is the row of `pixel_values` that fills the i-th place.

    With `packing=True` all samples are one row, as [`pack_sequences`] gives it, without `attention_mask`. With `share_images`
    also `image_token_indices`, `supervised_indices` ([`LlavaForConditionalGeneration.forward`]) and `segment_lengths`
    ([`~modeling_llava.kernels.packed_attention.varlen_attention_forward`]).

    Args:
        processor ([`LlavaProcessor`]): Ours or a stock one.
        max_length (`int`, *optional*, defaults to 2048):
            Maximum tokens of a sample, images included. `None` for no limit.
        overflow (`str`, *optional*, defaults to `"error"`):
            What becomes of a longer sample: `"error"`, `"drop"` (counted), or `"truncate_text"`, which cuts its end
            but never an image.
        image_folder (`str`, *optional*):
            Relative image paths are looked up there, and no path may leave it.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`):
            `"raise"`, or `"drop"` samples whose image cannot be read or that hold nothing to learn. They are counted by
            reason in `dropped`, and the first of each reason is logged.
        first_turn_order (`str`, *optional*, defaults to `"as_is"`):
            `"as_is"` renders images before the text, as the chat templates and the original code do; `"random"` puts the
            images of the first question before or after it (LLaVA §4.1), drawn by `seed` and the sample's id alone:
            the same in every epoch, process and resume.
        seed (`int`, *optional*, defaults to 0): Of that draw.
        padding (`str`, *optional*, defaults to `"longest"`): `"longest"` sample of the batch, or `"max_length"`.
        pad_to_multiple_of (`int`, *optional*): Round the sequence length up.
        follow_symlinks (`bool`, *optional*, defaults to `False`):
            Allow links inside `image_folder` to lead out of it.
        share_images (`bool`, *optional*, defaults to `True`):
            Give an image that occurs more than once only once, with `image_indices`. A stock model needs `False`.
        packing (`bool`, *optional*, defaults to `False`):
            Pack instead of padding. The language model's attention must know packs
            ([`~modeling_llava.kernels.packed_attention.use_varlen_attention`]).

    Attributes:
        dropped (`dict[str, int]`):
            Samples dropped so far, by reason, in all workers of this process's `DataLoader`.

    Example:

    With 4 tokens per image (here `I`), padding 0, and ids shortened:

    ```python
    >>> collator = LlavaDataCollator(processor, image_folder="images")
    >>> collator([
    ...     {"id": "a", "messages": [user(image, "What is it?"), assistant("A cat.")], "images": ["cat.jpg"]},
    ...     {"id": "b", "messages": [user("Hi."), assistant("Hello.")], "images": []},
    ... ])
    {"input_ids":      [[1, 11,    I,    I,    I,    I,   13,   21, 12, 31, 32, 2],
                        [1, 11,   22,   12,   33,    2,    0,    0,  0,  0,  0, 0]],
     "attention_mask": [[1,  1,    1,    1,    1,    1,    1,    1,  1,  1,  1, 1],
                        [1,  1,    1,    1,    1,    1,    0,    0,  0,  0,  0, 0]],
     "labels":         [[-100, -100, -100, -100, -100, -100, -100, -100, -100, 31, 32, 2],
                        [-100, -100, -100, -100,   33,    2, -100, -100, -100, -100, -100, -100]],
     "pixel_values":   float32 [1, 3, 336, 336]}
    ```
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        max_length: int | None = 2048,
        overflow: Literal["error", "drop", "truncate_text"] = "error",
        image_folder: str | os.PathLike | None = None,
        on_bad_sample: Literal["raise", "drop"] = "raise",
        first_turn_order: Literal["as_is", "random"] = "as_is",
        seed: int = 0,
        padding: Literal["longest", "max_length"] = "longest",
        pad_to_multiple_of: int | None = None,
        follow_symlinks: bool = False,
        share_images: bool = True,
        packing: bool = False,
    ):
        choices = {
            "overflow": (overflow, ("error", "drop", "truncate_text")),
            "on_bad_sample": (on_bad_sample, ("raise", "drop")),
            "first_turn_order": (first_turn_order, ("as_is", "random")),
            "padding": (padding, ("longest", "max_length")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}: give one of {', '.join(map(repr, allowed))}.")
        if padding == "max_length" and max_length is None:
            raise ValueError("padding='max_length' needs a max_length.")
        if packing and (padding == "max_length" or pad_to_multiple_of):
            raise ValueError("packing=True leaves no padding: leave padding and pad_to_multiple_of out.")
        require_image_folder(image_folder)
        self.processor = processor
        self.max_length = max_length
        self.overflow = overflow
        self.image_folder = image_folder
        self.on_bad_sample = on_bad_sample
        self.first_turn_order = first_turn_order
        self.seed = seed
        self.padding = padding
        self.pad_to_multiple_of = pad_to_multiple_of
        self.follow_symlinks = follow_symlinks
        self.share_images = share_images
        self.packing = packing
        # The attention mask hides it, so that any id serves a tokenizer without a padding token.
        ids = processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id, 0
        self.pad_token_id = next(i for i in ids if i is not None and i >= 0)
        self._dropped = DropCounter()
        self._has_found_samples = False

    @property
    def dropped(self) -> dict[str, int]:
        return self._dropped.as_dict()

    def count_dropped(self, error: BadSampleError) -> None:
        """Count a sample that is left out, and log the first of its reason."""
        self._dropped.add(error, "the collator")

    def __call__(self, examples: Sequence[Conversation | list[Conversation]]) -> dict[str, torch.Tensor | int]:
        """
        Encode and pad, or pack, `examples`. A batch whose every sample was dropped is a row of padding with nothing to
        learn, so that a bad sample ends no run, whatever the batch size.

        Raises:
            BadSampleError: A sample cannot be used, and it is not to be dropped.
            ValueError: The first [`GIVE_UP_AFTER`] samples were all dropped; the processor's image tokens do not fit its
                images.
        """
        if self.packing:
            packs = [example if isinstance(example, list) else [example] for example in examples]
            examples = [sample for pack in packs for sample in pack]
        samples, images = self.encode_all(examples)
        if self.packing:
            batch = pack_sequences([sample["input_ids"] for sample in samples], [s["labels"] for s in samples])
            if self.share_images:  # our model: what it would otherwise ask the device for, and wait
                is_image = batch["input_ids"] == self.processor.image_token_id
                is_supervised = batch["labels"] != IGNORE_INDEX
                batch["image_token_indices"] = is_image.flatten().nonzero().squeeze(1)
                batch["supervised_indices"] = is_supervised.flatten()[1:].nonzero().squeeze(1)
                batch["segment_lengths"] = [len(sample["input_ids"]) for sample in samples]
        else:
            batch = self._pad(samples)
        batch.update(self._pixels(samples, images))
        return batch

    def length(self, conversation: Conversation) -> int:
        """
        Tokens that a conversation takes in a batch, images included. No image is opened.

        With `overflow="truncate_text"` at most `max_length`; otherwise longer ones are told as they are.
        """
        messages, options = self._ordered(conversation), {"keep_image_order": self._keeps_order}
        length = conversation_length(messages, self.processor, sample_id=_id(conversation), **options)
        return min(length, self.max_length) if self.overflow == "truncate_text" and self.max_length else length

    def encode_all(self, examples: Sequence[Conversation]) -> tuple[list[dict], dict[tuple, Any]]:
        """
        Tokens of every usable example, and the images that they need.

        Returns:
            `tuple[list[dict], dict]`: a dict per sample with `id`, `input_ids` `[S]`, `labels` `[S]` and `keys`, one per
            image; and RGB images by key, each loaded once, in the order in which they first occur.
        """
        samples, images, errors = [], {}, []
        for position, example in enumerate(examples):
            if example is PLACEHOLDER_SAMPLE:
                samples.append(self._blank())
                continue
            if not isinstance(example, Mapping) or "messages" not in example:
                raise TypeError(
                    f"example {position} of the batch is not a conversation with 'messages' and 'images', but "
                    f"{sorted(example) if isinstance(example, Mapping) else type(example).__name__}: read the data with "
                    "load_conversations, and set remove_unused_columns=False."
                )
            try:
                sample = self.encode(example)
                where = {"image_folder": self.image_folder, "follow_symlinks": self.follow_symlinks}
                for key, reference in zip(sample["keys"], example.get("images") or ()):
                    if key not in images:
                        images[key] = load_image(reference, sample_id=sample["id"], **where)
            except BadSampleError as error:
                asked_to_raise = self.on_bad_sample == "raise"
                if error.reason == TOO_LONG and self.overflow != "truncate_text":
                    asked_to_raise = self.overflow == "error"
                if asked_to_raise:
                    raise
                self.count_dropped(error)
                errors.append(error)
                continue
            samples.append(sample)
        if samples:
            self._has_found_samples = True
        elif not self._has_found_samples and sum(self.dropped.values()) >= GIVE_UP_AFTER:
            causes = "; ".join(str(error) for error in errors[:3])
            raise ValueError(
                f"the first {sum(self.dropped.values())} samples were all dropped, so there is nothing to train on. "
                f"{causes} `llava data check` lists every such sample."
            )
        else:
            samples.append(self._blank())
        return samples, images

    def _blank(self) -> dict[str, Any]:
        """A stand-in for a batch whose every sample was dropped: nothing in it is supervised, its loss is zero."""
        nothing = torch.full((2,), IGNORE_INDEX, dtype=torch.long)
        return {"id": "blank", "keys": [], "input_ids": torch.full_like(nothing, self.pad_token_id), "labels": nothing}

    def encode(self, conversation: Conversation) -> dict[str, Any]:
        """Tokens, labels and image keys of one conversation. No image is opened."""
        sample_id, images = _id(conversation), conversation.get("images")
        images = [] if images is None else images
        require_an_image_for_each_place(sample_id, conversation["messages"], images)
        encoded = encode_conversation(
            self._ordered(conversation),
            self.processor,
            max_length=self.max_length,
            overflow=self.overflow,
            sample_id=sample_id,
            keep_image_order=self._keeps_order,
        )
        if encoded is None:
            raise BadSampleError(sample_id, TOO_LONG, f"has more tokens than max_length={self.max_length}.")
        return {"id": sample_id, "keys": [image_key(image) for image in images], **encoded}

    @property
    def _keeps_order(self) -> bool:
        return self.first_turn_order == "random"

    def _ordered(self, conversation: Conversation) -> list[dict]:
        """The messages with the images of the first question where the draw puts them."""
        messages = conversation["messages"]
        if not self._keeps_order:
            return messages
        ordered, is_first = [], True
        for message in messages:
            if message["role"] == "user":
                after = is_first and _draws_after(self.seed, _id(conversation))
                message, is_first = {**message, "content": _with_images(message["content"], after)}, False
            ordered.append(message)
        return ordered

    def _pad(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(sample["input_ids"]) for sample in samples)
        if self.padding == "max_length":
            length = max(length, self.max_length)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(samples), length)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for row, sample in enumerate(samples):
            end = len(sample["input_ids"])
            input_ids[row, :end] = sample["input_ids"]
            labels[row, :end] = sample["labels"]
            attention_mask[row, :end] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def _pixels(self, samples: list[dict], images: dict[tuple, Any]) -> dict[str, torch.Tensor]:
        """`pixel_values`, and `image_indices` if an image occurs twice; checked against the tokens of each sample."""
        keys = [key for sample in samples for key in sample["keys"]]
        if not keys:
            return {}
        unique = list(dict.fromkeys(keys))  # images of dropped samples are not among them
        inputs = self.processor.image_processor([images[key] for key in unique], return_tensors="pt")
        pixel_values = inputs["pixel_values"]
        self._check_image_tokens(samples, pixel_values)
        if len(unique) == len(keys):
            return {"pixel_values": pixel_values}
        row_of = {key: row for row, key in enumerate(unique)}
        indices = torch.tensor([row_of[key] for key in keys])
        if not self.share_images:
            return {"pixel_values": pixel_values[indices]}
        return {"pixel_values": pixel_values, "image_indices": indices}

    def _check_image_tokens(self, samples: list[dict], pixel_values: torch.Tensor) -> None:
        processor = self.processor
        height, width = pixel_values.shape[-2:]
        strategy, additional = processor.vision_feature_select_strategy, processor.num_additional_image_tokens
        per_image = count_image_tokens(height, width, processor.patch_size, additional, strategy)
        for sample in samples:
            found = int((sample["input_ids"] == processor.image_token_id).sum())
            if found != per_image * len(sample["keys"]):
                raise ValueError(
                    f"sample {sample['id']!r} has {found} image tokens but its {len(sample['keys'])} images of "
                    f"{height}×{width} pixels yield {per_image} each (patch_size={processor.patch_size}, "
                    f"{additional} additional, vision_feature_select_strategy={strategy!r}), "
                    f"while the processor's settings say {num_image_tokens(processor)} each. The image processor and the "
                    "processor's settings disagree: set size and crop_size to what the vision tower takes."
                )


def _id(conversation: Conversation) -> str:
    return str(conversation.get("id", "without id"))


def _draws_after(seed: int, sample_id: str) -> bool:
    """A coin toss that is the same in every process: Python's own `hash` of a string is not."""
    return bool(hashlib.blake2b(f"{seed}/{sample_id}".encode(), digest_size=1).digest()[0] & 1)


def _with_images(content: Any, after: bool) -> Any:
    """The items of a user turn with its images in front of its text, or after it."""
    if isinstance(content, str) or all(item["type"] == "text" for item in content):
        return content
    images = [item for item in content if item["type"] != "text"]
    text = "".join(item["text"] for item in content if item["type"] == "text").strip()
    texts = [{"type": "text", "text": text}] if text else []
    return texts + images if after else images + texts


def pack_sequences(input_ids: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> dict[str, torch.Tensor | int]:
    """
    Concatenate samples into one row.

    Args:
        input_ids (`Sequence[torch.LongTensor]`, each of shape `(length_i,)`):
            Token ids, image tokens expanded. At least one sample, none of them empty.
        labels (`Sequence[torch.LongTensor]`, each of shape `(length_i,)`): As long as their `input_ids`.

    Returns:
        `dict`: with T the sum of the lengths,

        - `input_ids`, `labels`, `position_ids` (`torch.LongTensor` of shape `(1, T)`): positions restart at 0 with each
          sample; the first label of each is `IGNORE_INDEX`, since the token before it belongs to another sample;
        - `cu_seq_lens_q`, `cu_seq_lens_k` (`torch.IntTensor` of shape `(num_samples + 1,)`): where samples begin, and T;
        - `max_length_q`, `max_length_k` (`int`): tokens of the longest sample.

        The names are transformers' `FlashAttentionKwargs`. There is no `attention_mask`: nothing is padding.

    Example:

    ```python
    >>> pack_sequences([tensor([1, 8, 9]), tensor([1, 7])], [tensor([-100, 8, 9]), tensor([-100, 7])])
    {"input_ids":     [[1, 8, 9, 1, 7]],
     "labels":        [[-100, 8, 9, -100, 7]],
     "position_ids":  [[0, 1, 2, 0, 1]],
     "cu_seq_lens_q": [0, 3, 5], "cu_seq_lens_k": [0, 3, 5], "max_length_q": 3, "max_length_k": 3}
    ```
    """
    if not input_ids:
        raise ValueError("A pack needs at least one sample.")
    lengths = [len(ids) for ids in input_ids]
    if any(len(row) != length for row, length in zip(labels, lengths)) or not all(lengths):
        raise ValueError(f"Samples of {lengths} tokens came with labels of {[len(row) for row in labels]}.")
    packed_labels = torch.cat(tuple(labels))  # a copy: the samples' own labels stay as they are
    cu_seq_lens = torch.tensor([0, *lengths]).cumsum(0).int()
    packed_labels[cu_seq_lens[:-1].long()] = IGNORE_INDEX
    longest = max(lengths)
    return {
        "input_ids": torch.cat(tuple(input_ids))[None],
        "labels": packed_labels[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
    }
