"""
LoRA, DoRA, rsLoRA and QLoRA: one adapter folder that plain PEFT, and transformers by itself, load back.

    adapter_config.json        target_modules: a regular expression; modules_to_save: what is trained whole
    adapter_model.safetensors  LoRA weights of the language model; the whole projector; the tower if trained
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

from ..io.atomic import atomic_path, write_atomic
from ..io.checkpoints import DORA_MAGNITUDE, base_name_to_record, resize_to_adapter
from .arguments import LlavaTrainingArguments


logger = logging.getLogger(__name__)

WEIGHTS_NAME = "adapter_model.safetensors"

LANGUAGE_MODEL = "model.language_model"
"""Where the language model lies in `LlavaForConditionalGeneration`; its head is `lm_head`, next to it."""


def lora_target_pattern(model: PreTrainedModel, target: str | list[str] | None = None) -> str:
    r"""
    The regular expression over full module names for an `lora_target`: by default, and for `all-linear`, every linear layer
    of the language model and no other.

    For Llama: `model\.language_model\..*\.(down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj)`.

    Raises:
        ValueError: a name that no layer of the language model has, or it has no linear layers (but some of its own type).
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
    endings = {name.rpartition(".")[2] for name, m in language_model.named_modules() if isinstance(m, nn.Linear)}
    if not endings:
        raise ValueError(
            f"The language model ({type(language_model).__name__}) has no torch.nn.Linear layers for LoRA. "
            "Set lora_target to a regular expression over its module names."
        )
    return rf"{re.escape(LANGUAGE_MODEL)}\..*\.({'|'.join(sorted(endings))})"


_TARGET_HINT = (
    "Give names of its layers, such as [q_proj, v_proj], or a regular expression over full module names, such as "
    rf"{re.escape(LANGUAGE_MODEL)}\..*\.(q_proj|v_proj); leave lora_target out for every linear layer."
)


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
        target_modules=lora_target_pattern(model, args.lora_target),
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
        raise ValueError(f"lora_target={args.lora_target!r} {found}. {_TARGET_HINT}")
    peft_model = get_peft_model(model, config)
    config.base_model_name_or_path = base_name_to_record(model)
    config.revision = args.model_revision
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

    resize_to_adapter(model, path, revision)
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
    return peft_model


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
    Make an adapter that PEFT has saved loadable on the base that others have, by transformers too: with DoRA's magnitudes under
    the names that it reads, and without what [`initial_lora`] took out of the base, as LoRA of twice the rank.
    """
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    if config.get("use_dora"):
        write_dora_keys_for_transformers(folder)
    if not initial:
        return
    tensors = load_file(folder / WEIGHTS_NAME)
    for name, start in initial.items():  # B A − B₀ A₀ = [B, −B₀] [A; A₀]
        start, axis = (start, 0) if ".lora_A." in name else (-start, 1)
        tensors[name] = torch.cat([tensors[name], start.to(tensors[name].dtype)], axis)
    alpha = 2**0.5 if config.get("use_rslora") else 2
    config |= {"r": 2 * config["r"], "lora_alpha": alpha * config["lora_alpha"], "init_lora_weights": True}
    for name, factor in (("rank_pattern", 2), ("alpha_pattern", alpha)):
        config[name] = {layer: factor * value for layer, value in (config.get(name) or {}).items()}
    _save(tensors, folder)
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


def write_dora_keys_for_transformers(folder: str | Path) -> None:
    """
    Rename DoRA's magnitudes in a saved adapter from `….lora_magnitude_vector` to `….lora_magnitude_vector.weight`.

    PEFT reads both. transformers' own adapter loading (pipelines, `from_pretrained` on the folder) reads the second
    only; of the first it says "unexpected", and leaves the magnitudes as they were before training.
    """
    tensors = load_file(Path(folder) / WEIGHTS_NAME)
    _save({f"{name}.weight" if name.endswith(DORA_MAGNITUDE) else name: t for name, t in tensors.items()}, folder)


def _save(tensors: dict[str, torch.Tensor], folder: str | Path) -> None:
    with atomic_path(Path(folder) / WEIGHTS_NAME) as path:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})


__all__ = [
    "add_adapter",
    "finish_adapter_folder",
    "initial_lora",
    "load_adapter",
    "load_unfinished",
    "lora_config",
    "lora_target_pattern",
]
