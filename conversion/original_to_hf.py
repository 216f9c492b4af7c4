"""Original checkpoints → HF: a folder that stock transformers, vLLM and ours load."""

import logging
import re
import shutil
import zlib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from tokenizers import AddedToken
from transformers import GenerationConfig, PreTrainedTokenizerBase

from modeling_llava.configuration_llava import LlavaConfig
from modeling_llava.image_processing_llava import LlavaImageProcessor
from modeling_llava.processing_llava import LlavaProcessor
from modeling_llava.text.chat_templates import CHAT_TEMPLATES, choose_chat_template, insert_image_token
from modeling_llava.text.stops import add_generation_stop, missing_stop
from modeling_llava.text.tokenization import LegacyLlamaTokenizer, add_image_token, load_tokenizer

from .checks import CheckReport, check_stock_ready
from .folders import TOKENIZER_FILES, read_json
from .hf_checkpoints import ORIGINAL_FILES, RECORD
from .keymaps import FLOAT_DTYPES, projector_entries
from .originals import FEATURE_STRATEGIES, Original, read_original
from .tensors import LazyTensor, as_bytes, cast, extended, in_memory
from .vocabularies import writes_images
from .writing import DEFAULT_SHARD_SIZE, OutputFolder, plan_shards


logger = logging.getLogger(__name__)

VOCABULARY_MULTIPLE = 64
"""The embedding is padded to a multiple of this number of rows, as matrix products on GPUs prefer."""

IMAGE_MARKS = ("<im_start>", "<im_end>")
"""Around each image if `mm_use_im_start_end` is set."""

IMAGE_FIELDS = (
    "do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std",
)  # fmt: skip
"""Of a CLIP tower's `preprocessor_config.json`, what LLaVA's image processor takes over."""


@dataclass
class Conversion:
    """What a conversion did."""

    output: Path
    notes: list[str]  # what the user should know about it, one sentence each
    check: CheckReport | None = None  # what the check at its end found, if it was asked for


def convert_original_to_hf(
    source: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    dtype: str | torch.dtype | None = None,
    chat_template: str | None = None,
    check: bool = True,
    overwrite: bool = False,
) -> Conversion:
    """
    Convert an original LLaVA checkpoint, of any of its five forms, to a HF folder.

    Unchanged tensors are copied byte for byte. The vocabulary gains the image token and, if there is none, a pad token, and
    is padded to a multiple of 64 rows; a new row is the mean of the old ones. A linear projector W is saved as
    `linear_1 = W`, `linear_2 =` identity, with a linear activation, so that stock transformers computes the same.

    Args:
        source (`str` or `Path`):
            Folder or Hub name of a full checkpoint, a delta, a LoRA or a projector, or a `mm_projector.bin`.
        output (`str` or `Path`):
            Folder to write. It appears when it is complete; an interrupted conversion resumes.
        base (`str` or `Path`, *optional*): The language model to which a delta, LoRA or projector belongs.
        vision_tower (`str` or `Path`, *optional*): The CLIP tower; by default the one that the configuration names.
        max_shard_size (`int` or `str`, *optional*, defaults to `"2GB"`):
            Of one safetensors file, in bytes or with a unit.
        dtype (`str` or `torch.dtype`, *optional*):
            `"float32"`, `"float16"` or `"bfloat16"`. By default every tensor keeps its own.
        chat_template (`str`, *optional*):
            Name of one of the package's templates, `"own"` for the tokenizer's, Jinja text or a file of it. By default as
            [`find_chat_template`] finds it; `Conversion.notes` says which one it is.
        check (`bool`, *optional*, defaults to `True`):
            Compute logits of one image before and after, and everything else of [`check_stock_ready`].
        overwrite (`bool`, *optional*, defaults to `False`): Replace the folder `output`.

    Returns:
        [`Conversion`].

    Raises:
        ValueError: `source` cannot be converted or is damaged, its parts do not match, or the check failed.
        OSError: a file is not there, or the disk is too small.
    """
    dtype = as_dtype(dtype)
    original = read_original(source, base, vision_tower)
    processor, template = make_processor(original, chat_template)
    if check:
        _check_marks(original, processor.tokenizer)
    tensors = hf_tensors(original, len(processor.tokenizer), dtype)
    config = make_config(original, processor, tensors)
    shards = plan_shards(tensors, max_shard_size)
    report = None
    with OutputFolder(output, "original to hf", original.files, shards, overwrite=overwrite) as folder:
        folder.write_shards(shards)
        tower = {key: tensor for key, tensor in tensors.items() if key.startswith("vision_tower.")}
        config.original_checkpoint["vision_tower"]["crc32"] = checksum(tower)
        _write_small_files(original, processor, config, folder.partial)
        config_file = folder.write_config(config.to_json_string())
        if check:
            report = check_stock_ready(folder.partial, config_file=config_file, reference=original, dtype=dtype)
        folder.commit(report)
    notes = [template]
    if original.kind != "full":
        notes.append(f"A {original.kind} and its base were merged into one checkpoint.")
    if (layers := config.projector_num_layers) > 2:
        notes.append(f"The projector has {layers} layers: only this package loads, trains and runs the checkpoint.")
    if stop := missing_stop(make_generation_config(original, processor), processor):
        given = ", ".join(f"{name}={value!r}" for name, value in stop.items())
        notes.append(f"An answer ends with a text, not a token: stock's generate needs {given} and the tokenizer.")
    return Conversion(Path(output), notes, report)


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in FLOAT_DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; there are float32, float16 and bfloat16.")
    return found


# Tensors


def hf_tensors(original: Original, num_tokens: int, dtype: torch.dtype | None = None) -> dict[str, LazyTensor]:
    """The tensors of the HF checkpoint."""
    old_rows = original.text_config.vocab_size
    rows = max(old_rows, -(-num_tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE)
    tensors: dict[str, LazyTensor] = {}
    for entry, tensor in original.tensors.items():
        if rows > old_rows and entry.original in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = extended(tensor, rows)
        tensors[entry.hf] = cast(tensor, dtype)
    like = tensors["multi_modal_projector.linear_1.weight"].dtype
    for entry in projector_entries(original.projector):
        if entry.original is None:  # the second layer, which stock transformers requires
            value = torch.eye(*entry.shape) if len(entry.shape) == 2 else torch.zeros(entry.shape)
            tensors[entry.hf] = in_memory(value.to(like), f"the identity of {entry.hf}")
    return tensors


def checksum(tensors: Mapping[str, LazyTensor]) -> str:
    """CRC-32 over names and contents: tells whether a tower has changed since its conversion."""
    value = 0
    for key in sorted(tensors):
        value = zlib.crc32(key.encode(), value)
        for piece in tensors[key].pieces():
            value = zlib.crc32(as_bytes(piece), value)
    return f"{value:08x}"


# Configuration, processor, small files


def make_processor(original: Original, chat_template: str | None = None) -> tuple[LlavaProcessor, str]:
    """The processor (the tower's image processing, the tokenizer, the chat template), and which template it is."""
    config = original.config
    tokenizer = load_tokenizer(original.tokenizer_folder, padding_side="left")  # for generation in batches
    marks = IMAGE_MARKS if config.get("mm_use_im_start_end") else ("", "")
    wanted = ["<im_patch>"] * bool(config.get("mm_use_im_patch_token")) + [mark for mark in marks if mark]
    # the original adds those that are missing when it loads such a checkpoint
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in wanted])
    add_image_token(tokenizer)
    if isinstance(tokenizer, LegacyLlamaTokenizer) and not tokenizer.init_kwargs["legacy"]:
        # The original tokenizes the text after an image separately, which puts a space in front of it.
        marks = (marks[0], marks[1] + " ")
    wrap = marks if any(marks) else None
    if chat_template is None:
        template, which = find_chat_template(original, tokenizer, wrap)
    else:
        template, which = _own_or_other(chat_template, tokenizer, wrap), chat_template
    processor = LlavaProcessor(
        image_processor=_image_processor(original),
        tokenizer=tokenizer,
        patch_size=original.vision_config.patch_size,
        num_additional_image_tokens=1,  # CLIP's class token
        vision_feature_select_strategy=FEATURE_STRATEGIES[config.get("mm_vision_select_feature", "patch")],
        chat_template=template,
    )
    which = "the one given" if "{" in which else which
    return processor, f"The chat template is {which}. Another one: --chat-template NAME, own or FILE.jinja."


def _check_marks(original: Original, tokenizer: PreTrainedTokenizerBase) -> None:
    """The original adds missing tokens with random rows, to which nothing can be compared."""
    for mark in IMAGE_MARKS if original.config.get("mm_use_im_start_end") else ():
        if (number := tokenizer.get_vocab()[mark]) >= original.text_config.vocab_size:
            rows = f"token {number}, but its embedding has {original.text_config.vocab_size} rows, none for it"
            raise ValueError(
                f"{original.folder} puts {mark} around images (mm_use_im_start_end), {rows}. Is the tokenizer another model's? "
                "If images were trained without marks, set mm_use_im_start_end to false; --no-check converts it as it is."
            )


def find_chat_template(
    original: Original, tokenizer: PreTrainedTokenizerBase, image_wrap: tuple[str, str] | None
) -> tuple[str, str]:
    """
    The chat template of an original checkpoint, as far as its files tell, and its name with the reason.

    A template of the tokenizer (Llama-3, ChatML) is used. For `[INST]` (LLaMA-2, Mistral) it is the original's
    `llava_llama_2`, for Mistral without a system message. Otherwise the names tell the version, as in the original: v0
    (`v0`, `mmtag`; only with a linear projector) or LLaMA-2.
    """
    own = _own(tokenizer)
    is_mistral = original.text_config.model_type == "mistral"
    if own is not None and (writes_images(own) or "[INST]" not in own):
        try:
            return _own_or_other("own", tokenizer, image_wrap), "the tokenizer's own"
        except (ValueError, jinja2.TemplateError):
            logger.warning("The tokenizer's own chat template cannot take images: another one is chosen.")
    is_v0 = re.search(r"(?<![a-z0-9])v0(?![0-9.])", original.names) and original.projector.layers == 1
    if is_mistral:
        name, reason = "llama_2", "for Mistral, without a system message"
    elif own is not None and "[INST]" in own or re.search(r"llama[-_]?2\S*chat", original.names):
        name, reason = "llama_2", "for LLaMA-2 chat"
    elif "<|im_start|>" in tokenizer.get_vocab():
        name, reason = "chatml", "for the tokenizer's <|im_start|>"
    elif "mmtag" in original.names:
        name, reason = ("v0_mmtag" if is_v0 else "v1_mmtag"), "by the checkpoint's name"
    else:
        name, reason = ("vicuna_v0", "of LLaVA v0, by its name") if is_v0 else ("vicuna_v1", "of LLaVA v1 and v1.5")
    template = choose_chat_template(name, tokenizer, image_wrap)
    if is_mistral:
        template, count = re.subn(r'\{%- set system = "[^"]*" -%\}', '{%- set system = "" -%}', template, count=1)
        assert count == 1, "the llama_2 template sets its system message in one line"
    return template, f"{name} ({reason})"


def _own(tokenizer: PreTrainedTokenizerBase) -> str | None:
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def _own_or_other(name: str, tokenizer: PreTrainedTokenizerBase, image_wrap: tuple[str, str] | None) -> str:
    """The requested template; images are inserted into one without them."""
    if name == "own" and (own := _own(tokenizer)) is not None and writes_images(own):
        return own
    template = choose_chat_template(name, tokenizer, image_wrap)
    if name in ("own", *CHAT_TEMPLATES) or writes_images(template):
        return template
    return insert_image_token(template, image_wrap=image_wrap)


def _image_processor(original: Original) -> LlavaImageProcessor:
    fields = read_json(original.tower_folder / "preprocessor_config.json", "a vision tower")
    known = {name: fields[name] for name in IMAGE_FIELDS if name in fields}
    known["do_pad"] = original.config.get("image_aspect_ratio") == "pad"
    processor = LlavaImageProcessor(**known)
    crop, side = processor.crop_size, original.vision_config.image_size
    if processor.do_center_crop and (crop["height"], crop["width"]) != (side, side):
        sizes = f"of {side} pixels (config.json), but preprocessor_config.json says {crop['height']}x{crop['width']}"
        raise ValueError(f"The vision tower {original.tower_folder} takes images {sizes}.")
    return processor


def make_config(original: Original, processor: LlavaProcessor, tensors: Mapping[str, LazyTensor]) -> LlavaConfig:
    """The HF configuration. Its field `original_checkpoint` keeps the original's, for the way back."""
    text, vision, layers = deepcopy(original.text_config), original.vision_config, original.projector.layers
    embedding = tensors["language_model.model.embed_tokens.weight"]
    text.vocab_size, text.pad_token_id = embedding.num_rows, processor.tokenizer.pad_token_id
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=processor.num_image_tokens,
        projector_hidden_act="linear" if layers == 1 else "gelu",
        projector_num_layers=layers,
        # transformers 5.23 takes 0 for "no hidden states" and fails; counted from the end it is the same one
        vision_feature_layer=original.config.get("mm_vision_select_layer", -2) or -(vision.num_hidden_layers + 1),
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = embedding.dtype
    record = {
        "config": original.config,
        "vocab_size": original.text_config.vocab_size,
        "vision_tower": {"name": original.config.get("mm_vision_tower"), "inside": original.tower_inside},
    }
    setattr(config, RECORD, record)
    return config


def _write_small_files(original: Original, processor: LlavaProcessor, config: LlavaConfig, folder: Path) -> None:
    """Everything but the weights and `config.json`."""
    processor.save_pretrained(folder)
    make_generation_config(original, processor).save_pretrained(folder)
    keep = folder / ORIGINAL_FILES
    keep.mkdir(exist_ok=True)
    files = [original.tokenizer_folder / name for name in TOKENIZER_FILES]
    files += [original.folder / name for name in ("config.json", "generation_config.json")]
    for file in files:
        if file.is_file():
            shutil.copyfile(file, keep / file.name)


def make_generation_config(original: Original, processor: LlavaProcessor) -> GenerationConfig:
    """The source's generation configuration, with the tokens that begin, end and pad a text."""
    text, folders = original.text_config, (original.folder, original.tokenizer_folder)
    file = next((f / "generation_config.json" for f in folders if (f / "generation_config.json").is_file()), None)
    fields = read_json(file) if file else {"bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_id}
    fields.pop("transformers_version", None)
    fields["pad_token_id"] = processor.tokenizer.pad_token_id
    config = GenerationConfig(**fields)
    add_generation_stop(config, processor)
    return config
