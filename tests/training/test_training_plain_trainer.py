"""transformers' own `Trainer` over our model and collator, as over the stock model; and Liger Kernel's settings."""

import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from transformers.utils.logging import warning_once

from modeling_llava import LlavaForConditionalGeneration
from modeling_llava.constants import is_older
from modeling_llava.data import LlavaDataCollator, load_conversations
from modeling_llava.training import LlavaTrainingArguments, train
from modeling_llava.training.setup import load_model_and_processor


@pytest.fixture
def plain_trainer(settings, instructions, tmp_path):
    model, processor = load_model_and_processor(LlavaTrainingArguments(**settings))

    def make(stock=False, compute_metrics=None, **changes):
        chosen = model
        if stock:
            chosen = transformers.LlavaForConditionalGeneration.from_pretrained(settings["model"])
        arguments = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 4}
        arguments |= {"use_cpu": True, "remove_unused_columns": False, "report_to": "none", "disable_tqdm": True}
        rows = load_conversations(str(instructions), str(instructions.parent))
        return Trainer(
            chosen,
            TrainingArguments(str(tmp_path / "plain"), **{**arguments, **changes}),
            data_collator=LlavaDataCollator(processor, max_length=256),
            train_dataset=rows,
            eval_dataset=rows,
            compute_metrics=compute_metrics,
        )

    return make


@pytest.mark.parametrize(
    "changes",
    [{}, {"prediction_loss_only": True}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}],
    ids=["default", "loss-only", "accumulated"],
)
def test_plain_trainer_trains_and_evaluates_ours_as_stock(plain_trainer, changes):
    histories = []
    for stock in (True, False):
        trainer = plain_trainer(stock, **changes)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        histories.append([*losses, trainer.evaluate()["eval_loss"]])
    assert histories[1] == pytest.approx(histories[0], abs=1e-4) and len(histories[0]) == 3


def test_plain_trainer_gives_logits_and_labels_to_compute_metrics(plain_trainer):
    def shapes(stock):
        found = {}

        def metrics(prediction):
            logits, *_ = prediction.predictions
            found["shapes"] = logits.shape, prediction.label_ids.shape
            return {"accuracy": (logits[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean()}

        return found, plain_trainer(stock, metrics).evaluate()

    ours, scores = shapes(False)
    assert ours["shapes"][1][0] == 24
    if not is_older(transformers.__version__, "5.24"):
        pytest.skip("stock's evaluation gathers outputs that hold None, which raises in 5.24")
    stock, expected = shapes(True)
    assert ours == stock
    for name in ("eval_loss", "eval_accuracy"):
        assert scores[name] == pytest.approx(expected[name], abs=1e-4)


def test_plain_trainers_label_smoothing_is_warned_of(plain_trainer, caplog):
    """It compares each position with its own label, for the stock model too; the model sees no labels then."""
    warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        plain_trainer(max_steps=1).train()
        assert "label_smoothing_factor" not in caplog.text
        plain_trainer(max_steps=1, label_smoothing_factor=0.1).train()
    assert "label_smoothing_factor" in caplog.text and "LlavaTrainer" in caplog.text


def test_removed_columns_are_explained(plain_trainer):
    with pytest.raises(TypeError, match="remove_unused_columns=False"):
        plain_trainer(remove_unused_columns=True).evaluate()


@pytest.mark.parametrize("given", [None, {"rope": False}, {"fused_linear_cross_entropy": False}])
def test_liger_leaves_the_loss_to_the_model(settings, given, monkeypatch, caplog):
    applied = []
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda model, config: applied.append(config))
    settings |= {"use_liger_kernel": True, "liger_kernel_config": given, "max_steps": 1}
    with caplog.at_level(logging.WARNING):
        args = LlavaTrainingArguments(**settings)
    assert "fused_linear_cross_entropy" in caplog.text
    assert args.to_recipe().get("liger_kernel_config") == given  # the recipe says what was written
    train(args.to_recipe())
    assert applied == [{**(given or {}), "fused_linear_cross_entropy": False}]


def test_ligers_own_loss_is_refused(settings):
    settings |= {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}}
    with pytest.raises(ValueError, match="fused_linear_cross_entropy.*liger_kernel_config"):
        LlavaTrainingArguments(**settings)


def test_plain_trainer_resumes_and_loads_its_best_model(settings, instructions, tmp_path):
    """It loads by names in memory, which those of the stock format are not, and is silent about what it does not find."""

    def trainer():
        torch.manual_seed(0)
        model, processor = load_model_and_processor(LlavaTrainingArguments(**settings))
        arguments = {"max_steps": 4, "logging_steps": 1, "save_steps": 1, "per_device_train_batch_size": 4}
        arguments |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 1e-2}
        arguments |= {"metric_for_best_model": "supervised", "use_cpu": True, "remove_unused_columns": False}
        rows = load_conversations(str(instructions), str(instructions.parent))
        return Trainer(
            model,
            TrainingArguments(str(tmp_path / "run"), report_to="none", disable_tqdm=True, **arguments),
            data_collator=LlavaDataCollator(processor, max_length=256),
            train_dataset=rows,
            eval_dataset=rows.select([0]),
            compute_metrics=lambda prediction: {"supervised": 1.0},  # the first checkpoint is the best
        )

    whole, resumed = trainer(), trainer()
    whole.train()
    first = LlavaForConditionalGeneration.from_pretrained(tmp_path / "run" / "checkpoint-1").state_dict()
    assert all(torch.equal(weight, first[name]) for name, weight in whole.model.state_dict().items())
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_state_dicts_are_loaded_by_saved_names_and_by_names_in_memory(base_model):
    model = LlavaForConditionalGeneration.from_pretrained(base_model)
    saved = load_file(base_model / "model.safetensors")
    for weights in (saved, model.state_dict()):
        other = LlavaForConditionalGeneration(model.config)
        assert not any(other.load_state_dict(weights))
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))
