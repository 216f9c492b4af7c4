# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the License.
# You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to
# in writing, software distributed under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY
# KIND, either express or implied. See the License for the specific language governing permissions and limitations under the License.
"""LLaVA's configuration, and the one formula for how many image tokens an image takes."""

from typing import Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


def count_image_tokens(
    height: int,
    width: int,
    patch_size: int,
    num_additional_image_tokens: int = 0,
    vision_feature_select_strategy: Literal["default", "full"] = "default",
) -> int:
    """
    Image tokens that one image takes in the language model. Processor, collator and model all use this.

    Args:
        height (`int`), width (`int`): Size of the preprocessed image, in pixels.
        patch_size (`int`): Side of one patch of the vision tower, in pixels.
        num_additional_image_tokens (`int`, *optional*, defaults to 0):
            Tokens that the tower adds to the patches: 1 for CLIP's class token, 0 for SigLIP.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`):
            `"default"` drops the tower's first token (the class token), `"full"` keeps all.

    Returns:
        `int`: `(height // patch_size) * (width // patch_size) + num_additional_image_tokens`, less one for `"default"`; 576 for
        336 × 336 pixels, patches of 14 and a class token.
    """
    num_tokens = (height // patch_size) * (width // patch_size) + num_additional_image_tokens
    return num_tokens - 1 if vision_feature_select_strategy == "default" else num_tokens


@strict
class LlavaConfig(PreTrainedConfig):
    r"""
    Configuration of LLaVA: a vision tower, a projector and a language model. The saved file is a stock `llava` configuration: stock
    transformers loads it and ignores `projector_num_layers`, the one field of ours.

    Args:
        vision_config, text_config (`PreTrainedConfig` or `dict`, *optional*):
            Default to CLIP ViT-L/14-336 (LLaVA-1.5) and `LlamaConfig()`.
        image_token_index (`int`, *optional*, defaults to 32000): Id of the image token; also reachable as `image_token_id`.
        image_seq_length (`int`, *optional*, defaults to 576): Tokens per image ([`count_image_tokens`]).
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation between the projector's layers. `"linear"` for the paper's single matrix W.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`):
            `"default"` drops the tower's class token, `"full"` keeps every token.
        vision_feature_layer (`int` or `list[int]`, *optional*, defaults to -2):
            Hidden state(s) of the tower that are projected; several are concatenated along the features.
        multimodal_projector_bias (`bool`, *optional*, defaults to `True`): Whether the projector's layers have a bias.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`): Also where `text_config` ties.
        projector_num_layers (`int`, *optional*, defaults to 2):
            Linear layers of the projector. 1 is the paper's W (LLaVA §4.1, Eq. 1); it is saved as `linear_1 = W` and `linear_2 =`
            identity, so that stock transformers computes the same. More than 2 has no stock form.

    Raises:
        ValueError: `projector_num_layers` is below 1, or is 1 with an activation other than `"linear"`; `vision_feature_layer` is
            not one of the tower's hidden states.
    """

    model_type = "llava"
    attribute_map = {"image_token_id": "image_token_index"}
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="clip_vision_model",
            init_kwargs={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
                "vocab_size": 32000,
            },
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_index: int = 32000
    image_seq_length: int = 576
    projector_hidden_act: str = "gelu"
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    vision_feature_layer: int | list[int] = -2
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False
    projector_num_layers: int = 2

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # Most language models keep the flag in their own configuration; the head that is tied is ours.
        self.tie_word_embeddings = bool(self.tie_word_embeddings or self.text_config.tie_word_embeddings)
        layers = self.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        depth = getattr(self.vision_config, "num_hidden_layers", None)
        if not layers or (isinstance(depth, int) and any(not -depth - 1 <= layer <= depth for layer in layers)):
            raise ValueError(
                f"vision_feature_layer={self.vision_feature_layer} is not one of the vision tower's hidden states: it has {depth} "
                f"layers, so 0 (the patch embeddings) to {depth}, or {-depth - 1 if depth else None} to -1 (the last layer's)."
            )
        if self.projector_num_layers < 1:
            raise ValueError(f"projector_num_layers must be at least 1, got {self.projector_num_layers}.")
        if self.projector_num_layers == 1 and self.projector_hidden_act != "linear":
            raise ValueError(
                f"A projector of one layer has no activation, but projector_hidden_act={self.projector_hidden_act!r}: "
                'stock transformers would apply it. Set projector_hidden_act="linear", or projector_num_layers=2.'
            )


def count_additional_image_tokens(vision_config: PreTrainedConfig) -> int:
    """
    Tokens that the tower adds to its patches (1: CLIP's class token, 0: SigLIP), read off a run without weights.

    Raises:
        ValueError: the tower has no fixed image size and square patches, takes more than pixels, or merges or drops patches.
    """
    image_size, patch_size = getattr(vision_config, "image_size", None), getattr(vision_config, "patch_size", None)
    if not isinstance(image_size, int) or not isinstance(patch_size, int):
        raise ValueError(
            f"The vision tower ({vision_config.model_type}) has image_size={image_size} and patch_size={patch_size}; "
            "LLaVA needs a tower with one square image size and patch size, such as CLIP's or SigLIP's."
        )
    with torch.device("meta"):
        pixels = torch.zeros(1, getattr(vision_config, "num_channels", 3), image_size, image_size)
        try:
            tower = AutoModel.from_config(vision_config)
            shapes = {state.shape for state in tower(pixels, output_hidden_states=True).hidden_states}
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:  # what towers' own code says of it
            raise ValueError(
                f"The vision tower ({vision_config.model_type}) does not run on pixel_values alone ({str(error).splitlines()[0]}), all "
                "that LLaVA gives it. Choose one that takes images of one size, such as CLIP's or SigLIP's."
            ) from error
    patches = count_image_tokens(image_size, image_size, patch_size, 0, "full")
    shape = next(iter(shapes))  # [1, tokens, hidden]
    if len(shapes) > 1 or len(shape) != 3 or shape[1] < patches:
        raise ValueError(
            f"The vision tower ({vision_config.model_type}) does not keep one token for each of its {patches} patches: its layers "
            f"give {', '.join(str(list(shape)) for shape in sorted(shapes))}. Choose one that does, such as CLIP's or SigLIP's."
        )
    return shape[1] - patches


__all__ = ["LlavaConfig", "count_additional_image_tokens", "count_image_tokens"]
