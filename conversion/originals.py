"""
Reading the original's checkpoints: what a folder holds, and the whole model that it stands for.

| kind | recognised by | needs |
|---|---|---|
| full | weights of a language model and a projector | its vision tower, unless it was trained and is inside |
| delta | the same, and a base is given | base, tower |
| lora | `adapter_model.*` (and `non_lora_trainables.bin`) | base, tower |
| projector | `mm_projector.bin` alone | base, tower |

Only the chat template is decided by a folder's name, since the original's files do not say it.
"""

import logging
import os
import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPConfig, CLIPVisionConfig, LlamaConfig, MistralConfig, PreTrainedConfig

from modeling_llava.io.files import NON_LORA_FILES, PROJECTOR_FILES, has_tokenizer, is_original, unsupported

from .folders import local_folder, read_json
from .keymaps import (
    CLIP_TEXT_SIDE,
    TOWER_PREFIXES,
    Entry,
    Projector,
    drop_derived,
    language_entries,
    match_entries,
    projector_entries,
    tower_form,
    vision_entries,
)
from .overlays import WRONG_BASE, add_delta, fold_lora, put_over, without_adapter_prefix
from .tensors import LazyTensor, extended, find_weights, read_checkpoint, shards_of


logger = logging.getLogger(__name__)

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
FEATURE_STRATEGIES = {"patch": "default", "cls_patch": "full"}
"""`mm_vision_select_feature` → `vision_feature_select_strategy`."""

NOT_TEXT_FIELDS = re.compile(
    r"mm_.*|use_mm_proj|tune_mm_.*|freeze_mm_.*|unfreeze_mm_.*|image_.*|pretrain_mm_.*|tokenizer_.*|vision_tower"
    r"|model_type|architectures|transformers_version|torch_dtype|dtype|_name_or_path|auto_map|quantization_config"
)
"""Fields of an original configuration that are not the language model's."""


@dataclass
class Original:
    """
    A whole original LLaVA, its parts and base put together; no weight is read yet.

    `config` is the original's `config.json`, `text_config.vocab_size` the embedding's rows. `names` are those of the
    checkpoint's folder and base, which may tell its version. `tower_inside`: the checkpoint held the tower's weights, since
    it was trained. `files` are all that were read.
    """

    kind: Literal["full", "delta", "lora", "projector"]
    folder: Path
    tokenizer_folder: Path
    tower_folder: Path
    config: dict
    text_config: PreTrainedConfig
    vision_config: CLIPVisionConfig
    projector: Projector
    names: str
    tensors: dict[Entry, LazyTensor]
    tower_inside: bool
    files: list[Path]


def read_original(
    source: str | Path,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    *,
    config: dict | None = None,
    tower: tuple[CLIPVisionConfig, dict[str, LazyTensor]] | None = None,
) -> Original:
    """
    Read what an original checkpoint is, and with its base and tower the whole model that it stands for.

    `source`, `base` and `vision_tower` are those of [`convert_original_to_hf`]; by default the tower is the one that
    `mm_vision_tower` names: a path, a folder in or next to `source`, or a Hub name. `config` stands in for `config.json`, and
    `tower`, a configuration and tensors by their HF names, for the tower's folder.

    Raises:
        ValueError: it is not an original LLaVA, or a part is missing, superfluous or of another size.
        OSError: a folder or file is not there.
    """
    folder = local_folder(source, "checkpoint")
    files = []
    if config is None:
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is an adapter in the HF format. Merge it: llava merge {folder} OUT")
        config = read_json(folder / "config.json")
        files.append(folder / "config.json")
    _check_is_original(config, folder)
    kind, tensors, tokenizer_folder = _read_tensors(folder, config, base, files)
    if not has_tokenizer(tokenizer_folder):
        raise OSError(f"{tokenizer_folder} has no tokenizer (tokenizer.model or .json): copy the language model's.")

    text_config = read_text_config(config)
    if embedding := tensors.get("model.embed_tokens.weight"):
        text_config.vocab_size = embedding.num_rows
        head = tensors.get("lm_head.weight")
        if head and text_config.tie_word_embeddings and torch.equal(head.tensor(), embedding.tensor()):
            del tensors["lm_head.weight"]  # as torch.save writes a tied head
        elif head and head.num_rows < embedding.num_rows:  # added tokens whose embeddings alone were kept
            tensors["lm_head.weight"] = extended(head, embedding.num_rows)

    tower_folder = find_tower(folder, config, vision_tower) if tower is None else folder
    vision_config = read_vision_config(tower_folder) if tower is None else tower[0]
    layers, is_numbered = read_projector_type(config)
    projector = Projector(layers, vision_config.hidden_size, text_config.hidden_size, is_numbered=is_numbered)
    layer, states = config.get("mm_vision_select_layer", -2), vision_config.num_hidden_layers + 1
    if type(layer) is not int or not -states <= layer < states:
        there = f"{states} hidden states ({states - 1} layers and the embeddings): {-states} to {states - 1}"
        raise ValueError(f"mm_vision_select_layer is {layer!r}, but the tower {tower_folder} has {there}.")
    first = tensors.get(projector_entries(projector)[0].original)
    if first is not None and first.shape[1:] != (projector.inputs,):
        raise ValueError(
            f"The vision tower {tower_folder} gives {projector.inputs} features per patch (hidden_size), but {first.origin} "
            f"is {list(first.shape)}. Give the tower that it was trained with: --vision-tower."
        )

    tower_inside = tower_form(tensors) == "inside"
    entries = [*language_entries(text_config), *projector_entries(projector)]
    towers = vision_entries(vision_config)
    hint = "" if kind == "full" else WRONG_BASE
    matched = match_entries([*entries, *towers] if tower_inside else entries, tensors, str(folder), hint)
    if not tower_inside and tower is None:
        matched |= read_tower(tower_folder, vision_config, files)
    elif not tower_inside:
        matched |= {entry: tower[1][entry.hf] for entry in towers}
    files.append(tower_folder / "config.json")
    names = source, config.get("version"), config.get("_name_or_path"), base
    return Original(
        kind=kind,
        folder=folder,
        tokenizer_folder=tokenizer_folder,
        tower_folder=tower_folder,
        config=config,
        text_config=text_config,
        vision_config=vision_config,
        projector=projector,
        names=" ".join(os.path.basename(os.path.abspath(name)).lower() for name in names if name),
        tensors=matched,
        tower_inside=tower_inside,
        files=files,
    )


# Configurations


def _check_is_original(config: dict, folder: Path) -> None:
    if reason := unsupported(str(folder), config):
        raise ValueError(reason)
    if not is_original(config):
        raise ValueError(f"{folder} is in the HF format already. Convert it with --to original or --to gguf.")
    feature = config.get("mm_vision_select_feature", "patch")
    if feature not in FEATURE_STRATEGIES:
        raise ValueError(f"{folder} has mm_vision_select_feature {feature!r}; known are 'patch' and 'cls_patch'.")


def read_text_config(config: dict) -> PreTrainedConfig:
    """The language model's configuration, out of an original LLaVA's."""
    # a copy: transformers writes into the `rope_scaling` that it is given, and the original's readers take two fields there
    fields = {name: deepcopy(value) for name, value in config.items() if not NOT_TEXT_FIELDS.fullmatch(name)}
    fields.setdefault("tie_word_embeddings", False)
    config_class = MistralConfig if "mistral" in config["model_type"] else LlamaConfig
    return _build(config_class, fields, "the checkpoint's config.json")


def _build(config_class: type[PreTrainedConfig], fields: dict, origin: str) -> PreTrainedConfig:
    try:
        return config_class(**fields)
    except (ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{origin} is not one that {config_class.__name__} accepts: {reason}.") from error


def read_projector_type(config: dict) -> tuple[int, bool]:
    """Number of layers of the projector, and whether a single one is numbered (`mlp1x_gelu`). The default is linear."""
    kind = config.get("mm_projector_type") or "linear"
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if match is None and kind != "linear":
        raise ValueError(f"mm_projector_type {kind!r} is not known; converted are 'linear' and 'mlpNx_gelu'.")
    return (int(match[1]), True) if match else (1, False)


# Weights


def _read_tensors(folder: Path, config: dict, base: str | Path | None, files: list[Path]):
    """Kind, tensors under the original's names, folder of the tokenizer."""
    adapter, weights = find_weights(folder, ADAPTER_FILES), find_weights(folder)
    projector = find_weights(folder, PROJECTOR_FILES)
    own_tokenizer = any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    if not (adapter or weights or projector):
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        raise ValueError(f"{folder} holds no weights (model, pytorch_model, adapter_model or mm_projector): {there}.")
    if weights and not adapter and base is None:
        tensors = drop_derived(_read(weights, files))
        norm = tensors.get("model.norm.weight")
        if norm is not None and norm.tensor().float().abs().mean() < 0.05:  # a model's is near 1 or above
            logger.warning(f"{folder} looks like a delta. If it is one, give the language model of which with --base.")
        return "full", tensors, folder

    if base is None:
        named = read_json(folder / "adapter_config.json", "a LoRA").get("base_model_name_or_path") if adapter else None
        called = f" (it names {named!r})" if named else ""
        what = "a LoRA adapter" if adapter else "a projector alone"
        raise ValueError(f"{folder} holds {what}: give the language model that it belongs to with --base{called}.")
    base_folder = local_folder(base, "base")
    if "text_config" in read_json(base_folder / "config.json"):
        raise ValueError(f"The base {base_folder} is in the HF form. Give the language model, or an original LLaVA.")
    base_weights = find_weights(base_folder)
    if base_weights is None:
        raise ValueError(f"The base {base_folder} holds no weights (model.safetensors, pytorch_model.bin).")
    below = drop_derived(_read(base_weights, files))
    files.append(base_folder / "config.json")
    tokenizer_folder = folder if own_tokenizer else base_folder

    gap = int(bool(config.get("mm_use_im_patch_token")) and bool(config.get("mm_use_im_start_end")))
    if adapter:
        adapter_config = read_json(folder / "adapter_config.json", "a LoRA")
        files.append(folder / "adapter_config.json")
        trained = find_weights(folder, NON_LORA_FILES)
        if trained is None and not any(key.startswith("model.mm_projector.") for key in below):
            raise ValueError(f"{folder} has no non_lora_trainables.bin (the projector), and its base has none.")
        own = without_adapter_prefix(_read(trained, files)) if trained else {}
        tensors = put_over(below, own, gap=gap)
        return "lora", fold_lora(_read(adapter, files), adapter_config, tensors, str(folder)), tokenizer_folder
    if weights:
        return "delta", add_delta(drop_derived(_read(weights, files)), below, str(folder)), tokenizer_folder
    return "projector", put_over(below, without_adapter_prefix(_read(projector, files)), gap=gap), tokenizer_folder


def _read(file: Path, files: list[Path]) -> dict[str, LazyTensor]:
    files += {file, *shards_of(file)}
    return read_checkpoint(file)


# Vision tower


def find_tower(folder: Path, config: dict, vision_tower: str | Path | None) -> Path:
    """The folder of the vision tower: the one given, or the one that the configuration names. OSError if it is not there."""
    if vision_tower is not None:
        return local_folder(vision_tower, "vision tower")
    name = config.get("mm_vision_tower") or config.get("vision_tower")
    if not name:
        raise ValueError(f"{folder}/config.json names no mm_vision_tower: give the tower with --vision-tower.")
    for place in (folder / name, folder.absolute().parent / name, Path(name)):
        if (place / "config.json").is_file():
            return place
    try:
        return local_folder(name, "vision tower")
    except OSError as error:
        raise OSError(f"{error} Or give it with --vision-tower.") from error


def read_vision_config(folder: Path) -> CLIPVisionConfig:
    """A CLIP tower's configuration; of a CLIP pair, the vision half. ValueError for another kind of tower."""
    config = read_json(folder / "config.json", "a vision tower")
    config_class = {"clip": CLIPConfig, "clip_vision_model": CLIPVisionConfig}.get(config.get("model_type"))
    if config_class is None:
        raise ValueError(f"The vision tower {folder} is a {config.get('model_type')!r}; the original's are CLIP's.")
    vision = _build(config_class, config, f"{folder}/config.json")
    vision = getattr(vision, "vision_config", vision)
    for name in ("architectures", "transformers_version", "_name_or_path", "dtype"):
        vision.__dict__.pop(name, None)
    return vision


def read_tower(folder: Path, vision: CLIPVisionConfig, files: list[Path]) -> dict[Entry, LazyTensor]:
    """The tower's tensors, from its own folder; of a CLIP pair, the vision half."""
    weights = find_weights(folder)
    if weights is None:
        raise OSError(f"The vision tower {folder} holds no weights (model.safetensors, pytorch_model.bin).")
    tensors = drop_derived(_read(weights, files))
    form = tower_form(tensors)
    if form is None:
        raise ValueError(f"{weights} does not hold a CLIP vision tower: no '{TOWER_PREFIXES['clip']}embeddings…'.")
    tensors = {key: value for key, value in tensors.items() if not CLIP_TEXT_SIDE.fullmatch(key)}
    matched = match_entries(vision_entries(vision, form), tensors, f"The vision tower {weights}")
    return dict(zip(vision_entries(vision), matched.values(), strict=True))
