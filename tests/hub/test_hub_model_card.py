"""The cards of models and data sets, written from what a run left."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from small_files import write_results

from modeling_llava.hub.model_card import render_model_card
from modeling_llava.hub.publish import gather
from modeling_llava.hub.staging import finish_data_card


def test_card_holds_the_facts_of_the_run(hub, model_folder):
    publication = gather(model_folder, "tester/my-llava", license="llama2", base_models=["org/base"])
    card = (publication.folder / "README.md").read_text()
    metadata, body = card.split("---\n")[1:3]
    metadata = yaml.safe_load(metadata)
    assert metadata["license"] == "llama2" and metadata["base_model"] == ["org/base"]
    assert metadata["pipeline_tag"] == "image-text-to-text"
    result = metadata["model-index"][0]["results"][0]
    assert (result["dataset"]["name"], result["metrics"][0]["value"]) == ("ScienceQA", 0.8984)
    for fact in ("1,234 samples", "abababababab", "42 optimizer steps in 2 h 3 min", "torch 2.13.0", "2 processes"):
        assert fact in body, fact
    assert "28 pixels in patches of 14" in body and "4 per image" in body
    for runtime in ("vllm serve tester/my-llava", "sglang", "llama.cpp", "transformers serve", "llava chat"):
        assert runtime in body


@pytest.mark.parametrize("name", ["config.json", "run.json", "recipe.yaml", "trainer_state.json"])
@pytest.mark.parametrize("content", [b"{ cut", b"[1]", "{}".encode("utf-16")])
def test_a_record_that_cannot_be_read_is_named(model_folder, name, content):
    """The one in the model's folder, not its copy, which the next try would replace."""
    (model_folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=str(model_folder / name)):
        gather(model_folder, "tester/my-llava")


@pytest.mark.parametrize("content", ["", "~", "# nothing"])
def test_an_empty_recipe_is_no_recipe(model_folder, content):
    (model_folder / "recipe.yaml").write_text(content)
    (model_folder / "run.json").write_text('{"data": null, "versions": null}')
    assert gather(model_folder, "tester/my-llava").problems == []


@pytest.mark.parametrize(
    "card, body",
    [
        ("\ufeff---\nlicense: mit\n---\n# Data\n", "# Data\n"),
        ("---\r\nlicense: mit\r\n---\r\n# Data\r\n", "# Data\n"),
        ("---\nlicense: mit\npretty_name: a---\n---", ""),
        ("# Data\n---\na: b\n---\n", "# Data\n---\na: b\n---\n"),
    ],
)
def test_a_data_card_has_one_head(tmp_path, card, body):
    (tmp_path / "README.md").write_bytes(card.encode())
    finish_data_card(tmp_path / "README.md", "tester/data", "apache-2.0")
    head, rest = re.fullmatch(r"---\n(.*?)^---\n(.*)", (tmp_path / "README.md").read_text(), re.S | re.M).groups()
    assert yaml.safe_load(head)["license"] == "apache-2.0" and rest == body


def test_results_of_evaluations_stand_in_card_and_index(tmp_path, model_folder):
    whole = write_results(tmp_path / "pope")
    part = write_results(tmp_path / "vqa", benchmark="VQA", complete=False, samples={"total": 500, "scored": 20})
    publication = gather(model_folder, "tester/my-llava", results=[whole, part / "results.json"])
    assert publication.problems == []
    names = {"results.json", "results-pope-adversarial.json", "results-pope-adversarial.png", "results-vqa.json"}
    assert names <= publication.files.keys()
    card = (publication.folder / "README.md").read_text()
    assert "| POPE: adversarial | accuracy | 85.5123 | 84.20 – 86.80 | 3,000 |" in card
    assert "| VQA (20 of 500 samples) | accuracy |" in card
    index = ModelCard(card).data.eval_results  # as the Hub reads it
    assert {(entry.dataset_name, entry.metric_name, entry.metric_value) for entry in index} == {
        ("POPE: adversarial", "accuracy", 85.5123),
        ("ScienceQA", "average", 0.8984),
        ("ScienceQA", "unparsed", 3),
    }
    with pytest.raises(ValueError, match="are of the same benchmark"):
        gather(model_folder, "tester/my-llava", results=[whole, whole])
    with pytest.raises(FileNotFoundError, match="holds no results.json"):
        gather(model_folder, "tester/my-llava", results=[tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="names no benchmark"):
        gather(model_folder, "tester/my-llava", results=[model_folder / "run.json"])


def test_odd_names_and_values_give_an_index_that_the_hub_can_read(tmp_path):
    scores = {
        "精度": 0.5,
        "nothing": float("nan"),
        "x|y": {"mean": 2.5, "interval": [None, None]},
        "!": 3,
        "yes": True,
    }
    (tmp_path / "results.json").write_text(json.dumps({"benchmark": 'A "B": #测试 |', "scores": scores}))
    card = render_model_card(tmp_path, "tester/x", kind="full", license="no", language="no", base_models=['o/"b'])
    data = ModelCard(card).data
    assert (data.license, data.language, data.base_model) == ("no", ["no"], ['o/"b'])
    index = {(entry.dataset_type, entry.metric_type, entry.metric_value) for entry in data.eval_results}
    assert index == {("a-b-测试", "精度", 0.5), ("a-b-测试", "x_y", 2.5), ("a-b-测试", "metric", 3)}
    assert 'A "B": #测试 \\| | x\\|y | 2.5 |' in card


def test_base_models_and_data_are_those_of_the_run(model_folder):
    (model_folder / "recipe.yaml").write_text("model: owner/base-7b\nadapter: none\nprecision: bf16\n")
    sources = [{"name": "owner/instruct", "sha256": None}, {"name": "/home/someone/more.json", "sha256": "ab" * 32}]
    (model_folder / "run.json").write_text(json.dumps({"data": {"sources": sources}}))
    publication = gather(model_folder, "tester/my-llava", data_license="CC BY 4.0")
    data = ModelCard((publication.folder / "README.md").read_text()).data
    assert data.base_model == ["owner/base-7b"] and data.datasets == ["owner/instruct"]
    assert "Its licence: CC BY 4.0." in (publication.folder / "README.md").read_text()


def test_card_of_a_projector_says_how_a_projector_is_used(tmp_path, model_folder):
    folder = tmp_path / "projector"
    folder.mkdir()
    (folder / "projector_config.json").write_text(json.dumps({"base_model_name_or_path": str(model_folder)}))
    (folder / "projector.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="is a projector for .* --base-model"):
        gather(folder, "tester/projector")
    publication = gather(folder, "tester/projector", base_models=["owner/base"])
    assert publication.problems == []
    card = (publication.folder / "README.md").read_text()
    assert "llava merge tester/projector merged" in card and "pipeline(" not in card and "vllm serve" not in card


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"projector_num_layers": 3}, "its projector has 3 layers"),
        ({"projector_hidden_act": "linear", "projector_num_layers": 1}, "| vLLM | no: it has no linear activation |"),
        ({"vision_config": {"model_type": "dinov2"}}, "no: `llava convert` writes its files for CLIP and SigLIP"),
        ({"vision_feature_select_strategy": "full"}, "| llama.cpp | no: it always drops the class token"),
        ({"text_config": {"model_type": "phi3"}}, "`convert_hf_to_gguf.py gguf/language_model` (not run for phi3)"),
    ],
)
def test_card_promises_no_runtime_that_cannot_run_the_model(model_folder, fields, expected):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | fields))
    card = (gather(model_folder, "tester/my-llava").folder / "README.md").read_text()
    assert expected in card
    if "projector_num_layers" in fields and fields["projector_num_layers"] > 2:
        assert "import modeling_llava\nfrom transformers import pipeline" in card and "vllm serve" not in card


def test_card_without_any_record_says_what_is_not_known(tmp_path):
    card = render_model_card(tmp_path, "tester/x", kind="full")
    assert "left no record" in card and "no evaluation results" in card
    assert "None" not in card
