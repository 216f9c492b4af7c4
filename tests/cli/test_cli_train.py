"""`llava train`: what it prints at its end is what comes next, and works as it is printed."""

import io
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from transformers import TrainerState

from modeling_llava import LlavaForConditionalGeneration, LlavaProcessor
from modeling_llava.cli.main import main
from modeling_llava.cli.train import _needs, _trial_of
from modeling_llava.training import LlavaTrainingArguments, read_recipe
from modeling_llava.training.callbacks import DurationCallback


GOLDEN = Path(__file__).parents[1] / "golden" / "llava_v15_tiny_lora"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, its image and data, in a folder whose name has a space."""
    folder = tmp_path_factory.mktemp("first try") / "my files"
    torch.manual_seed(0)
    parts = str(GOLDEN / "vision_tower"), str(GOLDEN / "language_model")
    LlavaForConditionalGeneration.from_vision_language_pretrained(*parts).save_pretrained(folder / "model")
    LlavaProcessor.from_vision_language_pretrained(*parts).save_pretrained(folder / "model")
    Image.new("RGB", (50, 40), "red").save(folder / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A red one."}]
    rows = [{"id": str(i), "image": "a.png", "conversations": turns} for i in range(4)]
    (folder / "data.json").write_text(json.dumps(rows))
    question = {"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "no", "category": "random"}
    (folder / "pope.json").write_text(json.dumps(question) + "\n")
    return folder


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_next_command_of_an_adapter_loads_it_as_it_was_trained(adapter, folder, recipe, capsys, monkeypatch, caplog):
    pytest.importorskip("bitsandbytes")
    out = folder / adapter
    words = ["use_cpu=true", "activation_checkpointing=false", "optim=adamw_torch", "save_strategy=no"]
    assert main(recipe(4, f"adapter={adapter}", f"output_dir={out}", *words)) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    assert ("4-bit" in line and "--no-4bit" in line) == (adapter == "qlora")
    llava, *command = shlex.split(line.removeprefix("next: ").partition("   (")[0])
    assert llava == "llava"

    def chat(*options):
        monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\n"))
        caplog.clear()
        assert main([*command, "--image", str(folder / "a.png"), "--max-new-tokens", "2", *options]) == 0
        return capsys.readouterr().err

    assert ("4-bit)" in chat()) == (adapter == "qlora")
    assert ("--no-4bit" in caplog.text) == (adapter == "qlora")
    assert "4-bit)" not in chat("--no-4bit") and "4-bit)" in chat("--load-in-4bit")

    def evaluated(name, *options):
        words = ["eval", "pope", out, "--questions", folder / "pope.json", "--images", folder, "--max-new-tokens", 2]
        assert main([*map(str, words), "--out", str(folder / name), *options]) == 0
        return json.loads((folder / name / "results.json").read_text("utf-8"))["model"]["load_in_4bit"]

    assert evaluated(f"{adapter}-default") == (adapter == "qlora")
    assert evaluated(f"{adapter}-16", "--no-4bit") is False


@pytest.fixture
def recipe(folder, tmp_path):
    """Words of `llava train` for some rows of data, four samples an epoch's step."""

    def words(num_rows, *settings):
        rows = json.loads((folder / "data.json").read_text())
        data = tmp_path / "rows.json"
        data.write_text(json.dumps([{**rows[0], "id": str(i)} for i in range(num_rows)]))
        fixed = {
            "model": folder / "model", "data": data, "image_folder": folder, "output_dir": tmp_path / "run", "max_steps": 1,
            "per_device_train_batch_size": 4, "global_batch_size": 4, "dataloader_num_workers": 0, "disable_tqdm": "true",
            "report_to": "none", "preview_samples": 0, "lora_r": 4,
        }  # fmt: skip
        return ["train", "lora", *(f"{name}={value}" for name, value in fixed.items()), *settings]

    return words


EVALUATES = ["eval_strategy=steps", "eval_steps=1"]


@pytest.mark.parametrize(
    "num_rows, settings, held_out",
    [(49, [], 0), (120, [], 6), (120, EVALUATES, 6), (120, ["eval_size=0"], 0), (5001, [], 0)],
)
def test_small_data_gets_a_held_out_split(num_rows, settings, held_out, recipe, tmp_path, capsys, caplog):
    assert main(recipe(num_rows, *settings)) == 0
    assert ("evaluation loss" in capsys.readouterr().out) == (held_out > 0)
    assert (f"{held_out} of {num_rows} samples are held out" in caplog.text) == (held_out > 0)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["num_samples"] + held_out == num_rows
    resolved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (resolved["eval_size"] or 0) == held_out


def test_without_a_held_out_split_an_evaluation_is_refused(recipe, capsys):
    assert main(recipe(49, *EVALUATES)) == 2
    assert "eval_strategy=steps" in (error := capsys.readouterr().err) and "49 samples" in error


def test_a_trial_shows_answers_and_hours_and_leaves_the_run_alone(recipe, tmp_path, capsys):
    words = recipe(60, "save_steps=1", "eval_size=0", "num_train_epochs=2", "eval_strategy=no")
    assert main(words) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    assert main([*words, "max_steps=-1", "--trial", "3"]) == 0
    printed = capsys.readouterr().out
    # 56 of 60 rows, four samples a step, two epochs
    assert "2 epochs, 28 optimizer steps" in printed and "in 3 steps" not in printed
    assert all(word in printed for word in ("reference", "before", "after", "A red one."))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not list((tmp_path / "run" / "trial").glob("checkpoint-*"))
    assert main([*words, "--trial", "0"]) == main(["train"]) == main(["train", "model=x"]) == 2
    error = capsys.readouterr().err
    assert all(words in error for words in ("at least 1 step", "RECIPE is missing", "RECIPE comes before key=value"))
    streamed = _trial_of({"streaming": True, "output_dir": "run"}, 5)  # nothing can be held out
    assert "eval_size" not in streamed and streamed["sample_answers"] == 0


def test_download_disk_and_free_memory_are_told_before_loading(monkeypatch, tmp_path):
    def snapshot_download(model, dry_run, **kwargs):
        return [SimpleNamespace(file_size=13 * 2**30, will_download=True)]

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    args = LlavaTrainingArguments(**read_recipe("qlora-8gb") | {"precision": "fp32", "output_dir": str(tmp_path)})
    args.model, args.precision = "llava-hf/llava-1.5-7b-hf", "bf16"
    assert [line.partition(":")[0] for line in _needs(args)] == ["Download", "Disk"]
    args.use_cpu = False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(LlavaTrainingArguments, "device", torch.device("cuda"))
    for free, fits in ((7, True), (4, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free * 2**30, 8 * 2**30))
        line = _needs(args)[-1]
        assert f"{free}.0 of 8.0 GiB are free" in line and ("may not fit" in line) != fits
    args.model = "nobody/nothing"  # which training says
    assert _needs(args) == []


@pytest.mark.parametrize("seconds, words", [(64.0, "5 h 20 min"), (2.0, "10 min")])
def test_a_run_says_once_how_long_it_takes(caplog, monkeypatch, seconds, words):
    callback, state = DurationCallback(num_epochs=3), TrainerState(max_steps=300, is_world_process_zero=True)
    monkeypatch.setattr("time.perf_counter", lambda: seconds * state.global_step)
    args = SimpleNamespace(gradient_accumulation_steps=2)
    callback.on_train_begin(args, state, None, train_dataloader=range(200))
    for state.global_step in range(1, 20):
        callback.on_step_end(args, state, None)
    assert caplog.messages == [f"By its first steps, the run takes about {words} (3 epochs, 300 optimizer steps)."]
