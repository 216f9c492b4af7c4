"""Reading HF LLaVA folders for the ways out."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration as StockLlava

from modeling_llava.configuration_llava import LlavaConfig
from modeling_llava.io.checkpoints import PROJECTOR_CONFIG_NAME, load_processor, require_llava
from modeling_llava.io.files import what_is_broken
from modeling_llava.modeling_llava import LlavaForConditionalGeneration
from modeling_llava.processing_llava import LlavaProcessor

from .folders import local_folder, read_json
from .keymaps import canonical_hf_key, drop_derived, match_keys, rename_all, shapes_of
from .tensors import LazyTensor, find_weights, read_checkpoint, shards_of


RECORD = "original_checkpoint"
"""Field of the HF configuration that says what the checkpoint was made from: what the way back needs."""

ORIGINAL_FILES = "original"
"""Sub-folder that keeps the original's small files (configuration, tokenizer) as they were."""


@dataclass
class HfCheckpoint:
    """A HF LLaVA folder."""

    folder: Path
    config: LlavaConfig  # `projector_num_layers` is what the weights show
    tensors: dict[str, LazyTensor]  # the identity of a one-layer projector included
    files: list[Path]  # of its weights, and `config.json`

    @property
    def record(self) -> dict:
        """What the conversion from the original noted; `{}` for a checkpoint that was never in that form."""
        return getattr(self.config, RECORD, None) or {}

    @functools.cached_property
    def processor(self) -> LlavaProcessor:
        """Its processor; what older ones lack (`patch_size`) is the configuration's."""
        return load_processor(self.folder)

    def part(self, name: str) -> dict[str, LazyTensor]:
        """The tensors of `"language_model"`, `"vision_tower"` or `"multi_modal_projector"`, with that name in front."""
        return {key: tensor for key, tensor in self.tensors.items() if key.startswith(f"{name}.")}


def read_hf(source: str | Path) -> HfCheckpoint:
    """
    Read a HF LLaVA folder.

    Raises:
        ValueError: it is an adapter, in the original's form or quantised, or its weights do not fit its configuration.
        OSError: it is not there.
    """
    folder = local_folder(source, "checkpoint")
    if require_llava(folder):
        raise ValueError(f"{folder} is an adapter. Merge it first: llava merge {folder} OUT.")
    if (folder / PROJECTOR_CONFIG_NAME).is_file():
        raise ValueError(f"{folder} is a projector alone. Merge it first: llava merge {folder} OUT.")
    if "quantization_config" in read_json(folder / "config.json"):
        raise ValueError(f"{folder} is quantised; give the 16-bit checkpoint from which it was made.")
    if reason := what_is_broken(folder, weights=False):
        raise ValueError(reason)
    config = LlavaConfig.from_pretrained(folder)
    weights = find_weights(folder)
    if weights is None:
        raise ValueError(f"{folder} holds no weights (model.safetensors or pytorch_model.bin).")
    tensors = rename_all(drop_derived(read_checkpoint(weights)), canonical_hf_key)
    if config.projector_num_layers == 2 and config.projector_hidden_act == "linear" and is_identity(tensors):
        config.projector_num_layers = 1  # saved by stock transformers, which does not know the field
    with torch.device("meta"):
        model = model_class_of(config)(config)
    shapes = {canonical_hf_key(name): shape for name, shape in shapes_of(model).items()}
    match_keys(shapes, tensors, str(folder))
    if config.projector_num_layers == 1 and not is_identity(tensors):
        raise ValueError(f"{folder} has projector_num_layers 1, but its projector's linear_2 is not the identity.")
    return HfCheckpoint(folder, config, tensors, [folder / "config.json", weights, *shards_of(weights)])


def model_class_of(config: LlavaConfig) -> type[nn.Module]:
    """Stock transformers' class; ours for a projector that stock has no form for."""
    return StockLlava if config.projector_num_layers <= 2 else LlavaForConditionalGeneration


def is_identity(tensors: dict[str, LazyTensor]) -> bool:
    """Whether the projector's second layer is exactly `y = x`: then the projector is the paper's matrix W."""
    weight = tensors.get("multi_modal_projector.linear_2.weight")
    bias = tensors.get("multi_modal_projector.linear_2.bias")
    if weight is None or torch.Size(weight.shape) != torch.Size([weight.num_rows] * 2):
        return False
    is_eye = torch.equal(weight.tensor(), torch.eye(weight.num_rows, dtype=weight.dtype))
    return is_eye and (bias is None or not bias.tensor().any())
