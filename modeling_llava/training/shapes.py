"""
Sizes of a LLaVA from its `config.json` alone: parameters by component, without importing PyTorch.

`llava estimate` answers in about a second because of it. The counts are held against the real models by tests.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..io.load_errors import is_original, other_than_llava, read_config


_TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    # what a configuration leaves out, as transformers fills it in
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
              "vocab_size": 32000},
    "mistral": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "vocab_size": 32000},
    "qwen2": {"hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 32, "vocab_size": 151936},
    "qwen3": {"hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 32, "vocab_size": 151936, "head_dim": 128},
}  # fmt: skip
_VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    # inside of a llava configuration: CLIP ViT-L/14-336; alone: transformers' defaults
    "llava": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
              "image_size": 336, "patch_size": 14},
    "clip_vision_model": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                          "num_attention_heads": 12, "image_size": 224, "patch_size": 32},
    "siglip_vision_model": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                            "num_attention_heads": 12, "image_size": 224, "patch_size": 16},
}  # fmt: skip

# Configurations of the models that the presets name, for a machine that has neither a copy nor a network.
_KNOWN: dict[str, dict[str, Any]] = {
    "llava-hf/llava-1.5-7b-hf": {"text_config": {"model_type": "llama", "vocab_size": 32064}},
    "llava-hf/llava-1.5-13b-hf": {
        "text_config": {
            "model_type": "llama", "vocab_size": 32064, "hidden_size": 5120, "intermediate_size": 13824,
            "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40,
        }
    },
}  # fmt: skip


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

LIKE_LLAMA = ("llama", "mistral", "phi3", "qwen2", "qwen3")
"""Language models whose layers are a Llama's in all that takes memory: the estimate was held against each."""


@dataclass(frozen=True)
class Shapes:
    """Sizes that decide about memory and time. Lengths in positions, images in pixels."""

    text_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    attention_bias: bool
    """Biases of queries, keys and values."""
    output_bias: bool
    """Bias of the attention's output projection."""
    mlp_bias: bool
    vision_type: str
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    image_size: int
    patch_size: int
    feature_layers: int
    """Hidden states of the tower that are joined."""
    image_tokens: int
    """Positions of the language model that one image takes."""
    projector_layers: int
    projector_bias: bool

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def vision_positions(self) -> int:
        """Positions of the tower per image."""
        return self.patches + (1 if self.vision_type == "clip_vision_model" else 0)

    @property
    def tower(self) -> int:
        """Parameters of the vision tower."""
        v, m = self.vision_hidden, self.vision_intermediate
        layer = 4 * (v * v + v) + 4 * v + (v * m + m) + (m * v + v)
        common = self.vision_layers * layer + 3 * self.patch_size**2 * v + self.vision_positions * v + 2 * v
        if self.vision_type == "siglip_vision_model":
            pooling_head = v + 4 * (v * v + v) + 2 * v + (v * m + m) + (m * v + v)
            return common + v + pooling_head
        return common + v + 2 * v  # class token, first norm

    @property
    def projector(self) -> int:
        """Parameters of the projector."""
        first = self.vision_hidden * self.feature_layers * self.hidden
        bias = self.hidden if self.projector_bias else 0
        return first + bias + (self.projector_layers - 1) * (self.hidden**2 + bias)

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each linear layer of one layer of the language model."""
        queries, keys = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        h, m = self.hidden, self.intermediate
        return [(h, queries), (h, keys), (h, keys), (queries, h), (h, m), (h, m), (m, h)]

    @property
    def layer_matrices(self) -> int:
        """Parameters of the language model's linear layers, which QLoRA keeps in 4 bit."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def layer_rest(self) -> int:
        """Norms and biases of the language model."""
        queries, keys = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        rest = 2 * self.hidden
        rest += (queries + 2 * keys) * self.attention_bias + self.hidden * self.output_bias
        rest += (2 * self.intermediate + self.hidden) * self.mlp_bias
        rest += 2 * self.head_dim if self.text_type == "qwen3" else 0
        return self.layers * rest + self.hidden

    @property
    def embeddings(self) -> int:
        """Parameters of the embedding matrix, and of the head if it has its own."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def language_model(self) -> int:
        return self.layer_matrices + self.layer_rest + self.embeddings

    def lora(self, rank: int) -> int:
        """Parameters of low-rank matrices beside every linear layer of the language model."""
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self.linears)


def shapes_of(config: dict[str, Any]) -> Shapes:
    """
    Sizes from a `llava` configuration.

    Args:
        config (`dict`):
            The content of `config.json`.

    Raises:
        ValueError: it is not a `llava` configuration, or of a tower or language model whose sizes are not known.
    """
    if config.get("model_type", "llava") != "llava":
        raise ValueError(f"The configuration is of the type {config['model_type']!r}, not llava.")
    text, vision = dict(config.get("text_config") or {}), dict(config.get("vision_config") or {})
    text_type = text.get("model_type", "llama")
    vision_type = vision.get("model_type", "clip_vision_model")
    text = {**_TEXT_DEFAULTS.get(text_type, {}), **text}
    vision_defaults = _VISION_DEFAULTS["llava"] if "vision_config" not in config else _VISION_DEFAULTS.get(vision_type)
    vision = {**(vision_defaults or {}), **vision}
    for name, part in (("text_config", text), ("vision_config", vision)):
        missing = [key for key in ("hidden_size", "intermediate_size", "num_hidden_layers") if part.get(key) is None]
        if missing:
            kind = part.get("model_type")
            raise ValueError(
                f"{name} of the type {kind!r} does not say {', '.join(missing)}, so nothing can be estimated."
            )
    experts = next((key for key in _EXPERTS if (text.get(key) or 0) > 1), "moe" if "moe" in text_type else None)
    if experts is not None or text_type == "mixtral":  # a configuration may leave out what is its type's default
        raise ValueError(
            f"text_config of the type {text_type!r} is a mixture of experts ({experts or text_type}): its weights are not "
            "counted here, so nothing can be estimated."
        )
    heads = text["num_attention_heads"]
    image_size, patch_size = _side(vision["image_size"]), _side(vision["patch_size"])
    additional = 1 if vision_type == "clip_vision_model" else 0
    strategy = config.get("vision_feature_select_strategy", "default")
    feature_layer = config.get("vision_feature_layer", -2)
    is_qwen2 = text_type == "qwen2"
    return Shapes(
        text_type=text_type,
        hidden=text["hidden_size"],
        intermediate=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=heads,
        key_value_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        vocabulary=text["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)),
        attention_bias=is_qwen2 or bool(text.get("attention_bias", False)),
        output_bias=not is_qwen2 and bool(text.get("attention_bias", False)),
        mlp_bias=bool(text.get("mlp_bias", False)),
        vision_type=vision_type,
        vision_hidden=vision["hidden_size"],
        vision_intermediate=vision["intermediate_size"],
        vision_layers=vision["num_hidden_layers"],
        vision_heads=vision["num_attention_heads"],
        image_size=image_size,
        patch_size=patch_size,
        feature_layers=1 if isinstance(feature_layer, int) else len(feature_layer),
        image_tokens=(image_size // patch_size) ** 2 + additional - (1 if strategy == "default" else 0),
        projector_layers=config.get("projector_num_layers", 2),
        projector_bias=config.get("multimodal_projector_bias", True),
    )


def _side(size: int | list[int]) -> int:
    return size if isinstance(size, int) else size[0]


def find_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """
    `config.json` of a model folder or Hub name: from the folder, the local cache, the Hub, or, for the models that our
    presets name, from a table. An adapter or projector folder leads to its base.

    Raises:
        FileNotFoundError: there is no such folder, and no such model can be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            config = read_config(folder / "config.json")
            if config.get("model_type", "llava") != "llava" or is_original(config):
                adapter = read_config(folder / "adapter_config.json")
                raise ValueError(other_than_llava(model, config, adapter, lambda file: (folder / file).is_file()))
            return config
        for name in ("adapter_config.json", "projector_config.json"):
            if (folder / name).is_file():
                base = json.loads((folder / name).read_text("utf-8")).get("base_model_name_or_path")
                if base:
                    return find_config(base)
        raise FileNotFoundError(f"{model} holds no config.json.")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no folder {model!r}, and it is not the name of a model on the Hub.")
    cached = _cached(model, revision)
    if cached is not None:
        return json.loads(cached.read_text("utf-8"))
    if model in _KNOWN:
        return _KNOWN[model]
    from huggingface_hub import hf_hub_download  # only now: importing it takes as long as everything else here

    try:
        return json.loads(Path(hf_hub_download(model, "config.json", revision=revision)).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"The configuration of {model} is neither in the local cache nor to be had from the Hub: {error}"
        ) from None


def _cached(model: str, revision: str | None) -> Path | None:
    """`config.json` in the Hub's local cache, found as `huggingface_hub` lays it out."""
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))).expanduser()
    repository = cache / f"models--{model.replace('/', '--')}"
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    path = repository / "snapshots" / commit / "config.json" if commit else None
    return path if path is not None and path.is_file() else None


__all__ = ["LIKE_LLAMA", "Shapes", "find_config", "shapes_of"]
