"""`llava train`: what it prints at its end is what comes next, and works as it is printed."""

import io
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from modeling_llava import LlavaForConditionalGeneration, LlavaProcessor
from modeling_llava.cli.main import main


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


def train(folder, adapter, out):
    settings = {
        "adapter": adapter, "model": folder / "model", "data": folder / "data.json", "image_folder": folder, "max_steps": 1,
        "per_device_train_batch_size": 2, "lora_r": 4, "lora_alpha": 8, "save_strategy": "no", "disable_tqdm": "true",
        "report_to": "none", "output_dir": out, "preview_samples": 0, "dataloader_num_workers": 0, "use_cpu": "true",
        "activation_checkpointing": "false", "optim": "adamw_torch",
    }  # fmt: skip
    return main(["train", "lora", *(f"{name}={value}" for name, value in settings.items())])


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_next_command_of_an_adapter_loads_it_as_it_was_trained(adapter, folder, capsys, monkeypatch, caplog):
    pytest.importorskip("bitsandbytes")
    out = folder / adapter
    assert train(folder, adapter, out) == 0
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
