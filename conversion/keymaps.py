"""
The names that one tensor has in each form of a checkpoint, written out once, tensor by tensor.

`key_table` lists every tensor of a LLaVA of given sizes: its name in the original's form, in the HF form and in llama.cpp's
files, and its shape. `match_keys` compares a checkpoint with one column of the table and lists every difference in one
error. No name is made by replacing parts of another.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from .tensors import LazyTensor


FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

TOWER_PREFIXES = {
    "inside": "model.vision_tower.vision_tower.vision_model.",
    "clip": "vision_model.",
    "bare": "",
}
"""Where a CLIP tower's names begin: in an original checkpoint that trained it, in a CLIP folder, in one that
transformers 5 made."""


@dataclass(frozen=True)
class Sizes:
    """
    What determines the names and shapes of a LLaVA's tensors.

    Args:
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary (`int`):
            Of the language model (LLaMA or Mistral); `vocabulary` in rows of the embedding.
        tied (`bool`): The head is the embedding and is not saved.
        attention_bias, mlp_bias (`bool`): Of the language model's linear layers.
        vision_layers, vision_hidden, vision_intermediate, image_size, patch_size, channels (`int`):
            Of the CLIP tower; sizes in pixels.
        feature_layers (`int`): Number of tower layers whose features are concatenated.
        projector_layers (`int`): Linear layers of the projector.
        projector_bias (`bool`): Of the projector's layers.
        projector_numbered (`bool`):
            The original's single layer stands in an `nn.Sequential` (`mlp1x_gelu`) and is called `mm_projector.0`.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    vision_layers: int = 0
    vision_hidden: int = 0
    vision_intermediate: int = 0
    image_size: int = 0
    patch_size: int = 1
    channels: int = 3
    feature_layers: int = 1
    projector_layers: int = 2
    projector_bias: bool = True
    projector_numbered: bool = False

    @classmethod
    def from_configs(cls, text, vision, **projector) -> "Sizes":
        """From the configurations of a language model and a CLIP tower (`PreTrainedConfig`); the rest as it stands."""
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads or text.num_attention_heads,
            head_dim=head_dim,
            vocabulary=text.vocab_size,
            tied=bool(text.tie_word_embeddings),
            attention_bias=bool(getattr(text, "attention_bias", False)),
            mlp_bias=bool(getattr(text, "mlp_bias", False)),
            vision_layers=vision.num_hidden_layers,
            vision_hidden=vision.hidden_size,
            vision_intermediate=vision.intermediate_size,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            channels=vision.num_channels,
            **projector,
        )


@dataclass(frozen=True)
class Entry:
    """
    One tensor: its shape and its names. `None` as a name: this form does not hold it.

    Args:
        part (`str`): `"language"`, `"vision"` or `"projector"`.
        original, hf, gguf (`str`, *optional*):
            Names in the original's checkpoint, in the HF checkpoint, in llama.cpp's files.
        shape (`tuple[int, ...]`): As in PyTorch.
    """

    part: Literal["language", "vision", "projector"]
    original: str | None
    hf: str | None
    gguf: str | None
    shape: tuple[int, ...]


Column = Literal["original", "hf", "gguf"]


def key_table(sizes: Sizes, tower: str = "inside") -> list[Entry]:
    """Every tensor of a LLaVA of these sizes."""
    return [*language_entries(sizes), *projector_entries(sizes), *vision_entries(sizes, tower)]


def language_entries(s: Sizes) -> list[Entry]:
    """LLaMA and Mistral: their tensors have the same names. The HF form puts `language_model.` before them."""
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    rows = [("model.embed_tokens.weight", "token_embd.weight", (s.vocabulary, s.hidden))]
    for i in range(s.layers):
        at, to = f"model.layers.{i}", f"blk.{i}"
        rows += [
            (f"{at}.self_attn.q_proj.weight", f"{to}.attn_q.weight", (queries, s.hidden)),
            (f"{at}.self_attn.k_proj.weight", f"{to}.attn_k.weight", (keys, s.hidden)),
            (f"{at}.self_attn.v_proj.weight", f"{to}.attn_v.weight", (keys, s.hidden)),
            (f"{at}.self_attn.o_proj.weight", f"{to}.attn_output.weight", (s.hidden, queries)),
            (f"{at}.mlp.gate_proj.weight", f"{to}.ffn_gate.weight", (s.intermediate, s.hidden)),
            (f"{at}.mlp.up_proj.weight", f"{to}.ffn_up.weight", (s.intermediate, s.hidden)),
            (f"{at}.mlp.down_proj.weight", f"{to}.ffn_down.weight", (s.hidden, s.intermediate)),
            (f"{at}.input_layernorm.weight", f"{to}.attn_norm.weight", (s.hidden,)),
            (f"{at}.post_attention_layernorm.weight", f"{to}.ffn_norm.weight", (s.hidden,)),
        ]
        if s.attention_bias:
            rows += [
                (f"{at}.self_attn.q_proj.bias", f"{to}.attn_q.bias", (queries,)),
                (f"{at}.self_attn.k_proj.bias", f"{to}.attn_k.bias", (keys,)),
                (f"{at}.self_attn.v_proj.bias", f"{to}.attn_v.bias", (keys,)),
                (f"{at}.self_attn.o_proj.bias", f"{to}.attn_output.bias", (s.hidden,)),
            ]
        if s.mlp_bias:
            rows += [
                (f"{at}.mlp.gate_proj.bias", f"{to}.ffn_gate.bias", (s.intermediate,)),
                (f"{at}.mlp.up_proj.bias", f"{to}.ffn_up.bias", (s.intermediate,)),
                (f"{at}.mlp.down_proj.bias", f"{to}.ffn_down.bias", (s.hidden,)),
            ]
    rows.append(("model.norm.weight", "output_norm.weight", (s.hidden,)))
    if not s.tied:
        rows.append(("lm_head.weight", "output.weight", (s.vocabulary, s.hidden)))
    return [Entry("language", name, f"language_model.{name}", gguf, shape) for name, gguf, shape in rows]


def projector_entries(s: Sizes) -> list[Entry]:
    """
    The projector: one `nn.Linear` (`mm_projector.weight`), or an `nn.Sequential` with activations between, so that its
    layers have even numbers (`mm_projector.0`, `.2`, …). The HF form counts `linear_1`, `linear_2`, …

    Of a single layer, HF's `linear_2` is the identity and has no name on the other side (DESIGN §5).
    """
    entries = []
    for i in range(s.projector_layers):
        is_bare = s.projector_layers == 1 and not s.projector_numbered
        original = "model.mm_projector" if is_bare else f"model.mm_projector.{2 * i}"
        width = s.vision_hidden * s.feature_layers if i == 0 else s.hidden
        entries.append(
            Entry(
                "projector",
                f"{original}.weight",
                f"{projector_key(i)}.weight",
                f"mm.{2 * i}.weight",
                (s.hidden, width),
            )
        )
        if s.projector_bias:
            entries.append(
                Entry("projector", f"{original}.bias", f"{projector_key(i)}.bias", f"mm.{2 * i}.bias", (s.hidden,))
            )
    if s.projector_layers == 1:
        entries.append(Entry("projector", None, f"{projector_key(1)}.weight", "mm.2.weight", (s.hidden, s.hidden)))
        if s.projector_bias:
            entries.append(Entry("projector", None, f"{projector_key(1)}.bias", "mm.2.bias", (s.hidden,)))
    return entries


def projector_key(index: int) -> str:
    """HF's module of the projector's layer `index`, counted from 0."""
    return f"multi_modal_projector.linear_{index + 1}"


def vision_entries(s: Sizes, tower: str = "inside") -> list[Entry]:
    """
    CLIP's vision tower. `pre_layrnorm` is spelled so in every checkpoint. In llama.cpp's file `post_layernorm` is left
    out: LLaVA takes features before it, and llama.cpp would apply it.
    """
    hidden, middle, patch = s.vision_hidden, s.vision_intermediate, s.patch_size
    positions = (s.image_size // patch) ** 2 + 1  # patches and the class token
    rows = [
        ("embeddings.class_embedding", "v.class_embd", (hidden,)),
        ("embeddings.patch_embedding.weight", "v.patch_embd.weight", (hidden, s.channels, patch, patch)),
        ("embeddings.position_embedding.weight", "v.position_embd.weight", (positions, hidden)),
        ("pre_layrnorm.weight", "v.pre_ln.weight", (hidden,)),
        ("pre_layrnorm.bias", "v.pre_ln.bias", (hidden,)),
    ]
    for i in range(s.vision_layers):
        at, to = f"encoder.layers.{i}", f"v.blk.{i}"
        linears = [
            ("self_attn.q_proj", "attn_q", (hidden, hidden)),
            ("self_attn.k_proj", "attn_k", (hidden, hidden)),
            ("self_attn.v_proj", "attn_v", (hidden, hidden)),
            ("self_attn.out_proj", "attn_out", (hidden, hidden)),
            ("mlp.fc1", "ffn_up", (middle, hidden)),
            ("mlp.fc2", "ffn_down", (hidden, middle)),
            ("layer_norm1", "ln1", (hidden,)),
            ("layer_norm2", "ln2", (hidden,)),
        ]
        for module, gguf, shape in linears:
            rows.append((f"{at}.{module}.weight", f"{to}.{gguf}.weight", shape))
            rows.append((f"{at}.{module}.bias", f"{to}.{gguf}.bias", shape[:1]))
    rows += [("post_layernorm.weight", None, (hidden,)), ("post_layernorm.bias", None, (hidden,))]
    prefix = TOWER_PREFIXES[tower]
    return [
        Entry("vision", f"{prefix}{name}", f"vision_tower.vision_model.{name}", gguf, shape)
        for name, gguf, shape in rows
    ]


# Names that are normalised or left out

DERIVED = (
    re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    re.compile(r"model\.rotary_emb\.inv_freq"),
    re.compile(r"(model\.vision_tower\.vision_tower\.)?(vision_model\.)?embeddings\.position_ids"),
    re.compile(r"vision_tower\.(vision_model\.)?embeddings\.position_ids"),
)
"""Buffers that old versions of transformers saved, computed from the configuration."""

CLIP_TEXT_SIDE = re.compile(r"(text_model\..+|text_projection\.weight|visual_projection\.weight|logit_scale)")
"""What a CLIP pair holds besides its vision tower."""

HF_SPELLINGS = (
    (re.compile(r"model\.language_model\.(.+)"), r"language_model.model.\1"),
    (re.compile(r"lm_head\.(.+)"), r"language_model.lm_head.\1"),
    (re.compile(r"model\.(vision_tower|multi_modal_projector)\.(.+)"), r"\1.\2"),
)
"""Names of the modules in memory, which some tools save, and the names that a checkpoint has for them."""

BARE_HF_TOWER = re.compile(r"vision_tower\.((?:embeddings|encoder|pre_layrnorm|post_layernorm)\..+)")
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
    return {key: value for key, value in tensors.items() if not any(rule.fullmatch(key) for rule in DERIVED)}


def rename_all(tensors: Mapping[str, LazyTensor], rename) -> dict[str, LazyTensor]:
    """`tensors` under `rename(key)`. ValueError where two keys would become one."""
    renamed: dict[str, LazyTensor] = {}
    for key, tensor in tensors.items():
        new = rename(key)
        if new in renamed:
            raise ValueError(f"'{key}' ({tensor.origin}) and another tensor are both called '{new}'.")
        renamed[new] = tensor
    return renamed


def tower_form(keys) -> str | None:
    """The key of [`TOWER_PREFIXES`] under which `keys` hold a CLIP tower; `None` if they hold none."""
    return next(
        (form for form, prefix in TOWER_PREFIXES.items() if f"{prefix}embeddings.class_embedding" in keys), None
    )


# Comparing a checkpoint with the table


def match_keys(
    entries: list[Entry], column: Column, tensors: Mapping[str, LazyTensor], source: str, *, hint: str = ""
) -> dict[Entry, LazyTensor]:
    """
    Each entry of the table with its tensor.

    Args:
        entries (`list[Entry]`): What must be there. Entries without a name in `column` are passed over.
        column (`str`): Which form `tensors` are in.
        tensors (`Mapping[str, LazyTensor]`): What is there.
        source (`str`): For the error: what was read.
        hint (`str`, *optional*): For the error: the likely cause and the fix.

    Raises:
        ValueError: a tensor that the table does not have, one that is missing, one of another shape, or one that is
            not float32, float16 or bfloat16. All of them are listed (the first five of each kind).
    """
    wanted = {getattr(entry, column): entry for entry in entries if getattr(entry, column) is not None}
    assert len(wanted) == sum(getattr(entry, column) is not None for entry in entries), "a name stands twice"

    missing = [f"'{key}' {list(entry.shape)}" for key, entry in wanted.items() if key not in tensors]
    unknown = [f"'{key}' {list(tensors[key].shape)}" for key in tensors if key not in wanted]
    shapes, dtypes = [], []
    for key, entry in wanted.items():
        tensor = tensors.get(key)
        if tensor is not None and tensor.shape != entry.shape:
            shapes.append(f"{tensor.origin} is {list(tensor.shape)}, its configuration asks for {list(entry.shape)}")
        elif tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            dtypes.append(f"{tensor.origin} is {str(tensor.dtype).removeprefix('torch.')}")
    problems = [
        _list("missing", missing),
        _list("not known", unknown),
        _list("of another shape", shapes),
        _list("neither float32, float16 nor bfloat16 (quantised weights cannot be converted)", dtypes),
    ]
    if any(problems):
        text = "; ".join(problem for problem in problems if problem)
        raise ValueError(f"{source} does not fit its configuration: {text}.{' ' + hint if hint else ''}")
    return {entry: tensors[key] for key, entry in wanted.items()}


def _list(kind: str, items: list[str], limit: int = 5) -> str:
    if not items:
        return ""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return f"{len(items)} {kind}: {', '.join(items[:limit])}{more}"
