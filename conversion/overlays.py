"""
Deltas, LoRA weights and projectors of the original, added to their base: tables of lazy tensors under the original's names.

Sums are computed in float32 while they are written, and rounded once to the base's dtype.
"""

import math
import re
from collections.abc import Mapping

import torch

from .keymaps import FLOAT_DTYPES, drop_derived, rename_all
from .tensors import LazyTensor, below, extended


ADAPTER_PREFIX = re.compile(r"(?:base_model\.model\.|model\.(?=model\.))(.+)")
"""PEFT's, and what some of the original's versions left of it."""

LORA_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
CHANGES_BASE = re.compile("pissa|olora|corda|loftq|lora_ga")
"""Values of `init_lora_weights` with which PEFT takes a part out of the base's weights before it adds the adapter."""
BASE_LAYER = re.compile(r"(.+)\.base_layer\.(weight|bias)")
"""PEFT saves the embedding or head below an adapter under this name, where it saves it."""

BARE_PROJECTOR = re.compile(r"mm_projector\.(?:\d+\.)?(?:weight|bias)")
LONGER_IN_DELTA = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors to which the original added rows (its image tokens); a delta holds the added rows themselves."""

WRONG_BASE = "Is --base the language model that it was made from?"


def without_adapter_prefix(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Names as in the model: `base_model.model.` (PEFT's) removed, `mm_projector.0.…` given its place in the model."""

    def rename(key: str) -> str:
        if match := ADAPTER_PREFIX.fullmatch(key):
            key = match[1]
        if match := BASE_LAYER.fullmatch(key):
            key = f"{match[1]}.{match[2]}"
        return f"model.{key}" if BARE_PROJECTOR.fullmatch(key) else key

    return rename_all(tensors, rename)


def add_delta(delta: Mapping[str, LazyTensor], base: Mapping[str, LazyTensor], source: str) -> dict[str, LazyTensor]:
    """
    The model of a delta: the base's tensors plus the delta's, the projector from the delta alone.

    Raises:
        ValueError: the base lacks a tensor or has another shape; or `delta` is a whole model.
    """
    base, summed = drop_derived(base), {}
    for key, tensor in delta.items():
        other = base.pop(key, None)
        if other is None and not key.startswith("model.mm_projector."):
            raise ValueError(f"The base has no '{key}', to which {tensor.origin} is to be added. {WRONG_BASE}")
        summed[key] = tensor if other is None else _sum(key, tensor, other)
    if base:
        lacks = f"it lacks {len(base)} of its tensors, such as '{next(iter(base))}'"
        raise ValueError(f"{source} is not a delta of this base: {lacks}. {WRONG_BASE}")
    norm = "model.norm.weight"
    if norm in delta:  # a whole model plus its base would be doubled
        own, total = delta[norm].tensor().float(), summed[norm].tensor().float()
        if (2 * own - total).abs().mean() < 0.25 * (total - own).abs().mean():
            raise ValueError(f"{source} is a whole model: its '{norm}' is nearly the base's. Leave out --base.")
    return summed


def _sum(key: str, delta: LazyTensor, base: LazyTensor) -> LazyTensor:
    is_longer = key in LONGER_IN_DELTA and delta.num_rows >= base.num_rows and delta.shape[1:] == base.shape[1:]
    if delta.shape != base.shape and not is_longer:
        shapes = f"{delta.origin} is {list(delta.shape)}, the base's {base.origin} is {list(base.shape)}"
        raise ValueError(f"The delta's {shapes}. {WRONG_BASE}")

    def rows(start: int, stop: int) -> torch.Tensor:
        total = delta.rows(start, stop).to(torch.float32, copy=True)
        shared = base.rows(min(start, base.num_rows), min(stop, base.num_rows))
        total[: shared.shape[0]] += shared.float()
        return total.to(delta.dtype)

    return LazyTensor(delta.dtype, delta.shape, rows, f"{delta.origin} plus {base.origin}")


def fold_lora(
    adapter: Mapping[str, LazyTensor], config: Mapping, base: Mapping[str, LazyTensor], source: str
) -> dict[str, LazyTensor]:
    """
    The base's tensors with a LoRA adapter folded in: `W + scale · B A`, `scale = alpha / r` (`/ √r` for rsLoRA).

    `adapter` holds PEFT's tensors: `….lora_A.weight` `[r, in]`, `….lora_B.weight` `[out, r]`, and whole tensors (biases,
    modules to save), which replace the base's. `config` is its `adapter_config.json`, `source` its name for errors.

    Raises:
        ValueError: not a LoRA adapter, or one of a kind that is not a sum with the base (DoRA, PiSSA); a target that the
            base lacks; shapes that do not fit.
    """
    kind = "DoRA" if config.get("use_dora") else config.get("peft_type", "LORA")
    if start := CHANGES_BASE.match(str(config.get("init_lora_weights")).lower()):
        kind = start[0]
    if kind != "LORA":
        raise ValueError(f"{source} is an adapter of kind {kind}; only LoRA can be folded in. Merge it with peft.")
    pairs: dict[str, dict[str, LazyTensor]] = {}
    folded, whole = dict(base), {}
    for key, tensor in adapter.items():
        if match := LORA_KEY.fullmatch(key):
            pairs.setdefault(match["module"], {})[match["side"]] = tensor
        else:
            whole[key] = tensor
    if not pairs:
        raise ValueError(f"{source} holds no LoRA tensors (….lora_A.weight).")
    for key, tensor in without_adapter_prefix(whole).items():
        if key not in folded:
            what = f"{tensor.origin} is neither a LoRA tensor of a linear layer nor one of the base's"
            raise ValueError(f"{what}. {WRONG_BASE} Merge an adapter of another kind with peft.")
        folded[key] = tensor
    for module, sides in pairs.items():
        key = f"{module}.weight"
        if sides.keys() != {"A", "B"}:
            raise ValueError(f"{source} has lora_{'/'.join(sides)} of '{module}' but not the other of the two.")
        if key not in folded:
            raise ValueError(f"The base has no '{key}', for which {sides['A'].origin} is an adapter. {WRONG_BASE}")
        folded[key] = _lora_sum(folded[key], sides["A"], sides["B"], _scale(config, module, sides["A"]))
    return folded


def _scale(config: Mapping, module: str, down: LazyTensor) -> float:
    """LoRA's factor of one module. `alpha_pattern` (PEFT) gives single modules another alpha than `lora_alpha`."""
    patterns = (config.get("alpha_pattern") or {}).items()
    own = (value for pattern, value in patterns if re.fullmatch(rf"(.*\.)?({pattern})", module))
    alpha = next(own, config.get("lora_alpha"))
    if alpha is None:
        raise ValueError("adapter_config.json has no lora_alpha, without which the adapter cannot be folded in.")
    return alpha / (math.sqrt(down.shape[0]) if config.get("use_rslora") else down.shape[0])


def _lora_sum(weight: LazyTensor, down: LazyTensor, up: LazyTensor, scale: float) -> LazyTensor:
    shape = up.shape[0], down.shape[1]
    if weight.dtype not in FLOAT_DTYPES or up.shape[1] != down.shape[0] or weight.shape != shape:
        raise ValueError(
            f"The adapter does not fit the base: {up.origin} {list(up.shape)} times {down.origin} {list(down.shape)} is "
            f"{list(shape)}, but {weight.origin} is {list(weight.shape)}, {weight.dtype}. {WRONG_BASE}"
        )

    def rows(start: int, stop: int) -> torch.Tensor:
        change = up.rows(start, stop).float() @ down.tensor().float()
        return (weight.rows(start, stop).float() + scale * change).to(weight.dtype)

    return LazyTensor(weight.dtype, weight.shape, rows, f"{weight.origin} with {down.origin}")


def put_over(base: Mapping[str, LazyTensor], own: Mapping[str, LazyTensor], *, gap: int = 0) -> dict[str, LazyTensor]:
    """
    The base's tensors, replaced by those that a training saved whole (projector, embedding rows of image tokens).

    An embedding that holds only the rows of added tokens (as the original accepts it) goes below the base's, after
    `gap` rows of tokens that were added but not trained.

    Raises:
        ValueError: such rows have another width than the base's.
    """
    result = dict(base)
    for key, tensor in own.items():
        known = base.get(key)
        if known is not None and key in LONGER_IN_DELTA and tensor.num_rows < known.num_rows:
            if known.shape[1:] != tensor.shape[1:]:
                rows = f"rows of {tensor.shape[1:]} values, {known.origin} of {known.shape[1:]}"
                raise ValueError(f"{tensor.origin} has {rows}. {WRONG_BASE}")
            tensor = below(extended(known, known.num_rows + gap), tensor)
        result[key] = tensor
    return result
