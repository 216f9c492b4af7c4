"""How the tokens of an answer are chosen: the settings, what a model asks of them by itself, and the draw."""

import hashlib
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging

from ..text.stops import answer_stop


logger = logging.get_logger(__name__)

_GENERATE_ONLY = {
    "bad_words_ids": [],
    "begin_suppress_tokens": [],
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_length": 0,
    "num_beams": 1,
    "sequence_bias": {},
    "suppress_tokens": [],
}
"""What a generation configuration may ask of greedy answers beyond [`DecodingSettings`], and the value that asks nothing."""


@dataclass(frozen=True)
class DecodingSettings:
    """
    How answers are chosen. The default is greedy.

    Args:
        max_new_tokens (`int`, defaults to 512): Tokens of an answer at most, its end token included.
        do_sample (`bool`, defaults to `False`): Draw tokens rather than take the likeliest.
        temperature, top_k, top_p: As in transformers' `GenerationConfig`; they need `do_sample`.
        repetition_penalty, no_repeat_ngram_size: As in `GenerationConfig`; over prompt and answer.
        min_new_tokens (`int`, defaults to 0): Tokens of an answer before an end token may come.
        seed (`int`, defaults to 0):
            With `do_sample`. Every row draws from a generator of its own, made of the seed and the row's id: an answer
            depends neither on the batch nor on where an interrupted run resumed.
        stop_strings (`tuple[str, ...]`): An answer ends before the first of them (`###` of LLaVA v0).
        end_token_ids (`tuple[int, ...]`): An answer ends with one of these.

    Raises:
        ValueError: a value out of range.
    """

    max_new_tokens: int = 512
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    seed: int = 0
    stop_strings: tuple[str, ...] = ()
    end_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name, least in (("max_new_tokens", 1), ("no_repeat_ngram_size", 0), ("min_new_tokens", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}.")
        if not self.do_sample and (self.temperature not in (0, 1) or self.top_k is not None or self.top_p is not None):
            raise ValueError(
                f"temperature={self.temperature}, top_k={self.top_k} and top_p={self.top_p} change nothing in a greedy answer. "
                "Set do_sample=True, or leave them out."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if isinstance(self.end_token_ids, int):
            raise ValueError(f"end_token_ids must be a sequence of ids, got {self.end_token_ids!r}.")
        if isinstance(self.stop_strings, str) or not all(self.stop_strings):
            raise ValueError(f"stop_strings must be a sequence of non-empty strings, got {self.stop_strings!r}.")
        self.processors(0)  # raises where a value is out of range

    @property
    def takes_likeliest(self) -> bool:
        """Whether each token is the likeliest, whatever came before."""
        return not (self.do_sample or self.processors(0))

    def processors(self, prompt_length: int) -> LogitsProcessorList:
        """What `generate` does to the logits after a prompt of so many tokens before one is chosen."""
        steps = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            steps.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.no_repeat_ngram_size:
            steps.append(NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        if self.min_new_tokens and self.end_token_ids:
            end = list(self.end_token_ids)
            steps.append(MinNewTokensLengthLogitsProcessor(prompt_length, self.min_new_tokens, end))
        if self.do_sample:
            steps.append(TemperatureLogitsWarper(float(self.temperature)))
            if self.top_k is not None:
                steps.append(TopKLogitsWarper(self.top_k))
            if self.top_p is not None:
                steps.append(TopPLogitsWarper(self.top_p))
        return steps


def default_settings(model, processor) -> DecodingSettings:
    """What the model's generation configuration and the chat template say about the end of an answer."""
    tokenizer, generation = processor.tokenizer, model.generation_config
    end = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    end = [] if end is None else list(end) if isinstance(end, (list, tuple)) else [end]
    stop_strings = ()
    try:
        stop = answer_stop(processor)
    except ValueError as error:  # a foreign template: the end token has to do
        logger.info("Answers end with the end token only: %s", error)
    else:
        stop_id = tokenizer.get_added_vocab().get(stop)
        if stop_id is not None:
            end = sorted({*end, stop_id})
        elif stop and stop not in map(tokenizer.decode, end):
            stop_strings = (stop,)
    ignored = [name for name, off in _GENERATE_ONLY.items() if getattr(generation, name, None) not in (None, off)]
    if ignored:
        logger.warning(
            f"The model's generation configuration sets {', '.join(ignored)}, which LlavaPredictor does not follow: its "
            "answers may be others than those of generate."
        )
    return DecodingSettings(
        end_token_ids=tuple(end),
        stop_strings=stop_strings,
        repetition_penalty=generation.repetition_penalty or 1.0,
        no_repeat_ngram_size=generation.no_repeat_ngram_size or 0,
        min_new_tokens=generation.min_new_tokens or 0,
    )


def draw_token(row, logits: torch.Tensor, settings: DecodingSettings) -> int:
    """The next token of a row [`~decoding.Row`]. logits `[1, vocab_size]`, on the CPU: the same draw on every device."""
    scores = settings.processors(len(row.ids))(torch.tensor([row.ids + row.tokens]), logits)
    if not settings.do_sample:
        return int(scores.argmax())
    if row.generator is None:
        digest = hashlib.sha256(f"{settings.seed}/{row.id}".encode()).digest()
        row.generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=row.generator))
