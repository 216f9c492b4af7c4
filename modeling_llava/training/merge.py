"""Adapters and projectors folded into their base: a full checkpoint, which needs neither PEFT nor this package."""

import logging
import shutil
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..io.checkpoints import (
    checkpoint_kind,
    file_of,
    find_base,
    four_bit_config,
    four_bits_of,
    has_processor,
    is_quantised,
    load_processor,
    load_projector,
    resize_to_adapter,
)
from ..io.load_errors import explained
from ..text.stops import add_generation_stop
from .adapters import LANGUAGE_MODEL


logger = logging.getLogger(__name__)

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
    Fold an adapter into its base and write a full stock checkpoint with its processor, and with the record of its run,
    from which `llava publish` writes the model card.

    The base is read again in 16 bit (or `dtype`), also where the adapter was trained on a 4-bit base: merging into 4-bit
    weights would round what was learned away. The products are added in float32.

    A QLoRA adapter makes up for the rounding of its 4-bit base. `as_trained` rounds the base in the same way before the adapter is
    added, so that the result computes what was trained; without it the adapter is added to weights that it has not seen, which
    a model of 135M notices (`examples/results/real_pictures`).

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
        as_trained (`bool`, *optional*, defaults to `False`):
            Round the language model to the 4 bits of its training (by the adapter's `recipe.yaml`) and back first.

    Raises:
        ImportError: `as_trained` without bitsandbytes.
        ValueError: `adapter` is a full model already; the base holds 4-bit weights; `output` is not empty; `as_trained`
            for an adapter that was not trained on a 4-bit base.
    """
    from transformers import AutoModelForImageTextToText

    kind = checkpoint_kind(adapter, revision)
    if kind == "full" and file_of(adapter, "config.json", revision) is None:  # a Hub name that was not found
        raise OSError(
            f"{adapter!r} is not a folder here, and the Hub does not give it: check the name and the network."
        )
    if kind == "full":
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
    base, base_revision = find_base(adapter, revision, base)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    # Training rounded the weights of the file.
    loaded_as = "auto" if as_trained else dtype
    with explained(base):
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=loaded_as, revision=base_revision)
    if is_quantised(model):
        raise ValueError(
            f"{base} holds 4-bit weights: merging into them would round away what was learned. Give the model in 16 "
            "bit from which it was made, with --base."
        )
    if rounding is not None:
        _round_to_four_bits(model, *rounding)
        if dtype != "auto":
            model.to(dtype)
    if kind == "projector":
        load_projector(model, adapter, revision)
    else:
        model = _merge(model, adapter, revision)
    output.parent.mkdir(parents=True, exist_ok=True)
    source = next(
        (path for path in (adapter, base) if has_processor(path, revision if path == adapter else None)), None
    )
    if source is None:
        logger.warning("Neither %s nor %s holds a processor: %s holds the weights alone.", adapter, base, output)
    else:
        processor = load_processor(source, revision if source == adapter else None)
        add_generation_stop(model.generation_config, processor)
        processor.save_pretrained(output)
    model.save_pretrained(output)
    for pattern in RUN_RECORD_FILES:
        for file in sorted(Path(adapter).glob(pattern)):
            shutil.copyfile(file, output / file.name)
    return output


def _merge(model: PreTrainedModel, adapter: str, revision: str | None) -> PreTrainedModel:
    from peft import PeftModel

    resize_to_adapter(model, adapter, revision)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    peft_model = PeftModel.from_pretrained(model, adapter, revision=revision)
    # PEFT's safe_merge would round the product to 16 bit before it is added; here the sum is rounded, once.
    merged = peft_model.merge_and_unload()
    for name, parameter in merged.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{adapter} is broken: with it, {name} is not finite. Merge an earlier checkpoint.")
        parameter.data = parameter.data.to(dtypes[name])  # whole modules come from the adapter in float32
    return merged


@torch.no_grad()
def _round_to_four_bits(model: PreTrainedModel, quant_type: str, double_quant: bool) -> None:
    """What `four_bit_config` quantises, quantised and read back."""
    four_bit_config(torch.float32)  # says what to install
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    linear = [m for m in model.get_submodule(LANGUAGE_MODEL).modules() if isinstance(m, nn.Linear)]
    for module in tqdm(linear, desc=f"Rounding to {quant_type} and back", unit="layer", leave=False):
        packed, state = quantize_4bit(module.weight.data, quant_type=quant_type, compress_statistics=double_quant)
        module.weight.data = dequantize_4bit(packed, state).to(module.weight.dtype)


__all__ = ["merge_adapter"]
