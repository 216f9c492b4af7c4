"""
The names that one tensor has in each form of a checkpoint, and its shape.

The original's names are those of transformers' LLaMA, Mistral and CLIP, each under a prefix of its own, and so are HF's.
[`key_table`] lists both for every tensor of a LLaVA; [`match_keys`] compares a checkpoint with such a list and puts every
difference into one error.
"""

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, PreTrainedConfig

from .tensors import LazyTensor


FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

TOWER_PREFIXES = {
    "inside": "model.vision_tower.vision_tower.vision_model.",
    "clip": "vision_model.",
    "bare": "",
}
"""Prefix of a CLIP tower's names: in an original checkpoint that trained it, in a CLIP folder, in one that transformers 5
saved."""


@dataclass(frozen=True)
class Projector:
    """Its number of layers and their widths."""

    layers: int
    inputs: int  # image features per patch
    hidden: int  # of the language model
    bias: bool = True
    is_numbered: bool = False  # the original's layers are in an `nn.Sequential`; a single one as well, of `mlp1x_gelu`


@dataclass(frozen=True)
class Entry:
    """One tensor: its names in both forms, and its shape, as in PyTorch."""

    part: Literal["language", "vision", "projector"]
    original: str | None  # where the original has no such tensor
    hf: str
    shape: tuple[int, ...]


def key_table(
    text: PreTrainedConfig, vision: CLIPVisionConfig, projector: Projector, tower: str = "inside"
) -> list[Entry]:
    """Every tensor of a LLaVA with a LLaMA or Mistral and a CLIP tower."""
    return [*language_entries(text), *projector_entries(projector), *vision_entries(vision, tower)]


def language_entries(text: PreTrainedConfig) -> list[Entry]:
    text = deepcopy(text)
    text.pad_token_id = None  # it may be a row that is added later
    with torch.device("meta"):
        shapes = shapes_of(AutoModelForCausalLM.from_config(text))
    return [Entry("language", name, f"language_model.{name}", shape) for name, shape in shapes.items()]


def vision_entries(vision: CLIPVisionConfig, tower: str = "inside") -> list[Entry]:
    with torch.device("meta"):
        shapes = shapes_of(CLIPVisionModel(vision))
    entries = []
    for name, shape in shapes.items():
        name = name.removeprefix("vision_model.")
        entries.append(Entry("vision", TOWER_PREFIXES[tower] + name, f"vision_tower.vision_model.{name}", shape))
    return entries


def projector_entries(projector: Projector) -> list[Entry]:
    """
    The original has one `nn.Linear` (`mm_projector`), or an `nn.Sequential` with activations between, so that its layers
    have even numbers (`mm_projector.0`, `.2`, …). HF counts `linear_1`, `linear_2`, …, and requires two: next to a single
    layer, `linear_2` is the identity.
    """
    entries = []
    for i in range(max(2, projector.layers)):
        original = "model.mm_projector"
        if projector.layers > 1 or projector.is_numbered:
            original += f".{2 * i}"
        for kind in ("weight", "bias") if projector.bias else ("weight",):
            columns = () if kind == "bias" else (projector.inputs if i == 0 else projector.hidden,)
            name = f"{original}.{kind}" if i < projector.layers else None
            hf = f"multi_modal_projector.linear_{i + 1}.{kind}"
            entries.append(Entry("projector", name, hf, (projector.hidden, *columns)))
    return entries


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """A model's parameters; a tied head is not one of its own."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


# Names that are normalised or left out

DERIVED = re.compile(
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    r"|(model\.)?(vision_tower\.)*(vision_model\.)?embeddings\.position_ids"
)
"""Buffers that old versions of transformers saved, computed from the configuration."""

CLIP_TEXT_SIDE = re.compile(r"text_model\..+|text_projection\.weight|visual_projection\.weight|logit_scale")
"""What a CLIP pair holds besides its vision tower."""

HF_SPELLINGS = (
    (re.compile(r"model\.language_model\.(.+)"), r"language_model.model.\1"),
    (re.compile(r"lm_head\.(.+)"), r"language_model.lm_head.\1"),
    (re.compile(r"model\.(vision_tower|multi_modal_projector)\.(.+)"), r"\1.\2"),
)
"""Names of the modules in memory, which some tools save, and the names that a checkpoint has for them."""

BARE_HF_TOWER = re.compile(r"vision_tower\.((?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\..+)")
"""transformers 5 saves a tower that it made (not one that it loaded) without `vision_model.`."""


def canonical_hf_key(key: str) -> str:
    """The table's spelling of a key of an HF checkpoint; a key that has only one is returned as it is."""
    for pattern, spelling in HF_SPELLINGS:
        if match := pattern.fullmatch(key):
            key = match.expand(spelling)
            break
    match = BARE_HF_TOWER.fullmatch(key)
    return f"vision_tower.vision_model.{match[1]}" if match else key


def drop_derived(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Without the buffers of [`DERIVED`]."""
    return {key: value for key, value in tensors.items() if not DERIVED.fullmatch(key)}


def rename_all(tensors: Mapping[str, LazyTensor], rename) -> dict[str, LazyTensor]:
    """`tensors` under `rename(key)`. ValueError where two keys would become one."""
    renamed: dict[str, LazyTensor] = {}
    for key, tensor in tensors.items():
        new = rename(key)
        if new in renamed:
            raise ValueError(f"'{key}' ({tensor.origin}) and another tensor are both called '{new}'.")
        renamed[new] = tensor
    return renamed


def tower_form(keys: Iterable[str]) -> str | None:
    """The key of [`TOWER_PREFIXES`] under which `keys` hold a CLIP tower; `None` if they hold none."""
    forms = (form for form, prefix in TOWER_PREFIXES.items() if f"{prefix}embeddings.class_embedding" in keys)
    return next(forms, None)


# Comparing a checkpoint with the table


def match_entries(
    entries: Iterable[Entry], tensors: Mapping[str, LazyTensor], source: str, hint: str = ""
) -> dict[Entry, LazyTensor]:
    """Each entry with its tensor, by the original's names; see [`match_keys`]."""
    named = {entry.original: entry for entry in entries if entry.original is not None}
    match_keys({name: entry.shape for name, entry in named.items()}, tensors, source, hint)
    return {entry: tensors[name] for name, entry in named.items()}


def match_keys(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, LazyTensor], source: str, hint: str = ""
) -> None:
    """
    Compare what is there with what must be there.

    Raises:
        ValueError: a tensor is unknown, missing, of another shape, or not float32, float16 or bfloat16. All of them are
            listed (the first five of each kind), with `source`, what was read, and `hint`, the likely cause.
    """
    there = [(tensors[key], shape) for key, shape in shapes.items() if key in tensors]
    problems = {
        "missing": [f"'{key}' {list(shape)}" for key, shape in shapes.items() if key not in tensors],
        "not known": [f"'{key}' {list(tensor.shape)}" for key, tensor in tensors.items() if key not in shapes],
        "of another shape": [
            f"{tensor.origin} is {list(tensor.shape)}, its configuration asks for {list(shape)}"
            for tensor, shape in there
            if tensor.shape != shape
        ],
        "neither float32, float16 nor bfloat16 (quantised weights cannot be converted)": [
            f"{tensor.origin} is {str(tensor.dtype).removeprefix('torch.')}"
            for tensor, _ in there
            if tensor.dtype not in FLOAT_DTYPES
        ],
    }
    text = "; ".join(
        f"{len(items)} {kind}: {', '.join(items[:5])}{', …' if len(items) > 5 else ''}"
        for kind, items in problems.items()
        if items
    )
    if text:
        raise ValueError(f"{source} does not fit its configuration: {text}. {hint}".strip())
