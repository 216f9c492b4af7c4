"""
LoRA, DoRA, rsLoRA and QLoRA: one adapter folder that plain PEFT, and transformers by itself, load back.

    adapter_config.json        target_modules: a regular expression; modules_to_save: what is trained whole
    adapter_model.safetensors  low-rank matrices of the language model; the whole projector; the tower if trained
    processor files            so that the folder is all a pipeline needs (there must be no config.json: with one,
                               transformers takes the folder for a full model and does not look for the base)

The low-rank matrices are found by a regular expression on `language_model`: targets by name ending (`q_proj`), the
usual way, would also hit the attention of a CLIP tower.
"""

import logging
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints import DORA_MAGNITUDE, base_name_to_record, is_quantised
from .arguments import LlavaTrainingArguments
from .stages import unused_tower_parameters


logger = logging.getLogger(__name__)

RUN_RECORD_FILES = ("recipe.yaml", "run.json", "trainer_state.json", "all_results.json", "results*.json", "*.png")
"""Of a run's folder, what goes along when its adapter or projector becomes part of a full model."""

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


def merge_adapter(
    adapter: str, output: str, dtype: str | torch.dtype = "auto", base: str | None = None, revision: str | None = None
) -> Path:
    """
    Fold an adapter into its base and write a full stock checkpoint with its processor, and with the record of its run,
    from which `llava publish` writes the model card.

    The base is read again in 16 bit (or `dtype`), also where the adapter was trained beside 4-bit weights: merging
    into 4-bit weights would round what was learned away. The products are added in float32.

    Args:
        adapter (`str`):
            An adapter folder or Hub name; the output folder of a pretrain run works as well.
        output (`str`):
            Folder to be written; it must be new or empty.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Of the written weights; `"auto"` is the base's.
        base (`str`, *optional*):
            The base, if it is no longer where the adapter says.
        revision (`str`, *optional*):
            Branch, tag or commit of `adapter`.

    Raises:
        ValueError: `adapter` is a full model already; the base holds 4-bit weights; `output` is not empty.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from ..checkpoints import base_model_of, base_revision_of, checkpoint_kind, has_processor, load_projector

    kind = checkpoint_kind(adapter, revision)
    if kind == "full":
        raise ValueError(f"{adapter} is a full model already: there is nothing to merge.")
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder. Choose another one.")
    base_revision = None if base else base_revision_of(adapter, revision)
    base = base or base_model_of(adapter, revision)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype, revision=base_revision)
    if is_quantised(model):
        raise ValueError(
            f"{base} holds 4-bit weights: merging into them would round away what was learned. Give the model in 16 "
            "bit from which it was made, with --base."
        )
    if kind == "projector":
        load_projector(model, adapter, revision)
    else:
        model = _merge(model, adapter, revision)
    output.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    source = next(
        (path for path in (adapter, base) if has_processor(path, revision if path == adapter else None)), None
    )
    if source is None:
        logger.warning("Neither %s nor %s holds a processor: %s holds the weights alone.", adapter, base, output)
    else:
        processor = AutoProcessor.from_pretrained(source, revision=revision if source == adapter else None)
        processor.save_pretrained(output)
    for pattern in RUN_RECORD_FILES:
        for file in sorted(Path(adapter).glob(pattern)):
            shutil.copyfile(file, output / file.name)
    return output


def _merge(model: PreTrainedModel, adapter: str, revision: str | None) -> PreTrainedModel:
    from peft import PeftModel

    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    peft_model = PeftModel.from_pretrained(model, adapter, revision=revision)
    # PEFT's safe_merge would round the product to 16 bit before it is added; here the sum is rounded, once.
    merged = peft_model.merge_and_unload()
    for name, parameter in merged.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{adapter} is broken: with it, {name} is not finite. Merge an earlier checkpoint.")
        parameter.data = parameter.data.to(dtypes[name])  # whole modules come from the adapter in float32
    return merged


__all__ = [
    "add_adapter",
    "load_adapter",
    "lora_config",
    "lora_target_pattern",
    "merge_adapter",
    "prepare_adapter",
    "write_dora_keys_for_transformers",
]
