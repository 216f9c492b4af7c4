"""`LlavaPredictor`: encode an image once, ask many. And the same for whole benchmarks."""

import hashlib
import os
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from PIL import Image

from ..data.schema import image_key
from ..io.images import read_image
from ..text.control_tokens import ControlTokens
from .decoding import Decoder, Row
from .decoding_settings import DecodingSettings, default_settings
from .prefix_cache import Prefix, longest_match
from .prompts import encode_images, encode_prompt, messages_of_turns, rows_of_samples, system_message


@dataclass(frozen=True)
class Answer:
    """
    The answer to one sample.

    Attributes:
        id: The sample's.
        text (`str`): Without end token and stop string, stripped.
        num_tokens (`int`): Tokens of the answer, its end token included.
        finish_reason (`str`): `"stop"`, or `"length"` if it was cut at `max_new_tokens`; `"broken off"` if its stream was
            closed before its end.
    """

    id: Any
    text: str
    num_tokens: int
    finish_reason: str


@dataclass
class _EncodedImages:
    """Images that have been through the tower, and the keys and values of the prompt up to the last of them."""

    features: list
    prefix: Prefix | None = None

    @property
    def nbytes(self) -> int:
        return sum(feature.nbytes for feature in self.features) + (self.prefix.nbytes if self.prefix else 0)


class LlavaPredictor:
    """
    Answers questions about images. An image, and the prompt in front of the question, is encoded once; a list of questions
    shares its keys and values, a question alone begins with a copy of them. Greedy answers are those of `generate`, token for
    token (float32).

    The model is put into `eval()`; its weights are not touched. A predictor is for one thread at a time; predictors over
    one model may be in several threads. Hold [`~modeling_llava.inference.model_lock`] for other uses of the model.

    Args:
        model ([`LlavaForConditionalGeneration`]): Ours or stock's; with a LoRA adapter (`PeftModel`) or 4-bit weights too.
        processor ([`LlavaProcessor`]): Ours or stock's, with a chat template.
        system (`str`, *optional*): System message in place of the chat template's own.
        max_cached_images (`int`, *optional*, defaults to 8), max_cached_bytes (`int`, *optional*, defaults to 2 GiB):
            Images whose keys and values are kept for when they are set again, the latest used; the present image always is.
            7B in 16 bits take 0.5 MB per token, 0.3 GB per image of 576.
        settings ([`DecodingSettings`], *optional*):
            How answers are chosen; by default greedy, at most 512 tokens, with the end tokens and what else the model's
            generation configuration sets for greedy answers. Each question can override any field.

    Example:

    ```python
    >>> from modeling_llava.inference import LlavaPredictor

    >>> predictor = LlavaPredictor.from_pretrained("llava-hf/llava-1.5-7b-hf", dtype="bfloat16", device="cuda")
    >>> predictor.set_image("street.jpg")
    >>> predictor.ask("What is the weather like?")
    >>> predictor.ask(["How many people are there?", "What is written on the sign?"], max_new_tokens=32)
    >>> predictor.ask("What are they wearing?", keep_history=True)
    >>> for piece in predictor.stream("And the one on the left?", keep_history=True):
    ...     print(piece, end="", flush=True)
    ```"""

    def __init__(
        self,
        model,
        processor,
        *,
        system: str | None = None,
        max_cached_images: int = 8,
        max_cached_bytes: int = 2 * 2**30,
        settings: DecodingSettings | None = None,
    ):
        if max_cached_images < 0 or max_cached_bytes < 0:
            raise ValueError("max_cached_images and max_cached_bytes must be 0 (the present image only) or more.")
        self.model = model.eval()
        self.processor = processor
        self.system = system
        self.max_cached_images, self.max_cached_bytes = max_cached_images, max_cached_bytes
        self.decoder = Decoder(model, processor.tokenizer)
        self.settings = settings or default_settings(self.decoder.model, processor)
        self._unsaid = _unsaid_ids(processor, self.settings.end_token_ids)
        self._cache: OrderedDict[tuple, _EncodedImages] = OrderedDict()
        self.reset()

    @classmethod
    def from_pretrained(cls, path: str, *, system: str | None = None, **kwargs) -> "LlavaPredictor":
        """A predictor over [`~modeling_llava.inference.load_model`]`(path, **kwargs)`."""
        from .loading import load_model

        return cls(*load_model(path, **kwargs), system=system)

    def reset(self) -> None:
        """Forgets image, conversation and every cached image."""
        self._cache.clear()
        self._images: _EncodedImages | None = None
        self._num_images: int | None = None
        self.last_answer: Answer | None = None
        self.forget_history()

    def forget_history(self) -> None:
        """Starts a new conversation about the same image."""
        self.history: list[tuple[str, str]] = []
        self._past: Prefix | None = None

    def set_image(self, image: Any) -> None:
        """
        Encodes what the next questions are about, and starts a new conversation.

        Args:
            image (`str`, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `bytes`, a list of them, or `None`):
                A path or URL, an image or its array, the bytes of an image file; several images stand before the question in this order;
                `None` for questions without an image.

        Raises:
            ValueError: an image is missing or cannot be read. The image set before stays.
        """
        references = [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]
        encoded = None
        if references:
            key = tuple(_content_key(reference) for reference in references)
            encoded = self._cache.get(key)
            if encoded is None:
                images = [read_image(reference) for reference in references]
                encoded = _EncodedImages(encode_images(images, self.decoder, self.processor))
                self._cover(encoded, encode_prompt(self._messages([("?", None)], len(references)), self.processor))
            self._cache[key] = encoded
            self._cache.move_to_end(key)
            self._evict()
        self._images, self._num_images = encoded, len(references)
        self.forget_history()

    def ask(
        self, question: str | list[str], *, keep_history: bool = False, batch_size: int = 64, **settings
    ) -> str | list[str]:
        """
        Answers a question, or a list of them at once, about the image.

        Args:
            keep_history (`bool`, *optional*, defaults to `False`):
                Continue the conversation of the earlier questions that were asked so. Otherwise the question stands alone and
                leaves the conversation as it is.
            batch_size (`int`, *optional*, defaults to 64):
                Most questions of a list answered at a time; fewer where memory has room for fewer.
            settings: Fields of [`DecodingSettings`] for this call, such as `max_new_tokens=32`.

        Raises:
            ValueError: no image was set (`set_image(None)` says that there is none); an empty question; a list of
                questions with `keep_history`.
            TypeError: a question that is not text; a setting that there is not.
        """
        if isinstance(question, str):
            row, pieces = self._stream(question, keep_history, settings)
            deque(pieces, maxlen=0)
            return self._text(row, self._settings(settings))
        if not isinstance(question, Iterable):
            raise TypeError(f"A question is a string, or a list of strings, not {type(question).__name__}.")
        if keep_history:
            raise ValueError("keep_history takes one question, not a list. Ask a list without keep_history.")
        settings = self._settings(settings)
        rows = [self._row([(text, None)], number) for number, text in enumerate(question)]
        for _ in self.decoder.run(rows, settings, batch_size):
            pass
        return [self._text(row, settings) for row in rows]

    def stream(self, question: str, *, keep_history: bool = False, **settings) -> Iterator[str]:
        """
        As [`ask`] with one question; yields the answer's text piece by piece. With `keep_history` the turn is kept once the
        last piece has been taken, unless a new conversation began meanwhile. `last_answer` then holds what was streamed.
        """
        return self._stream(question, keep_history, settings)[1]

    def prompt_length(self, question: str, *, keep_history: bool = False) -> int:
        """Tokens of the prompt that [`ask`] would answer, image tokens included; nothing is computed."""
        turns = [*(self.history if keep_history else []), (question, None)]
        return len(encode_prompt(self._messages(turns, self._num_images or 0), self.processor))

    def _stream(self, question: str, keep_history: bool, settings: dict) -> tuple[Row, Iterator[str]]:
        turns = [*(self.history if keep_history else []), (question, None)]
        row = self._row(turns, 0, self._past if keep_history else None)
        row.keep = keep_history
        return row, self._pieces(row, question, self._settings(settings), self.history)

    def _pieces(self, row: Row, question: str, settings: DecodingSettings, history: list) -> Iterator[str]:
        shown = ""
        try:
            for _ in self.decoder.run([row], settings, batch_size=1):
                text = self._text(row, settings)
                # The beginning of a stop string, or half a character, may still change.
                held = text.endswith("\N{REPLACEMENT CHARACTER}") or any(
                    text.endswith(stop[:end]) for stop in settings.stop_strings for end in range(1, len(stop))
                )
                if row.finish_reason is None and held:
                    continue
                if len(text) > len(shown):
                    yield text[len(shown) :]
                    shown = text
        finally:
            self.last_answer = Answer(row.id, shown, len(row.tokens), row.finish_reason or "broken off")
        if row.keep and self.history is history:  # no new conversation was begun meanwhile
            self.history.append((question, self._text(row, settings)))
            self._past = row.kept

    def answer_many(
        self,
        samples: Iterable[dict],
        *,
        batch_size: int | None = None,
        image_folder: str | os.PathLike | None = None,
        follow_symlinks: bool = False,
        template_variables: dict | None = None,
        **settings,
    ) -> Iterator[Answer]:
        """
        Answers a benchmark's samples. Those with the same image are put together, and it is encoded once for them; prompts are
        computed without padding; the next sample takes a finished one's place. Memory does not grow with their number.

        Args:
            samples (`Iterable[dict]`):
                `{"id", "messages", "images"}` as in [`modeling_llava.data.schema.Conversation`], a user's turn last.
                Samples with the same image should stand near each other (within `8 · batch_size`) and refer to it by the
                same path.
            batch_size (`int`, *optional*):
                Most answers that grow at a time; by default 32, on the CPU 8. Fewer where memory has room for fewer.
            image_folder (`str`, *optional*): What paths of images are relative to.
            follow_symlinks (`bool`, *optional*, defaults to `False`): Allow links inside `image_folder` to lead out of it.
            template_variables (`dict`, *optional*): For the chat template.
            settings: Fields of [`DecodingSettings`].

        Yields:
            [`Answer`]: as they are finished, not in the samples' order. An answer does not depend on the other samples.

        Raises:
            ValueError: a sample whose image is missing or unreadable, or whose messages and images do not match; it is named.
        """
        settings = self._settings(settings)
        batch_size = self.decoder.max_rows if batch_size is None else batch_size
        rows = rows_of_samples(
            iter(samples),
            self.decoder,
            self.processor,
            system=self.system,
            batch_size=batch_size,
            image_folder=image_folder,
            follow_symlinks=follow_symlinks,
            template_variables=template_variables or {},
        )
        for row in self.decoder.run(rows, settings, batch_size):
            if row.finish_reason is not None:
                yield Answer(row.id, self._text(row, settings), len(row.tokens), row.finish_reason)

    def _cover(self, encoded: _EncodedImages, ids: list[int]) -> None:
        """Makes sure that the keys and values of a prompt's images, and of what stands before them, are there."""
        last = max(i for i, token in enumerate(ids) if token == self.processor.image_token_id)
        matched = longest_match([encoded.prefix], ids)
        if self.decoder.shares_prefixes and (matched is None or len(matched.ids) <= last):
            encoded.prefix = self.decoder.compute(Prefix(ids[: last + 1], features=encoded.features))

    def _row(self, turns: list[tuple[str, str | None]], row_id: int, past: Prefix | None = None) -> Row:
        """The row of a conversation whose last question is to be answered; `past` are the turns' keys and values."""
        if self._num_images is None:
            raise ValueError("No image is set: call set_image(image), or set_image(None) to ask without an image.")
        question = turns[-1][0]
        if not isinstance(question, str):
            raise TypeError(f"A question is a string, not {type(question).__name__}.")
        if not question.strip():
            raise ValueError("The question is empty.")
        ids = encode_prompt(self._messages(turns, self._num_images), self.processor)
        row = Row(row_id, ids, longest_match([past, self._images and self._images.prefix], ids))
        # Another beginning than when the image was set, or a prefix that cannot be shared.
        if self._images and self.processor.image_token_id in row.own_ids:
            self._cover(self._images, ids)
            row.prefix = longest_match([self._images.prefix], ids)
            row.features = [] if row.prefix else self._images.features
        return row

    def _messages(self, turns: list[tuple[str, str | None]], num_images: int) -> list[dict]:
        return [*system_message(self.system), *messages_of_turns(turns, num_images)]

    def _text(self, row: Row, settings: DecodingSettings) -> str:
        text = self.processor.tokenizer.decode([token for token in row.tokens if token not in self._unsaid])
        for stop in settings.stop_strings:
            text = text.split(stop, 1)[0]
        return text.strip()

    def _settings(self, changes: dict) -> DecodingSettings:
        known = [field.name for field in fields(DecodingSettings)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise TypeError(f"There is no setting {', '.join(unknown)}; the settings are {', '.join(known)}.")
        if changes.get("do_sample") is False:  # greedy, whatever the predictor's own settings are
            changes = {"temperature": 1.0, "top_k": None, "top_p": None, **changes}
        return replace(self.settings, **changes)

    def _evict(self) -> None:
        while len(self._cache) > max(1, self.max_cached_images) or (
            len(self._cache) > 1 and sum(entry.nbytes for entry in self._cache.values()) > self.max_cached_bytes
        ):
            self._cache.popitem(last=False)


def _unsaid_ids(processor, end_token_ids: tuple[int, ...]) -> set[int]:
    """Special tokens that are no part of an answer's text; what a user added for answers to hold, such as `<seg>`, is."""
    tokenizer = processor.tokenizer
    said = ControlTokens.of(tokenizer, processor.image_token).said(
        processor.chat_template or tokenizer.chat_template or ""
    )
    special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {i for i, name in special.items() if i in end_token_ids or name not in said}


def _content_key(reference: Any) -> tuple:
    """Equal for the same image: a file that has not changed, or the same pixels, upright and in RGB."""
    if isinstance(reference, Mapping) and reference.get("bytes") is None:
        reference = reference.get("path")
    if isinstance(reference, Image.Image) or getattr(reference, "ndim", 0):
        image = read_image(reference)  # equal values are another image under another palette or orientation
        return "pixels", image.size, hashlib.blake2b(image.tobytes()).digest()
    if isinstance(reference, (str, os.PathLike)) and os.path.isfile(reference):
        info = os.stat(reference)
        return "file", os.path.abspath(reference), info.st_mtime_ns, info.st_size
    return image_key(reference)
