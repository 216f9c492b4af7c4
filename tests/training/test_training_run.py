"""`train(recipe)`: what it writes, who can read it, and what a resumed run takes up."""

import hashlib
import json
import shutil
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from modeling_llava import LlavaForConditionalGeneration
from modeling_llava.constants import IGNORE_INDEX
from modeling_llava.io.checkpoints import checkpoint_kind, load_projector
from modeling_llava.training import LlavaTrainingArguments, merge_adapter, train
from modeling_llava.training.batches import load_datasets
from modeling_llava.training.callbacks import plot_loss_curve
from modeling_llava.training.setup import load_model_and_processor


BOTH_FORMS = pytest.mark.parametrize("base_model", [None, "llava-hf"], ids=["ours", "llava-hf"], indirect=True)
PUBLISHED = pytest.mark.parametrize("base_model", ["llava-hf"], indirect=True)


def keys(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}


def test_pretrain_writes_the_projector_and_finetune_takes_it(settings, base_model, tmp_path):
    result = train({**settings, "stage": "pretrain", "chat_template": "plain", "save_steps": 1})
    assert result.kind == checkpoint_kind(result.output_dir) == "projector"
    frozen_bytes = (base_model / "model.safetensors").stat().st_size
    for folder in (result.output_dir, result.output_dir / "checkpoint-1", result.output_dir / "checkpoint-2"):
        assert (folder / "projector.safetensors").stat().st_size < frozen_bytes / 10
        assert not (folder / "model.safetensors").exists()
        with safe_open(folder / "projector.safetensors", framework="pt") as file:
            assert set(file.keys()) == {
                f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
            }
        AutoProcessor.from_pretrained(folder)

    further = {**settings, "projector": str(result.output_dir), "output_dir": str(tmp_path / "second")}
    model, processor = load_model_and_processor(LlavaTrainingArguments(**further))
    trained = model.model.multi_modal_projector.linear_1.weight
    untrained = AutoModelForImageTextToText.from_pretrained(base_model).model.multi_modal_projector.linear_1.weight
    assert not torch.equal(trained, untrained)
    assert "USER" in processor.chat_template  # the template of pretraining stays there
    assert train(further).kind == "full"
    with pytest.raises(ValueError, match=f"Set projector=.*model={base_model}"):
        train({**settings, "model": str(result.output_dir)})


def test_full_finetuning_writes_a_stock_checkpoint(settings, base_model):
    result = train({**settings, "train_vision_tower": True})
    assert keys(result.output_dir) == keys(base_model)
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (result.output_dir, base_model))
    for part in (config, before):  # transformers writes the tokenizer's, if the model has none
        part["text_config"].pop("pad_token_id")
    assert config == before  # use_cache and the like: training leaves no trace
    _, info = transformers.LlavaForConditionalGeneration.from_pretrained(result.output_dir, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert json.loads((result.output_dir / "processor_config.json").read_text())["processor_class"] == "LlavaProcessor"


@BOTH_FORMS
def test_full_finetuning_in_mixed_precision_is_published_in_16_bit_and_resumable_in_float32(settings):
    result = train({**settings, "precision": "bf16", "save_steps": 1})
    for folder, expected in ((result.output_dir, {"BF16"}), (result.output_dir / "checkpoint-1", {"BF16", "F32"})):
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}
        assert set(dtypes.values()) == expected
    assert all(dtype == ("BF16" if "vision_tower" in name else "F32") for name, dtype in dtypes.items())
    assert json.loads((result.output_dir / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_run_is_recorded_next_to_the_weights(settings, instructions):
    result = train({**settings, "save_steps": 1, "eval_size": 4, "hub_token": "secret"})
    for folder in (result.output_dir, result.output_dir / "checkpoint-1"):
        record = json.loads((folder / "run.json").read_text())
        assert record["versions"]["transformers"] == transformers.__version__
        source = record["data"]["sources"][0]
        assert source == {"name": str(instructions), "sha256": hashlib.sha256(instructions.read_bytes()).hexdigest()}
        assert record["data"]["num_samples"] == 20
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        assert recipe["model"] == settings["model"] and recipe["seed"] == 42
        assert "secret" not in (folder / "recipe.yaml").read_text() + (folder / "run.json").read_text()
    assert "eval_loss" in result.metrics
    assert (result.output_dir / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    again = train(str(result.output_dir / "recipe.yaml"), [f"output_dir={result.output_dir}-again"])
    assert [e["loss"] for e in again.log_history if "loss" in e] == [
        e["loss"] for e in result.log_history if "loss" in e
    ]


def test_preview_shows_the_table_and_a_masked_sample_and_changes_nothing(settings, tmp_path, quiet):
    shown = train(settings, console=quiet)
    text = quiet.export_text()
    assert "What is trained" in text and "multi_modal_projector" in text
    assert "<image> × 9" in text and "ASSISTANT:" in text
    hidden = train({**settings, "output_dir": str(tmp_path / "hidden"), "preview_samples": 0}, console=quiet)
    assert shown.log_history[0]["loss"] == hidden.log_history[0]["loss"]


@BOTH_FORMS
def test_evaluation_loss_is_the_models_and_builds_no_logits(make_trainer):
    trainer = make_trainer(per_device_eval_batch_size=4)
    dataset, seen = trainer.train_dataset.select(range(4)), []
    handle = trainer.model.register_forward_hook(lambda *call: seen.append(call[-1].get("logits")))
    step = TrainerCallback()  # some GPUs have no float64
    step.on_prediction_step = lambda *args, **kwargs: seen.extend(pair.dtype for pair in trainer._evaluated)
    trainer.add_callback(step)
    loss = trainer.evaluate(dataset)["eval_loss"]
    handle.remove()
    assert seen == [None, torch.float32]
    batch = trainer.data_collator([dataset[i] for i in range(4)])
    assert loss == pytest.approx(cross_entropy(trainer.model, batch), abs=1e-5)


@torch.no_grad()
def cross_entropy(model, batch, **kwargs):
    logits = model.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits
    targets = batch["labels"][:, 1:].flatten()
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORE_INDEX, **kwargs
    ).item()


def test_evaluation_loss_is_the_mean_over_tokens_whatever_the_batches(make_trainer):
    """Answers are of unequal length, and 7 samples do not come out even in batches of 2 or 3."""
    losses = []
    for size, packing in ((7, "none"), (2, "none"), (3, "batch")):
        trainer = make_trainer(per_device_eval_batch_size=size, packing=packing)
        losses.append(trainer.evaluate(trainer.train_dataset.select(range(7)))["eval_loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-5)


def test_label_smoothing_compares_shifted_labels(settings, make_trainer):
    stock = transformers.LlavaForConditionalGeneration.from_pretrained(settings["model"])
    with pytest.raises(ValueError, match="label_smoothing_factor.*AutoModelForImageTextToText"):
        make_trainer(own_model=stock, label_smoothing_factor=0.2)
    trainer = make_trainer(label_smoothing_factor=0.2)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    count = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    expected = cross_entropy(trainer.model, batch, label_smoothing=0.2)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.train(), dict(batch), num_items_in_batch=count)
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_gradient_accumulation_weights_tokens_not_batches(settings, tmp_path):
    """4 samples in one batch, or in two of unequal length: the same step, since the count of tokens is passed on."""

    def first_step(**changes):
        folder = tmp_path / str(changes)
        return train({**settings, "output_dir": str(folder), "max_steps": 1, **changes}).log_history[0]

    at_once = first_step(per_device_train_batch_size=4)
    in_two = first_step(per_device_train_batch_size=2, global_batch_size=4)
    assert at_once["loss"] == pytest.approx(in_two["loss"], rel=1e-5)
    assert at_once["grad_norm"] == pytest.approx(in_two["grad_norm"], rel=1e-4)


@PUBLISHED
@pytest.mark.parametrize("kind", [{}, {"stage": "pretrain"}, {"adapter": "lora"}], ids=["full", "pretrain", "lora"])
def test_the_stock_class_trains_saves_and_resumes_as_ours_does(settings, make_trainer, kind, tmp_path):
    def run(model_class, folder, resume=None):
        transformers.set_seed(0)
        model = model_class.from_pretrained(settings["model"])
        trainer = make_trainer(own_model=model, **kind, output_dir=str(folder), save_steps=1)
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.model

    stock = transformers.LlavaForConditionalGeneration
    losses, trained = run(stock, tmp_path / "stock")
    ours, _ = run(LlavaForConditionalGeneration, tmp_path / "ours")
    assert losses == pytest.approx(ours, abs=1e-5)
    shutil.rmtree(tmp_path / "stock" / "checkpoint-2")
    again, resumed = run(stock, tmp_path / "stock", str(tmp_path / "stock" / "checkpoint-1"))
    assert again == losses
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), resumed.parameters()))


@pytest.mark.parametrize("kind", [{}, {"stage": "pretrain"}, {"adapter": "lora"}], ids=["full", "pretrain", "lora"])
def test_best_checkpoint_is_loaded_at_the_end(settings, tmp_path, kind):
    class WorseAndWorse(TrainerCallback):
        """After step 1 the learning rate ruins the model."""

        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            for group in optimizer.param_groups:
                group["lr"] = 3.0

    result = train(
        {
            **settings, **kind, "max_steps": 3, "eval_size": 4, "eval_strategy": "steps", "eval_steps": 1,
            "save_steps": 1, "save_total_limit": 5, "load_best_model_at_end": True, "lr_scheduler_type": "constant",
        },
        callbacks=[WorseAndWorse()],
    )  # fmt: skip
    evaluations = [entry["eval_loss"] for entry in result.log_history if "eval_loss" in entry]
    assert evaluations[0] < evaluations[1] and evaluations[0] < evaluations[2]
    assert result.metrics["eval_loss"] == pytest.approx(evaluations[0], abs=1e-6)
    name = {"lora": "adapter_model.safetensors", "pretrain": "projector.safetensors"}.get(
        kind.get("adapter") or kind.get("stage"), "model.safetensors"
    )
    final, best = load_file(result.output_dir / name), load_file(result.output_dir / "checkpoint-1" / name)
    assert all(torch.equal(final[key], best[key]) for key in best)


def test_early_stopping_and_a_second_start_of_the_finished_run(settings):
    settings |= {
        "max_steps": 20, "learning_rate": 0.0, "eval_size": 4, "eval_strategy": "steps", "eval_steps": 1,
        "save_steps": 1, "early_stopping_patience": 2,
    }  # fmt: skip
    result = train(settings)
    assert result.global_step == 3  # the first evaluation is the best, two more are not better
    weights = (result.output_dir / "model.safetensors").read_bytes()
    again = train(settings)  # Trainer would train at least one step more
    assert (again.global_step, again.resumed_from.name) == (3, "checkpoint-3")
    assert (again.output_dir / "model.safetensors").read_bytes() == weights


class FakeHub:
    """Stands where the Hub is; keeps what `Trainer` would send."""

    def __init__(self):
        self.created, self.uploaded = [], []

    def create_repo(self, name, **kwargs):
        self.created.append((name, kwargs))
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, **kwargs):
        files = {p.name: p.read_bytes() for p in Path(kwargs["folder_path"]).iterdir() if p.is_file()}
        self.uploaded.append({**kwargs, "files": files})
        future = Future()
        future.set_result(None)
        return future


@pytest.fixture
def hub(monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    return hub


@pytest.mark.parametrize("kind", [{"adapter": "lora"}, {"stage": "pretrain"}], ids=["lora", "pretrain"])
def test_push_to_hub_is_passed_through(settings, kind, hub):
    settings |= {"push_to_hub": True, "hub_model_id": "me/mine", "hub_private_repo": True, "hub_token": "hf_secret"}
    result = train({**settings, **kind, "save_steps": 1})
    assert hub.created[0][0] == "me/mine" and hub.created[0][1]["private"] is True
    assert {upload["repo_id"] for upload in hub.uploaded} == {"me/mine"}
    assert hub.uploaded[-1]["folder_path"] == str(result.output_dir)
    weights = "adapter_model.safetensors" if "adapter" in kind else "projector.safetensors"
    assert len(hub.uploaded) >= 2  # while it trains, and at the end
    for upload in hub.uploaded:
        assert upload["token"] == "hf_secret"
        assert weights in upload["files"] and "processor_config.json" in upload["files"]
        assert not any(b"hf_secret" in content for content in upload["files"].values())


def test_an_upload_that_fails_at_the_end_loses_nothing_and_is_made_up_for(settings, hub, monkeypatch):
    settings |= {"push_to_hub": True, "hub_model_id": "me/mine", "stage": "pretrain", "hub_strategy": "end"}
    with monkeypatch.context() as broken:
        broken.setattr(hub, "upload_folder", lambda **kwargs: (_ for _ in ()).throw(ConnectionError("no route")))
        with pytest.raises(OSError, match="lies in .* not be uploaded to me/mine: no route .*same command again"):
            train(settings)
    assert checkpoint_kind(settings["output_dir"]) == "projector"
    again = train(settings)
    assert again.resumed_from.name == "checkpoint-2"  # the end: nothing is trained
    assert "projector.safetensors" in hub.uploaded[-1]["files"]


def test_types_can_be_chosen_and_weighted(settings, instructions, make_trainer):
    def dataset_of(**changes):
        return load_datasets(LlavaTrainingArguments(**{**settings, **changes}))[0]

    dataset = dataset_of(only_types=["detail", "complex"])
    assert sorted(set(dataset.types)) == ["complex", "detail"] and len(dataset) == 16
    assert len(dataset_of(data={"mine": str(instructions)})) == 24
    with pytest.raises(ValueError, match="only_types names detial"):
        dataset_of(only_types=["detial", "complex"])
    trainer = make_trainer(type_weights={"conversation": 1, "detail": 0, "complex": 3})
    drawn = [trainer.train_dataset.types[i] for i in trainer._get_train_sampler()]
    assert set(drawn) == {"conversation", "complex"} and len(drawn) == 16


def test_data_is_split_by_seed_without_overlap(settings):
    def split(**changes):
        train_set, eval_set = load_datasets(LlavaTrainingArguments(**{**settings, "eval_size": 0.25, **changes}))
        return {c["id"] for c in train_set}, {c["id"] for c in eval_set}

    train_ids, eval_ids = split()
    assert len(eval_ids) == 6 and len(train_ids) == 18 and not train_ids & eval_ids
    assert split() == (train_ids, eval_ids)
    assert split(data_seed=1)[1] != eval_ids
    with pytest.raises(ValueError, match="holds out 24 of 24"):
        split(eval_size=24)


def test_users_mistakes_are_one_clear_error(settings, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor the name"):
        train({**settings, "model": "./no/such/model"})
    with pytest.raises(ValueError, match="overrides apply to a recipe file"):
        train(settings, ["max_steps=1"])
    for name in ("model", "output_dir", "data"):
        with pytest.raises(ValueError, match=f"{name} is not set"):
            train({k: v for k, v in settings.items() if k != name})
    with pytest.raises(ValueError, match="not the output folder of a pretrain run"):
        train({**settings, "projector": str(tmp_path)})
    for folder, error in ((tmp_path, ValueError), (tmp_path / "absent", FileNotFoundError)):  # before the model
        with pytest.raises(error, match="not there"):
            load_datasets(LlavaTrainingArguments(**{**settings, "image_folder": str(folder)}))


@PUBLISHED
def test_pretrain_output_becomes_a_full_checkpoint_by_merging(settings, tmp_path):
    result = train({**settings, "stage": "pretrain", "train_vision_tower": True})
    merge_adapter(str(result.output_dir), str(tmp_path / "full"))
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "full")
    expected = AutoModelForImageTextToText.from_pretrained(settings["model"])
    assert load_projector(expected, result.output_dir) == ["multi_modal_projector", "vision_tower"]
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), expected.parameters()))
    adapter = {**settings, "output_dir": str(tmp_path / "b"), "projector": str(result.output_dir), "adapter": "lora"}
    for lost, trained in (("vision_tower", {}), ("multi_modal_projector", {"train_projector": "lora"})):
        with pytest.raises(ValueError, match=f"brings a trained {lost}, which"):
            train({**adapter, "train_vision_tower": lost != "vision_tower", **trained})


def test_loss_curve_needs_no_evaluation_and_says_when_it_has_nothing(tmp_path, monkeypatch):
    assert plot_loss_curve([], tmp_path / "a.png") is None
    history = [{"step": i, "loss": 3 / (i + 1)} for i in range(5)] + [{"step": 4, "eval_loss": 1.0}]
    assert plot_loss_curve(history, tmp_path / "b.png").is_file()
    assert not list(tmp_path.glob(".*"))  # no part of it is left
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_loss_curve(history, tmp_path / "c.png") is None


@BOTH_FORMS
def test_command_line(settings, tmp_path, capsys):
    from modeling_llava.cli.main import main

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**settings, "adapter": "lora"}))
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    assert main(["train", str(recipe), "max_steps=1", f"output_dir={adapter}"]) == 0
    out = capsys.readouterr().out
    assert "finetune with lora" in out and f"llava merge {adapter}" in out
    assert main(["merge", adapter, merged]) == 0
    assert checkpoint_kind(merged) == "full"
    AutoProcessor.from_pretrained(merged)
    capsys.readouterr()
    assert main(["train", str(recipe), "lora_rr=3"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Did you mean 'lora_r'" in error
    assert main(["merge", merged, str(tmp_path / "again")]) == 2
    assert "nothing to merge" in capsys.readouterr().err
    assert main(["train", "--list-settings"]) == 0
    assert "projector_learning_rate" in capsys.readouterr().out
    shutil.rmtree(merged)
