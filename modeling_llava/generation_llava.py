"""`generate` of a LLaVA: images in a kept cache, drafts that would invent images, and continuous batching, which takes text alone."""

import copy

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .constants import CACHE
from .kernels.packed_attention import VARLEN


class LlavaGenerationMixin(GenerationMixin):
    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs):
        """
        As in transformers, but the assistant of an assisted generation sees the images too, and the first step of one reads only
        what a kept cache does not hold, where the whole conversation is given again.
        """
        image_outputs, past = (kwargs.get("mm_encoder_outputs") or {}).get("image"), kwargs.get(CACHE)
        is_later_prompt = not is_first_iteration and isinstance(past, DynamicCache) and past.get_seq_length() == 0
        num_image_tokens = int((input_ids == self.config.image_token_id).sum()) if is_later_prompt else 0
        if num_image_tokens:
            # An assistant, which transformers leaves without what the answering model made of the images. Features of
            # another width say nothing here, and those in the kept cache are gone: it drafts as if it had seen nothing.
            is_first_iteration, width = True, self.config.text_config.hidden_size
            features = [] if image_outputs is None else image_outputs.pooler_output
            if sum(map(len, features)) != num_image_tokens or features[0].shape[-1] != width:
                blank = torch.zeros(num_image_tokens, width, device=input_ids.device)
                kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=[blank])}
        elif is_first_iteration and isinstance(past, DynamicCache) and kwargs.get("next_sequence_length") is None:
            cached, positions = past.get_seq_length(), kwargs.get("position_ids")
            is_whole = positions is not None and positions.shape[-1] == input_ids.shape[1] > cached > 0
            if is_whole and not positions.flatten()[0]:  # a chunk of a prompt begins after what is cached
                kwargs["next_sequence_length"] = input_ids.shape[1] - cached
        # transformers looks for `inputs_embeds` in the signature, and refuses them in `generate` where it is not there.
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        return {**inputs, "images_required": True}

    def _expand_inputs_for_generation(self, expand_size=1, **kwargs):
        if kwargs.get("mm_encoder_outputs"):  # transformers would repeat them for the beams in the caller's own object
            kwargs["mm_encoder_outputs"] = {k: copy.copy(output) for k, output in kwargs["mm_encoder_outputs"].items()}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        return input_ids, self._without_cached_images(input_ids, kwargs)

    def _without_cached_images(self, input_ids: torch.LongTensor, kwargs: dict) -> dict:
        """
        The arguments without the images whose tokens are in a kept cache, where the whole conversation is given again.

        Raises:
            ValueError: the cache holds all of it or more, so that transformers would read a part again, or nothing.
        """
        images, cache = (kwargs.get("mm_encoder_outputs") or {}).get("image"), kwargs.get(CACHE)
        num_cached = 0 if cache is None else int(cache.get_seq_length())
        only_new_tokens = kwargs["position_ids"].shape[-1] != input_ids.shape[1]
        if num_cached == 0 or only_new_tokens:
            return kwargs
        if num_cached >= input_ids.shape[1]:
            raise ValueError(
                f"The kept cache holds {num_cached} tokens and the prompt has {input_ids.shape[1]}, so none is new. Give the "
                "whole conversation, or only its new tokens with the attention mask of all; or begin with an empty cache."
            )
        if images is None:
            return kwargs
        features = torch.cat(list(images.pooler_output))
        positions = (input_ids == self.config.image_token_id).nonzero()[:, 1]
        if len(positions) != len(features):
            return kwargs  # forward says what is wrong
        is_new = (positions >= num_cached).to(features.device)
        new = {"image": BaseModelOutputWithPooling(pooler_output=[features[is_new]])} if is_new.any() else {}
        return {**kwargs, "mm_encoder_outputs": new}

    def _get_candidate_generator(self, *args, **kwargs):
        """As in transformers, but a draft (prompt lookup, an assistant's) ends before an image token, which has no image."""
        generator = super()._get_candidate_generator(*args, **kwargs)
        draft = generator.get_candidates

        def draft_text(input_ids, *args, **kwargs):
            ids, logits = draft(input_ids, *args, **kwargs)
            length = input_ids.shape[1]
            num_kept = int((ids[0, length:] != self.config.image_token_id).cumprod(0).sum())
            return ids[:, : length + num_kept], None if logits is None else logits[:, :num_kept]

        generator.get_candidates = draft_text
        return generator

    def generate_batch(self, inputs, *args, **kwargs):
        """
        As in transformers: continuous batching, which `cache_implementation="paged"` chooses too.

        Raises:
            ValueError: a prompt has images, which the model would not see, or padding, which would be read as text; "varlen"
                attention.
        """
        has_images = any(kwargs.get(name) is not None for name in ("pixel_values", "mm_encoder_outputs"))
        for ids in inputs:
            self._require_text(ids, has_images)
        config, mask = kwargs.get("generation_config") or self.generation_config, kwargs.get("attention_mask")
        pad, eos = config.pad_token_id, config.eos_token_id
        begins_padded = pad is not None and pad not in (eos if isinstance(eos, list) else [eos])
        if mask is not None and not mask.all() or begins_padded and any(list(ids[:1]) == [pad] for ids in inputs):
            raise ValueError(
                "Continuous batching and the paged cache read padding as text. Give generate_batch a list of ids per prompt."
            )
        return super().generate_batch(inputs, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """As in transformers; the manager takes text alone."""
        if self.config.text_config._attn_implementation == VARLEN:
            raise ValueError(
                'Continuous batching does not work with "varlen" attention. Set model.set_attn_implementation("sdpa").'
            )
        manager = super().init_continuous_batching(*args, **kwargs)

        def add_request(input_ids, *args, **kwargs):
            self._require_text(input_ids)
            return type(manager).add_request(manager, input_ids, *args, **kwargs)

        manager.add_request = add_request
        return manager

    def _require_text(self, input_ids, has_images: bool = False) -> None:
        if has_images or self.config.image_token_id in input_ids:
            raise ValueError(
                "Continuous batching and the paged cache take text alone, so the model would not see the images of this "
                "prompt. Use generate with another cache, or LlavaPredictor.answer_many."
            )


__all__ = ["LlavaGenerationMixin"]
