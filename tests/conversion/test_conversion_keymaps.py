"""The key table: bijective, complete against transformers' and gguf's own names, and strict with every difference."""

import dataclasses
import re

import pytest
import torch
from conversion_cases import random_language_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from modeling_llava.conversion.keymaps import (
    TOWER_PREFIXES,
    Sizes,
    canonical_hf_key,
    key_table,
    language_entries,
    match_keys,
    projector_entries,
    rename_all,
    vision_entries,
)
from modeling_llava.conversion.tensors import in_memory


SIZES = Sizes(
    layers=3,
    hidden=32,
    intermediate=48,
    heads=4,
    kv_heads=2,
    head_dim=8,
    vocabulary=128,
    vision_layers=2,
    vision_hidden=16,
    vision_intermediate=24,
    image_size=28,
    patch_size=14,
)


def stock_model(sizes: Sizes) -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        tie_word_embeddings=sizes.tied,
        attention_bias=sizes.attention_bias,
        mlp_bias=sizes.mlp_bias,
    )
    vision = CLIPVisionConfig(
        hidden_size=sizes.vision_hidden,
        intermediate_size=sizes.vision_intermediate,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=2,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
    )
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=5, multimodal_projector_bias=sizes.projector_bias
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(1, 4),
    vision_layers=st.integers(1, 4),
    projector_layers=st.integers(1, 5),
    flags=st.tuples(*[st.booleans()] * 5),
    tower=st.sampled_from(sorted(TOWER_PREFIXES)),
)
def test_every_name_stands_once_in_every_form(layers, vision_layers, projector_layers, flags, tower):
    tied, attention_bias, mlp_bias, projector_bias, numbered = flags
    sizes = dataclasses.replace(
        SIZES,
        layers=layers,
        vision_layers=vision_layers,
        projector_layers=projector_layers,
        tied=tied,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        projector_bias=projector_bias,
        projector_numbered=numbered,
    )
    table = key_table(sizes, tower)
    for form in ("original", "hf", "gguf"):
        names = [getattr(entry, form) for entry in table if getattr(entry, form) is not None]
        assert len(names) == len(set(names))
    assert all(entry.hf is not None for entry in table)
    # what one side lacks is exactly the identity of a single layer, and the norm that LLaVA does not use
    without_original = {entry.hf for entry in table if entry.original is None}
    assert len(without_original) == (0 if projector_layers > 1 else 1 + projector_bias)
    assert {entry.hf.split(".")[2] for entry in table if entry.gguf is None} == {"post_layernorm"}


@pytest.mark.parametrize(
    "change",
    [{}, {"tied": True}, {"attention_bias": True}, {"mlp_bias": True}, {"projector_bias": False}, {"head_dim": 16}],
    ids=str,
)
def test_hf_column_is_what_stock_transformers_has(change):
    sizes = dataclasses.replace(SIZES, **change)
    own = {entry.hf: entry.shape for entry in key_table(sizes)}
    stock = {canonical_hf_key(name): tuple(p.shape) for name, p in stock_model(sizes).named_parameters()}
    assert own == stock


def test_original_column_of_the_language_model_is_transformers_llama():
    for model_type in ("llama", "mistral"):
        model = random_language_model(model_type=model_type)
        sizes = dataclasses.replace(SIZES, **_language_sizes(model.config))
        own = {entry.original: entry.shape for entry in language_entries(sizes)}
        assert own == {name: tuple(p.shape) for name, p in model.named_parameters()}


def _language_sizes(config) -> dict:
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "vocabulary": config.vocab_size,
    }


def test_tower_column_is_transformers_clip():
    vision = stock_model(SIZES).config.vision_config
    with torch.device("meta"):
        names = {name: tuple(p.shape) for name, p in CLIPVisionModel(vision).named_parameters()}
    assert {entry.original: entry.shape for entry in vision_entries(SIZES, "bare")} == names


@pytest.mark.parametrize(
    ("layers", "numbered", "names"),
    [
        (1, False, ["model.mm_projector"]),
        (1, True, ["model.mm_projector.0"]),  # mlp1x_gelu
        (2, True, ["model.mm_projector.0", "model.mm_projector.2"]),
        (3, True, ["model.mm_projector.0", "model.mm_projector.2", "model.mm_projector.4"]),
    ],
)
def test_projector_names_are_those_of_the_originals_modules(layers, numbered, names):
    """The original builds `nn.Linear`, or `nn.Sequential(Linear, GELU, Linear, …)`."""
    sizes = dataclasses.replace(SIZES, projector_layers=layers, projector_numbered=numbered)
    original = [entry.original for entry in projector_entries(sizes) if entry.original]
    assert original == [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    expected = {f"multi_modal_projector.linear_{i}" for i in range(1, max(2, layers) + 1)}
    assert {entry.hf.rpartition(".")[0] for entry in projector_entries(sizes)} == expected


def test_gguf_column_is_the_gguf_packages_own_map():
    gguf = pytest.importorskip("gguf")
    biased = dataclasses.replace(SIZES, attention_bias=True, mlp_bias=True)
    own = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES.layers)
    for entry in language_entries(biased):
        assert own.get_name(entry.original, try_suffixes=(".weight", ".bias")) == entry.gguf
    towers = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, SIZES.vision_layers)
    for entry in vision_entries(SIZES):
        if entry.gguf is not None:
            assert towers.get_name(entry.hf, try_suffixes=(".weight", ".bias")) == entry.gguf


@pytest.mark.parametrize(
    ("key", "canonical"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("vision_tower.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        ("model.vision_tower.embeddings.class_embedding", "vision_tower.vision_model.embeddings.class_embedding"),
        ("language_model.model.norm.weight", "language_model.model.norm.weight"),
        ("vision_tower.vision_model.post_layernorm.weight", "vision_tower.vision_model.post_layernorm.weight"),
        ("my.vision_tower.embeddings.class_embedding", "my.vision_tower.embeddings.class_embedding"),
    ],
)
def test_spellings_of_hf_keys_are_put_into_one(key, canonical):
    assert canonical_hf_key(key) == canonical
    assert canonical_hf_key(canonical) == canonical


def make_tensors(entries, form="original"):
    return {getattr(e, form): in_memory(torch.zeros(e.shape), f"'{getattr(e, form)}' of a.bin") for e in entries}


def test_match_gives_each_entry_its_tensor():
    entries = [e for e in key_table(SIZES) if e.original]
    tensors = make_tensors(entries)
    matched = match_keys(entries, "original", tensors, "SRC")
    assert {entry.original: tensor for entry, tensor in matched.items()} == tensors


def test_match_lists_every_difference_at_once():
    entries = language_entries(SIZES)
    tensors = make_tensors(entries)
    del tensors["model.norm.weight"]
    tensors["model.extra.weight"] = in_memory(torch.zeros(3), "x")
    wrong = in_memory(torch.zeros(128, 31), "'lm_head.weight' of a.bin")
    tensors["lm_head.weight"] = wrong
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key] = in_memory(torch.zeros(48, 32, dtype=torch.int8), f"'{key}' of a.bin")
    with pytest.raises(ValueError) as error:
        match_keys(entries, "original", tensors, "SRC", hint="Mend it.")
    text = str(error.value)
    assert "SRC does not fit its configuration" in text
    assert "1 missing: 'model.norm.weight' [32]" in text
    assert "1 not known: 'model.extra.weight' [3]" in text
    assert "'lm_head.weight' of a.bin is [128, 31], its configuration asks for [128, 32]" in text
    assert re.search(r"neither float32.*up_proj\.weight' of a.bin is int8", text)
    assert text.endswith("Mend it.")


def test_two_keys_never_become_one():
    tensors = {
        "lm_head.weight": in_memory(torch.zeros(1), "a"),
        "language_model.lm_head.weight": in_memory(torch.zeros(1), "b"),
    }
    with pytest.raises(ValueError, match="both called 'language_model.lm_head.weight'"):
        rename_all(tensors, canonical_hf_key)
