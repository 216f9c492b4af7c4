"""
What a run trains: model and processor, frozen and adapted.

What each stage trains (LLaVA §4.2; LLaVA-1.5 §3), each part at its own learning rate:

| | vision tower | projector | language model |
|---|---|---|---|
| pretrain | frozen | trained | frozen |
| finetune | frozen | trained | trained |
| finetune, LoRA or QLoRA | frozen | trained | LoRA weights |
| with `train_vision_tower`, `lora_vision_tower` | trained, LoRA weights | | |
| with `train_projector` lora, frozen | | LoRA weights, frozen | |

LoRA, DoRA, rsLoRA and QLoRA give one adapter folder, which plain PEFT and stock transformers load:

    adapter_config.json        target_modules: a regular expression; modules_to_save: what is trained whole
    adapter_model.safetensors  LoRA weights; the projector and the tower where they are trained whole
    processor files            all that a pipeline needs besides (no config.json: transformers would take the folder for a full
                               model and not look for the base)

Layers are found by a regular expression on `language_model`: PEFT's targets by the end of a name (`q_proj`) also match the
attention of a CLIP tower.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from ..io.adapters import (
    DORA_MAGNITUDE,
    TODAYS_NAMES,
    find_base,
    forbid_inference_packing,
    four_bit_config,
    require_fits,
    resize_to_adapter,
)
from ..io.checkpoints import (
    COMPONENTS,
    base_name_to_record,
    base_of,
    checkpoint_kind,
    component_of,
    file_of,
    has_processor,
    load_processor,
    load_projector,
)
from ..io.files import atomic_path, read_config, write_atomic
from ..text.chat_templates import chat_template_of, load_chat_template
from ..text.stops import end_answers_with_eos, teaches_no_stop
from .arguments import LlavaTrainingArguments


logger = logging.getLogger(__name__)

ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"

LANGUAGE_MODEL = "model.language_model"
"""Where the language model lies in `LlavaForConditionalGeneration`; its head is `lm_head`, next to it."""


def base_and_adapter(args: LlavaTrainingArguments) -> tuple[str, str | None, str | None]:
    """
    The full model of a run, its revision, and the adapter that is trained further, if any.

    Raises:
        ValueError: `model` is not set, is the output of a pretrain run, or is an adapter and `adapter="none"`; the projector does
            not fit, or `lora_target` matches nothing.
        FileNotFoundError: `model` does not exist.
    """
    if args.model is None:
        raise ValueError("model is not set. Give a LLaVA folder or Hub name, such as llava-hf/llava-1.5-7b-hf.")
    kind = checkpoint_kind(args.model, args.model_revision)
    if kind == "projector":
        raise ValueError(
            f"model={args.model} is the output of a pretrain run: a projector. "
            f"Set projector={args.model} and model={base_of(args.model, args.model_revision)[0]}."
        )
    if kind == "adapter":
        if args.adapter == "none":
            raise ValueError(
                f"model={args.model} is an adapter, but adapter=none. Set adapter=lora or qlora to train it further, "
                "or merge it first (llava merge)."
            )
        base, adapter = find_base(args.model, args.model_revision), args.model
    else:
        base, adapter = (args.model, args.model_revision), None
    if args.projector is not None:
        require_fits(args.projector, *base)
    if args.lora_target is not None and adapter is None:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(base[0], revision=base[1])
            lora_config(AutoModelForImageTextToText.from_config(config), args)
    return *base, adapter


def load_model_and_processor(args: LlavaTrainingArguments) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    The model of a run, with the projector and the adapter that it starts from, and its processor. Weights have the dtype of their
    file until [`prepare_model`].

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
    Parameters of the vision tower that do not reach the loss: layers after the last feature layer (LLaVA takes the last but one, −2),
    the last norm and the pooling head. They are frozen: data-parallel training would wait for their gradients.
    """
    tower, layers, num_used = tower_layers(model)
    if layers is None:
        return []
    unused = list(tower.get_submodule(layers)[num_used:].parameters())
    for name, parameter in tower.named_parameters():
        if not name.startswith(f"{layers}.") and any(part in name for part in ("post_layernorm", "head.")):
            unused.append(parameter)
    return unused


@torch.no_grad()
def set_dtypes(model: nn.Module, args: LlavaTrainingArguments) -> None:
    """
    Trained weights in `args.trained_dtype` (float32 by default: small updates vanish in 16 bit), frozen ones in the dtype of the
    arithmetic: float32 norms (PEFT's `prepare_model_for_kbit_training`) would turn all activations after them into float32. 4-bit
    weights and buffers (rotary frequencies) are left as they are.
    """
    trained_dtype = getattr(torch, args.trained_dtype)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            dtype = trained_dtype if parameter.requires_grad else args.compute_dtype
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)


def optimizer_groups(model: nn.Module, args: LlavaTrainingArguments, decay_names: list[str]) -> list[dict]:
    """
    Parameter groups, those of the language model first, whose rate `Trainer` logs: a learning rate per component, weight decay on
    `decay_names` alone (no biases, no norms).
    """
    rates, decay_names = args.learning_rates(), set(decay_names)
    groups: dict[tuple[str, bool], list] = {(part, decays): [] for part in COMPONENTS for decays in (True, False)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[component_of(name), name in decay_names].append(parameter)
    return [
        {"params": group, "lr": rates[part], "weight_decay": args.weight_decay * decays, "component": part}
        for (part, decays), group in groups.items()
        if group
    ]


@torch.no_grad()
def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert a trained model's weights to the dtype in which it is published; buffers that are not saved stay."""
    saved = model.state_dict(keep_vars=True)
    for tensor in [*model.parameters(), *saved.values()]:
        if tensor.is_floating_point() and tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)


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


# Adapters


def core_model(model: nn.Module) -> nn.Module:
    """The LLaVA under PEFT's wrapper."""
    return model.get_base_model() if is_peft(model) else model


def is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def lora_target_pattern(model: PreTrainedModel, target: str | list[str] | None = None) -> str:
    r"""
    The regular expression over full module names for an `lora_target`. By default, and for `all-linear`, it is every linear layer of
    the language model; for Llama `model\.language_model\.(.*\.)?(down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj)`.

    Raises:
        ValueError: a name that no layer of the language model has.
    """
    language_model = model.get_submodule(LANGUAGE_MODEL)
    if target not in (None, "all-linear", ["all-linear"]):
        if isinstance(target, str) and not re.fullmatch(r"[\w.,\s-]+", target):
            return target
        names = target.split(",") if isinstance(target, str) else target
        names = [name.strip().removeprefix(f"{LANGUAGE_MODEL}.") for name in names]
        layers = [f".{layer}" for layer, _ in language_model.named_modules()]
        for name in names:
            if not any(layer.endswith(f".{name}") for layer in layers):
                raise ValueError(f"lora_target: no layer of the language model is called {name!r}. {_TARGET_HINT}")
        return rf"{re.escape(LANGUAGE_MODEL)}\.(.*\.)?({'|'.join(map(re.escape, names))})"
    return _linear_layers(model, LANGUAGE_MODEL)


_TARGET_HINT = (
    "Give names of its layers, such as [q_proj, v_proj], or a regular expression over full module names, such as "
    rf"{re.escape(LANGUAGE_MODEL)}\..*\.(q_proj|v_proj); leave lora_target out for every linear layer."
)


def _linear_layers(model: nn.Module, place: str) -> str:
    """The regular expression of all linear layers of a part of the model."""
    modules = model.get_submodule(place).named_modules()
    endings = {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)}
    return rf"{re.escape(place)}\.(.*\.)?({'|'.join(sorted(endings))})"


def tower_layers(model: nn.Module) -> tuple[nn.Module, str | None, int]:
    """
    The vision tower (under PEFT the copy that is trained), the name of its list of layers, if it has one, and how many of them reach
    the loss: hidden state 0 is the embedding, hidden state i the output of layer i − 1.
    """
    tower = model.model.vision_tower
    for trained in getattr(tower, "modules_to_save", {}).values():
        tower = trained
    number = getattr(tower.config, "num_hidden_layers", None)
    lists = ((name, m) for name, m in tower.named_modules() if isinstance(m, nn.ModuleList) and len(m) == number)
    name = next(lists, (None, None))[0]
    if name is None:
        return tower, None, 0
    feature_layers = model.config.vision_feature_layer
    feature_layers = [feature_layers] if isinstance(feature_layers, int) else feature_layers
    return tower, name, max(layer % (number + 1) for layer in feature_layers)  # −2 of 25 states is 23: layers 0 to 22


def lora_config(model: PreTrainedModel, args: LlavaTrainingArguments):
    """The `peft.LoraConfig` of a run; ValueError if `lora_target` matches nothing, or something outside the language model."""
    from peft import LoraConfig

    targets = [lora_target_pattern(model, args.lora_target)]
    matched = [name for name, _ in model.named_modules() if re.fullmatch(targets[0], name)]
    outside = [name for name in matched if not name.startswith(LANGUAGE_MODEL + ".")]
    if not matched or outside:
        found = f"matches {', '.join(outside[:3])}, outside of the language model" if outside else "matches no module"
        raise ValueError(f"lora_target={args.lora_target!r} {found}. {_TARGET_HINT}")
    if args.train_projector == "lora":
        targets.append(_linear_layers(model, "model.multi_modal_projector"))
    if args.lora_vision_tower:
        _, layers, num_used = tower_layers(model)
        place = f"model.vision_tower.{layers}" if layers else "model.vision_tower"
        numbers = rf"\.({'|'.join(map(str, range(num_used)))})\." if layers else r"\."
        targets.append(_linear_layers(model, place).replace(r"\.(.*", numbers + "(.*", 1))
    whole = {"multi_modal_projector": args.train_projector == "full", "vision_tower": args.train_vision_tower}
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        bias=args.lora_bias,
        use_dora=args.use_dora,
        use_rslora=args.use_rslora,
        target_modules="|".join(targets),
        modules_to_save=[name for name, is_whole in whole.items() if is_whole] or None,
    )


def _trained_form(model: nn.Module, component: str) -> str:
    """How an adapter trains projector or tower: `full`, `lora` or `frozen`."""
    names = " ".join(name for name, _ in model.named_parameters() if component_of(name) == component)
    return "full" if ".modules_to_save." in names else "lora" if ".lora_" in names else "frozen"


def add_adapter(model: PreTrainedModel, args: LlavaTrainingArguments):
    """Wrap a model with a new adapter (`peft.PeftModel`); everything but the adapter is frozen."""
    from peft import get_peft_model

    config = lora_config(model, args)
    peft_model = get_peft_model(model, config)
    config.base_model_name_or_path = base_name_to_record(model)
    config.revision = args.model_revision
    return peft_model


def load_adapter(model: PreTrainedModel, path: str, args: LlavaTrainingArguments, revision: str | None = None):
    """
    Wrap a model with an adapter (`peft.PeftModel`) to be trained further; its own rank and targets hold.

    Raises:
        ValueError: the adapter trains projector or tower in another form than the run.
    """
    from peft import PeftModel

    resize_to_adapter(model, path, revision)
    peft_model = PeftModel.from_pretrained(model, path, is_trainable=True, revision=revision, key_mapping=TODAYS_NAMES)
    projector, tower = (_trained_form(peft_model, part) for part in ("multi_modal_projector", "vision_tower"))
    for name, theirs, ours in (
        ("train_projector", projector, args.train_projector),
        ("train_vision_tower", tower == "full", args.train_vision_tower),
        ("lora_vision_tower", tower == "lora", args.lora_vision_tower),
    ):
        if ours != theirs:
            raise ValueError(
                f"{path} was trained with {name}={theirs}, this run has {ours}. Set {name}={str(theirs).lower()}, or merge the "
                "adapter first (llava merge)."
            )
    config = peft_model.peft_config["default"]
    for name, ours in (("r", args.lora_r), ("lora_alpha", args.lora_alpha), ("use_dora", args.use_dora)):
        theirs = getattr(config, name)
        if ours != theirs:
            logger.warning(f"{path} has {name}={theirs}, which stays; the recipe's {ours} is not used.")
    config.base_model_name_or_path = base_name_to_record(model)  # PEFT would write a relative path as it was given
    return peft_model


def require_new_rows_are_saved(model: nn.Module) -> None:
    """
    Raise ValueError where tokens were added to the base and the adapter would not hold their rows of the embeddings or of an untied
    head: PEFT leaves frozen ones out.
    """
    from peft import get_peft_model_state_dict

    core = core_model(model)
    base = base_name_to_record(core)
    config = base and read_config(file_of(base, "config.json"))
    before = (config or {}).get("text_config", {}).get("vocab_size")
    embeddings, head = core.get_input_embeddings().weight, core.get_output_embeddings().weight
    if before is None or len(embeddings) <= before:
        return
    whole = [name for name, tensor in get_peft_model_state_dict(model).items() if len(tensor) == len(embeddings)]
    are_new_trained = bool(getattr(model.peft_config[model.active_adapter], "trainable_token_indices", None))
    held = {"embed_tokens": are_new_trained, "lm_head": head is embeddings}
    lost = [part for part, is_held in held.items() if not is_held and not any(part in name for name in whole)]
    if lost:
        raise ValueError(
            f"The model has {len(embeddings)} tokens, its base {base} {before}, and the adapter would not hold the new rows of "
            f"{' and '.join(lost)}. Add {lost} to modules_to_save of the LoraConfig, or save the resized model and adapt that."
        )


def initial_lora(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    The LoRA weights, by their names in an adapter file, that an initialisation such as PiSSA has taken out of the base's weights;
    empty for one that leaves the base as it is. ValueError for LoftQ, which changes the base in a way that an adapter cannot undo.
    """
    from peft import get_peft_model_state_dict

    init = str(getattr(model.peft_config[model.active_adapter], "init_lora_weights", True)).lower()
    if init == "loftq":
        raise ValueError(
            "init_lora_weights='loftq' changes the weights of the base, which an adapter folder does not hold. Choose another "
            "initialisation, or adapter=qlora."
        )
    if not init.startswith(("pissa", "olora", "corda", "lora_ga")):
        return {}
    weights = get_peft_model_state_dict(model)
    return {name: w.detach().to("cpu", copy=True) for name, w in weights.items() if _LORA.search(name)}


_LORA = re.compile(r"\.lora_[AB]\.")


def finish_adapter_folder(folder: str | Path, initial: dict[str, torch.Tensor]) -> None:
    """
    Make an adapter that PEFT has saved loadable on the base that others have: without what [`initial_lora`] took out of the base, as
    LoRA of twice the rank, and with DoRA's magnitudes as `….lora_magnitude_vector.weight`, the only name that transformers reads.
    """
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    if not config.get("use_dora") and not initial:
        return
    tensors = load_file(folder / ADAPTER_WEIGHTS_NAME)
    tensors = {f"{name}.weight" if name.endswith(DORA_MAGNITUDE) else name: t for name, t in tensors.items()}
    for name, start in initial.items():  # B A − B₀ A₀ = [B, −B₀] [A; A₀]
        start, axis = (start, 0) if ".lora_A." in name else (-start, 1)
        tensors[name] = torch.cat([tensors[name], start.to(tensors[name].dtype)], axis)
    with atomic_path(folder / ADAPTER_WEIGHTS_NAME) as path:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})
    if initial:
        alpha = 2**0.5 if config.get("use_rslora") else 2
        config |= {"r": 2 * config["r"], "lora_alpha": alpha * config["lora_alpha"], "init_lora_weights": True}
        for name, factor in (("rank_pattern", 2), ("alpha_pattern", alpha)):
            config[name] = {layer: factor * value for layer, value in (config.get(name) or {}).items()}
        write_atomic(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True))


@torch.no_grad()
def load_unfinished(model: nn.Module, folder: str | Path, initial: dict[str, torch.Tensor]) -> None:
    """Load what [`finish_adapter_folder`] wrote into the model that is trained; `initial` and the base become the folder's."""
    from peft import set_peft_model_state_dict

    tensors = load_file(Path(folder) / ADAPTER_WEIGHTS_NAME)
    for a in [name for name in initial if ".lora_A." in name]:
        b, layer = a.replace(".lora_A.", ".lora_B."), model.get_submodule(a.partition(".lora_A.")[0])
        before = initial[b] @ initial[a]
        tensors[a], initial[a] = tensors[a].chunk(2, 0)
        tensors[b], minus_b = tensors[b].chunk(2, 1)
        initial[b] = -minus_b
        weight = layer.get_base_layer().weight
        weight += (layer.scaling[model.active_adapter] * (before - initial[b] @ initial[a])).to(weight)
    set_peft_model_state_dict(model, tensors)
