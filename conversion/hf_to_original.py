"""HF checkpoints → the original's form: a folder that the original's `load_pretrained_model` reads."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPVisionConfig, PreTrainedConfig, PreTrainedTokenizerBase

from modeling_llava.io.files import HUB_NAME, write_atomic

from .checks import check_original
from .folders import TOKENIZER_FILES, read_json
from .hf_checkpoints import ORIGINAL_FILES, HfCheckpoint, read_hf
from .keymaps import Projector, key_table, vision_entries
from .original_to_hf import IMAGE_FIELDS, IMAGE_MARKS, Conversion, as_dtype, checksum
from .originals import FEATURE_STRATEGIES, read_text_config
from .tensors import LazyTensor, cast, first_rows, in_memory
from .vocabularies import CHAT_TEMPLATE, has_sentencepiece, sentencepiece_model
from .writing import DEFAULT_SHARD_SIZE, OutputFolder, plan_shards, write_json


ARCHITECTURES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
}
"""Language model → the original's `model_type` and class."""

DEFAULTS = {
    "mm_projector_type": "linear",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_use_im_start_end": False,
    "image_aspect_ratio": "square",
}
"""What a field of the original's configuration that is not there stands for."""

TOWER_FOLDER = "vision_tower"
"""Sub-folder for a tower that has no name of its own."""


def convert_hf_to_original(
    source: str | Path,
    output: str | Path,
    *,
    vision_tower: str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    dtype: str | torch.dtype | None = None,
    check: bool = True,
    overwrite: bool = False,
) -> Conversion:
    """
    Convert a HF LLaVA folder to the original's form.

    A checkpoint that came from the original is restored bit for bit.

    The original loads its tower from `mm_vision_tower`. An unchanged tower is only named; a trained one is written into the
    checkpoint, as the original does (`unfreeze_mm_vision_tower`); one without a name gets a folder in `output`.

    Args:
        source (`str` or `Path`): HF folder or Hub name.
        output (`str` or `Path`): Folder to write.
        vision_tower (`str`, *optional*):
            Name of the tower for `mm_vision_tower`, of which the checkpoint's tower is an unchanged copy.
        max_shard_size, dtype, check, overwrite: As in [`convert_original_to_hf`].

    Raises:
        ValueError: the original does not support it (several feature layers, another activation), it is damaged, or the
            check failed.
        OSError: a file is not there, or the disk is too small.
    """
    dtype = as_dtype(dtype)
    hf = read_hf(source)
    projector = original_projector(hf)
    tokenizer = AutoTokenizer.from_pretrained(hf.folder)
    rows, keeps_files = original_vocabulary(hf, tokenizer)
    tower = _plan_tower(hf, vision_tower)
    tensors = original_tensors(hf, projector, rows, tower["inside"], dtype)
    config = original_config(hf, projector, rows, tower)
    shards = plan_shards(tensors, max_shard_size)
    entries = vision_entries(hf.config.vision_config, "clip") if tower["folder"] else []
    own_tower = {entry.original: cast(hf.tensors[entry.hf], dtype) for entry in entries}

    report = None
    plan = {**shards, "tower": own_tower}
    with OutputFolder(output, "hf to original", hf.files, plan, overwrite=overwrite) as folder:
        folder.write_shards(shards)
        if own_tower:
            folder.write_shards({"model.safetensors": own_tower}, tower["folder"])
            _write_tower_files(hf, folder.partial / tower["folder"])
        _write_tokenizer(hf, tokenizer, rows, keeps_files, folder.partial)
        kept = hf.folder / ORIGINAL_FILES / "config.json"
        is_same = kept.is_file() and read_json(kept) == config
        folder.write_config(kept.read_text("utf-8") if is_same else json.dumps(config, indent=2) + "\n")
        if check:
            report = check_original(folder.partial, hf, config, has_tower=bool(tower["folder"]), dtype=dtype)
        folder.commit(report)
    return Conversion(Path(output), _notes(hf, tower, output), report)


def original_projector(hf: HfCheckpoint) -> Projector:
    """The original's projector. ValueError for a checkpoint that the original's form cannot hold."""
    config, record = hf.config, hf.record.get("config") or {}
    if config.text_config.model_type not in ARCHITECTURES or not isinstance(config.vision_config, CLIPVisionConfig):
        kinds = f"{config.vision_config.model_type} with {config.text_config.model_type}"
        raise ValueError(f"{hf.folder} is {kinds}; the original's form has CLIP with LLaMA or Mistral.")
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(f"{hf.folder} has features of several layers ({config.vision_feature_layer}), not of one.")
    layers, act = config.projector_num_layers, config.projector_hidden_act
    if layers > 1 and act != "gelu":
        raise ValueError(f"{hf.folder} has a projector of {layers} layers with activation {act!r}, not 'gelu'.")
    return Projector(
        layers,
        config.vision_config.hidden_size,
        config.text_config.hidden_size,
        config.multimodal_projector_bias,
        is_numbered=layers > 1 or record.get("mm_projector_type") == "mlp1x_gelu",
    )


# Tensors


def original_vocabulary(hf: HfCheckpoint, tokenizer: PreTrainedTokenizerBase) -> tuple[int, bool]:
    """
    Rows of the original's vocabulary, and whether the tokenizer files that it came with still fit.

    Left out are the image token, a pad token right after it and the padding rows, unless later tokens follow them.
    """
    ids, image = tokenizer.get_vocab(), hf.config.image_token_id
    ours = {image, image + 1} if ids.get("<pad>") == tokenizer.pad_token_id == image + 1 else {image}
    needed = max((i for i in ids.values() if i not in ours), default=-1) + 1
    recorded = hf.record.get("vocab_size")
    has_files = any((hf.folder / ORIGINAL_FILES / name).is_file() for name in TOKENIZER_FILES)
    if recorded is not None and needed <= recorded <= hf.config.text_config.vocab_size and has_files:
        return recorded, True
    if not has_sentencepiece(hf.folder):  # tokenizer.json is copied, image token and all
        needed = max(ids.values()) + 1
    return min(needed, hf.config.text_config.vocab_size), False


def original_tensors(
    hf: HfCheckpoint, projector: Projector, rows: int, tower_inside: bool, dtype: torch.dtype | None = None
) -> dict[str, LazyTensor]:
    """The original's name → tensor; a projector without bias gets one of zeros, since the original's has one."""
    tensors: dict[str, LazyTensor] = {}
    for entry in key_table(hf.config.text_config, hf.config.vision_config, projector):
        if entry.original is None or (entry.part == "vision" and not tower_inside):
            continue
        tensor = hf.tensors[entry.hf]
        if entry.original in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = first_rows(tensor, rows)
        tensors[entry.original] = cast(tensor, dtype)
        if entry.part == "projector" and not projector.bias:
            name = f"{entry.original.removesuffix('weight')}bias"
            tensors[name] = in_memory(torch.zeros(entry.shape[0], dtype=dtype or tensor.dtype), f"zeros for {name}")
    return tensors


def _plan_tower(hf: HfCheckpoint, name: str | None) -> dict:
    """`name` for `mm_vision_tower`, whether the weights go `inside`, and the `folder` to write or `None`."""
    recorded = hf.record.get("vision_tower") or {}
    name = name or recorded.get("name")
    if not name:
        return {"name": TOWER_FOLDER, "inside": False, "folder": TOWER_FOLDER, "trained": False}
    inside, path = bool(recorded.get("inside")), Path(name)
    trained = not inside and "crc32" in recorded and checksum(hf.part("vision_tower")) != recorded["crc32"]
    is_ours = not HUB_NAME.fullmatch(name) and not path.is_absolute() and ".." not in path.parts
    return {"name": name, "inside": inside or trained, "folder": name if is_ours else None, "trained": trained}


# Configuration and small files


def original_config(hf: HfCheckpoint, projector: Projector, rows: int, tower: dict) -> dict:
    """
    The original's `config.json`: the one that the checkpoint came with, if any, with the fields whose meaning has changed.
    """
    config, recorded = hf.config, hf.record.get("config") or {}
    strategies = {strategy: feature for feature, strategy in FEATURE_STRATEGIES.items()}
    layer, ratio = recorded.get("mm_vision_select_layer", -2), recorded.get("image_aspect_ratio", "square")
    if (layer - config.vision_feature_layer) % (config.vision_config.num_hidden_layers + 1):  # −2 may be 22 too
        layer = config.vision_feature_layer
    pads = bool(getattr(hf.processor.image_processor, "do_pad", False))
    if pads != (ratio == "pad"):
        ratio = "pad" if pads else "square"
    template = hf.processor.chat_template or ""
    fields = {
        "mm_projector_type": f"mlp{projector.layers}x_gelu" if projector.is_numbered else "linear",
        "mm_vision_select_feature": strategies[config.vision_feature_select_strategy],
        "mm_vision_select_layer": layer,
        "mm_hidden_size": projector.inputs,
        "mm_vision_tower": tower["name"],
        "mm_use_im_start_end": all(mark in template for mark in IMAGE_MARKS),
        "image_aspect_ratio": ratio,
        "vocab_size": rows,
    }
    if tower["trained"]:
        fields["unfreeze_mm_vision_tower"] = True
    text = _fields_of_4(config.text_config)
    if not recorded:
        model_type, architecture = ARCHITECTURES[config.text_config.model_type]
        dtype = str(config.dtype or torch.float32).removeprefix("torch.")
        text |= {"architectures": [architecture], "model_type": model_type, "torch_dtype": dtype}
        return text | fields | {"use_mm_proj": True, "mm_use_im_patch_token": False}
    before = _fields_of_4(read_text_config(recorded))
    of_tokens = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
    # a longer context, say
    since = {k: v for k, v in text.items() if k in before and v != before[k] and k not in of_tokens}
    changed = {k: v for k, v in fields.items() if recorded.get(k, DEFAULTS.get(k)) != v}
    return recorded | since | changed


def _fields_of_4(text: PreTrainedConfig) -> dict:
    """A language model's fields as transformers 4, which the original uses, writes them."""
    fields = text.to_dict()
    rope = dict(fields.pop("rope_parameters", None) or {})
    fields["rope_theta"] = rope.pop("rope_theta", 10000.0)
    kind = rope.pop("rope_type", "default")
    fields["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    for name in ("architectures", "model_type", "transformers_version", "dtype", "_name_or_path"):
        fields.pop(name, None)
    if fields.get("head_dim") == text.hidden_size // text.num_attention_heads:
        fields.pop("head_dim")
    return fields


def _write_tokenizer(hf: HfCheckpoint, tokenizer, rows: int, keeps_files: bool, folder: Path) -> None:
    """The tokenizer, with the chat template, and the generation configuration."""
    source, names = hf.folder / (ORIGINAL_FILES if keeps_files else ""), TOKENIZER_FILES
    if not keeps_files and has_sentencepiece(source):
        names = ("tokenizer.model",)
        _write_slow_tokenizer_files(tokenizer, rows, folder)
        if not (source / "tokenizer.model").is_file():
            (folder / "tokenizer.model").write_bytes(sentencepiece_model(source / "tokenizer.json"))
    for name in (*names, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    template = hf.processor.chat_template
    if not keeps_files and template:  # the original knows its own; the way back reads it
        write_atomic(folder / CHAT_TEMPLATE, template)


def _write_slow_tokenizer_files(tokenizer: PreTrainedTokenizerBase, rows: int, folder: Path) -> None:
    """What transformers 4's `LlamaTokenizer` reads next to `tokenizer.model`, without the tokens that HF needs."""
    named = ("bos_token", "eos_token", "unk_token", "pad_token")
    tokens = {name: getattr(tokenizer, name) for name in named if getattr(tokenizer, name) is not None}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        tokens["pad_token"] = tokens.get("unk_token", tokens["eos_token"])
    added = sorted((i, token) for i, token in tokenizer.added_tokens_decoder.items() if i < rows)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": bool(tokenizer.init_kwargs.get("legacy", True)),
        "add_bos_token": bool(tokenizer.init_kwargs.get("add_bos_token", True)),
        "add_eos_token": bool(tokenizer.init_kwargs.get("add_eos_token", False)),
        "model_max_length": tokenizer.model_max_length,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "sp_model_kwargs": {},
        "use_default_system_prompt": False,
        "added_tokens_decoder": {str(i): token.__getstate__() for i, token in added},
        **tokens,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", tokens)


def _write_tower_files(hf: HfCheckpoint, folder: Path) -> None:
    """What `CLIPVisionModel.from_pretrained` and `CLIPImageProcessor.from_pretrained` read next to the weights."""
    config = hf.config.vision_config.to_dict()
    write_json(folder / "config.json", {**config, "architectures": ["CLIPVisionModel"]})
    fields = {key: value for key, value in hf.processor.image_processor.to_dict().items() if key in IMAGE_FIELDS}
    write_json(folder / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor", **fields})


def _notes(hf: HfCheckpoint, tower: dict, output: str | Path) -> list[str]:
    notes = []
    if tower["trained"]:
        why = f"The vision tower is no longer exactly {tower['name']} (trained, or saved in another dtype)"
        notes.append(f"{why}: its weights are in the checkpoint, with unfreeze_mm_vision_tower.")
    if tower["folder"]:
        name = tower["folder"]
        notes.append(
            f"The vision tower is in {Path(output, name)}; the original reads ./{name}: start it in {output}."
        )
    if not has_sentencepiece(hf.folder):
        slow = "the original requires a slow one (use_fast=False), which transformers may not have for it"
        notes.append(f"The tokenizer is not a SentencePiece model; {slow}.")
    return notes
