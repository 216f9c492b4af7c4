"""What a model goes through before its first step: frozen, adapted, set to its dtypes, and found fit for packs or not."""

import logging

from torch import nn

from ..io.checkpoints import forbid_inference_packing
from ..kernels.packed_attention import VARLEN, packs_leak, use_varlen_attention
from .adapters import add_adapter
from .arguments import LlavaTrainingArguments
from .stages import set_dtypes, set_trainable


logger = logging.getLogger(__name__)


def prepare_model(model: nn.Module, args: LlavaTrainingArguments) -> nn.Module:
    """Freeze, add the adapter if there is none, set dtypes, and keep 4-bit weights trainable on the CPU."""
    if not is_peft(model):
        set_trainable(model, args)
        set_dtypes(model, args)
        if args.adapter != "none":
            model = add_adapter(model, args)
    elif args.adapter == "none":
        raise ValueError("The model has an adapter, but adapter=none. Set adapter=lora, or merge it (llava merge).")
    forbid_inference_packing(model)
    return model


def resolve_packing(model: nn.Module, args: LlavaTrainingArguments, has_own_collator: bool = False) -> None:
    """
    Decide `packing=auto`, and give the language model an attention that keeps packed samples apart.

    Raises:
        ValueError: packing is asked for, but samples would see each other, or a T × T mask would be needed.
    """
    if args.packing == "none":
        return
    reason = _why_not_packed(model, args)
    if reason is None and has_own_collator and args.packing == "auto":
        reason = "the run has a data collator of its own"
    if reason is not None and args.packing != "auto":
        raise ValueError(f"packing={args.packing}, but {reason}. Set packing=none.")
    if reason is not None:
        logger.info("Samples are padded, not packed: %s.", reason)
    args.packing = "none" if reason is not None else "batch" if args.packing == "auto" else args.packing


def _why_not_packed(model: nn.Module, args: LlavaTrainingArguments) -> str | None:
    attention = args.attn_implementation
    if attention is not None and attention != VARLEN and "flash" not in attention:
        return f"attn_implementation={attention} would build a mask of all positions × all positions for a pack"
    if args.torch_compile:
        return "torch_compile would compile anew for each length of a pack"
    language_model = model.model.language_model
    if attention is None:
        before = language_model.config._attn_implementation
        try:
            use_varlen_attention(model)
        except ValueError as error:
            return str(error).rstrip(".")
    if any(p.is_meta or hasattr(p, "ds_id") for p in language_model.parameters()):
        return None  # weights that are not here cannot be tried
    reason = _why_packs_are_wrong(language_model)
    if reason is not None and attention is None:
        model.set_attn_implementation({"text_config": before})
    return reason


def _why_packs_are_wrong(language_model: nn.Module) -> str | None:
    try:
        leak = packs_leak(language_model)
    except ValueError as error:  # an attention with parts that a pack's does not know: Gemma 2, GPT-OSS
        return str(error).removesuffix(" Do not pack.").rstrip(".")
    if leak > _LEAK:
        return f"samples of a pack see each other in {type(language_model).__name__} (relative error {leak:.2g})"
    return None


_LEAK = 0.1  # 16-bit rounding makes about 0.01, another sample's influence about 1


def core_model(model: nn.Module) -> nn.Module:
    """The LLaVA under PEFT's wrapper."""
    return model.get_base_model() if is_peft(model) else model


def is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


__all__ = ["core_model", "is_peft", "prepare_model", "resolve_packing"]
