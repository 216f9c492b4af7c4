"""The answers of `generate` for every kind of language model, with shared keys and values or, where that cannot be, without."""

import pytest
import torch
from tiny_predictor import QUESTIONS, assistant_turn, generated, picture, tiny_llava, user_turn

from modeling_llava.inference.predictor import LlavaPredictor


LANGUAGE_MODELS = {
    "llama": {},
    "llama without grouped heads": {"num_key_value_heads": 4},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "mistral, window inside the question": {"model_type": "mistral", "sliding_window": 6},
    "mistral, window over the image": {"model_type": "mistral", "sliding_window": 30},
    "qwen2, one layer with a window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
    "phi3": {"model_type": "phi3"},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16},
    "mistral, a window of three": {"model_type": "mistral", "sliding_window": 3},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    "deepseek_v2, values narrower than keys": {
        "model_type": "deepseek_v2",
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "v_head_dim": 12,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 2,
    },
}

ALIKE = ("gemma3", "mistral, a window of three")
"""Tiny models that answer other questions and images alike."""


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_answers_equal_generate_one_by_one_and_in_a_batch(name, processor):
    model = tiny_llava(processor, **{"pad_token_id": 0, **LANGUAGE_MODELS[name]})
    predictor = LlavaPredictor(model, processor)
    assert predictor.decoder.shares_prefixes
    image = picture(1)
    expected = [generated(model, processor, [user_turn(question, [image])]) for question in QUESTIONS]
    assert name in ALIKE or len(set(expected)) == len(QUESTIONS)
    predictor.set_image(image)
    assert predictor.ask(QUESTIONS, max_new_tokens=12) == expected
    assert predictor.ask(QUESTIONS, max_new_tokens=12, batch_size=2) == expected
    assert [predictor.ask(question, max_new_tokens=12) for question in QUESTIONS] == expected
    predictor.set_image(picture(2))
    assert name in ALIKE or predictor.ask(QUESTIONS, max_new_tokens=12) != expected


CANNOT_SHARE = {
    "scores that are capped": {
        "model_type": "gemma2",
        "head_dim": 16,
        "attn_logit_softcapping": 5.0,
        "sliding_window": 8,
    },
    "angles that go by the longest row": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    },
    "attention sinks": {"model_type": "gpt_oss", "head_dim": 16, "num_local_experts": 4, "sliding_window": 8},
    "keyword arguments that end in a layer": {"model_type": "nemotron"},
    "two attentions in a layer": {"model_type": "diffllama"},
    "layers that are gone through again": {"model_type": "hrm_text", "head_dim": 16, "num_key_value_heads": 4},
}


@pytest.mark.parametrize("name", CANNOT_SHARE)
def test_language_models_whose_keys_or_scores_depend_on_more_are_answered_all_the_same(name, processor):
    model = tiny_llava(processor, **{"pad_token_id": 0, **CANNOT_SHARE[name]})
    predictor = LlavaPredictor(model, processor)
    assert not predictor.decoder.shares_prefixes
    predictor.set_image(picture(1))
    expected = [generated(model, processor, [user_turn(question, [picture(1)])], 6) for question in QUESTIONS[:2]]
    assert predictor.ask(QUESTIONS[:2], max_new_tokens=6) == expected
    messages = [user_turn(QUESTIONS[0], [picture(1)]), assistant_turn(expected[0]), user_turn(QUESTIONS[1])]
    predictor.ask(QUESTIONS[0], keep_history=True, max_new_tokens=6)
    assert predictor.ask(QUESTIONS[1], keep_history=True, max_new_tokens=6) == generated(model, processor, messages, 6)


def test_lora_adapter_as_peft_model_and_as_loaded_adapter(processor, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = tiny_llava(processor)
    plain = LlavaPredictor(model, processor)
    plain.set_image(picture(1))
    without = plain.ask(QUESTIONS, max_new_tokens=8)
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)", init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    predictor = LlavaPredictor(adapted, processor)
    predictor.set_image(picture(1))
    answers = predictor.ask(QUESTIONS, max_new_tokens=8)
    assert answers == [generated(adapted, processor, [user_turn(q, [picture(1)])], 8) for q in QUESTIONS] != without
    adapted.save_pretrained(tmp_path)

    loaded = tiny_llava(processor)
    loaded.load_adapter(tmp_path)
    predictor = LlavaPredictor(loaded, processor)
    predictor.set_image(picture(1))
    assert predictor.ask(QUESTIONS, max_new_tokens=8) == answers


def test_virtual_tokens_of_prompt_tuning_are_refused_instead_of_left_out(model, processor):
    from peft import PromptTuningConfig, get_peft_model

    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="virtual tokens of a PromptTuningConfig"):
        LlavaPredictor(tuned, processor)


@pytest.mark.slow
def test_four_bit_weights(processor, tmp_path):
    from modeling_llava.inference.loading import load_model

    wide = tiny_llava(processor, hidden_size=64, intermediate_size=128)
    wide.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, loaded_processor = load_model(tmp_path, dtype=torch.float32, device="cpu", load_in_4bit=True)
    assert "Linear4bit" in {type(module).__name__ for module in model.modules()}
    predictor = LlavaPredictor(model, loaded_processor)
    predictor.set_image(picture(1))
    expected = [generated(model, loaded_processor, [user_turn(q, [picture(1)])], 8) for q in QUESTIONS]
    assert predictor.ask(QUESTIONS, max_new_tokens=8) == expected
