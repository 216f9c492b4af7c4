"""
Checks of a converted checkpoint.

[`check_stock_ready`] compares a HF folder with stock transformers: keys, configuration, tokens per image, template, and the
logits of one image, which must equal the original's if it is given. Weights stay in their files ([`streamed`]).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import cpu_offload, init_empty_weights
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, CLIPVisionModel

from modeling_llava.configuration_llava import LlavaConfig, count_additional_image_tokens, count_image_tokens
from modeling_llava.io.checkpoints import require_llava
from modeling_llava.processing_llava import LlavaProcessor

from .folders import read_json
from .hf_checkpoints import HfCheckpoint, model_class_of
from .keymaps import TOWER_PREFIXES, canonical_hf_key, drop_derived, rename_all
from .originals import Original, read_original
from .tensors import LazyTensor, cast, find_weights, read_checkpoint


QUESTION = "What is shown here?"
TOLERANCE = 1e-4
"""Maximum difference of logits before and after, relative to the largest logit, in float32."""

NUM_COMPARED = 16
"""The logits of this many last tokens are compared."""


@dataclass(frozen=True)
class CheckItem:
    """`state` is `"ok"`, `"failed"`, `"skipped"` or, where only this package runs the model, `"ours only"`."""

    name: str
    state: str
    detail: str


@dataclass
class CheckReport:
    """What a check found."""

    folder: Path
    items: list[CheckItem] = field(default_factory=list)

    def add(self, name: str, state: str, detail: str) -> None:
        self.items.append(CheckItem(name, state, detail))

    @property
    def is_sound(self) -> bool:
        """Nothing failed: this package runs it."""
        return all(item.state != "failed" for item in self.items)

    @property
    def is_stock_ready(self) -> bool:
        """Stock transformers runs it without this package."""
        return all(item.state in ("ok", "skipped") for item in self.items)

    def failures(self) -> str:
        return "; ".join(f"{item.name}: {item.detail}" for item in self.items if item.state not in ("ok", "skipped"))

    def __str__(self) -> str:
        width = max(len(item.name) for item in self.items)
        return "\n".join(f"{item.state:>9}  {item.name:<{width}}  {item.detail}" for item in self.items)


def check_stock_ready(
    folder: str | Path,
    *,
    reference: str | Path | Original | None = None,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    logits: bool = True,
    config_file: Path | None = None,
    dtype: torch.dtype | None = None,
) -> CheckReport:
    """
    Check that stock transformers can run a HF LLaVA folder, and that it computes what the original did.

    Args:
        folder (`str` or `Path`): The HF folder.
        reference (`str`, `Path` or [`Original`], *optional*): The original from which it was made, for equal logits.
        base, vision_tower (`str` or `Path`, *optional*): Of the reference.
        logits (`bool`, *optional*, defaults to `True`): Run the model on one image: some minutes for 7B on a CPU.
        config_file (`Path`, *optional*): In place of `config.json`.
        dtype (`torch.dtype`, *optional*): To which the reference's weights were rounded.

    Raises:
        ValueError: the folder or the reference cannot be read.
        OSError: it is not there.
    """
    if require_llava(folder):
        raise ValueError(f"{folder} is an adapter. Make a full model of it first: llava merge {folder} OUT")
    if isinstance(reference, (str, Path)):
        reference = read_original(reference, base, vision_tower)
    folder = Path(folder)
    report = CheckReport(folder)
    config = LlavaConfig.from_dict(read_json(config_file or folder / "config.json"))
    weights = find_weights(folder)
    if weights is None:
        raise ValueError(f"{folder} holds no weights (model.safetensors or its index).")
    tensors = rename_all(drop_derived(read_checkpoint(weights)), canonical_hf_key)

    _check_projector(report, config)
    _check_keys(report, folder, config)
    inputs = _check_processor(report, config, LlavaProcessor.from_pretrained(folder))
    if inputs is None or not report.is_sound:
        return report
    if not logits:
        report.add("logits", "skipped", "not asked for")
        return report
    after = hf_logits(config, tensors, inputs)
    if not torch.isfinite(after).all():
        report.add("logits", "failed", "not finite for one image")
    elif reference is None:
        report.add("logits", "ok", "finite for one image (no original given to compare with)")
    else:
        _compare(report, original_logits(reference, inputs, config.image_token_id, dtype), after)
    return report


def _check_projector(report: CheckReport, config: LlavaConfig) -> None:
    layers = config.projector_num_layers
    if layers > 2:
        only = "this package loads, trains and runs the checkpoint, stock transformers, vLLM and llama.cpp do not"
        report.add("projector", "ours only", f"{layers} layers, stock's has two: {only}")
    else:
        what = "one layer W, saved as W and an identity" if layers == 1 else "two layers"
        report.add("projector", "ok", f"{what}, activation {config.projector_hidden_act!r}")


def _check_keys(report: CheckReport, folder: Path, config: LlavaConfig) -> None:
    """Load the folder onto the meta device, which matches all names and shapes and reads no weight."""
    model_class = model_class_of(config)
    stock_config = model_class.config_class.from_dict(config.to_dict())
    options = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    _, info = model_class.from_pretrained(folder, config=stock_config, **options)
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        text = "; ".join(f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in wrong.items())
        report.add("keys", "failed", text)
    else:
        who = "this package" if config.projector_num_layers > 2 else "stock transformers"
        report.add("keys", "ok", f"{who} finds every weight, none missing, none left over")


def _check_processor(report: CheckReport, config: LlavaConfig, processor):
    """Tokens per image, the template, and the inputs for the run; `None` where one of them failed."""
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    additional, side = count_additional_image_tokens(vision), vision.image_size
    expected = count_image_tokens(side, side, vision.patch_size, additional, strategy)
    settings = {
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": additional,
        "vision_feature_select_strategy": strategy,
    }
    wrong = {name: right for name, right in settings.items() if getattr(processor, name, None) != right}
    if wrong:
        found = ", ".join(f"{name} is {getattr(processor, name, None)!r}" for name in wrong)
        fix = ", ".join(f'"{name}": {json.dumps(right)}' for name, right in wrong.items())
        why = "with which stock transformers fails at the first image"
        detail = f"{found} in the processor's files, {why}. By its tower, write into processor_config.json: {fix}"
        report.add("image tokens", "failed", detail)
        return None
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
    except Exception as error:  # a template is a program
        text = f"{type(error).__name__}: {error}"
    image_token = processor.image_token
    if text.count(image_token) != 1 or QUESTION not in text:
        report.add("template", "failed", f"one image and a question became {text!r}")
        return None
    report.add("template", "ok", f"{len(text)} characters, one {image_token}")

    inputs = processor(images=probe_image(), text=text, return_tensors="pt")
    count = int((inputs["input_ids"] == config.image_token_id).sum())
    size = tuple(inputs["pixel_values"].shape[-2:])
    if not count == expected == config.image_seq_length or size != (side, side):
        found = f"the processor writes {count} for an image of {size[0]}x{size[1]} pixels"
        said = f"the configuration says {config.image_seq_length} (image_seq_length)"
        report.add("image tokens", "failed", f"{found}, {said}, the tower gives {expected} for {side}x{side}")
        return None
    report.add("image tokens", "ok", f"{expected} per image, by processor, configuration and tower")
    return inputs


def probe_image(width: int = 96, height: int = 64) -> Image.Image:
    """An image with content in every channel and region: two gradients and a pattern."""
    x, y = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    pixels = torch.stack([x * 255 // width, y * 255 // height, (x * 7 + y * 13) % 256], dim=-1)
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def _compare(report: CheckReport, before: torch.Tensor, after: torch.Tensor) -> None:
    """Logits `[1, tokens, vocabulary]`; the longer vocabulary's added tokens must not win."""
    rows = min(before.shape[-1], after.shape[-1])
    largest = (after[..., :rows] - before[..., :rows]).abs().max().item()
    scale = before[..., :rows].abs().max().item()
    added = after[..., rows:]
    wins = added.numel() > 0 and bool((added.amax(-1) > before.amax(-1) + TOLERANCE).any())
    state = "failed" if wins or largest > TOLERANCE * max(1.0, scale) else "ok"
    detail = f"before and after differ by at most {largest:.1e} (largest {scale:.3g}) for one image"
    report.add("logits", state, detail + (", and a token that was added has the largest logit" if wins else ""))


def check_original(
    folder: Path, hf: HfCheckpoint, config: dict, *, has_tower: bool, dtype: torch.dtype | None = None
) -> CheckReport:
    """Check that an original folder which was made from a HF one is read as an original, with equal logits."""
    report = CheckReport(folder)
    tower = None if has_tower else (hf.config.vision_config, hf.part("vision_tower"))
    original = read_original(folder, config=config, tower=tower)
    report.add("keys", "ok", f"{len(original.tensors)} tensors, as the original names them")
    inputs = _check_processor(report, hf.config, hf.processor)
    if inputs is not None:
        before = hf_logits(hf.config, {key: cast(tensor, dtype) for key, tensor in hf.tensors.items()}, inputs)
        after = original_logits(original, inputs, hf.config.image_token_id, dtype)
        _compare(report, before, after)
    return report


# Logits, computed without loading the weights


class _Weights(Mapping):
    """The tensors of a model by its names in memory, each read in float32 when it is asked for."""

    def __init__(self, tensors: Mapping[str, LazyTensor], rename: Callable[[str], str], tied: Mapping[str, str]):
        self.tensors, self.rename, self.tied = tensors, rename, tied

    def __getitem__(self, name: str) -> torch.Tensor:
        key = self.rename(name)
        return self.tensors[key if key in self.tensors else self.rename(self.tied[name])].tensor().float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def streamed(
    build: Callable[[], nn.Module], tensors: Mapping[str, LazyTensor], rename: Callable[[str], str] = str
) -> nn.Module:
    """A model in evaluation mode whose weights are read, in float32, while their module runs: models larger than the memory."""
    with init_empty_weights(include_buffers=False):
        model = build().float().eval()  # a configuration may ask for half precision
    weights = _Weights(tensors, rename, getattr(model, "all_tied_weights_keys", None) or {})
    # torch's own attention, of SigLIP's head, uses the weights of its linear layers without calling them
    return cpu_offload(model, torch.device("cpu"), state_dict=weights, preload_module_classes=["MultiheadAttention"])


@torch.no_grad()
def hf_logits(config: LlavaConfig, tensors: dict[str, LazyTensor], inputs) -> torch.Tensor:
    """Logits of the last tokens, `[1, tokens, vocabulary]`, by the stock class (ours where stock has no form)."""
    model_class = model_class_of(config)
    config = model_class.config_class.from_dict(config.to_dict())
    model = streamed(lambda: model_class(config), tensors, canonical_hf_key)
    pixel_values = inputs["pixel_values"].float()
    return model(input_ids=inputs["input_ids"], pixel_values=pixel_values, logits_to_keep=NUM_COMPARED).logits


@torch.no_grad()
def original_logits(original: Original, inputs, image_token_id: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """
    Logits of the last tokens as the original computes them: tower, projector, features put between the text's
    embeddings, language model. It uses the original's configuration, names and weights only, rounded to `dtype`.

    `inputs` are `input_ids [1, S]` with `image_token_id`, which the original does not have, at the image's tokens, and
    `pixel_values [1, 3, H, W]`.
    """
    read = {entry.original: cast(tensor, dtype) for entry, tensor in original.tensors.items()}

    def original_name(name: str) -> str:
        return TOWER_PREFIXES["inside"] + name.removeprefix("vision_model.")

    tower = streamed(lambda: CLIPVisionModel(original.vision_config), read, original_name)
    states = tower(inputs["pixel_values"].float(), output_hidden_states=True).hidden_states
    features = states[original.config.get("mm_vision_select_layer", -2)]
    if original.config.get("mm_vision_select_feature", "patch") == "patch":
        features = features[:, 1:]
    layers = [key for key in read if key.startswith("model.mm_projector.") and key.endswith("weight")]
    for i, key in enumerate(layers):
        features = F.gelu(features) if i else features
        bias = read[key.removesuffix("weight") + "bias"].tensor().float()
        features = F.linear(features, read[key].tensor().float(), bias)

    text_config = deepcopy(original.text_config)
    text_config.pad_token_id = None
    language_model = streamed(lambda: AutoModelForCausalLM.from_config(text_config), read)
    ids = inputs["input_ids"][0]
    image = (ids == image_token_id).nonzero().flatten()
    embed = language_model.get_input_embeddings()
    first, last = int(image[0]), int(image[-1]) + 1
    embeddings = torch.cat([embed(ids[:first]), features[0], embed(ids[last:])])
    return language_model(inputs_embeds=embeddings[None], logits_to_keep=NUM_COMPARED).logits
