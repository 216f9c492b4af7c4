# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the License.
# You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to
# in writing, software distributed under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY
# KIND, either express or implied. See the License for the specific language governing permissions and limitations under the License.
"""
LLaVA: a vision tower, a projector and a language model (Visual Instruction Tuning, §4.1).

    pixel_values ──► vision_tower ──► patch features ──► multi_modal_projector ──► image features
    input_ids ──► embedding ──► image tokens replaced by image features ──► language_model ──► lm_head

Class and module names are those of stock transformers, and so are the saved keys: a checkpoint of ours is a stock `llava`
checkpoint. What differs is the work per step, not the result: the head sees supervised tokens only
(`kernels/linear_cross_entropy.py`), a frozen tower builds no graph, a repeated image is encoded once, and layers of the
tower that nothing reads are not computed (`kernels/efficient_layers.py`).
"""

from contextlib import nullcontext
from dataclasses import dataclass, fields, make_dataclass
from inspect import signature

import torch
from torch import nn
from transformers import AutoModel, Cache, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging, torch_compilable_check
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import select_hidden_states

from .compat import assert_in_graph, install_capturing_hooks, without_capturing_hooks
from .configuration_llava import LlavaConfig
from .constants import CACHE
from .generation_llava import LlavaGenerationMixin
from .io.adapters import load_adapter_for_inference, name_stock_class_in_adapters, what_to_load
from .io.checkpoints import by_module_names, require_all_loaded, require_weights
from .io.files import explained
from .kernels.efficient_layers import without_later_layers
from .kernels.linear_cross_entropy import causal_language_model_loss, is_sharded
from .kernels.packed_attention import mask_of_pack


logger = logging.get_logger(__name__)


class _WithImageOutputs:
    @property
    def image_hidden_states(self) -> torch.Tensor | None:
        """The projected image features `(num_image_tokens, hidden_size)`, in the order of their image tokens."""
        return None if self.image_outputs is None else torch.cat(list(self.image_outputs.pooler_output))

    def to_tuple(self) -> tuple:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in super().to_tuple())


@dataclass
class LlavaModelOutputWithPast(_WithImageOutputs, BaseModelOutputWithPast):
    """
    Output of [`LlavaModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): Before the head.
        past_key_values (`Cache`, *optional*; called `cache` since transformers 5.24): Keys and values of the tokens so far.
        hidden_states, attentions (`tuple[torch.Tensor]`, *optional*): The language model's, one per layer.
        image_outputs (`BaseModelOutputWithPooling`, *optional*): What [`LlavaModel.get_image_features`] returned.
    """

    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class LlavaCausalLMOutputWithPast(_WithImageOutputs, CausalLMOutputWithPast):
    """
    Output of [`LlavaForConditionalGeneration`]; what is not named here is as in [`LlavaModelOutputWithPast`].

    Args:
        loss (`torch.Tensor`, a float32 scalar, *optional*): Next-token loss over the supervised tokens; given with `labels`.
        logits (`torch.Tensor` of shape `(batch_size, num_kept_tokens, vocab_size)`):
            Scores before the softmax. Reading logits that were skipped (see `skip_logits`) raises.
    """

    image_outputs: BaseModelOutputWithPooling | None = None


class _WithoutLogits(_WithImageOutputs, ModelOutput):
    @property
    def logits(self):
        raise AttributeError(
            "This output has no logits: in training with labels they are not computed, to save memory. Pass "
            "skip_logits=False to the model if you need them."
        )

    def __getitem__(self, key):
        return self.logits if key == "logits" else super().__getitem__(key)

    def to_tuple(self) -> tuple:
        """With `None` where [`LlavaCausalLMOutputWithPast`] has its logits."""
        values, index = super().to_tuple(), 0 if self.loss is None else 1
        return (*values[:index], None, *values[index:])


# Without the field, so that FSDP, pickle and repr, which read every field, do not read the logits.
LlavaOutputWithoutLogits = make_dataclass(
    "LlavaOutputWithoutLogits",
    [(field.name, field.type, None) for field in fields(LlavaCausalLMOutputWithPast) if field.name != "logits"],
    bases=(_WithoutLogits,),
    namespace={"__module__": __name__},
)


class IdentityLinear(nn.Module):
    """The second layer of a one-layer projector, as stock transformers reads it: `y = I x + 0`. Its matrix is a buffer: saved and
    loaded under the stock key, never trained, quantized or wrapped by LoRA."""

    def __init__(self, features: int, bias: bool):
        super().__init__()
        self.weight = nn.Buffer(torch.empty(features, features))
        self.bias = nn.Buffer(torch.empty(features)) if bias else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


class LlavaMultiModalProjector(nn.Module):
    """
    Patch features → image features in the language model's width. One layer is the paper's matrix W (§4.1, Eq. 1), two with GELU are
    LLaVA-1.5's (§3.3), more (`linear_3`, …) have no stock form.
    """

    def __init__(self, config: LlavaConfig):
        super().__init__()
        layers = config.vision_feature_layer
        num_feature_layers = 1 if isinstance(layers, int) else len(layers)
        hidden_size, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_1 = nn.Linear(config.vision_config.hidden_size * num_feature_layers, hidden_size, bias=bias)
        if config.projector_num_layers == 1:  # CODEPATH: LLaVA v1, and LLaVA-1.5's ablations with a linear projector
            self.linear_2 = IdentityLinear(hidden_size, bias)
        for number in range(2, config.projector_num_layers + 1):
            self.add_module(f"linear_{number}", nn.Linear(hidden_size, hidden_size, bias=bias))
        self.num_layers = config.projector_num_layers

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(num_images, num_patches, vision_hidden_size)` → `(num_images, num_patches, text_hidden_size)`."""
        hidden_states = self.linear_1(image_features)
        for number in range(2, self.num_layers + 1):
            hidden_states = getattr(self, f"linear_{number}")(self.act(hidden_states))
        return hidden_states


def _is_beginning(cache: Cache | None) -> bool:
    """Whether no token came before. While compiling the length of a static cache is a tensor, and a paged one has none."""
    if not isinstance(cache, Cache) or torch.compiler.is_compiling():
        return cache is None
    return bool(cache.get_seq_length() == 0)


def _check(condition: torch.Tensor | bool, message: str) -> None:
    """Raise a `ValueError` unless `condition` holds; without a break of a compiled graph, whose error is shorter."""
    if torch.compiler.is_compiling() and isinstance(condition, torch.Tensor):
        assert_in_graph(condition, "Image features and image tokens do not match.")
    else:
        torch_compilable_check(condition, message)


class LlavaPreTrainedModel(PreTrainedModel):
    """Base class: weights' initialisation, and what transformers may rely on."""

    config: LlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        As in transformers, which fills what a checkpoint lacks with random weights.

        Raises:
            ValueError: it is another model, one in the original's format, or without all of its weights (with
                `ignore_mismatched_sizes=True` those are drawn at random, and with `output_loading_info=True` missing ones are
                told as in transformers), or an adapter that does not fit its base.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, **kwargs)
        path, adapter, hub = what_to_load(pretrained_model_name_or_path, kwargs)
        gives_info, is_random_allowed = (
            kwargs.pop(name, False) for name in ("output_loading_info", "ignore_mismatched_sizes")
        )
        with explained(path):
            if not (is_random_allowed or gives_info):
                require_weights(path, cls, kwargs.get("config"))
            model, info = super().from_pretrained(
                path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        if not is_random_allowed:
            require_all_loaded(path, {**info, "missing_keys": set()} if gives_info else info)
        if adapter is not None:
            load_adapter_for_inference(model, adapter, **hub)
        return (model, info) if gives_info else model

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As in torch, also by the names of a checkpoint, with which `Trainer` resumes and loads the best model."""
        return super().load_state_dict(by_module_names(self, state_dict), *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, IdentityLinear):
            init.copy_(module.weight, torch.eye(module.weight.shape[0], dtype=module.weight.dtype))
            if module.bias is not None:
                init.zeros_(module.bias)


class LlavaModel(LlavaPreTrainedModel):
    """The vision tower, the projector and the language model without its head."""

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()
        self.prepare_for_compile()

    def prepare_for_compile(self) -> None:
        """Hook the tower for its hidden states (see `compat.py`); to be called again where another tower was put in."""
        install_capturing_hooks(self)

    def __getstate__(self) -> dict:
        modules = {name: without_capturing_hooks(module) for name, module in self.named_children()}
        return {**self.__dict__, "_modules": modules}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.prepare_for_compile()

    @merge_with_config_defaults
    @can_return_tuple
    @select_hidden_states("vision_feature_layer")
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        image_indices: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Encode images and project their patch features.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`): Preprocessed images.
            vision_feature_layer (`int` or `list[int]`, *optional*):
                Hidden state(s) of the tower to project; the configuration's by default.
            vision_feature_select_strategy (`str`, *optional*):
                `"default"` drops the class token, `"full"` keeps it; the configuration's by default.
            image_sizes (`torch.Tensor` of shape `(num_images, 2)`, *optional*):
                Height and width in pixels, for towers with images of several sizes (Pixtral).
            image_indices (`torch.LongTensor` of shape `(num_slots,)`, *optional*):
                Which image fills each slot of the text, when one image fills several: it is encoded once.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: the tower's output; its `pooler_output` is a list with
            one tensor `(tokens_per_image, text_hidden_size)` per slot.
        """
        if image_sizes is not None:  # not every tower takes them
            kwargs["image_sizes"] = image_sizes
        if vision_feature_layer == 0:  # the patch embeddings: transformers would take the 0 for "none"
            kwargs["output_hidden_states"] = [0]
        trained = pixel_values.requires_grad or any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):  # a frozen tower keeps no activations
            outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)

        layers = [vision_feature_layer] if isinstance(vision_feature_layer, int) else vision_feature_layer
        selected = [outputs.hidden_states[layer] for layer in layers]  # each [num_images, tokens, vision_hidden]
        if vision_feature_select_strategy == "default":
            selected = [hidden_state[:, 1:] for hidden_state in selected]
        selected = selected[0] if isinstance(vision_feature_layer, int) else torch.cat(selected, dim=-1)
        features = self.multi_modal_projector(selected)  # [num_images, tokens_per_image, text_hidden]

        if image_sizes is not None:  # the tower packed the images into one row
            patches = torch.as_tensor(image_sizes, device=features.device) // self.vision_tower.patch_size
            features = torch.split(features.squeeze(0), patches.prod(dim=-1).tolist())
        if image_indices is not None and image_sizes is None:
            features = features.index_select(0, image_indices.to(features.device))
        elif image_indices is not None:
            features = [features[i] for i in image_indices.tolist()]
        outputs.pooler_output = list(features)
        return outputs

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor,
    ) -> torch.BoolTensor:
        """
        Which tokens are image tokens, `(batch_size, sequence_length, 1)`. Without `input_ids` they are found by their embedding.

        Raises:
            ValueError: there are more or fewer image tokens than features `(num_features, hidden_size)`, counted over the batch
                (processor and collator check each sample).
        """
        if input_ids is not None:
            mask = input_ids == self.config.image_token_id
        else:
            image_token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)
        self._check_number_of_features(mask.sum(), image_features)
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    def _check_number_of_features(self, num_tokens: torch.Tensor | int, image_features: torch.Tensor) -> None:
        num_features = image_features.shape[0]
        _check(
            num_tokens == num_features,
            lambda: (
                f"Image features and image tokens do not match: the batch has {int(num_tokens)} image tokens but its images "
                f"yield {num_features} (tokens: {int(num_tokens)}, features: {num_features}). Let the processor expand the "
                "image tokens, and do not truncate them; its patch_size and num_additional_image_tokens have to be those of "
                "the vision tower."
            ),
        )

    def _check_for_missing_images(self, input_ids, image_token_indices, are_required: bool) -> None:
        """An error where the model would learn or answer without its images; a bare forward is warned."""
        message = (
            "Image features and image tokens do not match: the text has image tokens, but there are no pixel_values. Pass on "
            "everything that the processor returned."
        )
        if image_token_indices is not None:
            _check(len(image_token_indices) == 0, message)
        elif are_required:
            _check((input_ids != self.config.image_token_id).all(), message)
        elif not torch.compiler.is_compiling() and (input_ids == self.config.image_token_id).any():
            logger.warning_once(message)

    def _must_run_without_images(self, past_key_values: Cache | None) -> bool:
        """Whether a batch without images must run the vision path: other processes reduce its gradients (DDP) or gather its
        weights (FSDP, ZeRO-3) at the same time, or nothing else is trained."""
        distributed, parts = torch.distributed, (self.vision_tower, self.multi_modal_projector)
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        if not several and not (self.training and torch.is_grad_enabled()):
            return False
        takes_part = any(map(is_sharded, parts))
        if self.training and torch.is_grad_enabled():
            takes_part |= any(p.requires_grad for part in parts for p in part.parameters())
            return takes_part and (several or not any(p.requires_grad for p in self.language_model.parameters()))
        return takes_part and _is_beginning(past_key_values)

    def _zero_from_image_path(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """A zero that has gone through tower and projector, and gives them gradients of zero."""
        size = self.config.vision_config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        pixel_values = inputs_embeds.new_zeros(1, self.config.vision_config.num_channels, height, width)
        takes_sizes = "image_sizes" in signature(self.vision_tower.forward).parameters
        sizes = torch.tensor([[height, width]]) if takes_sizes else None
        features = self.get_image_features(pixel_values, image_sizes=sizes, return_dict=True).pooler_output[0]
        return 0.0 * features.sum().to(inputs_embeds.device, inputs_embeds.dtype)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_indices: torch.LongTensor | None = None,
        image_token_indices: torch.LongTensor | None = None,
        cache: Cache | None = None,
        images_required: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaModelOutputWithPast:
        """
        See [`LlavaForConditionalGeneration.forward`] for the arguments. `images_required`: image tokens without an image are an
        error, not a warning.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; both `pixel_values` and `mm_encoder_outputs`;
                more or fewer image tokens than the images yield.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if pixel_values is not None and mm_encoder_outputs:
            raise ValueError("Give pixel_values or mm_encoder_outputs (images that are encoded already), not both.")

        past_key_values = cache if past_key_values is None else past_key_values
        if inputs_embeds is None:
            token_ids = input_ids
            # CODEPATH: no embedding (the original's −200; language models whose vocabulary was not enlarged)
            if not 0 <= self.config.image_token_id < self.config.text_config.vocab_size:
                token_ids = input_ids.masked_fill(input_ids == self.config.image_token_id, 0)
            inputs_embeds = self.get_input_embeddings()(token_ids)

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            # In training only the features are read. (Otherwise another thread may be in `get_image_features`, which gives all.)
            layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
            is_skipping = self.training and not torch.compiler.is_compiling()
            with without_later_layers(self.vision_tower, layer) if is_skipping else nullcontext():
                image_outputs = self.get_image_features(
                    pixel_values=pixel_values,
                    vision_feature_layer=vision_feature_layer,
                    vision_feature_select_strategy=vision_feature_select_strategy,
                    image_sizes=image_sizes,
                    image_indices=image_indices,
                    return_dict=True,
                )

        if image_outputs is not None:
            image_features = torch.cat(list(image_outputs.pooler_output), dim=0)  # [num_features, text_hidden]
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            if image_token_indices is None:
                mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
                inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)
            else:  # their number is known without waiting for the device
                self._check_number_of_features(len(image_token_indices), image_features)
                indices = image_token_indices.to(inputs_embeds.device)
                inputs_embeds = (
                    inputs_embeds.flatten(0, 1).index_copy(0, indices, image_features).view_as(inputs_embeds)
                )
        else:
            if input_ids is not None and input_ids.shape[1] > 1 and _is_beginning(past_key_values):
                self._check_for_missing_images(input_ids, image_token_indices, images_required)
            if self._must_run_without_images(past_key_values):
                inputs_embeds = inputs_embeds + self._zero_from_image_path(inputs_embeds)

        is_pack = "cu_seq_lens_q" in kwargs
        if is_pack and attention_mask is None and past_key_values is None:
            attention_mask = mask_of_pack(self.language_model, inputs_embeds)
        if past_key_values is None and (self.training or is_pack):
            kwargs.setdefault("use_cache", False)  # keys and values of a training step are of no use after it
        # Continuous batching calls its paged cache by the newer name in every version; the attention layers take it up.
        cache_name = CACHE if past_key_values is None or isinstance(past_key_values, Cache) else "cache"
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{cache_name: past_key_values},
            **kwargs,
        )
        return LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=_without_unselected_layers(image_outputs),
        )


def _without_unselected_layers(image_outputs: BaseModelOutputWithPooling | None) -> BaseModelOutputWithPooling | None:
    """Without `hidden_states` where only those of selected layers are there: `Trainer` gathers outputs, and not `None`."""
    if image_outputs is None or all(states is not None for states in image_outputs.hidden_states or ()):
        return image_outputs
    return type(image_outputs)(**{**image_outputs, "hidden_states": None})


class LlavaTrainingKwargs(TransformersKwargs, total=False):
    """For training. In the signature of forward, `Trainer` would take every name with "label" for labels."""

    label_smoothing: float
    shift_labels: torch.LongTensor | None
    supervised_indices: torch.LongTensor | None


class LlavaForConditionalGeneration(LlavaPreTrainedModel, LlavaGenerationMixin):
    """LLaVA with its head: answers questions about images, and learns to."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.model = LlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def __setattr__(self, name, value):
        # `use_liger_kernel=True` would set Liger's own forward, with another loss.
        if name == "forward" and (getattr(value, "__module__", None) or "").startswith("liger_kernel."):
            logger.warning_once("Liger Kernel is used in the layers; forward and loss stay those of modeling_llava.")
            return
        if name == "peft_config":  # PEFT wraps the model
            name_stock_class_in_adapters()
        super().__setattr__(name, value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self, pixel_values, vision_feature_layer=None, vision_feature_select_strategy=None, **kwargs
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`LlavaModel.get_image_features`]."""
        return self.model.get_image_features(
            pixel_values=pixel_values,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            **kwargs,
        )

    @classmethod
    def from_vision_language_pretrained(cls, vision: str, language: str, **kwargs) -> "LlavaForConditionalGeneration":
        """A new LLaVA from a pretrained vision tower and language model, its projector untrained: see
        [`modeling_llava.composition.compose`] for the arguments (any field of [`LlavaConfig`], and `dtype`)."""
        from .composition import compose

        return compose(cls, vision, language, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_indices: torch.LongTensor | None = None,
        image_token_indices: torch.LongTensor | None = None,
        skip_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[LlavaTrainingKwargs],
    ) -> tuple | LlavaCausalLMOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids, each image expanded to its image tokens (the processor does it).
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`, *optional*):
                Preprocessed images of the whole batch, in the order in which their image tokens stand.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding. Absent for packed samples.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions; in a pack they restart at 0 with each sample.
            past_key_values, cache (`Cache`, *optional*):
                Keys and values of earlier tokens; transformers has called them `cache` since 5.24.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings in place of `input_ids`; image tokens are found by their embedding.
            vision_feature_layer, vision_feature_select_strategy, image_sizes, image_indices:
                See [`LlavaModel.get_image_features`].
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids to learn, `IGNORE_INDEX` elsewhere. They are shifted here.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                The last so many tokens, or the tokens at these positions, get logits; 0 for all. The loss is not affected.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": output of get_image_features}`, in place of `pixel_values`.
            image_token_indices (`torch.LongTensor` of shape `(num_image_tokens,)`, *optional*):
                Where the image tokens are in the flattened batch. A collator knows; forward would have to wait for the device.
            skip_logits (`bool`, *optional*):
                Compute the loss without logits. By default: in training, with labels.
            num_items_in_batch, label_smoothing, shift_labels, supervised_indices:
                See [`~modeling_llava.kernels.linear_cross_entropy.causal_language_model_loss`].
        """
        of_loss = {name: kwargs.pop(name, None) for name in ("shift_labels", "label_smoothing", "supervised_indices")}
        has_labels = labels is not None or of_loss["shift_labels"] is not None
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache if past_key_values is None else past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            image_indices=image_indices,
            image_token_indices=image_token_indices,
            return_dict=True,
            **({"images_required": True} if has_labels else {}),
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state

        loss = None
        if has_labels:
            loss = causal_language_model_loss(hidden_states, labels, self.lm_head, num_items_in_batch, **of_loss)
        elif num_items_in_batch is not None and not torch.compiler.is_compiling():
            logger.warning_once(
                "Trainer took the labels out of the batch to compute the loss itself. With label_smoothing_factor its loss "
                "is wrong for a llava: it does not shift the labels. Use LlavaTrainer; a compute_loss_func must shift them."
            )
        if skip_logits is None:
            skip_logits = self.training and loss is not None
        output_class, logits = LlavaOutputWithoutLogits, {}
        if not skip_logits:
            kept = slice_logits_to_keep(hidden_states, logits_to_keep)
            output_class, logits = LlavaCausalLMOutputWithPast, {"logits": self.lm_head(kept)}
        return output_class(
            loss=loss,
            **logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
        )


__all__ = ["LlavaForConditionalGeneration", "LlavaModel", "LlavaPreTrainedModel"]
