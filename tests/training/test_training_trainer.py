"""`LlavaTrainer` as people call it in a notebook: arguments used twice, `model_init`, single steps, saving on one process."""

import os
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from modeling_llava.data import LlavaDataCollator, load_conversations
from modeling_llava.training import LlavaTrainer, LlavaTrainingArguments, train
from modeling_llava.training.setup import load_model_and_processor


@pytest.fixture
def make(settings, instructions):
    """Makes a trainer of these arguments."""
    rows = load_conversations(str(instructions), str(instructions.parent))

    def trainer(args, **kwargs):
        model, processor = load_model_and_processor(args)
        kwargs = {"model": model, "eval_dataset": rows, **kwargs}
        return LlavaTrainer(args=args, train_dataset=rows, processing_class=processor, **kwargs)

    return trainer


def test_arguments_are_left_as_they_were_given(settings, make):
    args = LlavaTrainingArguments(**settings, hub_token="secret")
    before = dict(vars(args))
    own = LlavaDataCollator(load_model_and_processor(args)[1], max_length=256)
    assert make(args, data_collator=own).args.packing == "none"
    assert vars(args) == before and args.packing == "auto"
    trainer = make(args)
    assert trainer.args.packing == "batch" and trainer.args.hub_token == "secret"


def test_model_init_trains_each_time_from_what_it_gives(settings, make):
    args = LlavaTrainingArguments(**{**settings, "adapter": "lora"})
    calls = []

    def model_init():
        calls.append(load_model_and_processor(args)[0])
        return calls[-1]

    trainer = make(args, model=None, model_init=model_init)
    losses = []
    for _ in range(2):
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and len(calls) == 3
    assert trainer.model.get_base_model() is calls[-1] and "lora" in str(trainer.model.peft_config).lower()
    with pytest.raises(ValueError, match="either `model` or `model_init`"):
        make(args, model_init=model_init)
    with pytest.raises(ValueError, match="has an adapter, but adapter=none"):
        make(LlavaTrainingArguments(**settings), model=trainer.model)
    with pytest.raises(ValueError, match="cannot tell the length of a conversation"):
        make(LlavaTrainingArguments(**settings, packing="full"), data_collator=list)
    with pytest.raises(TypeError, match="TrainingArguments"):
        LlavaTrainer(trainer.model, TrainingArguments(settings["output_dir"]))


def test_a_prediction_step_outside_of_an_evaluation(settings, make):
    trainer = make(LlavaTrainingArguments(**settings))
    batch = next(iter(trainer.get_eval_dataloader()))
    loss, _, _ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
    assert loss.item() == pytest.approx(trainer.evaluate(trainer.eval_dataset.select([0, 1]))["eval_loss"], rel=1e-5)


def test_one_process_can_save_while_the_others_do_not(settings, make, monkeypatch):
    """`if trainer.is_world_process_zero(): trainer.save_model()` must not wait for the others."""
    trainer = make(LlavaTrainingArguments(**settings))
    trainer.train()
    monkeypatch.setattr(
        trainer.accelerator, "reduce", lambda *args, **kwargs: pytest.fail("waits for other processes")
    )
    monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", lambda: pytest.fail("waits for other processes"))
    trainer.save_model()


@pytest.mark.parametrize("kernels", [True, False])
def test_kernels_are_reported_and_turned_off_by_one_setting(settings, kernels, quiet):
    train({**settings, "kernels": kernels, "max_steps": 1, "preview_samples": 0}, console=quiet)
    assert ("Kernels: " in quiet.export_text()) == kernels


def test_a_process_without_supervised_tokens_of_its_own_saves(settings, make):
    """What counts is what all processes together were trained on."""
    trainer = make(LlavaTrainingArguments(**settings))
    trainer._speed = SimpleNamespace(num_batches=1, total_supervised=0)
    trainer._num_supervised = 5
    trainer._check_weights()
    trainer._num_supervised = 0
    with pytest.raises(ValueError, match="nothing was learnt"):
        trainer._check_weights()


def test_micro_batches_of_a_step_wait_in_main_memory(settings, make, monkeypatch):
    trainer = make(LlavaTrainingArguments(**settings, gradient_accumulation_steps=2))
    monkeypatch.setattr("accelerate.data_loader.send_to_device", lambda *args, **kwargs: pytest.fail("moved at once"))
    assert len(list(trainer.get_train_dataloader())) == 12


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the collator is not picklable")
def test_workers_persist_from_one_evaluation_to_the_next(settings, make):
    args = LlavaTrainingArguments(**settings, dataloader_num_workers=1, dataloader_multiprocessing_context="fork")
    trainer = make(args, data_collator=lambda rows: {"worker": torch.tensor([os.getpid()] * len(rows))})

    def workers(dataset=None):
        return torch.cat([batch["worker"] for batch in trainer.get_eval_dataloader(dataset)]).tolist()

    first, again, other = workers(), workers(), workers(trainer.eval_dataset.select([0, 1]))
    assert set(first) == set(again) and os.getpid() not in first
    assert (len(first), len(other), len(workers())) == (24, 2, 24)  # not the loader of the dataset before


def test_state_of_a_paged_optimizer_is_paged_again_on_resume(settings, make, monkeypatch):
    optimizers = pytest.importorskip("bitsandbytes").optim.optimizer

    def paged(optimizer, parameter, dtype=torch.float32):
        buffer = torch.zeros_like(parameter, dtype=dtype)
        buffer.is_paged = True
        return buffer

    monkeypatch.setattr(optimizers.Optimizer8bit, "get_state_buffer", paged)
    monkeypatch.setattr(optimizers.Optimizer8bit, "prefetch_state", lambda optimizer, parameter: None)
    settings |= {"stage": "pretrain", "optim": "paged_adamw_32bit", "save_steps": 1}
    whole = make(LlavaTrainingArguments(**settings))
    whole.train()
    resumed = make(LlavaTrainingArguments(**settings))
    resumed.train(resume_from_checkpoint=f"{settings['output_dir']}/checkpoint-1")
    states = resumed.optimizer.optimizer.state.values()
    assert states and all(state[name].is_paged for state in states for name in ("state1", "state2"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters()):
        assert torch.equal(ours, theirs)
