"""
HF checkpoints → GGUF: the two files of llama.cpp's multimodal programs (and Ollama).

`model-TYPE.gguf` holds the language model with tokenizer and chat template, `mmproj-TYPE.gguf` the CLIP or SigLIP tower up
to the selected layer and the projector. Of a language model that is not in [`ARCHITECTURES`], a folder for llama.cpp's own
`convert_hf_to_gguf.py` is written in place of the first file.

llama.cpp has had a bug since May 2025 (https://github.com/ggml-org/llama.cpp/issues/25814): it puts CLIP's class token
after the patches but reads positions and results as if it came first. SigLIP has no class token.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPVisionConfig, SiglipVisionConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modeling_llava.configuration_llava import count_additional_image_tokens

from .checks import CheckReport
from .folders import TOKENIZER_FILES
from .gguf_files import (
    BLOCK,
    QUANTISED,
    TORCH_TYPES,
    TYPES,
    GgufTensor,
    check_gguf,
    import_package,
    quantise,
    write_gguf,
)
from .hf_checkpoints import HfCheckpoint, read_hf
from .original_to_hf import Conversion
from .tensors import LazyTensor, below, in_memory, permuted_rows
from .vocabularies import CHAT_TEMPLATE, gguf_chat_template, vocabulary
from .writing import DEFAULT_SHARD_SIZE, OutputFolder, plan_shards, write_atomic, write_json


ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""Language model → its architecture in the `gguf` package."""

ROPES = ("default", "linear", "llama3")
TOWERS = (CLIPVisionConfig, SiglipVisionConfig)
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "bf16": "MOSTLY_BF16"}
SMALL_FILES = (*TOKENIZER_FILES, "processor_config.json", "preprocessor_config.json", "chat_template.json")
"""What the fields of the two files are made from, next to `config.json`."""

LANGUAGE_FOLDER = "language_model"


def convert_hf_to_gguf(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str = "f16",
    class_token_last: bool = False,
    check: bool = True,
    overwrite: bool = False,
) -> Conversion:
    """
    Convert a HF LLaVA folder to the two files that llama.cpp reads.

    Args:
        source (`str` or `Path`): HF folder or Hub name.
        output (`str` or `Path`): Folder for `model-TYPE.gguf` and `mmproj-TYPE.gguf`.
        dtype (`str`, *optional*, defaults to `"f16"`):
            `"f32"`, `"f16"`, `"bf16"` or `"q8_0"` (8 bits, in blocks of 32 values); vectors and the table of positions
            are always float32. `"q4_k_m"` and `"q6_k"` are quantised by llama.cpp (`llama-cpp-python`), next to a
            `mmproj` in `f16`.
        class_token_last (`bool`, *optional*, defaults to `False`):
            Write `mmproj` for builds of llama.cpp with the bug above (see `_for_class_token_last`).
        check (`bool`, *optional*, defaults to `True`):
            Read the files back and compare every tensor with what was to be written; of a quantised file its types.
        overwrite: As in [`convert_original_to_hf`].

    Raises:
        ImportError: the `gguf` package, or for a quantised file `llama-cpp-python`, is not installed.
        ValueError: llama.cpp's LLaVA cannot express it, or the check failed.
        OSError: a file is not there, or the disk is too small.
    """
    gguf = import_package("gguf", "'modeling-llava[gguf]'")
    if dtype not in TYPES:
        raise ValueError(f"dtype {dtype!r} is not a GGUF type that is written; there are {', '.join(TYPES)}.")
    llama_cpp = import_package("llama_cpp", "llama-cpp-python") if dtype in QUANTISED else None
    hf = read_hf(source)
    layers = feature_layers(hf)
    is_known = _check_is_known_to_llama_cpp(hf)
    kind, image_kind = dtype, dtype
    if llama_cpp is not None:  # from the checkpoint's own type, without rounding before
        saved = hf.tensors["language_model.model.embed_tokens.weight"].dtype
        kind, image_kind = next(name for name, torch_type in TORCH_TYPES.items() if torch_type == saved), "f16"
    model, mmproj, shards = f"model-{dtype}.gguf", f"mmproj-{image_kind}.gguf", {}
    plan = {mmproj: mmproj_tensors(gguf, hf, max(layers), image_kind)}
    if class_token_last:
        _for_class_token_last(plan[mmproj], hf)
    if is_known:
        plan[model] = language_tensors(gguf, hf, kind)
    else:
        text = {key.removeprefix("language_model."): tensor for key, tensor in hf.part("language_model").items()}
        shards = plan_shards(text, DEFAULT_SHARD_SIZE)
    files = [*hf.files, *(hf.folder / name for name in SMALL_FILES if (hf.folder / name).is_file())]
    report = CheckReport(Path(output)) if check else None
    direction = f"hf to gguf {dtype} {class_token_last=}"
    with OutputFolder(output, direction, files, plan | shards, overwrite=overwrite) as folder:
        place, advance = folder.partial, folder.progress.update
        if not (place / mmproj).exists():
            metadata = mmproj_metadata(gguf, hf, layers, image_kind)
            write_gguf(gguf, place / mmproj, "clip", metadata, plan[mmproj], advance)
        if shards:
            folder.write_shards(shards, LANGUAGE_FOLDER)
            _write_language_files(hf, place / LANGUAGE_FOLDER)
        elif not (place / model).exists():
            architecture = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[ARCHITECTURES[hf.config.text_config.model_type]]]
            written = place / ("not_quantised.gguf" if llama_cpp else model)
            write_gguf(gguf, written, architecture, language_metadata(gguf, hf, kind), plan[model], advance)
            if llama_cpp is not None:
                quantise(llama_cpp, written, place / model, dtype)
                written.unlink()
        if check:
            for name, tensors in plan.items():
                check_gguf(gguf, report, place / name, tensors, dtype if name == model else image_kind)
        folder.commit(report)
    return Conversion(Path(output), _notes(hf, output, is_known, class_token_last), report)


# What llama.cpp can express


def feature_layers(hf: HfCheckpoint) -> list[int]:
    """The tower's selected hidden states, counted from the embeddings (0) on, in ascending order."""
    states = hf.config.vision_config.num_hidden_layers + 1
    selected = hf.config.vision_feature_layer
    selected = [selected] if isinstance(selected, int) else list(selected)
    layers = [layer if layer >= 0 else states + layer for layer in selected]
    if layers != sorted(set(layers)) or layers[0] < 1 or layers[-1] >= states:
        order = f"llama.cpp joins them in ascending order and begins at 1 (of {states})"
        raise ValueError(f"{hf.folder} takes features of the tower's hidden states {selected}; {order}.")
    return layers


def _check_is_known_to_llama_cpp(hf: HfCheckpoint) -> bool:
    """Whether the language model is written too. ValueError for what llama.cpp's LLaVA cannot express."""
    config, vision, text = hf.config, hf.config.vision_config, hf.config.text_config
    strategy = "default" if count_additional_image_tokens(vision) else "full"
    is_known = text.model_type in ARCHITECTURES
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    act, selected, tower = config.projector_hidden_act, config.vision_feature_select_strategy, vision.model_type
    tower_act, middle = getattr(vision, "hidden_act", None), getattr(vision, "intermediate_size", None)
    problems = (
        (not isinstance(vision, TOWERS), f"a vision tower of kind {tower!r}; CLIP and SigLIP are converted"),
        (config.projector_num_layers > 2, f"a projector of {config.projector_num_layers} layers; llama.cpp's has two"),
        (act not in ("gelu", "linear"), f"projector_hidden_act {act!r}; llama.cpp has 'gelu'"),
        (selected != strategy, f"vision_feature_select_strategy={selected!r}; llama.cpp drops the class token alone"),
        (tower_act not in ACTIVATIONS, f"a tower with {tower_act!r}; known are {', '.join(ACTIVATIONS)}"),
        (middle == vision.hidden_size, "a tower with square MLPs, whose layers llama.cpp would swap"),
        (is_known and rope not in ROPES, f"rope_type {rope!r}; known are {', '.join(ROPES)}"),
        (is_known and text.hidden_act != "silu", f"a language model with {text.hidden_act!r}; llama.cpp has silu"),
    )
    if problem := next((problem for is_there, problem in problems if is_there), None):
        raise ValueError(f"{hf.folder} has {problem}.")
    return is_known


def _notes(hf: HfCheckpoint, output: str | Path, is_known: bool, class_token_last: bool) -> list[str]:
    notes = []
    if not is_known:
        place = Path(output) / LANGUAGE_FOLDER
        notes.append(f"The language model is in {place}. Convert it with llama.cpp's convert_hf_to_gguf.py.")
    if class_token_last:
        notes.append("mmproj is for builds of llama.cpp with the bug of issue 25814; a fixed build needs the other.")
    elif count_additional_image_tokens(hf.config.vision_config):
        bug = "llama.cpp since May 2025 has a bug (issue 25814) that spoils the image features of every LLaVA-1.5"
        notes.append(f"{bug}. For a build with it, convert with --class-token-last.")
    if not getattr(hf.processor.image_processor, "do_pad", False):
        notes.append("llama.cpp pads images to a square; this checkpoint was trained on cropped or stretched images.")
    window = getattr(hf.config.text_config, "sliding_window", None)
    if window is not None:
        notes.append(f"llama.cpp attends to all tokens, this language model to the last {window}: stay below that.")
    return notes


# Tensors


def language_tensors(gguf, hf: HfCheckpoint, kind: str) -> dict[str, GgufTensor]:
    """
    The language model. llama.cpp's `llama` rotates neighbouring values, HF values half a head apart: q and k are reordered.
    """
    text = hf.config.text_config
    heads = {".attn_q.": text.num_attention_heads, ".attn_k.": text.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[text.model_type]], text.num_hidden_layers)
    result = {}
    for key, tensor in hf.part("language_model").items():
        name = names.get_name(key.removeprefix("language_model."), try_suffixes=(".weight", ".bias"))
        for part, count in heads.items() if ARCHITECTURES[text.model_type] == "LLAMA" else ():
            if part in name:
                tensor = permuted_rows(tensor, rotary_order(count, head_dim(text)))
        result[name] = _typed(tensor, kind)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":  # how much slower each pair of values rotates
        plain = rope["rope_theta"] ** (-torch.arange(0, head_dim(text), 2) / head_dim(text))
        factors = plain / ROPE_INIT_FUNCTIONS["llama3"](text, "cpu")[0]
        result["rope_freqs.weight"] = GgufTensor(in_memory(factors, "the factors of rope_type llama3"), "f32")
    return result


def head_dim(text) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def rotary_order(heads: int, head_dim: int) -> torch.Tensor:
    """Row `(head, i, half)` of llama.cpp's order is row `(head, half, i)` of HF's."""
    rows = torch.arange(heads * head_dim).view(heads, 2, head_dim // 2)
    return rows.transpose(1, 2).reshape(-1)


def mmproj_tensors(gguf, hf: HfCheckpoint, num_layers: int, kind: str) -> dict[str, GgufTensor]:
    """
    The tower's first `num_layers` layers, and the projector as llama.cpp's `mlp` (GELU between two layers). LLaVA takes
    features before the tower's `post_layernorm`, which llama.cpp would apply.
    """
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, num_layers)
    result = {}
    for key, tensor in hf.part("vision_tower").items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))  # none for a later layer, and SigLIP's head
        if name == "v.position_embd.weight":
            result[name] = GgufTensor(tensor, "f32")
        elif name == "v.patch_embd.weight":  # ggml's convolution takes these two types
            result[name] = GgufTensor(tensor, "f16" if kind == "f16" else "f32")
        elif name is not None and not name.startswith("v.post_ln."):
            result[name] = _typed(tensor, kind)
    return result | {name: _typed(tensor, kind) for name, tensor in _projector(hf).items()}


def _projector(hf: HfCheckpoint) -> dict[str, LazyTensor]:
    """
    `mm.0` and `mm.2`. llama.cpp always puts GELU between them; a linear projector is written as `[W; −W]` and
    `[V, −V]`, since gelu(x) − gelu(−x) = x (V is HF's second layer, an identity for the paper's W).
    """
    own, hidden = {}, hf.config.text_config.hidden_size
    for layer, name in (("linear_1", "mm.0"), ("linear_2", "mm.2")):
        own[f"{name}.weight"] = weight = hf.tensors[f"multi_modal_projector.{layer}.weight"]
        zeros = in_memory(torch.zeros(hidden, dtype=weight.dtype), f"a bias of zeros for {layer}")
        own[f"{name}.bias"] = hf.tensors.get(f"multi_modal_projector.{layer}.bias", zeros)
    if hf.config.projector_hidden_act == "linear":
        for name in ("mm.0.weight", "mm.0.bias"):
            own[name] = below(own[name], _changed(own[name], own[name].shape, torch.neg))
        own["mm.2.weight"] = _changed(own["mm.2.weight"], (hidden, 2 * hidden), lambda v: torch.cat([v, -v], dim=1))
    return own


CLASS_TOKEN_SCALE = 1e5


def _for_class_token_last(tensors: dict[str, GgufTensor], hf: HfCheckpoint) -> None:
    """
    Change the class embedding and the positions so that a build with the bug computes the right features, though it gives
    that of the top left patch last instead of first, and as one of padding.

    It lays out `[patch 0, …, patch n−1, class]`, adds position row i to token i, and gives tokens 1 to n to the
    projector. So token 0, which it does not give on, becomes the class token: its position row is the class token times
    10⁵, against which the patch vanishes in the layer norm that follows. Token n, a constant, becomes patch 0 of padding
    (which it is unless the image is square), and tokens 1 to n−1 get their own positions.
    """
    if "v.class_embd" not in tensors:
        raise ValueError(f"{hf.folder} has a tower without a class token: leave out --class-token-last.")
    images = hf.processor.image_processor
    background = [(int(mean * 255) / 255 - mean) / std for mean, std in zip(images.image_mean, images.image_std)]
    kernel = tensors["v.patch_embd.weight"].content.tensor().float()  # [hidden, 3, patch, patch]
    padding = (kernel.sum(dim=(2, 3)) * torch.tensor(background)).sum(dim=1)
    token = tensors["v.class_embd"].content.tensor().float()
    old = tensors["v.position_embd.weight"].content.tensor().float()  # [1 + patches, hidden]
    new = torch.cat([CLASS_TOKEN_SCALE * (token + old[0])[None], old[2:], old[1:2]])
    tensors["v.class_embd"] = GgufTensor(in_memory(padding, "the embedding of a patch of padding"), "f32")
    tensors["v.position_embd.weight"] = GgufTensor(in_memory(new, "the rearranged positions"), "f32")


def _changed(tensor: LazyTensor, shape: tuple[int, ...], change: Callable) -> LazyTensor:
    return LazyTensor(tensor.dtype, shape, lambda start, stop: change(tensor.rows(start, stop)), tensor.origin)


def _typed(tensor: LazyTensor, kind: str) -> GgufTensor:
    if len(tensor.shape) < 2:
        return GgufTensor(tensor, "f32")
    if kind == "q8_0" and tensor.shape[-1] % BLOCK:
        kind = "f16"
    return GgufTensor(tensor, kind)


def _write_language_files(hf: HfCheckpoint, folder: Path) -> None:
    """What makes the weights of a language model a HF folder, with the chat template for llama.cpp."""
    text = hf.config.text_config
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]
    write_json(folder / "config.json", {**text.to_dict(), "architectures": [name]})
    for name in TOKENIZER_FILES:
        if (hf.folder / name).is_file():
            shutil.copyfile(hf.folder / name, folder / name)
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    tokenizer_config.pop("chat_template", None)
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write_atomic(folder / CHAT_TEMPLATE, gguf_chat_template(hf.processor.chat_template, hf.processor.image_token))


# Metadata: functions that fill a `gguf.GGUFWriter`


def _general(gguf, hf: HfCheckpoint, kind: str, what: str) -> dict:
    return {
        "type": what,
        "name": hf.folder.name,
        "quantization_version": gguf.GGML_QUANT_VERSION,
        "file_type": gguf.LlamaFileType[FILE_TYPES[kind]],
    }


def language_metadata(gguf, hf: HfCheckpoint, kind: str) -> dict:
    """Fields of the language model's file: names of a `gguf.GGUFWriter`'s methods without `add_`, and their argument."""
    text, processor = hf.config.text_config, hf.processor
    tokenizer = AutoTokenizer.from_pretrained(hf.folder)
    table = vocabulary(hf.folder, tokenizer, text.vocab_size)
    rope, ids = getattr(text, "rope_parameters", None) or {}, tokenizer("a").input_ids
    fields = _general(gguf, hf, kind, "model") | {
        "vocab_size": text.vocab_size,
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "block_count": text.num_hidden_layers,
        "feed_forward_length": text.intermediate_size,
        "head_count": text.num_attention_heads,
        "head_count_kv": text.num_key_value_heads,
        "key_length": head_dim(text),
        "value_length": head_dim(text),
        "layer_norm_rms_eps": text.rms_norm_eps,
        "rope_dimension_count": head_dim(text),
        "rope_freq_base": float(rope.get("rope_theta", 10000.0)),
        "tokenizer_model": table["model"],
        "tokenizer_pre": table["pre"],
        "token_list": table["tokens"],
        "token_scores": table["scores"],
        "token_types": table["types"],
        "token_merges": table["merges"],
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")},
        "add_bos_token": ids[0] == tokenizer.bos_token_id,
        "add_eos_token": ids[-1] == tokenizer.eos_token_id,
    }
    if rope.get("rope_type") == "linear":
        fields |= {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": float(rope["factor"])}
    if processor.chat_template:
        fields["chat_template"] = gguf_chat_template(processor.chat_template, processor.image_token)
    return {name: value for name, value in fields.items() if value is not None}


def mmproj_metadata(gguf, hf: HfCheckpoint, layers: list[int], kind: str) -> dict:
    """The same of the tower up to the deepest selected layer and the projector."""
    vision, images = hf.config.vision_config, hf.processor.image_processor
    return _general(gguf, hf, kind, "mmproj") | {
        "clip_has_vision_encoder": True,
        "clip_projector_type": "mlp",
        "vision_projection_dim": hf.config.text_config.hidden_size,
        "vision_image_size": vision.image_size,
        "vision_patch_size": vision.patch_size,
        "vision_embedding_length": vision.hidden_size,
        "vision_feed_forward_length": vision.intermediate_size,
        "vision_block_count": max(layers),
        "vision_head_count": vision.num_attention_heads,
        "vision_attention_layernorm_eps": vision.layer_norm_eps,
        "vision_image_mean": [float(x) for x in images.image_mean],
        "vision_image_std": [float(x) for x in images.image_std],
        "vision_use_gelu": vision.hidden_act != "quick_gelu",
        "clip.vision.feature_layer": layers,  # hidden states, counted from the embeddings on
    }
