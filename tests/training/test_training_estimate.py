"""The estimate of memory, held against what a process grows by; its settings and parameters, against the real ones."""

import dataclasses
import json
import os
import subprocess
import sys

import measure_growth
import pytest
from accelerate import init_empty_weights
from transformers import AutoConfig

from modeling_llava import LlavaConfig, LlavaForConditionalGeneration
from modeling_llava.training import LlavaTrainingArguments
from modeling_llava.training.estimate import Settings, estimate
from modeling_llava.training.shapes import shapes_of


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
    "LoRA beside shared keys": (
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
    micro_batch = {name: measured[name] for name in ("positions", "images", "supervised")}
    shapes = shapes_of(json.loads((tmp_path / "model" / "config.json").read_text()))
    estimated = estimate(shapes, Settings(**settings, **micro_batch, device="cpu")).growth
    assert estimated == pytest.approx(measured["growth"], rel=0.15)


def test_defaults_are_those_of_the_training_arguments():
    ours = {setting.name: setting.default for setting in dataclasses.fields(Settings)}
    theirs = {setting.name: setting.default for setting in dataclasses.fields(LlavaTrainingArguments)}
    shared = ours.keys() & theirs.keys()
    assert {"lora_r", "max_length", "packing", "optim", "gradient_accumulation_steps"} <= shared
    assert {name: ours[name] or None for name in shared} == {name: theirs[name] or None for name in shared}


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("vision", ["clip_vision_model", "siglip_vision_model"])
def test_parameters_are_counted_as_the_model_has_them(vision, text):
    config = LlavaConfig(
        vision_config=AutoConfig.for_model(vision, **VISION),
        text_config=AutoConfig.for_model(text, **{**TEXT, "num_key_value_heads": 2}),
    )
    with init_empty_weights():
        model = LlavaForConditionalGeneration(config)
    shapes = shapes_of(json.loads(config.to_json_string(use_diff=False)))
    core = model.model

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert shapes.tower == count(core.vision_tower)
    assert shapes.projector == count(core.multi_modal_projector)
    assert shapes.language_model == count(core.language_model) + count(model.lm_head)
