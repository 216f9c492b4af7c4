"""Composing a LLaVA from a tower and a language model of many families."""

import json
import shutil

import pytest
import torch
from published import build_language, build_tower
from tiny import tiny_text_config, tiny_vision_config
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
)
from transformers import LlavaForConditionalGeneration as StockModel

from modeling_llava import LlavaForConditionalGeneration
from modeling_llava.configuration_llava import count_additional_image_tokens


VOCABULARY = 700  # of golden/tiny_spm.model


def save_language_model(folder, golden, model_type="llama", vocab_size=VOCABULARY, **overrides):
    config = tiny_text_config(model_type, vocab_size=vocab_size, **overrides)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    shutil.copy(golden / "tiny_spm.model", folder / "tokenizer.model")
    return str(folder)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("language", ["llama", "mistral", "qwen2", "gpt2", "gpt_neox", "opt"])
def test_composed_model_is_its_parts_and_loads_in_stock(tmp_path, golden, tower, language):
    overrides = {"rotary_pct": 0.5} if language == "gpt_neox" else {}
    overrides = {"word_embed_proj_dim": 64} if language == "opt" else overrides
    vision = str(build_tower(tower))
    text = save_language_model(tmp_path / "language", golden, language, **overrides)
    model = LlavaForConditionalGeneration.from_vision_language_pretrained(vision, text)

    assert model.config.image_token_id == VOCABULARY  # <image> and <pad> follow the 700 pieces
    assert model.config.image_seq_length == 4
    assert model.config.vision_feature_select_strategy == ("default" if tower == "clip" else "full")
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == 704
    assert model.generation_config.pad_token_id == VOCABULARY + 1

    alone = AutoModelForCausalLM.from_pretrained(text).eval()
    ids = torch.arange(3, 15)[None]
    torch.testing.assert_close(model(input_ids=ids).logits[..., :VOCABULARY], alone(input_ids=ids).logits)
    pixels = torch.randn(1, 3, 28, 28)
    tower_alone = AutoModel.from_pretrained(vision).eval()
    torch.testing.assert_close(
        model.model.vision_tower(pixels).last_hidden_state, tower_alone(pixels).last_hidden_state
    )

    model.save_pretrained(tmp_path / "llava")
    stock, info = StockModel.from_pretrained(tmp_path / "llava", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor([[1, *[VOCABULARY] * 4, 20, 21]])
    torch.testing.assert_close(
        stock.eval()(input_ids=ids, pixel_values=pixels).logits, model(input_ids=ids, pixel_values=pixels).logits
    )


@pytest.mark.parametrize("vocab_size, rows", [(VOCABULARY, 704), (768, 768)], ids=["grown", "kept in reserve"])
def test_new_rows_are_the_mean_of_the_known_ones(tmp_path, golden, vocab_size, rows):
    text = save_language_model(tmp_path / "language", golden, vocab_size=vocab_size)
    model = LlavaForConditionalGeneration.from_vision_language_pretrained(str(build_tower()), text)
    alone = AutoModelForCausalLM.from_pretrained(text)
    assert model.config.image_token_id == VOCABULARY
    for ours, theirs in ((model.get_input_embeddings(), alone.get_input_embeddings()), (model.lm_head, alone.lm_head)):
        known = theirs.weight[:VOCABULARY]
        assert torch.equal(ours.weight[:VOCABULARY], known) and len(ours.weight) == rows
        torch.testing.assert_close(ours.weight[VOCABULARY:], known.mean(dim=0).expand(rows - VOCABULARY, -1))


def test_tied_language_model_stays_tied(tmp_path, golden):
    text = save_language_model(tmp_path / "language", golden, tie_word_embeddings=True)
    model = LlavaForConditionalGeneration.from_vision_language_pretrained(str(build_tower()), text)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "llava")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava")
    assert again.lm_head.weight is again.get_input_embeddings().weight


def test_a_language_model_with_a_temperature_and_no_sampling_is_composed_and_saved(tmp_path):
    """Vicuna's generation configuration: once its padding token is set, transformers 5 refuses to save it as it is."""
    language = shutil.copytree(build_language("vicuna"), tmp_path / "language")
    (language / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}))
    model = LlavaForConditionalGeneration.from_vision_language_pretrained(str(build_tower()), str(language))
    model.save_pretrained(tmp_path / "model")


def test_fields_of_the_configuration_are_taken(tmp_path, golden):
    text = save_language_model(tmp_path / "language", golden)
    model = LlavaForConditionalGeneration.from_vision_language_pretrained(
        str(build_tower()), text, dtype=torch.bfloat16, vision_feature_layer=-1, projector_num_layers=1
    )
    assert model.dtype == model.model.vision_tower.dtype == torch.bfloat16
    assert model.config.vision_feature_layer == -1
    assert model.config.projector_hidden_act == "linear"
    projector = model.model.multi_modal_projector
    assert torch.equal(projector.linear_2.weight.float(), torch.eye(64))
    # initializer_range
    assert 0.015 < projector.linear_1.weight.float().std() < 0.025 and not projector.linear_1.bias.any()


def test_the_vision_half_of_a_clip_pair_is_taken(tmp_path, golden):
    text_config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    pair = CLIPModel(CLIPConfig(vision_config=tiny_vision_config().to_dict(), text_config=text_config)).eval()
    pair.save_pretrained(tmp_path / "pair")
    text = save_language_model(tmp_path / "language", golden)
    model = LlavaForConditionalGeneration.from_vision_language_pretrained(str(tmp_path / "pair"), text)
    pixels = torch.randn(1, 3, 28, 28)
    torch.testing.assert_close(
        model.model.vision_tower(pixels).last_hidden_state, pair.vision_model(pixels).last_hidden_state
    )


IDS = {"bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(
    "language, overrides, message",
    [
        ("gemma2", {"head_dim": 16, "pad_token_id": 0}, "scales or caps"),  # capped at 30, far from random weights'
        ("cohere", IDS, "scales or caps"),
        ("phi", {}, "bias"),
        ("mamba", {**IDS, "pad_token_id": 0}, "cannot be the language model of a llava"),
        ("openai-gpt", {"n_positions": 64}, "cannot be the language model of a llava"),  # no cache, which stock reads
    ],
)
def test_heads_that_a_llava_checkpoint_cannot_hold_are_refused(tmp_path, golden, language, overrides, message):
    text = save_language_model(tmp_path / "language", golden, language, **overrides)
    with pytest.raises(ValueError, match=message):
        LlavaForConditionalGeneration.from_vision_language_pretrained(str(build_tower()), text)


@pytest.mark.parametrize("tower, shapes", [("vit_mae", r"\[1, 2, 32\]"), ("convnext", r"\[1, 8, 7, 7\]")])
def test_a_tower_without_a_position_for_each_patch_is_refused(tower, shapes):
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "patch_size": 4} if tower == "convnext" else {}
    with pytest.raises(ValueError, match=f"{tower}.*patches: .*{shapes}"):
        count_additional_image_tokens(tiny_vision_config(tower, **sizes))


def test_a_tower_that_takes_more_than_pixels_or_has_no_image_size_is_refused():
    config = tiny_vision_config("siglip2_vision_model", num_patches=4)
    with pytest.raises(ValueError, match="siglip2_vision_model.* on pixel_values alone .*spatial_shapes"):
        count_additional_image_tokens(config)
    with pytest.raises(ValueError, match="resnet.* image_size=None and patch_size=None"):
        count_additional_image_tokens(AutoConfig.for_model("resnet"))


def test_wrong_names_are_one_clear_error(tmp_path, golden):
    text = save_language_model(tmp_path / "language", golden)
    tower = str(build_tower())
    with pytest.raises(ValueError, match="no field vision_layer"):
        LlavaForConditionalGeneration.from_vision_language_pretrained(tower, text, vision_layer=-1)
    with pytest.raises(FileNotFoundError, match="missing.gguf does not exist"):
        LlavaForConditionalGeneration.from_vision_language_pretrained(tower, str(tmp_path / "missing.gguf"))
