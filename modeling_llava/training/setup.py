"""What a run starts from: the datasets, the processor, and the model, frozen and adapted, with packing resolved."""

import logging
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from ..io.checkpoints import (
    base_model_of,
    checkpoint_kind,
    find_base,
    forbid_inference_packing,
    four_bit_config,
    has_processor,
    load_processor,
    load_projector,
)
from ..kernels.packed_attention import VARLEN, packs_leak, use_varlen_attention
from ..text.chat_templates import chat_template_of, load_chat_template
from ..text.stops import end_answers_with_eos, teaches_no_stop
from .adapters import add_adapter, load_adapter
from .arguments import LlavaTrainingArguments
from .stages import set_dtypes, set_trainable, unused_tower_parameters


logger = logging.getLogger(__name__)


def base_and_adapter(args: LlavaTrainingArguments) -> tuple[str, str | None, str | None]:
    """
    The full model of a run, its revision, and the adapter that is trained further, if any.

    Raises:
        ValueError: `model` is not set, is the output of a pretrain run, or is an adapter and `adapter="none"`.
        FileNotFoundError: `model` does not exist.
    """
    if args.model is None:
        raise ValueError("model is not set. Give a LLaVA folder or Hub name, such as llava-hf/llava-1.5-7b-hf.")
    kind = checkpoint_kind(args.model, args.model_revision)
    if kind == "projector":
        raise ValueError(
            f"model={args.model} is the output of a pretrain run: a projector. "
            f"Set projector={args.model} and model={base_model_of(args.model)}."
        )
    if kind == "adapter":
        if args.adapter == "none":
            raise ValueError(
                f"model={args.model} is an adapter, but adapter=none. Set adapter=lora or qlora to train it further, "
                "or merge it first (llava merge)."
            )
        return (*find_base(args.model, args.model_revision), args.model)
    return args.model, args.model_revision, None


def load_model_and_processor(args: LlavaTrainingArguments) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    The model of a run, with the projector of a pretrain run and the adapter to be trained further if there are any, and
    its processor. Weights have the dtype of their file until [`prepare_model`].

    Raises:
        ValueError: as in [`base_and_adapter`]; the projector does not fit.
        FileNotFoundError: `model` or `projector` does not exist.
    """
    base, revision, adapter_path = base_and_adapter(args)
    own = args.model if has_processor(args.model, args.model_revision) else base
    processor = load_processor(
        args.processor or own, args.model_revision if own == args.model and not args.processor else None
    )
    _choose_chat_template(processor, args)
    settings: dict[str, Any] = {"dtype": "auto", "revision": revision}
    if args.attn_implementation is not None:
        settings["attn_implementation"] = args.attn_implementation
    if args.adapter == "qlora":
        settings["quantization_config"] = four_bit_config(args.compute_dtype, args.quant_type, args.double_quant)
    if args.device.type == "cuda" and not args.fsdp and not args.deepspeed:
        settings["device_map"] = {"": args.device}  # not through main memory, which may be too small
    model = AutoModelForImageTextToText.from_pretrained(base, **settings)

    if args.projector is not None:
        replaced = load_projector(model, args.projector)
        if args.adapter != "none" and "vision_tower" in replaced and not args.train_vision_tower:
            raise ValueError(
                f"projector={args.projector} brings a trained vision tower, which an adapter would not save. Merge it into a "
                "full model first (llava merge), or set train_vision_tower=true."
            )
    if adapter_path is not None:
        model = load_adapter(model, adapter_path, args, args.model_revision)
    return model, processor


def _choose_chat_template(processor: ProcessorMixin, args: LlavaTrainingArguments) -> None:
    """Set `chat_template`, or let the answers of the processor's own template end with the EOS token if nothing ends them."""
    if args.chat_template not in (None, "keep"):
        processor.chat_template = load_chat_template(args.chat_template)
    elif args.chat_template is None and args.stage == "finetune" and teaches_no_stop(processor):
        tokens = processor.tokenizer.special_tokens_map
        try:
            processor.chat_template = end_answers_with_eos(chat_template_of(processor), tokens)
        except ValueError as error:
            raise ValueError(
                f"{error} Set chat_template=vicuna_v1, LLaVA-1.5's own, or chat_template=keep to train without one."
            ) from error
        if args.process_index == 0:
            logger.warning(
                f"The model's chat template ends an answer with white space, which teaches no stop: it is replaced by "
                f"{tokens['eos_token']}, and the template is saved with the result (chat_template=keep: as it is)."
            )


def load_datasets(args: LlavaTrainingArguments) -> tuple[Any, Any]:
    """
    Training and evaluation data of a run, selected and split by its settings.

    Raises:
        ValueError: `data` is not set, or no sample is left.
    """
    from ..data.sources import load_conversations

    if args.data is None:
        raise ValueError("data is not set. Give a LLaVA JSON file, or a dataset with `messages` and `images`.")
    seed = args.seed if args.data_seed is None else args.data_seed
    reading = {"image_folder": args.image_folder, "on_bad_sample": args.on_bad_sample}
    train_dataset = load_conversations(
        args.data,
        split=args.data_split,
        types=args.only_types,
        streaming=args.streaming,
        shuffle_buffer=args.shuffle_buffer if args.streaming else 0,
        seed=seed,
        **reading,
    )
    if args.only_types is not None and not args.streaming:
        absent = sorted(set(args.only_types) - set(train_dataset.types))
        if absent:
            raise ValueError(f"only_types names {', '.join(absent)}, but no sample of {args.data} has that type.")
    if args.max_samples is not None and args.max_samples < len(train_dataset):
        train_dataset = train_dataset.select(_shuffled(len(train_dataset), seed)[: args.max_samples])
    eval_dataset = None
    if args.eval_data is not None:
        eval_dataset = load_conversations(args.eval_data, split=args.data_split, types=args.only_types, **reading)
    elif args.eval_size is not None:
        total = len(train_dataset)
        held_out = round(args.eval_size * total) if args.eval_size < 1 else int(args.eval_size)
        if not 0 < held_out < total:
            raise ValueError(f"eval_size={args.eval_size} holds out {held_out} of {total} samples. Choose another.")
        order = _shuffled(total, seed)
        eval_dataset = train_dataset.select(sorted(order[:held_out]))
        train_dataset = train_dataset.select(sorted(order[held_out:]))
    return train_dataset, eval_dataset


def _shuffled(total: int, seed: int) -> list[int]:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()


def prepare_model(model: nn.Module, args: LlavaTrainingArguments) -> nn.Module:
    """Freeze what is not trained, add the adapter if there is none, set dtypes, and keep 4-bit weights trainable on the CPU."""
    if args.adapter == "none":
        if is_peft(model):
            raise ValueError(
                "The model has an adapter, but adapter=none. Set adapter=lora, or merge it (llava merge)."
            )
        set_trainable(model, args)
    elif not is_peft(model):
        model = add_adapter(model, args)
    if args.train_vision_tower:
        for parameter in unused_tower_parameters(core_model(model)):
            parameter.requires_grad_(False)
    set_dtypes(model, args)
    forbid_inference_packing(model)
    return model


def resolve_packing(model: nn.Module, args: LlavaTrainingArguments, has_own_collator: bool = False) -> None:
    """
    Resolve `packing=auto` in place, and set an attention that keeps packed samples apart.

    Raises:
        ValueError: `packing` is set, but samples would attend to each other, or need an attention mask of T × T.
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
        return f"attn_implementation={attention} would build an attention mask of tokens × tokens for a pack"
    if args.torch_compile:
        return "torch_compile would recompile for each length of a pack"
    language_model = model.model.language_model
    if attention is None:
        before = language_model.config._attn_implementation
        try:
            use_varlen_attention(model)
        except ValueError as error:
            return str(error).rstrip(".")
    if any(p.is_meta or hasattr(p, "ds_id") for p in language_model.parameters()):
        return None  # sharded or offloaded: no probe forward
    reason = _why_packs_leak(language_model)
    if reason is not None and attention is None:
        model.set_attn_implementation({"text_config": before})
    return reason


def _why_packs_leak(language_model: nn.Module) -> str | None:
    """Checked with a probe forward."""
    try:
        leak = packs_leak(language_model)
    except ValueError as error:  # an attention with features that the packed one lacks: Gemma 2, GPT-OSS
        return str(error).removesuffix(" Do not pack.").rstrip(".")
    if leak > _LEAK:
        return f"samples of a pack attend to each other in {type(language_model).__name__} (relative error {leak:.2g})"
    return None


_LEAK = 0.1  # relative: rounding to 16 bits gives about 0.01, another sample about 1


def core_model(model: nn.Module) -> nn.Module:
    """The LLaVA under PEFT's wrapper."""
    return model.get_base_model() if is_peft(model) else model


def is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


__all__ = [
    "base_and_adapter",
    "core_model",
    "is_peft",
    "load_datasets",
    "load_model_and_processor",
    "prepare_model",
    "resolve_packing",
]
