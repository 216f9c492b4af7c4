"""
What a run starts from: the data, the processor, and the model, frozen and adapted, with packing resolved.

What each stage trains (LLaVA §4.2; LLaVA-1.5 §3), each part at its own learning rate:

| | vision tower | projector | language model |
|---|---|---|---|
| pretrain | frozen | trained | frozen |
| finetune | frozen | trained | trained |
| finetune, LoRA or QLoRA | frozen | trained | LoRA weights |
| with `train_vision_tower`, `lora_vision_tower` | trained, LoRA weights | | |
| with `train_projector` lora, frozen | | LoRA weights, frozen | |
"""

import logging
import re
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from ..io.checkpoints import (
    COMPONENTS,
    base_model_of,
    checkpoint_kind,
    component_of,
    find_base,
    forbid_inference_packing,
    four_bit_config,
    has_processor,
    load_processor,
    load_projector,
)
from ..kernels.packed_attention import VARLEN, packed_attention_error, use_varlen_attention
from ..text.chat_templates import chat_template_of, load_chat_template
from ..text.stops import end_answers_with_eos, teaches_no_stop
from .adapters import add_adapter, core_model, is_peft, load_adapter, tower_layers
from .arguments import LlavaTrainingArguments


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
        ValueError, FileNotFoundError: as in [`base_and_adapter`]; the projector does not fit, or would not be saved.
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
        saved = {"multi_modal_projector": args.train_projector == "full", "vision_tower": args.train_vision_tower}
        if args.adapter != "none" and (lost := [name for name in replaced if not saved[name]]):
            raise ValueError(
                f"projector={args.projector} brings a trained {lost[0]}, which this run's adapter would not save. Merge it into a "
                "full model first (llava merge), or train it whole (train_projector=full, train_vision_tower=true)."
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
        processor.chat_template = end_answers_with_eos(chat_template_of(processor), tokens)
        if args.process_index == 0:
            logger.warning(
                f"The model's chat template ends an answer with white space, which teaches no stop: it is replaced by "
                f"{tokens['eos_token']}, and the template is saved with the result (chat_template=keep: as it is)."
            )


def load_datasets(args: LlavaTrainingArguments) -> tuple[Any, Any]:
    """
    Training and evaluation data of a run, selected and split by its settings; `eval_size=auto` becomes a number.

    Raises:
        ValueError: `data` is not set, or no sample is left.
    """
    from ..data.sources import load_conversations

    if args.data is None:
        raise ValueError("data is not set. Give a LLaVA JSON file, or a dataset with `messages` and `images`.")
    seed = args.sampling_seed
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
    elif args.eval_size == "auto" and not 50 <= len(train_dataset) <= 5_000:
        args.eval_size = None
    elif args.eval_size:
        total, size = len(train_dataset), args.eval_size
        held_out = max(round(total / 20), 4) if size == "auto" else round(size * total) if size < 1 else int(size)
        if not 0 < held_out < total:
            raise ValueError(f"eval_size={size} holds out {held_out} of {total} samples. Choose another.")
        if size == "auto":
            args.eval_size = held_out
            if args.process_index == 0:
                logger.warning("%d of %d samples are held out for evaluation (eval_size=0: none).", held_out, total)
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
    for parameter in unused_tower_parameters(core_model(model)):
        parameter.requires_grad_(False)
    set_dtypes(model, args)
    forbid_inference_packing(model)
    return model


def set_trainable(model: nn.Module, args: LlavaTrainingArguments) -> None:
    """Freeze and unfreeze the parameters of a model without adapters, as `args.stage` says."""
    trained = {
        "multi_modal_projector": args.train_projector == "full",
        "vision_tower": args.train_vision_tower,
        "language_model": args.stage == "finetune",
    }
    for name, parameter in model.named_parameters():
        # 4-bit weights are integers and cannot be trained
        parameter.requires_grad_(trained[component_of(name)] and parameter.is_floating_point())


def unused_tower_parameters(model: nn.Module) -> list[nn.Parameter]:
    """
    Parameters of the vision tower that do not reach the loss, such as those after its last feature layer (LLaVA uses the last but
    one, −2) and of its last norm and pooling head. They are frozen: data-parallel training would wait for their gradients.
    """
    tower, layers, num_used = tower_layers(model)
    if layers is None:
        return []
    is_used = re.compile(rf"{re.escape(layers)}\.({'|'.join(map(str, range(num_used)))})\.")
    unused = []
    for name, parameter in tower.named_parameters():
        in_layers = name.startswith(layers + ".")
        behind = any(part in name for part in ("post_layernorm", "head.")) and not in_layers
        if behind or (in_layers and not is_used.match(name)):
            unused.append(parameter)
    return unused


@torch.no_grad()
def set_dtypes(model: nn.Module, args: LlavaTrainingArguments) -> None:
    """
    Trained weights in `args.trained_dtype`, frozen ones in the dtype of the arithmetic.

    Small updates would vanish in 16-bit weights, so trained ones are float32 by default, under autocast. Frozen norms stay in
    16 bit (PEFT's `prepare_model_for_kbit_training` makes them float32): as float32 they would turn all activations after them
    into float32. 4-bit weights and buffers (rotary frequencies) are left as they are.
    """
    trained_dtype = getattr(torch, args.trained_dtype)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            dtype = trained_dtype if parameter.requires_grad else args.compute_dtype
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)


def optimizer_groups(model: nn.Module, args: LlavaTrainingArguments, decay_names: list[str]) -> list[dict]:
    """
    Parameter groups: a learning rate per component, weight decay only on `decay_names` (no biases, no norms). The language
    model's come first: its rate is the one that `Trainer` logs.

    Returns:
        `list[dict]`: `params`, `lr`, `weight_decay` and `component` of each group that is not empty.
    """
    rates = args.learning_rates()
    groups = {(component, decay): [] for component in COMPONENTS for decay in (True, False)}
    decay_names = set(decay_names)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[component_of(name), name in decay_names].append(parameter)
    return [
        {
            "params": parameters,
            "lr": rates[component],
            "weight_decay": args.weight_decay if decay else 0.0,
            "component": component,
        }
        for (component, decay), parameters in groups.items()
        if parameters
    ]


@torch.no_grad()
def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert a trained model's weights to the dtype in which it is published; buffers that are not saved stay."""
    saved = model.state_dict(keep_vars=True)
    for tensor in [*model.parameters(), *saved.values()]:
        if tensor.is_floating_point() and tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)


def resolve_packing(model: nn.Module, args: LlavaTrainingArguments, has_own_collator: bool = False) -> None:
    """
    Resolve `packing=auto` and `auto_full` in place, and set an attention that keeps packed samples apart.

    Raises:
        ValueError: `packing` is set, but samples would attend to each other, or need an attention mask of T × T.
    """
    if args.packing == "none":
        return
    reason = _why_not_packed(model, args)
    if args.packing.startswith("auto"):
        if reason is None and has_own_collator:
            reason = "the run has a data collator of its own"
        fills = args.packing == "auto_full" and args.train_sampling_strategy != "group_by_length"
        args.packing = "none" if reason is not None else "full" if fills else "batch"
        if reason is not None:
            logger.info("Samples are padded, not packed: %s.", reason)
    elif reason is not None:
        raise ValueError(f"packing={args.packing}, but {reason}. Set packing=none.")


def resolve_checkpointing(model: nn.Module, args: LlavaTrainingArguments) -> None:
    """Resolve `activation_checkpointing=auto` in place, the same on all processes; without a CUDA device, and sharded: on."""
    if args.activation_checkpointing != "auto":
        return
    args.activation_checkpointing = True
    if args.device.type != "cuda" or args.is_sharded:
        return
    from .estimate import Settings, available_memory, choose_checkpointing, sizes_of

    try:
        available = min(gather_object([available_memory(args.device)]))
        args.activation_checkpointing, why = choose_checkpointing(sizes_of(model.config), Settings.of(args), available)
    except ValueError as error:  # a language model that cannot be estimated
        why = f"activation_checkpointing: on. {error}"
    if args.process_index == 0:
        logger.warning("%s", why)


class CheckpointEverySecondLayer(TrainerCallback):
    """Of the language model: transformers' `every_n_layers` counts the vision tower's layers too."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        language_model = core_model(model).model.language_model
        layers = [layer for layer in language_model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = index % 2 == 0


def _why_not_packed(model: nn.Module, args: LlavaTrainingArguments) -> str | None:
    attention = args.attn_implementation
    if attention is not None and attention != VARLEN and "flash" not in attention:
        return f"attn_implementation={attention} would build an attention mask of tokens × tokens for a pack"
    if args.torch_compile:
        return "torch_compile would recompile for each length of a pack"
    language_model = model.model.language_model
    before = language_model.config._attn_implementation
    try:
        if attention is None:
            use_varlen_attention(model)
        if any(p.is_meta or hasattr(p, "ds_id") for p in language_model.parameters()):
            return None  # sharded or offloaded: no probe forward
        if (leak := packed_attention_error(language_model)) <= _LEAK:
            return None
        reason = (
            f"samples of a pack attend to each other in {type(language_model).__name__} (relative error {leak:.2g})"
        )
    except ValueError as error:  # an attention with features that the packed one lacks: Gemma 2, GPT-OSS
        reason = str(error).removesuffix(" Do not pack.").rstrip(".")
    if attention is None:
        model.set_attn_implementation({"text_config": before})
    return reason


_LEAK = 0.1  # relative: rounding to 16 bits gives about 0.01, another sample about 1
