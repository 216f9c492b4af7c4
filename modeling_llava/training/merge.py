"""Adapters and projectors folded into their base: a full checkpoint, which needs neither PEFT nor this package."""

import copy
import json
import logging
import os
import shutil
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..io.adapters import TODAYS_NAMES, find_base, four_bit_config, four_bits_of, is_quantised, resize_to_adapter
from ..io.checkpoints import checkpoint_kind, file_of, has_processor, load_processor, load_projector, saved_tensors
from ..io.files import write_atomic
from ..text.stops import add_generation_stop
from .setup import LANGUAGE_MODEL


logger = logging.getLogger(__name__)

MERGED_SHARD_SIZE = "4GB"
"""What a merge holds in memory at a time, besides the adapter."""

RUN_RECORD_FILES = ("recipe.yaml", "run.json", "trainer_state.json", "all_results.json", "results*.json", "*.png")
"""Of a run's folder, what goes along when its adapter or projector becomes part of a full model."""


def merge_adapter(
    adapter: str,
    output: str,
    dtype: str | torch.dtype = "auto",
    base: str | None = None,
    revision: str | None = None,
    as_trained: bool = False,
) -> Path:
    """
    Fold an adapter, or what a pretrain run trained, into its base: a full stock checkpoint with its processor and the record of its
    run, from which `llava publish` writes the model card.

    The base is read in 16 bits, also where the adapter was trained on a 4-bit base; sums are made in float32 and rounded once. The
    base stays on the disk (mapped), and a shard of the result is in memory at a time.

    Args:
        adapter (`str`): An adapter folder or Hub name, or the output folder of a pretrain run.
        output (`str`): Folder to be written; it must be new or empty.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): Of the written weights; `"auto"` is the base's.
        base (`str`, *optional*): The base, if it is no longer where the adapter says.
        revision (`str`, *optional*): Branch, tag or commit of `adapter`.
        as_trained (`bool`, *optional*, defaults to `False`):
            Round the language model to the 4 bits of its training (by the adapter's `recipe.yaml`) and back first, so that the
            result computes what was trained; otherwise the adapter meets weights that it has not seen.

    Raises:
        ValueError: `adapter` is a full model, not finite, or does not fit; the base holds 4-bit weights; `output` is not empty.
    """
    kind = checkpoint_kind(adapter, revision)
    if kind == "full":
        if file_of(adapter, "config.json", revision) is None:
            raise OSError(f"{adapter!r} is not a folder here, and the Hub does not give it: check name and network.")
        raise ValueError(f"{adapter} is a full model already: there is nothing to merge.")
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder. Choose another one.")
    rounding = four_bits_of(adapter, revision) if as_trained else None
    if as_trained and rounding is None:
        raise ValueError(
            f"{adapter} was not trained on a 4-bit base (its recipe.yaml does not say adapter: qlora): there is no "
            "rounding to repeat. Merge it without --as-trained."
        )
    if rounding is not None:
        four_bit_config(torch.float32)  # says what to install
    base, base_revision = find_base(adapter, revision, base)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto", revision=base_revision)
    if is_quantised(model):
        raise ValueError(
            f"{base} holds 4-bit weights: merging into them would round away what was learned. Give the model in 16 "
            "bit from which it was made, with --base."
        )
    processor, sources = None, ((adapter, revision), (base, base_revision))
    if (source := next((s for s in sources if has_processor(*s)), None)) is None:
        logger.warning("Neither %s nor %s holds a processor: %s holds the weights alone.", adapter, base, output)
    else:
        processor = load_processor(*source)
        add_generation_stop(model.generation_config, processor)

    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    written_dtype = model.dtype if dtype == "auto" else dtype
    tensors, merged = _merged_tensors(model, adapter, revision, kind, rounding)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        _write_shards(tensors, merged, unfinished, adapter, dtype)
        model.config.dtype = written_dtype
        model.config.save_pretrained(unfinished)
        model.generation_config.save_pretrained(unfinished)
        if processor is not None:
            processor.save_pretrained(unfinished)
        for pattern in RUN_RECORD_FILES:
            for file in sorted(Path(adapter).glob(pattern)):
                shutil.copyfile(file, unfinished / file.name)
        if output.exists():
            output.rmdir()
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return output


@torch.no_grad()
def _merged_tensors(model: PreTrainedModel, adapter: str, revision: str | None, kind: str, rounding: tuple | None):
    """Saved name → tensor of the base; and, by the address of those that change, a function that gives what replaces it."""
    if kind == "projector":
        load_projector(model, adapter, revision)
        return _without_tied_head(model, saved_tensors(model), {}, {}), {}
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    resize_to_adapter(model, adapter, revision)
    tensors, merged, of_head, rounded = saved_tensors(model), {}, {}, set()
    if rounding is not None:
        linear = [m for m in model.get_submodule(LANGUAGE_MODEL).modules() if isinstance(m, nn.Linear)]
        rounded = {module.weight.data_ptr() for module in linear}
        merged = {m.weight.data_ptr(): partial(_rounded_to_four_bits, m.weight, *rounding) for m in linear}
    peft_model = PeftModel.from_pretrained(model, adapter, revision=revision, key_mapping=TODAYS_NAMES)
    for place, module in peft_model.named_modules():
        changed = of_head if "lm_head" in place.split(".") else merged
        if isinstance(module, BaseTunerLayer):
            for name, parameter in module.get_base_layer().named_parameters():
                address = parameter.data_ptr()
                changed[address] = partial(_merged_layer, module, name, rounding if address in rounded else None)
        elif isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[module.active_adapters[0]]
            for name, parameter in module.original_module.named_parameters():
                changed[parameter.data_ptr()] = partial(trained.get_parameter, name)
    return _without_tied_head(model, tensors, merged, of_head), of_head | merged


def _without_tied_head(model: PreTrainedModel, tensors: dict, merged: dict, of_head: dict) -> dict:
    """The tensors without a head that is the embeddings; where the adapter makes them differ, it becomes its own, in place."""
    name = next(name for name in tensors if name.endswith("lm_head.weight"))
    address = tensors[name].data_ptr()
    if address not in {tensor.data_ptr() for other, tensor in tensors.items() if other != name}:
        return tensors
    values = [changed[address]() for changed in (merged, of_head) if address in changed]
    if not values or len(values) == 2 and torch.equal(*values):
        return {other: tensor for other, tensor in tensors.items() if other != name}
    head = tensors[name].clone()
    if address in of_head:
        of_head[head.data_ptr()] = of_head.pop(address)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    return {**tensors, name: head}


@torch.no_grad()
def _merged_layer(layer: nn.Module, name: str, rounding: tuple | None) -> torch.Tensor:
    """A weight or bias of a layer with its adapter added by PEFT, in float32; the layer stays as it is."""
    original, changed = layer.base_layer, copy.deepcopy(layer.base_layer)
    if rounding is not None:
        changed.weight.data = _rounded_to_four_bits(changed.weight, *rounding)
    layer.base_layer = changed.float()
    layer.merge()
    layer.base_layer = original
    layer.merged_adapters.clear()
    return changed.get_parameter(name)


def _rounded_to_four_bits(weight: torch.Tensor, quant_type: str, double_quant: bool) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.detach(), quant_type=quant_type, compress_statistics=double_quant)
    return dequantize_4bit(packed, state).to(weight.dtype)


@torch.no_grad()
def _write_shards(tensors: dict, merged: dict, folder: Path, adapter: str, dtype: str | torch.dtype) -> None:
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=MERGED_SHARD_SIZE)
    # disable=None: a bar in terminals only
    for file, names in tqdm(plan.filename_to_tensors.items(), desc="merging", unit="file", disable=None):
        shard = {}
        for name in names:
            tensor = merged.get(tensors[name].data_ptr(), lambda name=name: tensors[name])()
            if tensor.is_floating_point():
                tensor = tensor.to(tensors[name].dtype if dtype == "auto" else dtype)
            if not tensor.isfinite().all():
                raise ValueError(f"{adapter} is broken: with it, {name} is not finite. Merge an earlier checkpoint.")
            shard[name] = tensor.contiguous()
        save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_atomic(folder / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")
