"""`LlavaTrainer` as people call it in a notebook: arguments used twice, `model_init`, single steps, saving on one process."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

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
def test_kernels_are_reported_and_turned_off_by_one_setting(settings, kernels):
    console = Console(file=io.StringIO(), width=200)
    train({**settings, "kernels": kernels, "max_steps": 1, "preview_samples": 0}, console=console)
    assert ("Kernels: " in console.file.getvalue()) == kernels


def test_a_process_without_supervised_tokens_of_its_own_saves(settings, make):
    """What counts is what all processes together were trained on."""
    trainer = make(LlavaTrainingArguments(**settings))
    trainer._speed = SimpleNamespace(num_batches=1, total_supervised=0)
    trainer._num_supervised = 5
    trainer._check_weights()
    trainer._num_supervised = 0
    with pytest.raises(ValueError, match="nothing was learnt"):
        trainer._check_weights()
