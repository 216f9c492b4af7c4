"""What a run's settings say of devices and of evaluation."""

import dataclasses
import logging

import pytest
from transformers import TrainingArguments

from modeling_llava.training import LlavaTrainingArguments, train


@pytest.fixture
def two_gpus(monkeypatch):
    """As transformers counts them where two GPUs are visible and no launcher was used."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))


def test_evaluation_takes_batches_of_the_training_size_unless_told_otherwise():
    assert LlavaTrainingArguments(per_device_train_batch_size=3).per_device_eval_batch_size == 3
    args = LlavaTrainingArguments(per_device_train_batch_size=3, per_device_eval_batch_size=5)
    assert args.per_device_eval_batch_size == 5 and args.to_recipe()["per_device_eval_batch_size"] == 5


def test_one_of_two_visible_gpus_is_used_and_accelerate_launch_is_named(two_gpus, caplog):
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


def test_reentrant_checkpointing_on_several_processes_is_refused(monkeypatch):
    """Backward passes of its own mark parameters that DDP has found unused."""
    checkpointing = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    LlavaTrainingArguments(**checkpointing)
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    LlavaTrainingArguments(activation_checkpointing=True)
    with pytest.raises(ValueError, match="use_reentrant=false"):
        LlavaTrainingArguments(**checkpointing)


def test_optimizers_that_group_by_themselves_keep_one_rate_for_all():
    args = LlavaTrainingArguments(optim="lomo", vision_tower_learning_rate=None)
    assert set(args.learning_rates().values()) == {args.learning_rate}


def test_a_copy_of_arguments_can_be_made_with_other_settings():
    args = LlavaTrainingArguments(per_device_train_batch_size=2, global_batch_size=8)
    assert dataclasses.replace(args, seed=1).gradient_accumulation_steps == 4
