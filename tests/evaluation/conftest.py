"""A tiny model on disk, a tiny ScienceQA, scripted language models."""

import json
import sys
from pathlib import Path

import pytest
from tiny_predictor import picture, published_llava, tiny_llava, tiny_processor
from tiny_science import science_problem

from modeling_llava.endpoint import Reply, Usage


sys.path.insert(0, str(Path(__file__).parents[1] / "endpoint"))  # for fault_server


@pytest.fixture(scope="session", params=["ours", "llava-hf"])
def model_folder(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("tiny-llava")
    if request.param == "llava-hf":
        published_llava(folder=folder, max_position_embeddings=2048)
        return folder
    processor = tiny_processor()
    tiny_llava(processor, max_position_embeddings=2048).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def science(tmp_path):
    """The official layout with 8 test and 6 train problems, half of them with an image."""
    problems = {str(n): science_problem(n, "test" if n <= 8 else "train") for n in range(1, 15)}
    splits = {"test": [str(n) for n in range(1, 9)], "train": [str(n) for n in range(9, 15)]}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps(splits))
    for number, problem in problems.items():
        if problem["image"]:
            folder = tmp_path / "images" / problem["split"] / number
            folder.mkdir(parents=True)
            picture(int(number)).save(folder / "image.png")
    return tmp_path


class ScriptedModel:
    """A `ChatModel` that answers by a function of the messages; counts how often it is asked."""

    def __init__(self, answer, name="scripted", model="scripted-2026-01-01"):
        self.name, self.answer, self.model = name, answer, model
        self.asked = []

    async def complete(self, messages, *, max_tokens, temperature=None, seed=None, request_id=None):
        self.asked.append(messages)
        text = self.answer(messages)
        if isinstance(text, Exception):
            raise text
        return Reply(text, "stop" if text else "length", Usage(10, 5), self.model)


@pytest.fixture
def scripted():
    return ScriptedModel
