"""The key table: equal to stock transformers' names, and strict with every difference."""

import re

import pytest
import torch
from tiny import tiny_config, tiny_text_config, tiny_vision_config
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from modeling_llava import conversion
from modeling_llava.conversion.keymaps import (
    Projector,
    canonical_hf_key,
    key_table,
    language_entries,
    match_keys,
    rename_all,
)
from modeling_llava.conversion.tensors import in_memory


@pytest.mark.parametrize(
    "text, bias",
    [
        ({}, True),
        ({"tie_word_embeddings": True}, True),
        ({"attention_bias": True, "mlp_bias": True}, True),
        ({"head_dim": 32}, False),
        ({"model_type": "mistral"}, True),
    ],
    ids=str,
)
def test_hf_column_is_what_stock_transformers_has(text, bias):
    text, vision = tiny_text_config(**text), tiny_vision_config(hidden_size=40)
    config = tiny_config(LlavaConfig, text=text, vision=vision, multimodal_projector_bias=bias)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    table = key_table(text, config.vision_config, Projector(2, 40, 64, bias, True))
    stock = {canonical_hf_key(name): tuple(p.shape) for name, p in model.named_parameters()}
    assert {entry.hf: entry.shape for entry in table} == stock


def test_match_lists_every_difference_at_once():
    shapes = {entry.original: entry.shape for entry in language_entries(tiny_text_config())}
    tensors = {name: in_memory(torch.zeros(shape), f"'{name}' of a.bin") for name, shape in shapes.items()}
    match_keys(shapes, tensors, "SRC")
    del tensors["model.norm.weight"]
    tensors["model.extra.weight"] = in_memory(torch.zeros(3), "x")
    tensors["lm_head.weight"] = in_memory(torch.zeros(300, 31), "'lm_head.weight' of a.bin")
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key] = in_memory(torch.zeros(96, 64, dtype=torch.int8), f"'{key}' of a.bin")
    with pytest.raises(ValueError, match=r"^SRC .*The cause\.$") as error:
        match_keys(shapes, tensors, "SRC", hint="The cause.")
    text = str(error.value)
    assert "1 missing: 'model.norm.weight' [64]" in text
    assert "1 not known: 'model.extra.weight' [3]" in text
    assert "'lm_head.weight' of a.bin is [300, 31], its configuration asks for [300, 64]" in text
    assert re.search(r"neither float32.*up_proj\.weight' of a.bin is int8", text)


def test_the_conversions_are_found_by_name_and_nothing_else():
    assert callable(conversion.convert_hf_to_original) and not hasattr(conversion, "convert_hf_to_onnx")


def test_two_keys_never_become_one():
    names = ("lm_head.weight", "language_model.lm_head.weight")
    with pytest.raises(ValueError, match="both called 'language_model.lm_head.weight'"):
        rename_all({name: in_memory(torch.zeros(1), name) for name in names}, canonical_hf_key)
