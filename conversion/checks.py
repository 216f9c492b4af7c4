"""
Checks of a converted checkpoint.

[`check_stock_ready`] compares a HF folder with stock transformers: keys, configuration, tokens per image, template, and the
logits of one image, which must equal the original's if it is given. Weights stay in their files (see `streamed.py`).
"""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPVisionModel, LlamaForCausalLM, MistralForCausalLM
from transformers.models.llava.configuration_llava import LlavaConfig as StockConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration as StockLlava
from transformers.utils import logging as hf_logging

from modeling_llava.configuration_llava import LlavaConfig, count_additional_image_tokens, count_image_tokens
from modeling_llava.io.checkpoints import require_llava
from modeling_llava.modeling_llava import LlavaForConditionalGeneration
from modeling_llava.processing_llava import LlavaProcessor

from .folders import read_json
from .hf_checkpoints import HfCheckpoint
from .keymaps import canonical_hf_key, drop_derived, rename_all
from .originals import Original, read_original
from .streamed import streamed
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
) -> CheckReport:
    """
    Check that stock transformers can run a HF LLaVA folder, and that it computes what the original did.

    Args:
        folder (`str` or `Path`): The HF folder.
        reference (`str`, `Path` or [`Original`], *optional*):
            The original from which it was made; its logits must be equal.
        base (`str` or `Path`, *optional*), vision_tower (`str` or `Path`, *optional*):
            Of the reference.
        logits (`bool`, *optional*, defaults to `True`):
            Run the model on one image: some minutes for 7B on a CPU.

    Returns:
        [`CheckReport`], with `is_stock_ready`.

    Raises:
        ValueError: the folder or the reference cannot be read.
        OSError: it is not there.
    """
    if require_llava(folder):
        raise ValueError(f"{folder} is an adapter. Make a full model of it first: llava merge {folder} OUT")
    if isinstance(reference, (str, Path)):
        reference = read_original(reference, base, vision_tower)
    return check_folder(Path(folder), reference=reference, logits=logits)


def check_folder(
    folder: Path,
    *,
    config_file: Path | None = None,
    reference: Original | None = None,
    dtype: torch.dtype | None = None,
    logits: bool = True,
) -> CheckReport:
    """[`check_stock_ready`], where `config.json` has another name yet, or the weights were rounded to `dtype`."""
    report = CheckReport(folder)
    fields = read_json(config_file or folder / "config.json", "a checkpoint")
    config = LlavaConfig.from_dict(fields)
    weights = find_weights(folder)
    if weights is None:
        raise ValueError(f"{folder} holds no weights (model.safetensors or its index).")
    tensors = rename_all(drop_derived(read_checkpoint(weights)), canonical_hf_key)

    is_stock = _check_projector(report, config)
    _check_keys(report, folder, fields, is_stock)
    processor = LlavaProcessor.from_pretrained(folder)
    inputs = _check_processor(report, config, processor)
    if inputs is None or not report.is_sound:
        return report
    if not logits:
        report.add("logits", "skipped", "not asked for")
        return report
    _check_logits(report, fields, tensors, inputs, is_stock, reference, dtype)
    return report


def _check_projector(report: CheckReport, config: LlavaConfig) -> bool:
    layers = config.projector_num_layers
    if layers > 2:
        report.add(
            "projector",
            "ours only",
            f"{layers} layers; stock's has two. This package loads, trains and runs the checkpoint; stock transformers, "
            "vLLM and llama.cpp do not.",
        )
        return False
    detail = "one layer W, saved as W and an identity" if layers == 1 else "two layers"
    report.add("projector", "ok", f"{detail}, activation {config.projector_hidden_act!r}")
    return True


def _check_keys(report: CheckReport, folder: Path, fields: dict, is_stock: bool) -> None:
    """Load the folder onto the meta device, which matches all names and shapes and reads no weight."""
    model_class = StockLlava if is_stock else LlavaForConditionalGeneration
    try:
        config = (StockConfig if is_stock else LlavaConfig).from_dict(fields)
        with _without_progress_bars():
            _, info = model_class.from_pretrained(
                folder, config=config, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (ValueError, TypeError, RuntimeError, OSError, KeyError) as error:
        report.add("keys", "failed", f"{model_class.__module__} does not load it: {str(error).splitlines()[0]}")
        return
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        text = "; ".join(f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in wrong.items())
        report.add("keys", "failed", text)
    else:
        who = "stock transformers" if is_stock else "this package"
        report.add("keys", "ok", f"{who} finds every weight, none missing, none left over")


@contextlib.contextmanager
def _without_progress_bars():
    """transformers shows a bar even for weights that it does not read."""
    was_on = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            hf_logging.enable_progress_bar()


def _check_processor(report: CheckReport, config: LlavaConfig, processor):
    """Tokens per image, the template, and the inputs for the run."""
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    additional = count_additional_image_tokens(vision)
    expected = count_image_tokens(vision.image_size, vision.image_size, vision.patch_size, additional, strategy)
    settings = {
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": additional,
        "vision_feature_select_strategy": strategy,
    }
    for name, right in settings.items():
        if (found := getattr(processor, name, None)) != right:
            report.add(
                "image tokens", "failed", f"{name} is {found!r} in the processor's files; the tower needs {right!r}"
            )
    if not report.is_sound:
        return None
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
    except Exception as error:  # a template is a program
        report.add("template", "failed", f"{type(error).__name__}: {error}")
        return None
    image_token = processor.image_token
    if text.count(image_token) != 1 or QUESTION not in text:
        report.add("template", "failed", f"one image and a question became {text!r}")
        return None
    report.add("template", "ok", f"{len(text)} characters, one {image_token}")

    inputs = processor(images=probe_image(), text=text, return_tensors="pt")
    count = int((inputs["input_ids"] == config.image_token_id).sum())
    size, side = tuple(inputs["pixel_values"].shape[-2:]), vision.image_size
    if count != expected or config.image_seq_length != expected or size != (side, side):
        report.add(
            "image tokens",
            "failed",
            f"the processor writes {count} for an image of {size[0]}x{size[1]} pixels, the configuration says "
            f"{config.image_seq_length} (image_seq_length), the tower gives {expected} for {side}x{side}",
        )
        return None
    if int(inputs["input_ids"].max()) >= config.text_config.vocab_size:
        report.add("image tokens", "failed", f"token id {int(inputs['input_ids'].max())} has no row in the vocabulary")
        return None
    report.add("image tokens", "ok", f"{expected} per image, by processor, configuration and tower")
    return inputs


def probe_image(width: int = 96, height: int = 64) -> Image.Image:
    """An image with content in every channel and region: two gradients and a pattern."""
    x, y = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    pixels = torch.stack([x * 255 // width, y * 255 // height, (x * 7 + y * 13) % 256], dim=-1)
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def _check_logits(report, fields, tensors, inputs, is_stock, reference, dtype) -> None:
    after = hf_logits(fields, tensors, inputs, is_stock)
    if not torch.isfinite(after).all():
        report.add("logits", "failed", "not finite for one image")
        return
    if reference is None:
        report.add("logits", "ok", "finite for one image (no original given to compare with)")
        return
    before = original_logits(reference, inputs, fields["image_token_index"], dtype)
    known, added = after[..., : before.shape[-1]], after[..., before.shape[-1] :]
    if added.numel() and (added.amax(-1) > before.amax(-1) + TOLERANCE).any():
        report.add("logits", "failed", "a token that was added has the largest logit")
        return
    _compare(report, before, known)


def _compare(report: CheckReport, before: torch.Tensor, after: torch.Tensor) -> None:
    difference, scale = (after - before).abs().max().item(), before.abs().max().item()
    state = "ok" if difference <= TOLERANCE * max(1.0, scale) else "failed"
    report.add(
        "logits", state, f"before and after differ by at most {difference:.1e} (largest {scale:.3g}) for one image"
    )


@torch.no_grad()
def hf_logits(fields: dict, tensors: dict[str, LazyTensor], inputs, is_stock: bool = True) -> torch.Tensor:
    """
    Logits of the last positions, `[1, positions, vocabulary]`, by the stock class (ours where stock has no form).
    """
    model_class, config_class = (StockLlava, StockConfig) if is_stock else (LlavaForConditionalGeneration, LlavaConfig)
    config = config_class.from_dict(fields)
    config._attn_implementation = "sdpa"
    model = streamed(lambda: model_class(config), tensors, canonical_hf_key)
    output = model(
        input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"].float(), logits_to_keep=NUM_COMPARED
    )
    return output.logits


def check_original(
    folder: Path, hf: HfCheckpoint, config: dict, *, has_tower: bool, dtype: torch.dtype | None = None
) -> CheckReport:
    """Check that an original folder which was made from a HF one is read as an original, with equal logits."""
    report = CheckReport(folder)
    tower = None if has_tower else (hf.config.vision_config, hf.tensors)
    original = read_original(folder, config=config, tower=tower)
    report.add("keys", "ok", f"{len(original.tensors)} tensors, as the original names them")
    inputs = _check_processor(report, hf.config, hf.processor)
    if inputs is not None:
        tensors = {entry.hf: cast(tensor, dtype) for entry, tensor in hf.tensors.items()}
        before = hf_logits(hf.config.to_dict(), tensors, inputs, hf.config.projector_num_layers <= 2)
        after = original_logits(original, inputs, hf.config.image_token_id, dtype)
        _compare(report, before[..., : after.shape[-1]], after)
    return report


@torch.no_grad()
def original_logits(original: Original, inputs, image_token_id: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """
    Logits of the last positions as the original computes them: tower, projector, features put between the text's
    embeddings, language model. It uses the original's configuration, names and weights only.

    Args:
        original ([`Original`]): The whole original model.
        inputs:
            `input_ids [1, S]` with `image_token_id` at the image's positions, `pixel_values [1, 3, H, W]`.
        image_token_id (`int`): Marks the image's positions; the original has no such token.
        dtype (`torch.dtype`, *optional*): To which the weights are rounded first.
    """
    read = {entry.original: cast(tensor, dtype) for entry, tensor in original.tensors.items()}
    prefix = "model.vision_tower.vision_tower.vision_model."
    tower = streamed(
        lambda: CLIPVisionModel(original.vision_config),
        {key[len(prefix) :]: tensor for key, tensor in read.items() if key.startswith(prefix)},
    )
    states = tower(inputs["pixel_values"].float(), output_hidden_states=True).hidden_states
    features = states[original.config.get("mm_vision_select_layer", -2)]
    if original.config.get("mm_vision_select_feature", "patch") == "patch":
        features = features[:, 1:]
    layers = [key for key in read if key.startswith("model.mm_projector.") and key.endswith("weight")]
    for i, key in enumerate(layers):
        features = torch.nn.functional.gelu(features) if i else features
        bias = read[key[: -len("weight")] + "bias"].tensor().float()
        features = torch.nn.functional.linear(features, read[key].tensor().float(), bias)

    model_class = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM}[original.text_config.model_type]
    text_config = type(original.text_config).from_dict(original.text_config.to_dict())
    text_config.vocab_size = original.sizes.vocabulary
    text_config.pad_token_id = None
    text_config._attn_implementation = "sdpa"
    language_model = streamed(
        lambda: model_class(text_config), {key: tensor for key, tensor in read.items() if "mm_projector" not in key}
    )
    ids = inputs["input_ids"][0]
    places = (ids == image_token_id).nonzero().flatten()
    embed = language_model.get_input_embeddings()
    first, last = int(places[0]), int(places[-1]) + 1
    embeddings = torch.cat([embed(ids[:first]), features[0], embed(ids[last:])])
    return language_model(inputs_embeds=embeddings[None], logits_to_keep=NUM_COMPARED).logits
