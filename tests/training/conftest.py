"""A tiny LLaVA with a real processor, and a tiny instruction set with pictures, made once per session."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from published import build
from rich.console import Console

from modeling_llava import LlavaForConditionalGeneration, LlavaProcessor
from modeling_llava.training import LlavaTrainer, LlavaTrainingArguments
from modeling_llava.training.batches import load_datasets
from modeling_llava.training.setup import load_model_and_processor


GOLDEN = Path(__file__).parents[1] / "golden" / "llava_v15_tiny_lora"
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "white": (240, 240, 240)}
TYPES = ("conversation", "detail", "complex")


@pytest.fixture(scope="session")
def base_model(tmp_path_factory, request) -> Path:
    """
    A composed LLaVA (CLIP 3 layers × 32, Llama × 64, 9 image tokens per image), saved with its processor; or, for tests that
    ask for it, a checkpoint as llava-hf publishes it.
    """
    if getattr(request, "param", None) is not None:
        return build(request.param)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "model"
    tower, language = str(GOLDEN / "vision_tower"), str(GOLDEN / "language_model")
    LlavaForConditionalGeneration.from_vision_language_pretrained(tower, language).save_pretrained(folder)
    LlavaProcessor.from_vision_language_pretrained(tower, language).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def instructions(tmp_path_factory) -> Path:
    """`instruct.json`: 24 questions about plain pictures, of three types, every sixth without a picture."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i in range(24):
        name, colour = list(COLOURS.items())[i % 4]
        Image.new("RGB", (40 + i, 30), colour).save(folder / f"{i}.png")
        question, answer = "What colour is it?", f"It is {name}" + ", quite" * (i % 3) + "."
        row = {"id": f"s{i}", "type": TYPES[i % 3]}
        if i % 6 != 5:
            row["image"], question = f"{i}.png", f"<image>\n{question}"
        row["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append(row)
    (folder / "instruct.json").write_text(json.dumps(rows))
    return folder / "instruct.json"


@pytest.fixture
def settings(base_model, instructions, tmp_path) -> dict:
    """A recipe of two optimizer steps on the tiny model; tests change what they are about."""
    return {
        "model": str(base_model),
        "data": str(instructions),
        "image_folder": str(instructions.parent),
        "output_dir": str(tmp_path / "run"),
        "max_length": 256,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 100,
        "learning_rate": 1e-3,
        "lora_r": 4,
        "lora_alpha": 8,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


@pytest.fixture
def make_trainer(settings):
    """Makes a trainer of the tiny model and the instructions, with these changes of the settings."""

    def make(dataset=None, own_model=None, eval_dataset=None, **changes):
        args = LlavaTrainingArguments(**{**settings, **changes})
        model, processor = load_model_and_processor(args)
        dataset = load_datasets(args)[0] if dataset is None else dataset
        return LlavaTrainer(
            own_model or model, args, train_dataset=dataset, eval_dataset=eval_dataset, processing_class=processor
        )

    return make


@pytest.fixture
def quiet(tmp_path):
    """A console that is not the terminal; what it was given: `export_text()`."""
    return Console(record=True, width=160, file=open(tmp_path / "console.txt", "w"))
