"""A small model as a run leaves it, and a server that speaks the Hub's API."""

import json
import shutil

import pytest
from local_hub import TOKEN, LocalHub
from published import build
from tiny import tiny_text_config, tiny_vision_config
from transformers import AutoModelForCausalLM, CLIPImageProcessor, CLIPVisionModel

from modeling_llava import LlavaForConditionalGeneration, LlavaProcessor


@pytest.fixture(scope="session")
def parts(tmp_path_factory, request):
    golden = request.config.rootpath / "tests" / "golden"
    folder = tmp_path_factory.mktemp("parts")
    CLIPVisionModel(tiny_vision_config()).save_pretrained(folder / "tower")
    size = {"height": 28, "width": 28}
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size).save_pretrained(folder / "tower")
    AutoModelForCausalLM.from_config(tiny_text_config(vocab_size=700)).save_pretrained(folder / "language")
    (folder / "language" / "tokenizer.model").write_bytes((golden / "tiny_spm.model").read_bytes())
    return str(folder / "tower"), str(folder / "language")


@pytest.fixture(scope="session")
def bare_model(tmp_path_factory, parts, request):
    """Composed by us, or, for tests that ask for it, in the form that llava-hf publishes."""
    if getattr(request, "param", None) is not None:
        return build(request.param)
    folder = tmp_path_factory.mktemp("bare") / "my-llava"
    LlavaForConditionalGeneration.from_vision_language_pretrained(*parts).save_pretrained(folder)
    LlavaProcessor.from_vision_language_pretrained(*parts).save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(tmp_path, bare_model):
    folder = shutil.copytree(bare_model, tmp_path / "my-llava")
    recipe = "model: /home/someone/llava\ndata: /home/someone/pictures/instruct.json\nadapter: none\nprecision: fp32\n"
    (folder / "recipe.yaml").write_text(recipe)
    data = {"sources": [{"name": "/home/someone/pictures/instruct.json", "sha256": "ab" * 32}], "num_samples": 1234}
    record = {"versions": {"torch": "2.13.0"}, "machine": "Linux-6", "devices": 2, "data": data}
    (folder / "run.json").write_text(json.dumps(record))
    state = {"global_step": 42, "log_history": [{"train_runtime": 7380.0}], "best_model_checkpoint": "/home/a/last"}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    results = {"benchmark": "ScienceQA", "scores": {"average": 0.8984, "unparsed": 3}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with LocalHub(TOKEN) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)  # nothing asks the Hub of the internet
        url = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url)
        yield server
