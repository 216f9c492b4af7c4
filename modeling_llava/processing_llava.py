# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the License.
# You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to
# in writing, software distributed under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY
# KIND, either express or implied. See the License for the specific language governing permissions and limitations under the License.
"""`LlavaProcessor`: images and chat to model inputs. Stock transformers reads what it saves, and it reads stock files."""

import copy
import os
from typing import Any

from transformers import BatchFeature
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils import logging

from .configuration_llava import count_additional_image_tokens, count_image_tokens
from .constants import IMAGE_TOKEN
from .image_processing_llava import LlavaImageProcessor
from .text.chat_templates import (
    chat_template_of,
    choose_chat_template,
    load_chat_template,
    plain_messages,
    warn_of_joined_texts,
    with_image_token,
)
from .text.control_tokens import ControlTokens, Marks
from .text.tokenization import add_image_token, load_tokenizer


logger = logging.get_logger(__name__)


class LlavaProcessor(ProcessorMixin):
    r"""
    Image processor and tokenizer in one. Constructor, attributes and saved files are those of the stock `LlavaProcessor`.

    Differs from stock: images are counted against `<image>` per sample; `apply_chat_template` treats a `<image>` or `</s>`
    that a user typed as ordinary text.

    Args:
        image_processor ([`LlavaImageProcessor`]): Any image processor whose output has one fixed size.
        tokenizer (`PreTrainedTokenizerBase`): It knows the image token ([`~modeling_llava.text.tokenization.add_image_token`]).
        patch_size (`int`, *optional*): Side of a patch of the vision tower, in pixels.
        vision_feature_select_strategy (`str`, *optional*):
            `"default"` drops the tower's first token, `"full"` keeps all. As in the model's configuration.
        chat_template (`str`, *optional*): Jinja text ([`load_chat_template`]).
        image_token (`str`, *optional*, defaults to `"<image>"`): Used where the tokenizer has no `image_token` of its own.
        num_additional_image_tokens (`int`, *optional*, defaults to 0):
            Tokens that the tower adds to the patches: 1 for CLIP's class token, 0 for SigLIP.

    Example:

    ```python
    >>> processor = LlavaProcessor.from_vision_language_pretrained("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5")
    >>> messages = [{"role": "user", "content": [{"type": "image", "path": "cat.jpg"}, {"type": "text", "text": "What is it?"}]}]
    >>> processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    ```
    """

    # The stock signature, in its order: files are read by position.
    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=0,
        **kwargs,
    ):
        self.patch_size = patch_size
        self.num_additional_image_tokens = num_additional_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token = tokenizer.image_token if hasattr(tokenizer, "image_token") else image_token
        ids = tokenizer.encode(self.image_token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"The tokenizer splits the image token {self.image_token!r} into {len(ids)} tokens. Add it first: "
                "modeling_llava.text.tokenization.add_image_token(tokenizer), and resize the model's embeddings."
            )
        self.image_token_id = ids[0]
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        processor = super().from_pretrained(*args, **kwargs)
        own = processor.chat_template or processor.tokenizer.chat_template
        if (completed := with_image_token(own, processor.image_token)) != own:
            processor.chat_template = completed
        return processor

    @classmethod
    def from_vision_language_pretrained(
        cls,
        vision: str | os.PathLike,
        language: str | os.PathLike,
        chat_template: str = "vicuna_v1",
        *,
        do_pad: bool = True,
        vision_feature_select_strategy: str | None = None,
        image_wrap: tuple[str, str] | None = None,
        gguf_file: str | None = None,
    ) -> "LlavaProcessor":
        """
        The processor of a new LLaVA, for [`LlavaForConditionalGeneration.from_vision_language_pretrained`] with the same names.

        Args:
            vision (`str` or `os.PathLike`):
                Folder or Hub name of a CLIP- or SigLIP-like model. Its own image processor says size, crop, mean and standard
                deviation; without one, CLIP's are taken at the tower's image size.
            language (`str` or `os.PathLike`):
                Folder or Hub name of a causal language model, or a `.gguf` file (`gguf_file`: its name inside `language`).
            chat_template (`str`, *optional*, defaults to `"vicuna_v1"`), image_wrap (`tuple[str, str]`, *optional*):
                As for [`choose_chat_template`].
            do_pad (`bool`, *optional*, defaults to `True`):
                Pad an image to a square (LLaVA-1.5) instead of cropping it (LLaVA v1, the paper).
            vision_feature_select_strategy (`str`, *optional*):
                Defaults to `"default"` for a tower with a class token and to `"full"` for one without.

        Raises:
            ValueError: the image processor's output is not of the tower's image size; the chat template does not exist or does
                not fit the tokenizer.
        """
        from .composition import split_gguf_path, vision_tower_config

        vision, language = os.fspath(vision), os.fspath(language)
        config = vision_tower_config(vision)
        num_additional = count_additional_image_tokens(config)
        language, gguf_file = split_gguf_path(language, gguf_file)
        tokenizer = load_tokenizer(language, padding_side="left", **({"gguf_file": gguf_file} if gguf_file else {}))
        add_image_token(tokenizer)
        tokenizer.chat_template = choose_chat_template(chat_template, tokenizer, image_wrap)
        processor = cls(
            image_processor=_image_processor_of(vision, config.image_size, do_pad),
            tokenizer=tokenizer,
            patch_size=config.patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy or ("default" if num_additional else "full"),
            num_additional_image_tokens=num_additional,
            chat_template=tokenizer.chat_template,
        )
        size = image_size(processor)
        if size != (config.image_size, config.image_size):
            raise ValueError(
                f"The image processor of {vision} makes images of {size[0]}×{size[1]} pixels, its vision tower takes "
                f"{config.image_size}×{config.image_size}. Correct size and crop_size in its preprocessor_config.json."
            )
        return processor

    @property
    def num_image_tokens(self) -> int:
        """Positions of the language model that one image takes, in tokens."""
        return num_image_tokens(self)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        *,
        control_token_marks: Marks | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Model inputs for prompts that hold one `<image>` per image; each becomes `num_image_tokens` of them.

        Args:
            images (`ImageInput`, *optional*):
                One image, a list for all texts in order, or one list per text (`[[image], []]`): PIL images, arrays, tensors, paths
                or URLs.
            text (`str` or `list[str]`, *optional*): Prompts. The tokenizer adds `<s>`.
            control_token_marks (`Marks`, *optional*):
                Given by `apply_chat_template` with a text whose user-typed control tokens are marked.
            kwargs: For the tokenizer (`padding`, `return_tensors`, …), the image processor, and `return_mm_token_type_ids`.

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` `[batch, sequence]`, `pixel_values` `[num_images, 3, height, width]`.

        Raises:
            ValueError: a sample has another number of `<image>` than of images; `images` holds `None`.
        """
        if any(kwargs.pop(name, None) is not None for name in ("videos", "audio")):
            raise ValueError("LLaVA reads images and text; there is no video or audio part.")
        if _is_text(images) and (self.image_token in "".join(images) or not (text is None or _is_text(text))):
            images, text = text, images
            logger.warning_once("The processor takes images first, then text: processor(images, text).")
        processor = self
        if control_token_marks is not None:
            processor = copy.copy(self)
            processor.tokenizer = _MarkedTextReader(self.tokenizer, control_token_marks)
        try:
            return ProcessorMixin.__call__(processor, images=images, text=text, **kwargs)
        except ValueError as error:
            if text is None and _is_text(images):
                raise ValueError(
                    f"{error} Images come first, then text: give a prompt alone as processor(text=…)."
                ) from error
            raise

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if isinstance(images, (list, tuple)):
            for i, image in enumerate(images):
                if image is None or (isinstance(image, (list, tuple)) and any(item is None for item in image)):
                    raise ValueError(
                        f"images[{i}] is None. For samples without an image give one list per sample, an empty one for "
                        "those: images=[[image], []]."
                    )
            if all(isinstance(image, (list, tuple)) and not image for image in images):
                images = None  # [[], []]: text only
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        is_nested = isinstance(images, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in images)
        if is_nested and isinstance(text, list):
            if len(images) != len(text):
                raise ValueError(
                    f"There are {len(text)} texts but {len(images)} lists of images. Image tokens in the prompts should be the "
                    "same as the number of images: give one list per text, an empty one for a text without images."
                )
            for i, (sample, own) in enumerate(zip(text, images)):
                is_empty = isinstance(own, (list, tuple)) and not own
                in_text, given = sample.count(self.image_token), 0 if is_empty else len(make_flat_list_of_images(own))
                if in_text != given:
                    raise ValueError(
                        f"Sample {i} has {in_text} {self.image_token} in its text but {given} images. Every image needs one "
                        "of its own, and a text without images none."
                    )
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        return self.image_token * num_image_tokens(self, (height, width))

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """Image tokens and patches (one per image) of images of `image_sizes`, in pixels; vLLM asks for it."""
        if image_sizes is None:
            return MultiModalData()
        options = self._merge_kwargs(**kwargs)["images_kwargs"]
        size = image_size(self, **{k: options[k] for k in ("size", "crop_size") if options.get(k)})
        num_tokens = num_image_tokens(self, size)
        return MultiModalData(
            num_image_tokens=[num_tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        tools: list[dict] | None = None,
        documents: list[dict] | None = None,
        *,
        tokenize: bool = False,
        processor_kwargs: dict | None = None,
        sanitize_control_tokens: bool = True,
        **kwargs,
    ):
        """
        Render a conversation, and with `tokenize=True` turn it and its images into model inputs.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`):
                Messages, or a batch of them, in any form that [`~modeling_llava.text.chat_templates.plain_messages`] reads.
            sanitize_control_tokens (`bool`, *optional*, defaults to `True`):
                With `tokenize=True`, a `<image>`, `</s>` or other special token in the messages is ordinary text, except, in an
                assistant's message, one that was added and that the template does not write, such as `<seg>`; template variables
                are left as they are. Stock's default is off; its ids of the surrounding text are not those of one tokenization, and
                there is no assistant mask.
            kwargs:
                As for stock: `add_generation_prompt`, `continue_final_message`, `return_assistant_tokens_mask`, `return_dict`,
                `return_tensors`, and the template's variables, such as `keep_image_order=True`.
        """
        conversation = plain_messages(conversation)
        batch = conversation if isinstance(conversation, list) else []
        batch = batch if batch and isinstance(batch[0], list) else [batch]
        if not all(batch):
            raise ValueError("A conversation is a list of messages: give at least one.")
        processor_kwargs = dict(processor_kwargs or {})
        named = self.chat_template if isinstance(self.chat_template, dict) else {}
        template = named.get(chat_template) or chat_template or chat_template_of(self)
        for messages in batch:
            warn_of_joined_texts(messages, template, kwargs.get("keep_image_order", False))
        if tokenize and sanitize_control_tokens:
            control = ControlTokens.of(self.tokenizer, self.image_token)
            (conversation, tools, documents), marks = control.mark(conversation, tools, documents, template=template)
            if marks is not None:
                processor_kwargs["control_token_marks"] = marks
        return super().apply_chat_template(
            conversation,
            chat_template,
            tools=tools,
            documents=documents,
            tokenize=tokenize,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )


class _MarkedTextReader:
    """Stands for the tokenizer while a marked text is read."""

    def __init__(self, tokenizer, marks: Marks):
        self._tokenizer = marks.tokenizer(tokenizer)
        self._marks = marks
        self.init_kwargs = tokenizer.init_kwargs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text, **kwargs):
        return self._tokenizer([self._marks.rename(sample) for sample in text], **kwargs)


def num_image_tokens(processor: ProcessorMixin, size: tuple[int, int] | None = None) -> int:
    """
    Image tokens of a preprocessed image of `size` (height and width in pixels), by default of every image; for stock processors too.

    Raises:
        ValueError: the processor lacks `patch_size` or the like, or its images have no fixed size.
    """
    names = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")
    if missing := [name for name in names if getattr(processor, name, None) is None]:
        raise ValueError(
            f"The processor lacks {' and '.join(missing)}. They are in the model's configuration: "
            "patch_size=config.vision_config.patch_size, vision_feature_select_strategy=config.vision_feature_select_strategy, "
            "and num_additional_image_tokens=1 for a tower with a class token (CLIP), 0 without (SigLIP)."
        )
    return count_image_tokens(*(size or image_size(processor)), *(getattr(processor, name) for name in names))


def image_size(processor: ProcessorMixin, size=None, crop_size=None) -> tuple[int, int]:
    """
    Height and width of every preprocessed image, in pixels; with `size` and `crop_size` in place of the image processor's own.

    Raises:
        ValueError: the image processor's output has no fixed size.
    """
    images = processor.image_processor
    size = size if size is not None else getattr(images, "size", None)
    crop_size = crop_size if crop_size is not None else getattr(images, "crop_size", None)
    if getattr(images, "do_center_crop", False) and crop_size:
        return (crop_size, crop_size) if isinstance(crop_size, int) else (crop_size["height"], crop_size["width"])
    sides = {} if size is None else {"shortest_edge": size} if isinstance(size, int) else dict(size)
    if sides.get("height") and sides.get("width"):
        return sides["height"], sides["width"]
    if getattr(images, "do_pad", False) and sides.get("shortest_edge"):
        return sides["shortest_edge"], sides["shortest_edge"]
    raise ValueError(
        f"The image processor keeps the proportions of an image (size={sides}, do_center_crop=False), so images have "
        "no fixed size, which LLaVA requires. Set do_center_crop=True with a crop_size, or do_pad=True."
    )


def _is_text(value) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return len(values) > 0 and all(isinstance(item, str) for item in values)


def _image_processor_of(vision: str, side: int, do_pad: bool) -> LlavaImageProcessor:
    """A [`LlavaImageProcessor`] with the settings of a tower's own image processor."""
    try:
        return LlavaImageProcessor.from_pretrained(vision, do_pad=do_pad, do_convert_rgb=True)
    except OSError:  # a tower saved alone
        logger.warning(
            f"{vision} has no preprocessor_config.json: images are prepared as for CLIP, at {side}×{side} pixels."
        )
        return LlavaImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_pad=do_pad
        )


__all__ = ["LlavaProcessor", "image_size", "load_chat_template", "num_image_tokens"]
