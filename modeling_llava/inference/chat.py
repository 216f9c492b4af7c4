"""A conversation about images as a person has it: stop an answer, ask again, start over, save it."""

import itertools
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..io.files import write_atomic
from ..io.images import ImageError, read_image
from .predictor import Answer, LlavaPredictor
from .prompts import messages_of_turns


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic")


@dataclass(frozen=True)
class NamedImage:
    """
    An image and what the person calls it.

    Attributes:
        name (`str`): Path or URL; for an upload, the file's name.
        image (`PIL.Image.Image` or `bytes`): Upright, RGB; or the bytes of an image file, where many are kept.
    """

    name: str
    image: Image.Image | bytes


def is_url(reference: str) -> bool:
    return reference.lower().startswith(("http://", "https://"))


def read_named_image(reference: str) -> NamedImage:
    """
    Reads an image from a path or an `http(s)` URL.

    Raises:
        ValueError: it is not there, not an image, damaged, too large, or cannot be downloaded; in one line.
    """
    try:
        return NamedImage(reference, read_image(reference))
    except ImageError as error:
        raise ValueError(f"{reference} {error.what}.") from None


@dataclass
class Conversation:
    """Images, and what was said about them so far. A stopped answer counts as far as it went."""

    images: list[NamedImage] = field(default_factory=list)
    turns: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Statistics:
    """
    The latest answer in numbers.

    Attributes:
        first_token_seconds (`float`): From the question to the first visible piece.
        tokens_per_second (`float`): After it.
        finish_reason (`str`): As in [`~modeling_llava.inference.Answer`].
        prompt_tokens (`int`): Of the question and all before it, image tokens included.
    """

    num_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    finish_reason: str
    prompt_tokens: int


class Chat:
    """
    One person's conversation over a [`LlavaPredictor`]. Images are encoded once and stay encoded over all turns.

    Args:
        predictor ([`LlavaPredictor`]): This chat's own; several, in threads, may share a model.
        seed (`int`, *optional*): Of the first sampled answer; each further one takes the next. Random by default.
        settings: Fields of [`~modeling_llava.inference.DecodingSettings`] for every answer.
    """

    def __init__(self, predictor: LlavaPredictor, *, seed: int | None = None, **settings):
        self.predictor, self.settings = predictor, settings
        self._predicting = threading.Lock()  # a predictor is for one thread at a time
        self.seeds = itertools.count(random.randrange(2**31) if seed is None else seed)
        self.conversation = Conversation()
        self.statistics: Statistics | None = None
        self._stop = False
        self._busy = threading.Lock()
        self.encoded = False
        """Whether the predictor holds the conversation's images."""

    @property
    def max_length(self) -> int | None:
        """Tokens that the language model was made for."""
        return getattr(self.predictor.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def answering(self) -> bool:
        """Whether an answer is being streamed."""
        return self._busy.locked()

    def show(self, images: list[NamedImage]) -> None:
        """Starts a conversation about these images (none: about text alone), and encodes them."""
        with self._predicting:
            self.predictor.set_image([image.image for image in images])
            self.encoded = True
        self.conversation = Conversation(list(images))

    def reset(self) -> None:
        """Starts a new conversation about the same images."""
        self.conversation = Conversation(self.conversation.images)

    def release(self) -> None:
        """Frees what the predictor holds; the next question encodes the images again."""
        with self._predicting:
            self.predictor.reset()
            self.encoded = False

    def stop(self) -> None:
        """Ends the answer that another thread is streaming, after the token that is being computed."""
        self._stop = True

    def ask(self, question: str, **settings) -> Iterator[str]:
        """
        Streams the answer to a question and adds both to the conversation. An iterator that is closed early, or ended by
        an exception, leaves the answer as far as it was streamed; without any text, the question is not kept either.

        Raises:
            ValueError: an empty question, one while another is being answered, or more tokens than the language model takes.
        """
        if not question.strip():
            raise ValueError("The question is empty.")
        return self._pieces(question, self.conversation.turns.copy(), {**self.settings, **settings})

    def retry(self, **settings) -> Iterator[str]:
        """Answers the latest question again; the new answer replaces the old one. Errors as [`ask`], or nothing was asked."""
        if not self.conversation.turns:
            raise ValueError("Nothing was asked yet.")
        *before, (question, _) = self.conversation.turns
        return self._pieces(question, before, {**self.settings, **settings})

    def _pieces(self, question: str, before: list[tuple[str, str]], settings: dict) -> Iterator[str]:
        if not self._busy.acquire(blocking=False):
            raise ValueError("One question at a time: the answer before is still being written.")
        self._stop = False
        conversation, predictor, begun = self.conversation, self.predictor, time.perf_counter()
        answer, first, prompt_tokens, stream = "", None, 0, None
        predictor.last_answer = None
        try:
            with self._predicting:
                if not self.encoded:
                    predictor.set_image([image.image for image in conversation.images])
                    self.encoded = True
                predictor.history = before.copy()
                prompt_tokens = predictor.prompt_length(question, keep_history=True)
                settings = self._fit(prompt_tokens, {"seed": next(self.seeds), **settings})
                stream = predictor.stream(question, keep_history=True, **settings)
            while not self._stop and self.conversation is conversation:  # a stop may come before the answer begins
                with self._predicting:
                    piece = next(stream, None)
                if piece is None:
                    break
                first = first or time.perf_counter() - begun
                answer += piece
                yield piece
        finally:
            if stream is not None:
                stream.close()
            seconds, last = time.perf_counter() - begun, predictor.last_answer or Answer(0, "", 0, "broken off")
            later = seconds - (first or seconds)
            speed = (last.num_tokens - 1) / later if later else 0.0
            self.statistics = Statistics(last.num_tokens, first or seconds, speed, last.finish_reason, prompt_tokens)
            if answer:
                conversation.turns[:] = [*before, (question, answer)]
            self._busy.release()

    def _fit(self, prompt_tokens: int, settings: dict) -> dict:
        """Room for the answer within the tokens that the language model was made for."""
        if self.max_length is None:
            return settings
        room = self.max_length - prompt_tokens
        if room < 1:
            raise ValueError(
                f"The conversation is {prompt_tokens:,} tokens long, and the model takes {self.max_length:,}. Start a new "
                "one about the same image: /reset, or New chat."
            )
        wanted = settings.get("max_new_tokens", self.predictor.settings.max_new_tokens)
        return {**settings, "max_new_tokens": min(wanted, room)}


def save_transcript(conversations: list[Conversation], path: str | os.PathLike, model: str = "") -> Path:
    """
    Writes conversations to a file, whole or not at all: rows of `messages` and `images`, which `llava train` reads, if its name
    ends in `.json`, else Markdown. ValueError: there is nothing to write.
    """
    told = [conversation for conversation in conversations if conversation.turns]
    if not told:
        raise ValueError("Nothing was said yet, so there is nothing to save.")
    path = Path(path).expanduser()
    text = _as_rows(told) if path.suffix.lower() == ".json" else _as_markdown(told, model)
    write_atomic(path, text)
    return path


def _as_rows(conversations: list[Conversation]) -> str:
    rows = []
    for number, conversation in enumerate(conversations, start=1):
        messages = messages_of_turns(conversation.turns, len(conversation.images))
        names = [image.name for image in conversation.images]
        names = [os.path.abspath(name) if os.path.exists(name) else name for name in names]
        rows.append({"id": f"chat-{number}", "messages": messages, "images": names})
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def _as_markdown(conversations: list[Conversation], model: str) -> str:
    lines = [f"# A conversation with {model}" if model else "# A conversation", ""]
    for conversation in conversations:
        names = ", ".join(f"`{image.name}`" for image in conversation.images)
        lines += [f"## About {names}" if names else "## Without an image", ""]
        for question, answer in conversation.turns:
            quoted = "\n".join(f"> {line}".rstrip() for line in question.splitlines())
            lines += [quoted, "", answer, ""]
    return "\n".join(lines)
