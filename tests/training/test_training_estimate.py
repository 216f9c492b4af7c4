"""The estimate of memory, compared with the growth of a process; its settings and parameters, with the real ones."""

import json
import os
import subprocess
import sys

import measure_growth
import pytest
from transformers import AutoConfig

from modeling_llava import LlavaConfig, LlavaForConditionalGeneration
from modeling_llava.training import LlavaTrainingArguments
from modeling_llava.training.estimate import Settings, estimate, load_config, sizes_of
from modeling_llava.training.setup import prepare_model


VISION = {
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 112,
    "patch_size": 14,
}  # fmt: skip
TEXT = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6, "vocab_size": 8192
}  # fmt: skip
CASES = {
    "everything is trained": (TEXT, {"per_device_train_batch_size": 8}),
    "the projector is trained": (TEXT, {"stage": "pretrain", "per_device_train_batch_size": 12}),
    "LoRA, grouped-query attention": (
        {**TEXT, "num_key_value_heads": 2},
        {"adapter": "lora", "lora_r": 16, "per_device_train_batch_size": 6},
    ),
    "checkpointing, a large vocabulary": (
        {**TEXT, "num_hidden_layers": 4, "vocab_size": 64_000},
        {"activation_checkpointing": True, "per_device_train_batch_size": 6},
    ),
    "LoRA and checkpointing": (
        TEXT,
        {"adapter": "lora", "lora_r": 16, "activation_checkpointing": True, "per_device_train_batch_size": 16},
    ),
    "accumulated gradients": (TEXT, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("case", CASES)
def test_estimated_growth_is_within_15_percent_of_the_measured(case, tmp_path):
    text, settings = CASES[case]
    measure_growth.write_model(tmp_path / "model", VISION, text)
    data = measure_growth.write_data(tmp_path, samples=24, words=250)
    recipe = {
        "model": str(tmp_path / "model"), "data": str(data), "image_folder": str(tmp_path), "max_steps": 3,
        "output_dir": str(tmp_path / "run"), "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "preview_samples": 0, "dataloader_pin_memory": False, **settings,
    }  # fmt: skip
    (tmp_path / "settings.json").write_text(json.dumps(recipe))
    done = subprocess.run(
        [sys.executable, measure_growth.__file__, str(tmp_path / "settings.json")],
        env={**os.environ, **measure_growth.MALLOC_ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["growth"] > 300 * 2**20  # the noise of an allocator would be a large share of less
    micro_batch = {name: measured[name] for name in ("tokens", "images", "supervised")}
    sizes = sizes_of(load_config(str(tmp_path / "model")))
    estimated = estimate(sizes, Settings(**settings, **micro_batch, device="cpu")).growth
    assert estimated == pytest.approx(measured["growth"], rel=0.15)


def test_every_second_layer_is_between_the_two_others():
    sizes = sizes_of(LlavaConfig(text_config={**TEXT, "num_hidden_layers": 5}))
    off, half, on = (
        estimate(sizes, Settings(activation_checkpointing=value)).activations
        for value in (False, "every_second", True)
    )
    assert half == pytest.approx(off * 2 / 5 + on * 3 / 5, rel=0.03)  # layers 0, 2 and 4


def test_evaluation_answers_and_larger_adapters_count():
    sizes = sizes_of(LlavaConfig(text_config=TEXT))

    def total(**settings):
        recipe = {"adapter": "lora", "per_device_train_batch_size": 1, "activation_checkpointing": True, "lora_r": 8}
        return estimate(sizes, Settings(**recipe | settings)).total

    assert total(per_device_eval_batch_size=64) > total(per_device_eval_batch_size=1) == total()
    assert total(packing="full", pack_length=4096) > total(packing="full") > total()  # more images in a row
    assert total(sample_answers=4, max_length=300) >= total(max_length=300)
    assert total(train_projector="full") > total(train_projector="lora") > total(train_projector="frozen")
    assert total(train_vision_tower=True) > total(lora_vision_tower=True) > total()
    assert total(optim="adamw_torch") > total(optim="adamw_8bit") > total(optim="paged_adamw_8bit")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"text": "phi3", "pad_token_id": 0},  # whose queries, keys and values are one linear layer
        {"text": "qwen2"},
        {"train_projector": "lora"},
        {"train_projector": "frozen"},
        {"lora_vision_tower": True},  # of three layers the last does not reach the loss
        {"train_vision_tower": True},
        {"adapter": "none", "train_vision_tower": True},
        {"adapter": "none", "stage": "pretrain"},
    ],
    ids=str,
)
def test_weights_and_what_is_trained_are_those_of_the_model(settings, tmp_path):
    recipe = {"adapter": "lora", "lora_r": 4, "precision": "bf16", **settings}
    text = {**TEXT, "num_key_value_heads": 2, "pad_token_id": recipe.pop("pad_token_id", None)}
    config = LlavaConfig(
        vision_config=AutoConfig.for_model("clip_vision_model", **VISION),
        text_config=AutoConfig.for_model(recipe.pop("text", "llama"), **text),
    )
    args = LlavaTrainingArguments(str(tmp_path), **recipe)
    parameters = list(prepare_model(LlavaForConditionalGeneration(config), args).parameters())
    estimated = estimate(sizes_of(config), Settings.of(args))
    assert estimated.trained_parameters == sum(p.numel() for p in parameters if p.requires_grad)
    assert sum(estimated.weights.values()) == sum(p.numel() * p.element_size() for p in parameters)


def test_a_configuration_without_a_size_is_named():
    with pytest.raises(ValueError, match="gpt2 has no intermediate_size"):
        sizes_of(LlavaConfig(text_config=AutoConfig.for_model("gpt2")))


def test_embeddings_that_are_tied_are_counted_once():
    text = AutoConfig.for_model("llama", **TEXT)
    tied = AutoConfig.for_model("llama", **TEXT, tie_word_embeddings=True)
    difference = (
        sizes_of(LlavaConfig(text_config=text)).language_model - sizes_of(LlavaConfig(text_config=tied)).language_model
    )
    assert difference == TEXT["vocab_size"] * TEXT["hidden_size"]


def test_an_adapter_is_estimated_as_its_base(tmp_path):
    LlavaConfig(text_config=TEXT).save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    adapter = {"base_model_name_or_path": str(tmp_path / "base"), "peft_type": "LORA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    assert load_config(str(tmp_path / "adapter")).text_config.hidden_size == TEXT["hidden_size"]
