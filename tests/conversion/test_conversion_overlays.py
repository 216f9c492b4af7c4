"""Deltas, LoRA and projectors put together with their base, against PEFT and against plain sums."""

import json

import peft
import pytest
import torch
from conversion_cases import random_language_model
from safetensors.torch import load_file

from modeling_llava.conversion import tensors as tensors_module
from modeling_llava.conversion.overlays import add_delta, fold_lora, put_over
from modeling_llava.conversion.tensors import in_memory


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(tensors_module, "PIECE_BYTES", 1000)  # a few rows: sums are taken piece by piece


def lazy(tensors: dict[str, torch.Tensor], file: str = "base.bin") -> dict:
    return {key: in_memory(value, f"tensor '{key}' of {file}") for key, value in tensors.items()}


def whole(tensors: dict) -> dict[str, torch.Tensor]:
    return {key: torch.cat(list(tensor.pieces())).reshape(tensor.shape) for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    "use_rslora, bias, alpha_pattern",
    [(False, "none", {}), (True, "lora_only", {}), (False, "none", {r"layers\.1\.self_attn\.q_proj": 3})],
)
def test_folded_lora_is_what_peft_merges(tmp_path, use_rslora, bias, alpha_pattern):
    base = random_language_model()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["q_proj", "v_proj", "down_proj", "lm_head"],
        use_rslora=use_rslora,
        bias=bias,
        alpha_pattern=alpha_pattern,
        modules_to_save=["norm"],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    folded = whole(fold_lora(lazy(adapter, "adapter"), settings, lazy(before), "ADAPTER"))
    merged = model.merge_and_unload().state_dict()
    assert folded.keys() == merged.keys()
    changed = 0
    for key, value in merged.items():
        assert torch.allclose(folded[key], value, atol=1e-6), key
        changed += not torch.equal(before[key], value)
    assert changed == 2 * 3 + 1 + 5  # three matrices in each of two layers, the head; every norm was saved whole


DOWN, UP = torch.ones(2, 5), torch.ones(6, 2)


def lora(down: torch.Tensor, up: torch.Tensor, module: str = "h") -> dict[str, torch.Tensor]:
    return {f"base_model.model.{module}.lora_A.weight": down, f"base_model.model.{module}.lora_B.weight": up}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, c: c.update(use_dora=True), "kind DoRA"),
        (lambda a, c: c.update(init_lora_weights="pissa_niter_16"), "kind pissa"),
        (lambda a, c: c.update(peft_type="IA3"), "kind IA3"),
        (lambda a, c: c.pop("lora_alpha"), "no lora_alpha"),
        (lambda a, c: a.pop("base_model.model.h.lora_B.weight"), "lora_A of 'h' but not the other"),
        (lambda a, c: a.clear(), "no LoRA tensors"),
        (lambda a, c: a.update(lora(DOWN, UP, "other")), r"base has no 'other\.weight'.*adapter\.bin.*Is --base"),
        (lambda a, c: a.update(lora(DOWN[:, :4], UP)), r"\[6, 4\].*'h\.weight' of base\.bin is \[6, 5\].*Is --base"),
        (lambda a, c: a.update({"base_model.model.h.lora_magnitude_vector": UP}), "neither a LoRA tensor"),
    ],
)
def test_adapter_that_does_not_fit_is_one_clear_error(change, message):
    adapter, config = lora(DOWN, UP), {"r": 2, "lora_alpha": 4}
    change(adapter, config)
    with pytest.raises(ValueError, match=message):
        fold_lora(lazy(adapter, "adapter.bin"), config, lazy({"h.weight": torch.ones(6, 5)}), "ADAPTER")


def delta_and_base():
    shapes = {"model.embed_tokens.weight": (10, 4), "model.norm.weight": (4,), "lm_head.weight": (10, 4)}
    base = {key: torch.randn(shape) + 2 for key, shape in shapes.items()}
    delta = {key: torch.randn(shape) for key, shape in shapes.items()}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):  # the image tokens' rows
        delta[key] = torch.cat([delta[key], torch.randn(3, 4)])
    return delta, base


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, b: b.pop("lm_head.weight"), r"base has no 'lm_head\.weight'.*delta\.bin.*Is --base"),
        (lambda d, b: b.update({"model.norm.weight": UP[:5, 0]}), r"delta\.bin is \[4\], .*base\.bin is \[5\]"),
        (lambda d, b: b.update({"lm_head.weight": torch.ones(14, 4)}), r"is \[13, 4\], the base's .* is \[14, 4\]"),
        (lambda d, b: b.update({"more": torch.ones(1)}), "1 of its tensors, such as 'more'"),
        (lambda d, b: d.update({"model.norm.weight": b["model.norm.weight"] * 1.01}), "whole model.*Leave out --base"),
    ],
)
def test_wrong_base_of_a_delta_is_one_clear_error(change, message):
    delta, base = delta_and_base()
    change(delta, base)
    with pytest.raises(ValueError, match=message):
        add_delta(lazy(delta, "delta.bin"), lazy(base), "DELTA")


def test_embedding_rows_of_another_width_are_refused():
    key = "model.embed_tokens.weight"
    with pytest.raises(ValueError, match="Is --base"):
        put_over(lazy({key: torch.randn(6, 3)}), lazy({key: torch.randn(2, 4)}))
