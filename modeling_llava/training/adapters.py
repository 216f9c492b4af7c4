"""
LoRA, DoRA, rsLoRA and QLoRA: one adapter folder that plain PEFT, and transformers by itself, load back.

    adapter_config.json        target_modules: a regular expression; modules_to_save: what is trained whole
    adapter_model.safetensors  low-rank matrices of the language model; the whole projector; the tower if trained
    processor files            so that the folder is all a pipeline needs (there must be no config.json: with one,
                               transformers takes the folder for a full model and does not look for the base)

The low-rank matrices are found by a regular expression on `language_model`: targets by name ending (`q_proj`), the
usual way, would also hit the attention of a CLIP tower.
"""

import json
import logging
import os
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..io.checkpoints import DORA_MAGNITUDE, base_name_to_record
from .arguments import LlavaTrainingArguments
from .stages import unused_tower_parameters


logger = logging.getLogger(__name__)

LANGUAGE_MODEL = "model.language_model"
"""Where the language model lies in `LlavaForConditionalGeneration`; the head lies beside it, in `lm_head`."""


def lora_target_pattern(model: PreTrainedModel) -> str:
    r"""
    A regular expression that matches every linear layer of the language model, whatever their names, and no other.

    For Llama: `model\.language_model\..*\.(down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj)`.

    Raises:
        ValueError: the language model has no linear layers (its layers are of a type of their own).
    """
    language_model = model.get_submodule(LANGUAGE_MODEL)
    endings = {name.rpartition(".")[2] for name, m in language_model.named_modules() if isinstance(m, nn.Linear)}
    if not endings:
        raise ValueError(
            f"The language model ({type(language_model).__name__}) has no torch.nn.Linear layers for LoRA. "
            "Set lora_target to a regular expression over its module names."
        )
    return rf"{re.escape(LANGUAGE_MODEL)}\..*\.({'|'.join(sorted(endings))})"


def lora_config(model: PreTrainedModel, args: LlavaTrainingArguments):
    """The `peft.LoraConfig` for a run; the projector, and the tower if it is trained, are trained whole."""
    from peft import LoraConfig

    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        bias=args.lora_bias,
        use_dora=args.use_dora,
        use_rslora=args.use_rslora,
        target_modules=args.lora_target or lora_target_pattern(model),
        modules_to_save=["multi_modal_projector", *(["vision_tower"] if args.train_vision_tower else [])],
    )


def add_adapter(model: PreTrainedModel, args: LlavaTrainingArguments):
    """
    Wrap a model with a new adapter; everything but the adapter is frozen.

    Returns:
        `peft.PeftModel`

    Raises:
        ValueError: `lora_target` matches nothing, or something outside the language model.
    """
    from peft import get_peft_model

    config = lora_config(model, args)
    matched = [name for name, _ in model.named_modules() if re.fullmatch(config.target_modules, name)]
    outside = [name for name in matched if not name.startswith(LANGUAGE_MODEL + ".")]
    if not matched or outside:
        found = f"matches {', '.join(outside[:3])}, outside of the language model" if outside else "matches no module"
        raise ValueError(
            f"lora_target={args.lora_target!r} {found}. Module names look like "
            rf"{LANGUAGE_MODEL}.layers.0.self_attn.q_proj; leave lora_target out for every linear layer."
        )
    peft_model = get_peft_model(model, config)
    config.base_model_name_or_path = base_name_to_record(model)
    config.revision = args.model_revision
    prepare_adapter(peft_model, args)
    return peft_model


def load_adapter(model: PreTrainedModel, path: str, args: LlavaTrainingArguments, revision: str | None = None):
    """
    Wrap a model with an adapter that was trained before, to be trained further; its own rank and targets hold.

    Returns:
        `peft.PeftModel`

    Raises:
        ValueError: the adapter does not train the vision tower but `train_vision_tower` is set, or the reverse.
    """
    from peft import PeftModel

    peft_model = PeftModel.from_pretrained(model, path, is_trainable=True, revision=revision)
    config = peft_model.peft_config["default"]
    has_tower = "vision_tower" in (config.modules_to_save or ())
    if has_tower != args.train_vision_tower:
        raise ValueError(
            f"{path} was trained with train_vision_tower={has_tower}, this run has {args.train_vision_tower}. "
            f"Set train_vision_tower={str(has_tower).lower()}, or merge the adapter first (llava merge)."
        )
    for name, ours in (("r", args.lora_r), ("lora_alpha", args.lora_alpha), ("use_dora", args.use_dora)):
        theirs = getattr(config, name)
        if ours != theirs:
            logger.warning(f"{path} has {name}={theirs}, which stays; the recipe's {ours} is not used.")
    config.base_model_name_or_path = base_name_to_record(model)  # PEFT would write a relative path as it was given
    prepare_adapter(peft_model, args)
    return peft_model


def prepare_adapter(peft_model: nn.Module, args: LlavaTrainingArguments) -> None:
    """
    What PEFT leaves to us: trained copies in the trained dtype, the memory of their frozen originals given back, and
    no gradients for tower layers that do not reach the loss.
    """
    from peft.utils import ModulesToSaveWrapper

    trained_dtype = getattr(torch, args.trained_dtype)
    for module in peft_model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            copy = module.modules_to_save[module.active_adapters[0]]
            for parameter in copy.parameters():
                parameter.data = parameter.data.to(trained_dtype)
            if not args.is_sharded:  # engines that cut parameters into shards cannot cut nothing
                # The original under the copy never runs; CLIP ViT-L alone would hold 0.6 GB of device memory.
                for parameter in module.original_module.parameters():
                    parameter.data = parameter.data.new_empty(0)
    for parameter in peft_model.parameters():
        if parameter.requires_grad and parameter.dtype != trained_dtype:
            parameter.data = parameter.data.to(trained_dtype)
    if args.train_vision_tower:
        for parameter in unused_tower_parameters(peft_model.get_base_model()):
            parameter.requires_grad_(False)


def finish_adapter_folder(folder: str | Path) -> None:
    """In an adapter as PEFT saved it: DoRA's magnitudes by the names that transformers reads."""
    if json.loads((Path(folder) / "adapter_config.json").read_text("utf-8")).get("use_dora"):
        write_dora_keys_for_transformers(folder)


def write_dora_keys_for_transformers(folder: str | Path) -> None:
    """
    Rename DoRA's magnitudes in a saved adapter from `….lora_magnitude_vector` to `….lora_magnitude_vector.weight`.

    PEFT reads both. transformers' own adapter loading (pipelines, `from_pretrained` on the folder) reads the second
    only; of the first it says "unexpected", and leaves the magnitudes as they were before training.
    """
    file = Path(folder) / "adapter_model.safetensors"
    tensors = load_file(file)
    renamed = {f"{name}.weight" if name.endswith(DORA_MAGNITUDE) else name: t for name, t in tensors.items()}
    if renamed.keys() != tensors.keys():
        beside = file.with_name(f".{file.name}.{os.getpid()}")
        save_file(renamed, beside, metadata={"format": "pt"})
        os.replace(beside, file)


__all__ = [
    "add_adapter",
    "finish_adapter_folder",
    "load_adapter",
    "lora_config",
    "lora_target_pattern",
    "prepare_adapter",
]
