"""
HF checkpoints → GGUF: the two files of llama.cpp's multimodal programs (and Ollama).

`model-TYPE.gguf` holds the language model with tokenizer and chat template, `mmproj-TYPE.gguf` the CLIP tower up to the
selected layer and the projector. How they are written and read back: `gguf_files.py`.

llama.cpp has had a bug since May 2025 (https://github.com/ggml-org/llama.cpp/issues/25814): it puts CLIP's class token
after the patches but reads positions and results as if it came first. In every LLaVA-1.5 each patch gets its
neighbour's position, and the first patch is lost. `class_token_last=True` writes a file that such builds compute correctly
(see `_for_class_token_last`).
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import AutoTokenizer

from modeling_llava.processing_llava import LlavaProcessor

from .folders import TOKENIZER_FILES
from .gguf_files import BLOCK, TYPES, GgufTensor, check_gguf, import_gguf, write_gguf
from .hf_checkpoints import HfCheckpoint, read_hf
from .keymaps import Entry
from .original_to_hf import Conversion, fingerprint_of
from .overlays import below
from .tensors import LazyTensor, in_memory, permuted_rows
from .vocabularies import gguf_chat_template, vocabulary
from .writing import OutputFolder


FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "bf16": "MOSTLY_BF16"}
SMALL_FILES = (*TOKENIZER_FILES, "processor_config.json", "preprocessor_config.json", "chat_template.json")
"""What the fields of the two files are made from, next to `config.json`."""


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
            `"f32"`, `"f16"`, `"bf16"` or `"q8_0"` (8 bits, in blocks of 32 values). Vectors and the table of positions
            are always float32.
        class_token_last (`bool`, *optional*, defaults to `False`):
            Write `mmproj` for builds of llama.cpp with the defect above. They then compute every image feature right,
            but hand the one of the top left patch over last instead of first, and see the padding's colour in it.
        check (`bool`, *optional*, defaults to `True`):
            Read the files back and compare every tensor with what was to be written.
        overwrite (`bool`, *optional*, defaults to `False`): Replace the folder `output`.

    Raises:
        ImportError: the `gguf` package is not installed.
        ValueError: llama.cpp's LLaVA cannot express it: a projector of more than two layers, image features with the
            class token, another activation; or the check failed.
        OSError: a file is not there, or the disk is too small.
    """
    gguf = import_gguf()
    if dtype not in TYPES:
        raise ValueError(f"dtype {dtype!r} is not a GGUF type that is written; there are {', '.join(TYPES)}.")
    hf = read_hf(source)
    layers = feature_layers(hf)
    _check_is_known_to_llama_cpp(hf)
    processor = hf.processor
    files = {
        f"model-{dtype}.gguf": (language_metadata(hf, processor, dtype), language_tensors(hf, dtype)),
        f"mmproj-{dtype}.gguf": (
            mmproj_metadata(hf, processor, layers, dtype),
            mmproj_tensors(hf, max(layers), dtype),
        ),
    }
    if class_token_last:
        _for_class_token_last(files[f"mmproj-{dtype}.gguf"][1], processor)
    total = sum(tensor.nbytes for _, tensors in files.values() for tensor in tensors.values())
    plan = {name: {key: tensor.content for key, tensor in tensors.items()} for name, (_, tensors) in files.items()}
    small = [hf.folder / name for name in SMALL_FILES if (hf.folder / name).is_file()]
    fingerprint = fingerprint_of(f"hf to gguf {class_token_last=}", [*hf.files, *small], plan)
    report = None
    with OutputFolder(output, fingerprint, total, overwrite=overwrite) as folder:
        if not folder.is_done:
            for name, (metadata, tensors) in files.items():
                path = folder.partial / name
                if path.exists():
                    folder.progress.update(sum(tensor.nbytes for tensor in tensors.values()))
                else:
                    write_gguf(gguf, path, metadata, tensors, folder.progress.update)
            if check:
                report = check_gguf(gguf, folder.partial, files)
                if not report.is_sound:
                    raise ValueError(f"The conversion of {source} does not hold: {report.failures()}")
            folder.commit()
    return Conversion(Path(output), _notes(hf, processor, class_token_last), report)


# What llama.cpp can express


def feature_layers(hf: HfCheckpoint) -> list[int]:
    """The tower's selected hidden states, counted from the embeddings (0) on, in ascending order."""
    states = hf.sizes.vision_layers + 1
    selected = hf.config.vision_feature_layer
    selected = [selected] if isinstance(selected, int) else list(selected)
    layers = [layer if layer >= 0 else states + layer for layer in selected]
    if layers != sorted(set(layers)) or layers[0] < 1 or layers[-1] >= states:
        raise ValueError(
            f"{hf.folder} takes features of the tower's hidden states {selected}; llama.cpp joins them in ascending order "
            f"and begins at 1 (of {states})."
        )
    return layers


def _check_is_known_to_llama_cpp(hf: HfCheckpoint) -> None:
    config, vision = hf.config, hf.config.vision_config
    if config.projector_num_layers > 2:
        raise ValueError(
            f"{hf.folder} has a projector of {config.projector_num_layers} layers; llama.cpp's has two. This package loads, "
            "trains and runs it."
        )
    if config.projector_hidden_act not in ("gelu", "linear"):
        raise ValueError(
            f"{hf.folder} has projector_hidden_act {config.projector_hidden_act!r}; llama.cpp has 'gelu'."
        )
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"{hf.folder} keeps the class token among its image features (vision_feature_select_strategy='full'); "
            "llama.cpp always drops it."
        )
    if vision.hidden_act not in ("quick_gelu", "gelu"):
        raise ValueError(
            f"{hf.folder} has a vision tower with {vision.hidden_act!r}; llama.cpp has quick_gelu and gelu."
        )
    if hf.sizes.vision_intermediate == hf.sizes.vision_hidden:
        raise ValueError(
            f"{hf.folder}: llama.cpp would swap the two layers of this tower's MLPs, since they are square."
        )
    rope = getattr(config.text_config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ("default", "linear"):
        raise ValueError(f"{hf.folder} has rope_type {rope['rope_type']!r}; written are 'default' and 'linear'.")
    if config.text_config.hidden_act != "silu":
        raise ValueError(
            f"{hf.folder} has a language model with {config.text_config.hidden_act!r}; llama.cpp has silu."
        )


def _notes(hf: HfCheckpoint, processor: LlavaProcessor, class_token_last: bool) -> list[str]:
    notes = []
    if class_token_last:
        notes.append("mmproj is for builds of llama.cpp with the bug of issue 25814; a fixed build needs the other.")
    else:
        notes.append(
            "llama.cpp since May 2025 has a bug (issue 25814) that spoils the image features of every LLaVA-1.5. For a "
            "build with it, convert with --class-token-last."
        )
    if not getattr(processor.image_processor, "do_pad", False):
        notes.append(
            "llama.cpp pads images to a square; this checkpoint was trained on images that are cropped to it."
        )
    window = getattr(hf.config.text_config, "sliding_window", None)
    if window is not None:
        notes.append(f"llama.cpp attends to all tokens, this language model to the last {window}: stay below that.")
    return notes


# Tensors


def language_tensors(hf: HfCheckpoint, kind: str) -> dict[str, GgufTensor]:
    """The language model. llama.cpp rotates neighbouring values, HF values half a head apart: q and k are reordered."""
    s, result = hf.sizes, {}
    for entry, tensor in hf.tensors.items():
        if entry.part != "language":
            continue
        for name, heads in ((".attn_q.", s.heads), (".attn_k.", s.kv_heads)):
            if name in entry.gguf:
                tensor = permuted_rows(tensor, rotary_order(heads, s.head_dim))
        result[entry.gguf] = _typed(tensor, kind)
    return result


def rotary_order(heads: int, head_dim: int) -> torch.Tensor:
    """Row `(head, i, half)` of llama.cpp's order is row `(head, half, i)` of HF's."""
    rows = torch.arange(heads * head_dim).view(heads, 2, head_dim // 2)
    return rows.transpose(1, 2).reshape(-1)


def mmproj_tensors(hf: HfCheckpoint, num_layers: int, kind: str) -> dict[str, GgufTensor]:
    """The tower's first `num_layers` layers, and the projector as llama.cpp's `mlp` (GELU between two layers)."""
    result = {}
    for entry, tensor in hf.tensors.items():
        if entry.part != "vision" or entry.gguf is None:
            continue
        if entry.gguf.startswith("v.blk.") and int(entry.gguf.split(".")[2]) >= num_layers:
            continue
        if entry.gguf == "v.position_embd.weight":
            result[entry.gguf] = GgufTensor(tensor, "f32")
        elif entry.gguf == "v.patch_embd.weight":  # ggml's convolution takes these two types
            result[entry.gguf] = GgufTensor(tensor, "f16" if kind == "f16" else "f32")
        else:
            result[entry.gguf] = _typed(tensor, kind)
    projector = {entry: tensor for entry, tensor in hf.tensors.items() if entry.part == "projector"}
    for name, tensor in _projector(hf, projector).items():
        result[name] = _typed(tensor, kind)
    return result


def _projector(hf: HfCheckpoint, tensors: Mapping[Entry, LazyTensor]) -> dict[str, LazyTensor]:
    """
    `mm.0` and `mm.2`. llama.cpp always puts GELU between them; a linear projector is written as `[W; −W]` and
    `[V, −V]`, since gelu(x) − gelu(−x) = x (V is HF's second layer, an identity for the paper's W).
    """
    own = {entry.gguf: tensor for entry, tensor in tensors.items()}
    hidden = hf.sizes.hidden
    for layer in ("mm.0", "mm.2"):
        if f"{layer}.bias" not in own:
            own[f"{layer}.bias"] = _computed(own[f"{layer}.weight"], (hidden,), lambda a, b: torch.zeros(b - a))
    if hf.config.projector_hidden_act == "gelu":
        return own
    for name in ("mm.0.weight", "mm.0.bias"):
        own[name] = below(own[name], _negated(own[name]))  # [W; −W]
    second = own["mm.2.weight"]

    def read(start: int, stop: int) -> torch.Tensor:
        rows = second.rows(start, stop)
        return torch.cat([rows, -rows], dim=1)

    own["mm.2.weight"] = LazyTensor(second.dtype, (hidden, 2 * hidden), read, second.origin)
    return own


CLASS_TOKEN_SCALE = 1e5


def _for_class_token_last(tensors: dict[str, GgufTensor], processor: LlavaProcessor) -> None:
    """
    Change the class embedding and the positions so that a build with the defect computes the right features.

    It lays out `[patch 0, …, patch n−1, class]`, adds position row i to token i, and gives tokens 1 to n to the
    projector. So token 0, which it does not give on, becomes the class token: its position row is the class token times
    10⁵, against which the patch vanishes in the layer norm that follows. Token n, a constant, becomes patch 0 of padding
    (which it is unless the image is square), and tokens 1 to n−1 get their own positions.
    """
    images = processor.image_processor
    background = [(int(mean * 255) / 255 - mean) / std for mean, std in zip(images.image_mean, images.image_std)]
    kernel = tensors["v.patch_embd.weight"].content.tensor().float()  # [hidden, 3, patch, patch]
    padding = (kernel.sum(dim=(2, 3)) * torch.tensor(background)).sum(dim=1)
    token = tensors["v.class_embd"].content.tensor().float()
    old = tensors["v.position_embd.weight"].content.tensor().float()  # [1 + patches, hidden]
    new = torch.cat([CLASS_TOKEN_SCALE * (token + old[0])[None], old[2:], old[1:2]])
    tensors["v.class_embd"] = GgufTensor(in_memory(padding, "the embedding of a patch of padding"), "f32")
    tensors["v.position_embd.weight"] = GgufTensor(in_memory(new, "the rearranged positions"), "f32")


def _computed(like: LazyTensor, shape: tuple[int, ...], read: Callable[[int, int], torch.Tensor]) -> LazyTensor:
    return LazyTensor(like.dtype, shape, lambda a, b: read(a, b).to(like.dtype), like.origin)


def _negated(tensor: LazyTensor) -> LazyTensor:
    return _computed(tensor, tensor.shape, lambda start, stop: -tensor.rows(start, stop))


def _typed(tensor: LazyTensor, kind: str) -> GgufTensor:
    if len(tensor.shape) < 2:
        return GgufTensor(tensor, "f32")
    if kind == "q8_0" and tensor.shape[-1] % BLOCK:
        kind = "f16"
    return GgufTensor(tensor, kind)


# Metadata: functions that fill a `gguf.GGUFWriter`


def language_metadata(hf: HfCheckpoint, processor: LlavaProcessor, kind: str) -> Callable:
    """LLaMA and Mistral are one architecture to llama.cpp."""
    text, s = hf.config.text_config, hf.sizes
    tokenizer = AutoTokenizer.from_pretrained(hf.folder)
    table = vocabulary(hf.folder, tokenizer, s.vocabulary)
    rope = getattr(text, "rope_parameters", None) or {}

    def fill(gguf, writer) -> None:
        writer.add_type("model")
        writer.add_name(hf.folder.name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
        writer.add_vocab_size(s.vocabulary)
        writer.add_context_length(text.max_position_embeddings)
        writer.add_embedding_length(s.hidden)
        writer.add_block_count(s.layers)
        writer.add_feed_forward_length(s.intermediate)
        writer.add_head_count(s.heads)
        writer.add_head_count_kv(s.kv_heads)
        writer.add_key_length(s.head_dim)
        writer.add_value_length(s.head_dim)
        writer.add_layer_norm_rms_eps(text.rms_norm_eps)
        writer.add_rope_dimension_count(s.head_dim)
        writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
        if rope.get("rope_type") == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_tokenizer_model(table["model"])
        writer.add_tokenizer_pre(table["pre"])
        writer.add_token_list(table["tokens"])
        writer.add_token_scores(table["scores"])
        writer.add_token_types(table["types"])
        if table["merges"] is not None:
            writer.add_token_merges(table["merges"])
        for name in ("bos", "eos", "unk", "pad"):
            if (i := getattr(tokenizer, f"{name}_token_id")) is not None:
                getattr(writer, f"add_{name}_token_id")(i)
        ids = tokenizer("a").input_ids
        writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
        writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
        if processor.chat_template:
            writer.add_chat_template(gguf_chat_template(processor.chat_template, processor.image_token))

    return fill


def mmproj_metadata(hf: HfCheckpoint, processor: LlavaProcessor, layers: list[int], kind: str) -> Callable:
    """CLIP's tower up to the deepest selected layer. `feature_layer` counts hidden states from the embeddings on."""
    vision, s, images = hf.config.vision_config, hf.sizes, processor.image_processor

    def fill(gguf, writer) -> None:
        writer.add_type("mmproj")
        writer.add_name(hf.folder.name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
        writer.add_clip_has_vision_encoder(True)
        writer.add_clip_projector_type("mlp")
        writer.add_vision_projection_dim(s.hidden)
        writer.add_vision_image_size(s.image_size)
        writer.add_vision_patch_size(s.patch_size)
        writer.add_vision_embedding_length(s.vision_hidden)
        writer.add_vision_feed_forward_length(s.vision_intermediate)
        writer.add_vision_block_count(max(layers))
        writer.add_vision_head_count(vision.num_attention_heads)
        writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
        writer.add_vision_image_mean([float(x) for x in images.image_mean])
        writer.add_vision_image_std([float(x) for x in images.image_std])
        writer.add_vision_use_gelu(vision.hidden_act == "gelu")
        writer.add_array("clip.vision.feature_layer", layers)

    return fill
