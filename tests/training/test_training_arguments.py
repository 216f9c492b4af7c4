"""Settings: what contradicts another is refused, what follows from others is resolved."""

import dataclasses
import logging

import pytest
import torch
import yaml
from transformers import TrainingArguments

from modeling_llava.training import LlavaTrainingArguments, train
from modeling_llava.training.arguments import best_precision


def test_one_of_two_visible_gpus_is_used_and_accelerate_launch_is_named(monkeypatch, caplog):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))  # visible, without a launcher
    with caplog.at_level(logging.WARNING):
        args = LlavaTrainingArguments(per_device_train_batch_size=2, global_batch_size=8)
    assert args.n_gpu == 1
    assert (args.train_batch_size, args.eval_batch_size, args.gradient_accumulation_steps) == (2, 2, 4)
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("modeling_llava")]
    assert "accelerate launch --num_processes 2" in said


def test_a_second_visible_gpu_changes_neither_loss_nor_batch_nor_packing(settings, monkeypatch, tmp_path):
    def run(name):
        result = train({**settings, "output_dir": str(tmp_path / name), "packing": "batch", "max_steps": 1})
        (entry,) = [entry for entry in result.log_history if "loss" in entry]
        return entry["loss"], entry["grad_norm"], entry["epoch"]

    expected = run("one")
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    assert run("two") == pytest.approx(expected, rel=1e-5)


def test_optimizers_that_group_by_themselves_keep_one_rate_for_all():
    args = LlavaTrainingArguments(optim="lomo", vision_tower_learning_rate=None)
    assert set(args.learning_rates().values()) == {args.learning_rate}


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"seed": 1}, {"gradient_accumulation_steps": 4, "learning_rate": 2e-5}),
        ({"adapter": "lora"}, {"learning_rate": 2e-4}),
        ({"stage": "pretrain", "learning_rate": 5e-4}, {"learning_rate": 5e-4}),
        ({"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 2, "per_device_eval_batch_size": 4}),
        ({"global_batch_size": 16}, {"gradient_accumulation_steps": 8}),
        ({"bf16": True}, {"precision": "bf16"}),
        ({"precision": "bf16"}, {"bf16": True}),
    ],
)
def test_a_copy_with_other_settings_resolves_again_what_follows_from_them(changed, expected):
    args = LlavaTrainingArguments(per_device_train_batch_size=2, global_batch_size=8)
    copied = dataclasses.replace(dataclasses.replace(args, **changed), seed=2)
    assert {name: getattr(copied, name) for name in expected} == expected
    recipe = yaml.safe_load(yaml.safe_dump(copied.to_recipe()))
    assert (recipe["learning_rate"], recipe["precision"]) == (copied.learning_rate, copied.precision)


def test_every_setting_has_a_help_text():
    for field in dataclasses.fields(LlavaTrainingArguments):
        assert field.metadata.get("help"), field.name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": "pretrane"}, "not one of pretrain, finetune"),
        ({"stage": "pretrain", "adapter": "lora"}, "adapter=none"),
        ({"use_dora": True}, "no effect with adapter=none"),
        ({"vision_tower_learning_rate": 1e-6}, "train_vision_tower=true"),
        ({"eval_data": "a.json", "eval_size": 0.1}, "Keep one"),
        ({"streaming": True}, "Set max_steps"),
        ({"streaming": True, "max_steps": 3, "type_weights": {"a": 1}}, "Set streaming=false"),
        ({"type_weights": {"a": -1}}, "at least 0"),
        ({"type_weights": {"a": 0}}, "above 0"),
        ({"type_weights": {"a": 1}, "only_types": ["b"]}, "excludes"),
        ({"remove_unused_columns": True}, "Leave it out"),
        ({"global_batch_size": 8, "gradient_accumulation_steps": 2}, "Keep one"),
        ({"global_batch_size": 9, "per_device_train_batch_size": 2}, "not a multiple of 2 samples"),
        ({"early_stopping_patience": 2}, "eval_strategy=steps"),
        ({"load_best_model_at_end": True, "save_strategy": "no"}, "load_best_model_at_end.*eval_strategy=steps"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "save_strategy=best.*eval_strategy=steps"),
        ({"early_stopping_patience": 2, "eval_size": 0.1}, "early_stopping_patience.*eval_strategy=steps"),
        ({"global_batch_size": 8, "auto_find_batch_size": True}, "auto_find_batch_size.*global_batch_size.*Keep one"),
        ({"precision": "fp32", "bf16": True}, "contradicts bf16"),
        ({"trained_dtype": "bfloat16", "precision": "fp32"}, "trained_dtype=bfloat16 requires precision=bf16"),
        ({"precision": "fp16", "use_cpu": True}, "needs a GPU"),
        ({"train_projector": "lora"}, "train_projector=lora has no effect with adapter=none"),
        ({"train_projector": "frozen", "stage": "pretrain"}, "train_projector=frozen"),
        ({"train_projector": "frozen", "projector_learning_rate": 1e-5}, "train_projector=frozen"),
        ({"lora_vision_tower": True}, "lora_vision_tower=True has no effect with adapter=none"),
        ({"lora_vision_tower": True, "train_vision_tower": True, "adapter": "lora"}, "Keep one"),
        ({"pack_length": 512}, "requires packing=full"),
        ({"packing": "full", "pack_length": 100}, "at least max_length=2048"),
        ({"group_by_modality": True}, "train_sampling_strategy=group_by_length"),
        ({"packing": "full", "train_sampling_strategy": "group_by_length"}, "both order the samples"),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "num_decay_steps.* lr_scheduler_kwargs can hold: num_decay_steps",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs can hold: .*min_lr_rate"),
        ({"lr_scheduler_kwargs": {"cycles": 2}}, "cycles.* lr_scheduler_kwargs can hold: num_cycles"),
        ({"optim": "lomo", "projector_learning_rate": 0.0}, "lomo.*ignores projector_learning_rate=0"),
        ({"optim": "adalomo", "adapter": "lora"}, "adalomo.*ignores projector_learning_rate=2e-05"),
        (
            {"optim": "apollo_adamw", "train_vision_tower": True, "vision_tower_learning_rate": 2e-6},
            "apollo.*ignores vision_tower_learning_rate=2e-06",
        ),
        ({"lora_target": "(", "adapter": "lora"}, "not a regular expression"),
        ({"max_length": 0}, "at least 1"),
        ({"lora_dropout": 1.0}, r"not in \[0, 1\)"),
        ({"overflow": "cut"}, "error, drop, truncate_text"),
        ({"train_sampling_strategy": "grouped"}, "not one of random, sequential, group_by_length"),
        ({"train_sampling_strategy": "batch_rebalance", "data": "a.json"}, "Take group_by_length"),
        ({"per_device_train_batch_size": 0}, "at least 1"),
        ({"global_batch_size": 0}, "global_batch_size=0 must be at least 1"),
        ({"learning_rate": float("nan")}, "not 0 or more"),
        ({"num_train_epochs": float("nan")}, "above 0"),
        ({"num_train_epochs": 0}, "above 0"),
        ({"eval_strategy": "steps", "eval_steps": 5, "data": "a.json"}, "Set eval_size or eval_data"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        LlavaTrainingArguments(str(tmp_path), **settings)


def test_defaults_follow_stage_and_adapter(tmp_path):
    def rate(**settings):
        return LlavaTrainingArguments(str(tmp_path), **settings).learning_rate

    # DESIGN §6: v1.5 pretrain, finetune and LoRA
    assert (rate(stage="pretrain"), rate(), rate(adapter="lora")) == (1e-3, 2e-5, 2e-4)
    args = LlavaTrainingArguments(str(tmp_path))
    assert (args.lr_scheduler_type, args.warmup_steps, args.weight_decay) == ("cosine", 0.03, 0.0)
    assert args.remove_unused_columns is False


@pytest.mark.parametrize(
    ("cuda", "bfloat16", "expected"), [(True, True, "bf16"), (True, False, "fp16"), (False, False, "fp32")]
)
def test_precision_follows_the_device(monkeypatch, cuda, bfloat16, expected):
    """A Turing GPU says that it can do bfloat16, by emulation; it gets float16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16 or including_emulation
    )
    assert best_precision() == expected


def test_precision_sets_transformers_switches(tmp_path):
    def switches(**settings):
        args = LlavaTrainingArguments(str(tmp_path), use_cpu=True, **settings)
        return args.precision, args.bf16, args.fp16, str(args.compute_dtype)

    assert switches() == ("fp32", False, False, "torch.float32")
    assert switches(precision="bf16") == switches(bf16=True) == ("bf16", True, False, "torch.bfloat16")
    with pytest.raises(ValueError, match="precision=fp16 needs a GPU"):
        switches(fp16=True)
