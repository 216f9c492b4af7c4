"""What the conversion tests share: the golden checkpoints, and originals and HF folders made for one test."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_text_config
from transformers import AutoModelForCausalLM


GOLDEN = Path(__file__).parents[1] / "golden"
TOWER = GOLDEN / "llava_v15_tiny" / "vision_tower"

GOLDEN_CASES = {
    "llava_v15_tiny": "",
    "llava_v1_tiny": "",
    "llava_v15_tiny_lora": "llava-lora",
    "llava_v15_tiny_projector": "projector",
    "llava_v1_tiny_delta": "delta",
}
"""Name → folder of what is converted; that of a part lies next to its `language_model`."""


def golden_arguments(name: str) -> dict[str, Path]:
    """Of `convert_original_to_hf`."""
    source = GOLDEN / name / GOLDEN_CASES[name]
    return {"source": source, "base": source.parent / "language_model"} if GOLDEN_CASES[name] else {"source": source}


def original_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an original checkpoint, by the libraries that wrote it."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    for path in sorted(folder.glob("*.bin")):
        tensors |= torch.load(path, weights_only=True)
    return tensors


def same(first: Path, second: Path) -> bool:
    """Whether two folders hold the same tensors under the same keys, bit for bit."""
    first, second = original_tensors(first), original_tensors(second)
    return first.keys() == second.keys() and all(
        value.dtype == second[key].dtype and torch.equal(value, second[key]) for key, value in first.items()
    )


def copy_original(target: Path, name: str = "llava_v15_tiny", **config) -> Path:
    """A copy of a golden full checkpoint (tower inside its folder) with fields of its configuration changed."""
    shutil.copytree(GOLDEN / name, target)
    edit_json(target / "config.json", **config)
    return target


def edit_json(path: Path, **fields) -> None:
    content = json.loads(path.read_text("utf-8"))
    content |= fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not REMOVED}), "utf-8")


REMOVED = object()
"""As a value for `edit_json`: the field goes."""


def rewrite(folder: Path, change, form: str = "safetensors") -> None:
    """Replace the weights of a one-file checkpoint by `change(tensors)`, as safetensors, one `.bin` or sharded `.bin`."""
    tensors = change(original_tensors(folder))
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        path.unlink()
    if form == "safetensors":
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    elif form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        weight_map = {}
        for i in range(3):
            shard = f"pytorch_model-{i + 1:05d}-of-00003.bin"
            group = dict(list(tensors.items())[i::3])
            torch.save(group, folder / shard)
            weight_map |= dict.fromkeys(group, shard)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), "utf-8")


def random_language_model(model_type: str = "llama", hidden: int = 64):
    """A tiny LLaMA or Mistral with grouped queries, of transformers, with random weights (norms included)."""
    fields = {"hidden_size": hidden, "vocab_size": 700, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    fields |= {"sliding_window": None} if model_type == "mistral" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_text_config(model_type, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.dim() == 1 else 0.0))
    return model.eval()


def random_projector(layers: int) -> dict[str, torch.Tensor]:
    """The original's projector tensors: one layer is `mm_projector`, several are `mm_projector.0`, `.2`, …"""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for i in range(layers):
        name = "model.mm_projector" if layers == 1 else f"model.mm_projector.{2 * i}"
        tensors[f"{name}.weight"] = torch.randn(64, 64 if i else 32, generator=generator) * 0.3
        tensors[f"{name}.bias"] = torch.randn(64, generator=generator) * 0.1
    return tensors


def random_original(folder: Path, model_type: str = "llama", projector_layers: int = 2, **config) -> Path:
    """An original full checkpoint with a random language model, the golden tower and the golden tokenizer."""
    model = random_language_model(model_type)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(TOWER, folder / "vision_tower")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(GOLDEN / "llava_v15_tiny" / name, folder / name)
    tensors = {key: value.clone() for key, value in model.state_dict().items()} | random_projector(projector_layers)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    golden = json.loads((GOLDEN / "llava_v15_tiny" / "config.json").read_text("utf-8"))
    fields = golden | {
        "model_type": f"llava_{model_type}",
        "architectures": [f"Llava{model_type.title()}ForCausalLM"],
        "num_key_value_heads": model.config.num_key_value_heads,
        "max_position_embeddings": model.config.max_position_embeddings,
        "rms_norm_eps": model.config.rms_norm_eps,
        "sliding_window": None,
        "mm_projector_type": "linear" if projector_layers == 1 else f"mlp{projector_layers}x_gelu",
        **config,
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2), "utf-8")
    return folder
