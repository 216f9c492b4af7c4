"""
LoRA, DoRA, rsLoRA and QLoRA: one adapter folder that plain PEFT, and transformers by itself, load back.

    adapter_config.json        target_modules: a regular expression; modules_to_save: what is trained whole
    adapter_model.safetensors  LoRA weights; the projector and the tower where they are trained whole
    processor files            so that the folder is all a pipeline needs (there must be no config.json: with one,
                               transformers takes the folder for a full model and does not look for the base)

Layers are found by a regular expression on `language_model`: PEFT's targets by the end of a name (`q_proj`) also match the
attention of a CLIP tower.
"""

import json
import logging
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..io.checkpoints import DORA_MAGNITUDE, base_name_to_record, component_of, file_of, resize_to_adapter
from ..io.files import atomic_path, read_config, write_atomic
from .arguments import LlavaTrainingArguments


logger = logging.getLogger(__name__)

WEIGHTS_NAME = "adapter_model.safetensors"

LANGUAGE_MODEL = "model.language_model"
"""Where the language model lies in `LlavaForConditionalGeneration`; its head is `lm_head`, next to it."""


def core_model(model: nn.Module) -> nn.Module:
    """The LLaVA under PEFT's wrapper."""
    return model.get_base_model() if is_peft(model) else model


def is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


# What is adapted


def lora_target_pattern(model: PreTrainedModel, target: str | list[str] | None = None) -> str:
    r"""
    The regular expression over full module names for an `lora_target`: by default, and for `all-linear`, every linear layer
    of the language model and no other.

    For Llama: `model\.language_model\.(.*\.)?(down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj)`.

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
    The vision tower (the copy that is trained, under PEFT), the name of its list of layers, `None` if there is none, and how many
    of them reach the loss: hidden state 0 is the embedding, hidden state i the output of layer i − 1.
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
    """
    The `peft.LoraConfig` for a run.

    Raises:
        ValueError: `lora_target` matches nothing, or something outside the language model.
    """
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


def trained_forms(model: nn.Module) -> dict[str, str]:
    """How an adapter trains projector and tower: `full`, `lora` or `frozen`."""
    forms = {}
    for component in ("multi_modal_projector", "vision_tower"):
        names = [name for name, _ in model.named_parameters() if component_of(name) == component]
        is_full, is_lora = (any(sign in name for name in names) for sign in (".modules_to_save.", ".lora_"))
        forms[component] = "full" if is_full else "lora" if is_lora else "frozen"
    return forms


# Adding, loading, saving


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
    peft_model = PeftModel.from_pretrained(model, path, is_trainable=True, revision=revision)
    forms = trained_forms(peft_model)
    for name, theirs, ours in (
        ("train_projector", forms["multi_modal_projector"], args.train_projector),
        ("train_vision_tower", forms["vision_tower"] == "full", args.train_vision_tower),
        ("lora_vision_tower", forms["vision_tower"] == "lora", args.lora_vision_tower),
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
    Raise ValueError where tokens were added to the base and the adapter does not hold their rows of the embeddings or of an untied
    head: PEFT leaves frozen ones out, and the result would have random rows there.
    """
    from peft import get_peft_model_state_dict

    core = core_model(model)
    base = base_name_to_record(core)
    config = base and read_config(file_of(base, "config.json"))
    before, embeddings, head = (config or {}).get("text_config", {}).get("vocab_size"), *_vocabulary(core)
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


def _vocabulary(model: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def initial_lora(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    The LoRA weights, by their names in an adapter file, that an initialisation such as PiSSA has taken out of the base's
    weights; empty for one that leaves the base as it is.

    Raises:
        ValueError: the initialisation changes the base in a way that an adapter cannot undo (LoftQ).
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
    Make an adapter that PEFT has saved loadable on the base that others have, by transformers too: without what [`initial_lora`]
    took out of the base, as LoRA of twice the rank, and with DoRA's magnitudes as `….lora_magnitude_vector.weight`. PEFT reads them
    with and without the end; transformers' own loading only with it, and leaves them untrained otherwise.
    """
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    if not config.get("use_dora") and not initial:
        return
    tensors = load_file(folder / WEIGHTS_NAME)
    tensors = {f"{name}.weight" if name.endswith(DORA_MAGNITUDE) else name: t for name, t in tensors.items()}
    for name, start in initial.items():  # B A − B₀ A₀ = [B, −B₀] [A; A₀]
        start, axis = (start, 0) if ".lora_A." in name else (-start, 1)
        tensors[name] = torch.cat([tensors[name], start.to(tensors[name].dtype)], axis)
    with atomic_path(folder / WEIGHTS_NAME) as path:
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

    tensors = load_file(Path(folder) / WEIGHTS_NAME)
    for a in [name for name in initial if ".lora_A." in name]:
        b, layer = a.replace(".lora_A.", ".lora_B."), model.get_submodule(a.partition(".lora_A.")[0])
        before = initial[b] @ initial[a]
        tensors[a], initial[a] = tensors[a].chunk(2, 0)
        tensors[b], minus_b = tensors[b].chunk(2, 1)
        initial[b] = -minus_b
        weight = layer.get_base_layer().weight
        weight += (layer.scaling[model.active_adapter] * (before - initial[b] @ initial[a])).to(weight)
    set_peft_model_state_dict(model, tensors)
