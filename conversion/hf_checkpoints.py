"""Reading HF LLaVA folders for the ways out: what they hold, under the names of the key table."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig

from modeling_llava.configuration_llava import LlavaConfig
from modeling_llava.io.checkpoints import PROJECTOR_CONFIG_NAME, load_processor, require_llava
from modeling_llava.io.load_errors import what_is_broken
from modeling_llava.processing_llava import LlavaProcessor

from .folders import check_has_tokenizer, local_folder, read_config
from .keymaps import Entry, Sizes, canonical_hf_key, drop_derived, key_table, match_keys, rename_all
from .tensors import LazyTensor, find_weights, read_checkpoint


RECORD = "original_checkpoint"
"""Field of the HF configuration that says what the checkpoint was made from: what the way back needs."""

ORIGINAL_FILES = "original"
"""Sub-folder that keeps the original's small files (configuration, tokenizer) as they were."""


@dataclass
class HfCheckpoint:
    """
    A HF LLaVA folder with a CLIP tower and a LLaMA or Mistral language model.

    Args:
        folder (`Path`): The folder.
        config ([`LlavaConfig`]): Its configuration; `projector_num_layers` is what the weights show.
        sizes ([`Sizes`]): Of its parts.
        tensors (`dict[Entry, LazyTensor]`): All of its tensors, the identity of a one-layer projector included.
        files (`list[Path]`): The files of its weights, and `config.json`.
    """

    folder: Path
    config: LlavaConfig
    sizes: Sizes
    tensors: dict[Entry, LazyTensor]
    files: list[Path]

    @property
    def record(self) -> dict:
        """What the conversion from the original noted; `{}` for a checkpoint that was never in that form."""
        return getattr(self.config, RECORD, None) or {}

    @functools.cached_property
    def processor(self) -> LlavaProcessor:
        """Its processor; what older ones lack (`patch_size`) is the configuration's."""
        return load_processor(self.folder)


def read_hf(source: str | Path) -> HfCheckpoint:
    """
    Read a HF LLaVA folder.

    Raises:
        ValueError: it is an adapter, in the original's form or quantised, its tower or language model is not supported, or
            its weights do not fit its configuration.
        OSError: it is not there.
    """
    folder = local_folder(source, "checkpoint")
    if require_llava(folder):
        raise ValueError(f"{folder} is an adapter. Merge it first: llava merge {folder} OUT.")
    if (folder / PROJECTOR_CONFIG_NAME).is_file():
        raise ValueError(f"{folder} is a projector alone. Merge it first: llava merge {folder} OUT.")
    fields = read_config(folder)
    if "quantization_config" in fields:
        raise ValueError(f"{folder} is quantised; give the 16-bit checkpoint from which it was made.")
    check_has_tokenizer(folder)
    if reason := what_is_broken(folder, weights=False):
        raise ValueError(reason)
    config = LlavaConfig.from_pretrained(folder)
    if not isinstance(config.text_config, (LlamaConfig, MistralConfig)):
        raise ValueError(
            f"{folder} has a language model of kind {config.text_config.model_type!r}; LLaMA and Mistral are converted."
        )
    if not isinstance(config.vision_config, CLIPVisionConfig):
        raise ValueError(
            f"{folder} has a vision tower of kind {config.vision_config.model_type!r}; CLIP is converted."
        )

    weights = find_weights(folder)
    if weights is None:
        raise ValueError(f"{folder} holds no weights (model.safetensors or pytorch_model.bin).")
    tensors = rename_all(drop_derived(read_checkpoint(weights)), canonical_hf_key)
    if config.projector_num_layers == 2 and config.projector_hidden_act == "linear" and is_identity(tensors):
        config.projector_num_layers = 1  # saved by stock transformers, which does not know the field
    layers = config.vision_feature_layer
    recorded = (getattr(config, RECORD, None) or {}).get("config") or {}
    sizes = Sizes.from_configs(
        config.text_config,
        config.vision_config,
        projector_layers=config.projector_num_layers,
        projector_bias=config.multimodal_projector_bias,
        projector_numbered=recorded.get("mm_projector_type") == "mlp1x_gelu",
        feature_layers=1 if isinstance(layers, int) else len(layers),
    )
    matched = match_keys(key_table(sizes), "hf", tensors, str(folder))
    if config.projector_num_layers == 1 and not is_identity(tensors):
        raise ValueError(
            f"{folder} says that its projector has one layer, but multi_modal_projector.linear_2 is not the identity."
        )
    files = [folder / "config.json", weights]
    if weights.suffix == ".json":
        shards = set(json.loads(weights.read_text("utf-8"))["weight_map"].values())
        files += sorted(folder / name for name in shards)
    return HfCheckpoint(folder, config, sizes, matched, files)


def is_identity(tensors: dict[str, LazyTensor]) -> bool:
    """Whether the projector's second layer is exactly `y = x`: then the projector is the paper's matrix W."""
    weight = tensors.get("multi_modal_projector.linear_2.weight")
    bias = tensors.get("multi_modal_projector.linear_2.bias")
    if weight is None or len(weight.shape) != 2 or weight.shape[0] != weight.shape[1]:
        return False
    start = 0
    for rows in weight.row_pieces():
        identity = torch.zeros_like(rows)
        identity[torch.arange(rows.shape[0]), torch.arange(start, start + rows.shape[0])] = 1
        if not torch.equal(rows, identity):
            return False
        start += rows.shape[0]
    return bias is None or not bias.tensor().any()
