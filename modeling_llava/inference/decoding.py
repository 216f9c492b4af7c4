"""
From prompts to answers, many rows at a time: rows that share an image share its keys and values, prompts are computed
without padding, a finished row leaves and the next one takes its place.
"""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache
from transformers.utils import logging

from ..constants import CACHE
from ..kernels.early_exit import without_later_layers
from .decoding_settings import DecodingSettings, draw_token
from .memory import MARGIN, compute_device, free_memory, key_value_bytes, pass_bytes
from .model_lock import model_lock
from .prefix_cache import Prefix, RowCache
from .prune_last_layer import prune_last_layer
from .shared_prefix import Decode, Prefill, shared_prefix_implementation, supports_shared_prefix


logger = logging.get_logger(__name__)

MAX_PREFILL_TOKENS = 4096
"""Tokens of prompts that one forward pass takes at most (a longer prompt goes alone): bounds its memory."""

MAX_ROWS = {"cpu": 8}
"""Rows at a time, as far as memory suffices, where no batch size is given: by device type, 32 on others."""


@dataclass(eq=False)
class Row:
    """
    A prompt and the answer that grows after it.

    Attributes:
        id: Names the row; also the seed of its sampling.
        ids (`list[int]`): The whole prompt, each image expanded to its image tokens.
        prefix (`Prefix`, *optional*): Keys and values of the first `prefix.end` tokens of `ids`.
        features (`list[torch.Tensor]`): Features `[num_image_tokens, hidden]` of the images after the prefix.
        keep (`bool`): Keep the keys and values of a finished row, in `kept`.
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
        return self.ids[self.prefix.end :] if self.prefix else self.ids


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
        return compute_device(self.model, self.model.get_input_embeddings())

    @torch.inference_mode()
    def encode_images(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """`pixel_values [num_images, 3, height, width]` → the features `[num_image_tokens, hidden]` of each image."""
        tower = self.model.model.vision_tower
        pixel_values = pixel_values.to(compute_device(self.model, tower), tower.dtype)
        with self.lock, without_later_layers(tower, self.model.config.vision_feature_layer):
            return list(self.model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output)

    @property
    def max_rows(self) -> int:
        """Rows that are answered at a time where no batch size is given, as far as memory suffices."""
        return MAX_ROWS.get(self.device.type, 32)

    @torch.inference_mode()
    def compute(self, prefix: Prefix) -> Prefix:
        """Computes a prefix's keys and values, unless they are there."""
        if prefix.keys:
            return prefix

        def write(layer, row, keys, values):
            prefix.keys.append(keys.clone())
            prefix.values.append(values.clone())

        num_tokens = len(prefix.ids)
        step = Prefill([num_tokens], [None], write, self.device)
        embeds = self._embed(Row("the prefix", prefix.ids, features=prefix.features))[None]
        last = torch.tensor([num_tokens - 1], device=self.device)
        with self.lock, prune_last_layer(self.language_model, last, num_tokens):
            self._forward(embeds, step)
        prefix.features = []
        return prefix

    def run(self, rows: Iterable[Row], settings: DecodingSettings, batch_size: int | None = None) -> Iterator[Row]:
        """
        Answers rows, at most `batch_size` of them at a time (by default `max_rows`), and no more than memory has room for;
        one always is. Yields a row each time it has got a token; `row.finish_reason` says whether it was the last one.
        `rows` is read as others finish, so it may be longer than memory.
        """
        if batch_size is None:
            batch_size = self.max_rows
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if not self.shares_prefixes:
            yield from self._run_unshared(rows, settings)
            return
        pending, waiting = iter(rows), []  # waiting: a row for which there was no room
        active: list[Row] = []  # row i of the cache is active[i]
        cache = RowCache(self.num_layers)
        refill_at = 0
        while True:
            # A pass over few new tokens costs as much as one over many: wait until a quarter of the rows has finished.
            if len(active) <= refill_at:
                new: list[Row] = []
                while len(active) + len(new) < batch_size:
                    row = waiting.pop() if waiting else next(pending, None)
                    if row is None:
                        break
                    if (active or new) and not self._has_room(cache, active, [*new, row], settings):
                        waiting.append(row)
                        break
                    new.append(row)
                num_rows = len(active) + len(new)
                refill_at = num_rows - max(1, num_rows // 4)
                if new:
                    cache.fit(num_rows, _max_length([*active, *new], settings))
                    self._prefill(new, cache, settings)
                    active += new
                    yield from new
                    _remove_finished(active, cache)
                    continue
            if not active:
                return
            self._decode(active, cache, settings)
            yield from active.copy()
            _remove_finished(active, cache)

    def _has_room(self, cache: RowCache, active: list[Row], new: list[Row], settings: DecodingSettings) -> bool:
        """Whether memory suffices for new rows next to the active ones, when all have grown to their full length."""
        config, dtype = self.language_model.config, self.model.get_input_embeddings().weight.dtype
        per_token = key_value_bytes(config, dtype)
        num_slots, max_length = cache.shape_for(len(active) + len(new), _max_length([*active, *new], settings))
        whole = num_slots * max_length * per_token
        growth = whole + whole // self.num_layers - cache.nbytes  # a layer's buffers are there twice when they grow
        prefixes = {id(row.prefix): len(row.prefix.ids) for row in new if row.prefix and not row.prefix.keys}
        lengths = [len(row.own_ids) for row in new]
        of_pass = max(min(sum(lengths), MAX_PREFILL_TOKENS), *lengths, *prefixes.values())
        needed = growth + sum(prefixes.values()) * per_token + pass_bytes(config, dtype, of_pass)
        return needed <= (1 - MARGIN) * free_memory(self.device)

    @torch.inference_mode()
    def _prefill(self, new: list[Row], cache: RowCache, settings: DecodingSettings) -> None:
        for row in new:
            if row.prefix is not None:
                self.compute(row.prefix)
        first = 0
        while first < len(new):
            end, num_tokens = first, 0
            while end < len(new) and (end == first or num_tokens + len(new[end].own_ids) <= MAX_PREFILL_TOKENS):
                num_tokens += len(new[end].own_ids)
                end += 1
            some, first = new[first:end], end
            lengths = [len(row.own_ids) for row in some]
            slots = [cache.add(length, row.prefix) for length, row in zip(lengths, some)]
            cache.reserve(max(lengths) + 1)

            def write(layer, index, keys, values, slots=slots):
                cache_keys, cache_values = cache.buffers(layer, keys[None], values[None])
                cache_keys[slots[index], :, : keys.shape[1]] = keys
                cache_values[slots[index], :, : values.shape[1]] = values

            step = Prefill(lengths, [row.prefix for row in some], write, self.device)
            embeds = torch.cat([self._embed(row) for row in some])[None]
            last = torch.tensor([end - 1 for _, end in step.spans], device=self.device)
            with self.lock, prune_last_layer(self.language_model, last, embeds.shape[1]):
                hidden = self._forward(embeds, step)
            self._choose(self.model.lm_head(hidden[0, last]), some, settings)

    @torch.inference_mode()
    def _decode(self, active: list[Row], cache: RowCache, settings: DecodingSettings) -> None:
        tokens = torch.tensor([[row.tokens[-1] for row in active]], device=self.device)
        step = Decode(cache, self.device)
        hidden = self._forward(self.model.get_input_embeddings()(tokens), step)
        cache.lengths = [length + 1 for length in cache.lengths]
        self._choose(self.model.lm_head(hidden[0]), active, settings)

    def _forward(self, embeds: torch.Tensor, step: Prefill | Decode) -> torch.Tensor:
        # embeds [1, num_tokens, hidden]
        with self.lock, shared_prefix_implementation(self.language_model.config):
            outputs = self.language_model(
                inputs_embeds=embeds,
                position_ids=step.positions[None],
                attention_mask=None,
                use_cache=False,
                llava_step=step,
            )
        return outputs.last_hidden_state

    def _embed(self, row: Row) -> torch.Tensor:
        """The embeddings `[num_tokens, hidden]` of a row's own tokens, with its images' features in their places."""
        ids = torch.tensor(row.own_ids, device=self.device)
        is_image = ids == self.model.config.image_token_id
        embeds = self.model.get_input_embeddings()(ids.masked_fill(is_image, 0))  # its id may have no embedding
        num_features = sum(len(features) for features in row.features)
        if int(is_image.sum()) != num_features:
            raise ValueError(
                f"sample {row.id!r} has {int(is_image.sum())} image tokens but its images yield {num_features}. Do "
                f"processor and model belong together? Does the question hold the text of the image token?"
            )
        if num_features:
            embeds[is_image] = torch.cat(row.features).to(embeds.device, embeds.dtype)
        return embeds

    @torch.inference_mode()
    def _run_unshared(self, rows, settings):
        """Row by row with transformers' own cache, for language models that `shared_prefix` cannot serve."""
        for row in rows:
            cache = DynamicCache(config=self.language_model.config)
            embeds = self._embed(row)[None]
            while row.finish_reason is None:
                with self.lock:
                    _forget_lengths(self.language_model)  # of what another decoder answered meanwhile
                    outputs = self.language_model(inputs_embeds=embeds, use_cache=True, **{CACHE: cache})
                    _forget_lengths(self.language_model)
                self._choose(self.model.lm_head(outputs.last_hidden_state[:, -1]), [row], settings)
                yield row
                embeds = self.model.get_input_embeddings()(torch.tensor([row.tokens[-1:]], device=self.device))

    def _choose(self, logits: torch.Tensor, rows: list[Row], settings: DecodingSettings) -> None:
        """Gives each row its next token. logits `[num_rows, vocab_size]`."""
        logits = logits.float()
        if settings.takes_likeliest:
            tokens = logits.argmax(dim=-1).tolist()
        else:
            tokens = [draw_token(row, row_logits[None], settings) for row, row_logits in zip(rows, logits.cpu())]
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


def _forget_lengths(language_model) -> None:
    """
    Sets "dynamic" rotary angles back to those of a model just loaded. They grow with the longest sequence so far, and
    transformers keeps them for the next one: a prompt's answer would depend on the prompts before it.
    """
    for module in language_model.modules():
        if not hasattr(module, "original_max_seq_len"):
            continue
        for kind in module.rope_type if isinstance(module.rope_type, dict) else [None]:
            token = torch.zeros(1, 1, dtype=torch.long, device=next(module.buffers()).device)
            module(token.float(), token, **({} if kind is None else {"layer_type": kind}))  # a sequence of one token


def _max_length(rows: list[Row], settings: DecodingSettings) -> int:
    """Tokens of its own that the longest row has at last."""
    return max(len(row.own_ids) for row in rows) + settings.max_new_tokens


@torch.inference_mode()
def _remove_finished(active: list[Row], cache: RowCache) -> None:
    for index in reversed(range(len(active))):
        row = active[index]
        if row.finish_reason is None:
            continue
        if row.keep:  # the last token of an answer was never an input
            row.kept = cache.take(index, row.own_ids + row.tokens[:-1])
        cache.remove(index)
        active[index] = active[-1]
        active.pop()


__all__ = ["Decoder", "Row"]
