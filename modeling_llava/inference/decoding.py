"""
From prompts to answers, many rows at a time: rows that share an image share its keys and values, prompts are computed
without padding, and a finished row's place is taken by the next one at once.
"""

import threading
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache
from transformers.utils import logging

from ..constants import CACHE
from ..kernels.efficient_layers import without_later_layers
from .decoding_settings import DecodingSettings, draw_token
from .prefix_cache import MARGIN, Prefix, RowCache, free_memory, key_value_bytes, pass_bytes
from .shared_prefix import Step, prune_last_layer, shared_prefix_implementation, supports_shared_prefix


logger = logging.get_logger(__name__)

MAX_PREFILL_TOKENS = 4096
"""Tokens of prompts that one forward pass takes at most (a longer prompt goes alone): bounds its memory."""

MAX_ROWS = {"cpu": 8}
"""Rows at a time, as far as memory suffices, where no batch size is given: by device type, 32 on others."""

_LOCKS: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()
_MAKING = threading.Lock()


def model_lock(model: nn.Module):
    """
    The lock that every predictor over a model holds while it computes a token: meanwhile the model attends in another way and
    some layers compute less. Hold it (`with model_lock(model):`) for other uses of the model in another thread.

    Args:
        model: A LLaVA, or a `PeftModel` around it: both are one model.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    with _MAKING:
        return _LOCKS.setdefault(model, threading.RLock())


@dataclass(eq=False)
class Row:
    """
    A prompt and the answer that grows after it.

    Attributes:
        id: Names the row; also the seed of its sampling.
        ids (`list[int]`): The whole prompt, each image expanded to its image tokens.
        prefix (`Prefix`, *optional*): Keys and values of the tokens that `ids` begins with.
        features (`list[torch.Tensor]`): Features `[num_image_tokens, hidden]` of the images after the prefix.
        keep (`bool`): Keep the keys and values of the finished row, in `kept`; of a row that is alone.
        tokens (`list[int]`): The answer so far, its end token included.
        finish_reason (`str`, *optional*): `"stop"`, `"length"`, or `None` while it grows.
    """

    id: Hashable
    ids: list[int]
    prefix: Prefix | None = None
    features: list[torch.Tensor] = field(default_factory=list)
    keep: bool = False
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    kept: Prefix | None = None
    generator: torch.Generator | None = None

    @property
    def own_ids(self) -> list[int]:
        """The prompt's tokens after the prefix."""
        return self.ids[len(self.prefix.ids) :] if self.prefix else self.ids

    @property
    def next_ids(self) -> list[int]:
        """The tokens of the next pass: the prompt's own, then the answer's latest."""
        return self.tokens[-1:] or self.own_ids


class Decoder:
    """
    Runs a LLaVA over rows. Decoders of one model in several threads share its `model_lock`.

    Args:
        model ([`LlavaForConditionalGeneration`], stock or ours, or a `PeftModel` around it)
        tokenizer: For stop strings.

    Raises:
        ValueError: an adapter of virtual tokens (prompt tuning).
    """

    def __init__(self, model, tokenizer):
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                f"LlavaPredictor cannot put the virtual tokens of a {type(model.active_peft_config).__name__} before its "
                "prompts. Ask such a model with generate."
            )
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.language_model = self.model.model.language_model
        self.tokenizer = tokenizer
        self.num_layers = self.language_model.config.num_hidden_layers
        with self.lock:
            self.shares_prefixes = supports_shared_prefix(self.language_model, self.device)
        if not self.shares_prefixes:
            logger.warning(
                f"{type(self.language_model).__name__} has layers whose keys and values cannot be shared between questions: "
                "images are encoded once, but each prompt is computed on its own, one at a time."
            )

    @property
    def lock(self):
        """The model's lock; looked up each time, for a lock can be neither copied nor pickled."""
        return model_lock(self.model)

    @property
    def device(self) -> torch.device:
        """Where the embeddings are computed."""
        return self._device_of(self.model.get_input_embeddings())

    def _device_of(self, module: nn.Module) -> torch.device:
        """Where a part of the model computes, wherever accelerate keeps its weights meanwhile (disk, CPU)."""
        device = next(module.parameters()).device
        if device.type != "meta":
            return device
        places = [place for place in self.model.hf_device_map.values() if place not in ("cpu", "disk")]
        return torch.device(places[0] if places else "cpu")

    @property
    def max_rows(self) -> int:
        """Rows that are answered at a time where no batch size is given, as far as memory suffices."""
        return MAX_ROWS.get(self.device.type, 32)

    @torch.inference_mode()
    def encode_images(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """`pixel_values [num_images, 3, height, width]` → the features `[num_image_tokens, hidden]` of each image."""
        tower = self.model.model.vision_tower
        pixel_values = pixel_values.to(self._device_of(tower), tower.dtype)
        with self.lock, without_later_layers(tower, self.model.config.vision_feature_layer):
            return list(self.model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output)

    @torch.inference_mode()
    def compute(self, prefix: Prefix) -> Prefix:
        """Computes a prefix's keys and values, unless they are there."""
        if not prefix.keys:
            cache = RowCache(self.num_layers)
            cache.fit(1, len(prefix.ids))
            cache.add(None, False)
            self._forward([Row("the prefix", prefix.ids, features=prefix.features)], cache)
            prefix.keys, prefix.values = [keys[0] for keys in cache.keys], [values[0] for values in cache.values]
            prefix.features = []
        return prefix

    def run(self, rows: Iterable[Row], settings: DecodingSettings, batch_size: int) -> Iterator[Row]:
        """
        Answers rows, at most `batch_size` of them at a time, and no more than memory has room for; one always is. Yields a
        row each time it has got a token; `row.finish_reason` says whether it was the last one. `rows` is read as others
        finish, so it may be longer than memory.

        Rows that are answered one at a time begin with a copy of their prefix: a token then costs what it costs `generate`.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if not self.shares_prefixes:
            yield from self._run_unshared(rows, settings)
            return
        pending = iter(rows)
        active: list[Row] = []  # row i of the cache is active[i]
        cache = RowCache(self.num_layers)
        limit = batch_size
        while True:
            new: list[Row] = []
            while len(active) + len(new) < limit and (row := next(pending, None)) is not None:
                if new and sum(len(other.own_ids) for other in [*new, row]) > MAX_PREFILL_TOKENS:
                    pending = chain([row], pending)
                    break
                if (active or new) and not self._has_room(cache, active, [*new, row], settings):
                    pending, limit = chain([row], pending), len(active) + len(new)  # until one of them has finished
                    break
                new.append(row)
            if not active and not new:
                return
            active += new
            self._step(active, new, cache, settings, copies=batch_size == 1)
            yield from active.copy()
            if any(row.finish_reason for row in active):
                _remove_finished(active, cache)
                limit = batch_size

    def _has_room(self, cache: RowCache, active: list[Row], new: list[Row], settings: DecodingSettings) -> bool:
        """Whether memory suffices for new rows next to the active ones, when all have grown to their full length."""
        config, dtype = self.language_model.config, self.model.get_input_embeddings().weight.dtype
        per_token = key_value_bytes(config, dtype)
        max_length = max(len(row.own_ids) for row in [*active, *new]) + settings.max_new_tokens
        num_slots, max_length = cache.shape_for(len(active) + len(new), max_length)
        whole = num_slots * max_length * per_token
        growth = whole + whole // self.num_layers - cache.nbytes  # a layer's buffers are there twice when they grow
        prefixes = {id(row.prefix): len(row.prefix.ids) for row in new if row.prefix and not row.prefix.keys}
        of_pass = max(len(active) + sum(len(row.own_ids) for row in new), *prefixes.values(), 0)
        needed = growth + sum(prefixes.values()) * per_token + pass_bytes(config, dtype, of_pass)
        return needed <= (1 - MARGIN) * free_memory(self.device)

    @torch.inference_mode()
    def _step(
        self, rows: list[Row], new: list[Row], cache: RowCache, settings: DecodingSettings, copies: bool
    ) -> None:
        """Gives each row its next token, in one pass with the prompts of the new ones."""
        if new:
            longest = max(len(row.ids if copies else row.own_ids) for row in rows)
            cache.fit(len(rows), longest + settings.max_new_tokens)
        for row in new:
            if row.prefix is not None:
                self.compute(row.prefix)
            cache.add(row.prefix, copies)
        self._choose(self.model.lm_head(self._forward(rows, cache)), rows, settings)

    def _forward(self, rows: list[Row], cache: RowCache) -> torch.Tensor:
        """The hidden states `[num_rows, hidden]` after each row's last token; keys and values go into the cache."""
        embeds, lengths = self._embed(rows), [len(row.next_ids) for row in rows]
        step = Step(cache, lengths, self.device)
        with (
            self.lock,
            shared_prefix_implementation(self.language_model.config),
            prune_last_layer(self.language_model, step.last, len(embeds)),
        ):
            outputs = self.language_model(
                inputs_embeds=embeds[None],
                position_ids=step.positions[None],
                attention_mask=None,
                use_cache=False,
                llava_step=step,
            )
        cache.lengths = [old + length for old, length in zip(cache.lengths, lengths)]
        return outputs.last_hidden_state[0] if len(embeds) == len(rows) else outputs.last_hidden_state[0, step.last]

    def _embed(self, rows: list[Row]) -> torch.Tensor:
        """The embeddings `[num_tokens, hidden]` of the rows' next tokens, with the images' features in their places."""
        ids, places, features = [], [], []
        for row in rows:
            if not row.tokens:
                own = [i for i, token in enumerate(row.own_ids, len(ids)) if token == self.model.config.image_token_id]
                num_features = sum(map(len, row.features))
                if len(own) != num_features:
                    raise ValueError(
                        f"sample {row.id!r} has {len(own)} image tokens but its images yield {num_features}. Do processor "
                        "and model belong together? Does the question hold the text of the image token?"
                    )
                places += own
                features += row.features
            ids += row.next_ids
        tokens = torch.tensor(ids, device=self.device)
        if places:
            tokens[places] = 0  # the image token may have no embedding
        embeds = self.model.get_input_embeddings()(tokens)
        if places:
            embeds[places] = torch.cat(features).to(embeds.device, embeds.dtype)
        return embeds

    @torch.inference_mode()
    def _run_unshared(self, rows, settings):
        """Row by row with transformers' own cache, for language models that `shared_prefix` cannot serve."""
        for row in rows:
            cache = DynamicCache(config=self.language_model.config)
            while row.finish_reason is None:
                embeds = self._embed([row])[None]
                with self.lock:
                    outputs = self.language_model(inputs_embeds=embeds, use_cache=True, **{CACHE: cache})
                self._choose(self.model.lm_head(outputs.last_hidden_state[:, -1]), [row], settings)
                yield row

    def _choose(self, logits: torch.Tensor, rows: list[Row], settings: DecodingSettings) -> None:
        """Gives each row its next token. logits `[num_rows, vocab_size]`."""
        if settings.takes_likeliest:
            tokens = logits.argmax(dim=-1).tolist()
        else:
            tokens = [
                draw_token(row, row_logits[None], settings) for row, row_logits in zip(rows, logits.float().cpu())
            ]
        for row, token in zip(rows, tokens):
            row.tokens.append(token)
            if token in settings.end_token_ids or self._stopped_by_text(row, settings.stop_strings):
                row.finish_reason = "stop"
            elif len(row.tokens) >= settings.max_new_tokens:
                row.finish_reason = "length"

    def _stopped_by_text(self, row: Row, stop_strings: tuple[str, ...]) -> bool:
        if not stop_strings:
            return False
        # A token is a character at least, but for the bytes of rare characters.
        tail = self.tokenizer.decode(row.tokens[-(max(map(len, stop_strings)) + 8) :])
        return any(stop in tail for stop in stop_strings)


@torch.inference_mode()
def _remove_finished(active: list[Row], cache: RowCache) -> None:
    for index in reversed(range(len(active))):
        row = active[index]
        if row.finish_reason is None:
            continue
        if row.keep:  # the last token of an answer was never an input
            row.kept = cache.take(index, row.ids + row.tokens[:-1])
        cache.remove(index)
        active[index] = active[-1]
        active.pop()
