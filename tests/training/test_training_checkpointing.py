"""Activation checkpointing: every value of it trains the same; auto takes the memory that a GPU has free."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny import tiny_config, tiny_text_config
from torch.autograd.graph import saved_tensors_hooks
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_llava.training import LlavaTrainingArguments, train
from modeling_llava.training import estimate as estimates
from modeling_llava.training.setup import core_model, resolve_checkpointing


class Layers(TrainerCallback):
    """Which layers of the language model are checkpointed."""

    def on_step_end(self, args, state, control, model, **kwargs):
        layers = core_model(model).model.language_model.modules()
        self.model = model
        self.flags = [m.gradient_checkpointing for m in layers if isinstance(m, GradientCheckpointingLayer)]


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_all_give_the_same_losses_and_gradients(adapter, settings, tmp_path):
    """The tower has three layers, which transformers' `every_n_layers` would count too."""
    found, layers = {}, {}
    for value in ("off", "every_second", "on", "offload"):
        recipe = {
            **settings,
            "adapter": adapter,
            "activation_checkpointing": value,
            "output_dir": str(tmp_path / value),
        }
        layers[value] = Layers()
        history = train({**recipe, "lora_dropout": 0.0}, callbacks=[layers[value]]).log_history
        found[value] = [number for e in history if "loss" in e for number in (e["loss"], e["grad_norm"])]
    assert layers["every_second"].flags == [True, False]
    assert layers["on"].flags == layers["offload"].flags == [True, True]
    for numbers in found.values():
        assert numbers == pytest.approx(found["off"], rel=1e-5)


def test_offload_keeps_the_inputs_of_layers_in_main_memory(settings, monkeypatch):
    moved, layers = [], Layers()

    class Moves(saved_tensors_hooks):
        def __init__(self, **kwargs):
            super().__init__(lambda tensor: moved.append(tensor.shape) or tensor, lambda tensor: tensor)

    monkeypatch.setattr("modeling_llava.training.callbacks.save_on_cpu", Moves)
    train({**settings, "adapter": "lora", "activation_checkpointing": "offload", "max_steps": 1}, callbacks=[layers])
    language_model = core_model(layers.model).model.language_model
    hidden_size = language_model.config.hidden_size
    inputs = [shape for shape in moved if len(shape) == 3 and shape[-1] == hidden_size]
    assert len(inputs) == language_model.config.num_hidden_layers + 1  # and that of the last norm
    number = len(moved)
    language_model(inputs_embeds=torch.zeros(1, 4, hidden_size, requires_grad=True))
    assert len(moved) == number  # it ends with the training


def test_auto_takes_the_fastest_that_the_gpu_has_room_for(settings, monkeypatch, caplog):
    args = LlavaTrainingArguments(**settings, adapter="lora")
    model = SimpleNamespace(config=estimates.load_config("llava-hf/llava-1.5-7b-hf"))
    monkeypatch.setattr(LlavaTrainingArguments, "device", torch.device("cuda"))
    run, sizes = estimates.Settings.of(args), estimates.sizes_of(model.config)
    for value in (False, "every_second", True, "offload"):
        estimated = estimates.estimate(sizes, run.replace(activation_checkpointing=value)).total
        available = (estimated - estimates.CUDA_CONTEXT) / (1 - estimates.MARGIN) + 1
        monkeypatch.setattr(estimates, "available_memory", lambda device, available=available: available)
        args.activation_checkpointing = "auto"
        resolve_checkpointing(model, args)
        assert args.activation_checkpointing == value
        assert f"checkpointing: {estimates.CHECKPOINTING[value]} (estimated GiB: off " in caplog.messages[-1]


def test_auto_is_on_for_a_language_model_that_cannot_be_estimated(settings, monkeypatch, caplog):
    args = LlavaTrainingArguments(**settings, activation_checkpointing="auto")
    model = SimpleNamespace(config=tiny_config(text=tiny_text_config("mixtral", num_local_experts=2)))
    monkeypatch.setattr(LlavaTrainingArguments, "device", torch.device("cuda"))
    monkeypatch.setattr(estimates, "available_memory", lambda device: 2**40)
    resolve_checkpointing(model, args)
    assert args.activation_checkpointing is True and "(mixtral) has weights that are not linear" in caplog.text


def test_every_process_takes_what_the_fullest_gpu_has_room_for(settings, monkeypatch):
    args = LlavaTrainingArguments(**settings, adapter="lora")
    model = SimpleNamespace(config=estimates.load_config("llava-hf/llava-1.5-7b-hf"))
    monkeypatch.setattr(LlavaTrainingArguments, "device", torch.device("cuda"))
    monkeypatch.setattr(estimates, "available_memory", lambda device: 2**40)
    for others, expected in ((2**40, False), (0, "offload")):
        monkeypatch.setattr("modeling_llava.training.setup.gather_object", lambda own, others=others: [*own, others])
        args.activation_checkpointing = "auto"
        resolve_checkpointing(model, args)
        assert args.activation_checkpointing == expected


def test_available_memory_is_within_the_share_of_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 2**30, 12 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * 2**30)
    for share, expected in ((1.0, 7 * 2**30), (0.5, 6 * 2**30)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, share=share: share)
        assert estimates.available_memory(torch.device("cuda")) == expected


def test_what_was_resolved_is_stored_and_kept_on_resume(settings, tmp_path):
    recipe = {**settings, "activation_checkpointing": "auto", "save_steps": 1}
    train({**recipe, "max_steps": 1})
    stored = tmp_path / "run" / "checkpoint-1" / "recipe.yaml"
    before = yaml.safe_load(stored.read_text())
    assert before["activation_checkpointing"] is True  # there is no GPU
    stored.write_text(yaml.safe_dump(before | {"activation_checkpointing": "every_second"}))
    layers = Layers()
    assert train(recipe, callbacks=[layers]).resumed_from == stored.parent
    assert layers.flags == [True, False]
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["activation_checkpointing"] == "every_second"


def test_other_spellings(tmp_path):
    def value(**settings):
        return LlavaTrainingArguments(str(tmp_path), **settings).activation_checkpointing

    assert value(activation_checkpointing="on") is True and value(activation_checkpointing="off") is False
    assert value() is False and value(gradient_checkpointing=True) is True
    assert value(gradient_checkpointing="every_second") == "every_second"
    with pytest.raises(ValueError, match="activation_checkpointing=half"):
        value(activation_checkpointing="half")
