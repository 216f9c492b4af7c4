"""Publishing to a server on this machine that speaks the Hub's API, with failures in the middle."""

import gzip
import importlib
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import textwrap

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from local_hub import LocalHub
from safetensors.torch import save
from tiny import tiny_text_config, tiny_vision_config
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPImageProcessor, CLIPVisionModel

from modeling_llava import LlavaForConditionalGeneration, LlavaProcessor
from modeling_llava.cli.main import main
from modeling_llava.hub.files import find_problems, select_files
from modeling_llava.hub.model_card import render_model_card
from modeling_llava.hub.publish import gather, push
from modeling_llava.hub.staging import finish_data_card


TOKEN = "hf_" + "t" * 30
SECRET = "hf_" + "a" * 30


@pytest.fixture(scope="module")
def parts(tmp_path_factory, request):
    golden = request.config.rootpath / "tests" / "golden"
    folder = tmp_path_factory.mktemp("parts")
    CLIPVisionModel(tiny_vision_config()).save_pretrained(folder / "tower")
    size = {"height": 28, "width": 28}
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size).save_pretrained(folder / "tower")
    AutoModelForCausalLM.from_config(tiny_text_config(vocab_size=700)).save_pretrained(folder / "language")
    (folder / "language" / "tokenizer.model").write_bytes((golden / "tiny_spm.model").read_bytes())
    return str(folder / "tower"), str(folder / "language")


@pytest.fixture(scope="module")
def bare_model(tmp_path_factory, parts):
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
    state = {
        "global_step": 42,
        "log_history": [{"train_runtime": 7380.0}],
        "best_model_checkpoint": "/home/a/checkpoint-1",
    }
    (folder / "trainer_state.json").write_text(json.dumps(state))
    results = {"benchmark": "ScienceQA", "scores": {"average": 0.8984, "unparsed": 3}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def safetensors(metadata: dict) -> bytes:
    return save({"x": torch.zeros(1)}, metadata=metadata)


def parquet(**columns) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def cut_weights(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-7])


def name_lost_shard(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


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


def test_published_model_downloads_and_loads(hub, model_folder, tmp_path):
    publication = gather(model_folder, "tester/my-llava", license="llama2", base_models=["org/base"])
    assert publication.problems == []
    url = push(publication, endpoint=hub.url, private=True, tags=["v1"])
    assert url == f"{hub.url}/tester/my-llava"
    assert hub.repositories["model", "tester/my-llava"]["visibility"] == "private"
    assert hub.repositories["model", "tester/my-llava"]["tags"] == {"v1": "main"}
    assert set(hub.files("tester/my-llava")) == set(publication.files)
    program = """
        import sys, torch
        from huggingface_hub import snapshot_download
        from transformers import AutoModelForImageTextToText, AutoProcessor
        model = AutoModelForImageTextToText.from_pretrained("tester/my-llava", revision="v1")
        AutoProcessor.from_pretrained("tester/my-llava")
        torch.save(model.state_dict(), sys.argv[1])
        assert not any(name.startswith("modeling_llava") for name in sys.modules)
    """
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": TOKEN, "PATH": "/usr/bin", "HF_HUB_OFFLINE": "0"}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "weights.pt")],
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    ours = AutoModelForImageTextToText.from_pretrained(model_folder).state_dict()
    downloaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert ours.keys() == downloaded.keys()
    assert all(torch.equal(ours[name], downloaded[name]) for name in ours)


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
    assert "28 pixels in patches of 14" in body and "4 per picture" in body
    for runtime in ("vllm serve tester/my-llava", "sglang", "llama.cpp", "transformers serve", "llava chat"):
        assert runtime in body


def test_local_paths_of_the_run_are_shortened_and_the_source_is_not_changed(model_folder):
    before = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    publication = gather(model_folder, "tester/my-llava")
    for name in ("recipe.yaml", "run.json", "trainer_state.json", "README.md"):
        text = (publication.folder / name).read_text()
        assert "/home" not in text
    assert "instruct.json" in (publication.folder / "recipe.yaml").read_text()
    assert {path.name: path.read_bytes() for path in model_folder.iterdir()} == before


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("results_notes.json", '{"key": "hf_' + "a" * 34 + '"}', "Hugging Face token"),
        ("results_notes.json", '{"key": "sk-' + "a" * 40 + '"}', "OpenAI key"),
        ("results_notes.json", '{"note": "see /home/someone/notes"}', "a place on this machine"),
        ("results_notes.json", '{"note": "see C:\\\\\\\\Users\\\\\\\\me"}', "a place on this machine"),
    ],
)
def test_secrets_and_local_paths_stop_the_push(hub, model_folder, name, content, message):
    (model_folder / name).write_text(content)
    publication = gather(model_folder, "tester/my-llava")
    assert len(publication.problems) == 1
    assert message in str(publication.problems[0]) and str(publication.problems[0]).startswith(name)
    assert "a" * 34 not in str(publication.problems[0])
    with pytest.raises(ValueError, match="1 problem"):
        push(publication, endpoint=hub.url)
    assert hub.requests == []


def test_pickles_optimizer_state_and_checkpoints_stay(model_folder):
    (model_folder / "optimizer.pt").write_bytes(b"x")
    (model_folder / "pytorch_model.bin").write_bytes(b"x")
    (model_folder / "checkpoint-10").mkdir()
    (model_folder / "checkpoint-10" / "model.safetensors").write_bytes(b"x")
    publication = gather(model_folder, "tester/my-llava")
    assert not any(name.endswith((".pt", ".bin")) or "checkpoint-10" in name for name in publication.files)
    assert "optimizer.pt" in publication.left_out and "pytorch_model.bin" in publication.left_out


def test_a_pickle_that_got_in_is_a_problem(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    assert [str(problem) for problem in find_problems(tmp_path)][0].startswith("weights.bin: can hold a pickle")


def test_an_interrupted_upload_goes_on_without_sending_twice(hub, model_folder):
    publication = gather(model_folder, "tester/my-llava")
    hub.fail_next("POST", "/commit/", "500")
    with pytest.raises(OSError, match="broke off .* goes on"):
        push(publication, endpoint=hub.url)
    sent = list(hub.uploads)
    assert sent and hub.files("tester/my-llava") == {}
    push(publication, endpoint=hub.url)
    assert hub.uploads == sent
    assert "model.safetensors" in hub.files("tester/my-llava")


def test_a_cut_connection_while_weights_are_sent_is_survived(hub, model_folder):
    publication = gather(model_folder, "tester/my-llava")
    hub.fail_next("PUT", "/lfs-storage/", "drop")
    push(publication, endpoint=hub.url)  # huggingface_hub tries again by itself
    sent = hub.files("tester/my-llava")["model.safetensors"]
    assert sent == (model_folder / "model.safetensors").read_bytes()


def test_a_storage_that_refuses_a_large_file_is_one_clear_error(hub, model_folder):
    """huggingface_hub raises a `RuntimeError` there; and it is not about the token."""
    publication = gather(model_folder, "tester/my-llava")
    hub.fail_next("PUT", "/lfs-storage/", "403")
    with pytest.raises(OSError, match=r"The upload broke off \(.*uploading .* 403\). Run the same command again"):
        push(publication, endpoint=hub.url)
    push(publication, endpoint=hub.url)
    assert "model.safetensors" in hub.files("tester/my-llava")


def test_a_token_that_may_not_write_is_one_clear_error_without_the_token(hub, model_folder):
    publication = gather(model_folder, "tester/my-llava")
    hub.fail_next("POST", "/repos/create", "403")
    with pytest.raises(PermissionError, match="may write there") as error:
        push(publication, endpoint=hub.url)
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize("method, path", [("POST", "/repos/create"), ("POST", "/commit/"), ("GET", "/api/models/")])
def test_a_cut_connection_is_one_clear_error_and_no_log_holds_the_token(hub, model_folder, caplog, method, path):
    publication = gather(model_folder, "tester/my-llava")
    hub.fail_next(method, path, "drop")
    with caplog.at_level("DEBUG"), pytest.raises(OSError, match="The upload broke off .* Run the same command again"):
        push(publication, endpoint=hub.url)
    with caplog.at_level("DEBUG"):
        push(publication, endpoint=hub.url)
    assert "config.json" in hub.files("tester/my-llava")
    assert caplog.records and TOKEN not in caplog.text


def test_private_is_never_sent_to_a_public_repository(hub, model_folder):
    publication = gather(model_folder, "tester/my-llava")
    push(publication, endpoint=hub.url)
    sent = len(hub.uploads)
    (model_folder / "config.json").write_text((model_folder / "config.json").read_text() + " ")
    with pytest.raises(ValueError, match="there already and public: --private"):
        push(gather(model_folder, "tester/my-llava"), endpoint=hub.url, private=True)
    assert len(hub.uploads) == sent


def test_a_tag_of_an_older_commit_is_refused_before_anything_is_sent(hub, model_folder):
    push(gather(model_folder, "tester/my-llava"), endpoint=hub.url, tags=["v1"])
    push(gather(model_folder, "tester/my-llava"), endpoint=hub.url, tags=["v1"])  # the same again: nothing to do
    push(gather(model_folder, "tester/my-llava", summary="Another."), endpoint=hub.url)
    before = dict(hub.files("tester/my-llava"))
    push(gather(model_folder, "tester/my-llava", summary="Another."), endpoint=hub.url, tags=["v2"])
    with pytest.raises(ValueError, match="files were sent, but tester/my-llava has the tag 'v2' already"):
        push(gather(model_folder, "tester/my-llava", summary="More."), endpoint=hub.url, tags=["v2", "v3"])
    assert set(hub.repositories["model", "tester/my-llava"]["tags"]) == {"v1", "v2"}
    before = dict(hub.files("tester/my-llava"))
    with pytest.raises(ValueError, match="has a tag 'v1', of an older commit"):
        push(gather(model_folder, "tester/my-llava", summary="A third."), endpoint=hub.url, tags=["v1"])
    for name in ("two words", "a..b", "", "-x"):
        with pytest.raises(ValueError, match="cannot be the name of a branch or a tag"):
            push(gather(model_folder, "tester/my-llava", summary="A fourth."), endpoint=hub.url, tags=[name])
    assert hub.files("tester/my-llava") == before


def test_weights_of_an_earlier_publication_go(hub, model_folder):
    """A loader would take an old index, or an old pickle, for this model's."""
    push(gather(model_folder, "tester/my-llava"), endpoint=hub.url)
    files = hub.files("tester/my-llava")
    old = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    files.update(dict.fromkeys((*old, "notes.txt", "onnx/model.safetensors"), b"x"))
    push(gather(model_folder, "tester/my-llava", summary="Another."), endpoint=hub.url)
    left = set(hub.files("tester/my-llava"))
    assert not left & set(old) and {"notes.txt", "onnx/model.safetensors", "model.safetensors"} <= left


def test_a_name_alone_gets_its_owner_from_the_hub(hub, model_folder):
    publication = gather(model_folder, "my-llava")
    assert publication.repo == "tester/my-llava"
    assert 'model="tester/my-llava"' in (publication.folder / "README.md").read_text()
    hub.fail_next("GET", "/whoami", "drop")
    with pytest.raises(ValueError, match="names no owner, and the Hub does not say who you are. Give owner/name"):
        gather(model_folder, "my-llava")


def test_a_branch_is_made_and_main_stays(hub, model_folder):
    push(gather(model_folder, "tester/my-llava"), endpoint=hub.url, revision="trial")
    assert hub.files("tester/my-llava") == {}
    assert "config.json" in hub.files("tester/my-llava", revision="trial")


def test_an_adapter_names_its_base_by_its_hub_name(hub, tmp_path, model_folder):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": str(model_folder), "r": 8, "lora_alpha": 16, "peft_type": "LORA"}
    config["auto_mapping"] = {
        "base_model_class": "LlavaForConditionalGeneration",
        "parent_library": "modeling_llava.x",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes())
    (adapter / "processor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="--base-model"):
        gather(adapter, "tester/adapter")
    publication = gather(adapter, "tester/adapter", base_models=["org/base"])
    assert publication.kind == "adapter" and publication.problems == []
    staged = json.loads((publication.folder / "adapter_config.json").read_text())
    assert staged["base_model_name_or_path"] == "org/base"
    library = importlib.import_module(staged["auto_mapping"]["parent_library"])  # as PEFT's AutoPeftModel does
    assert library.LlavaForConditionalGeneration.__module__.startswith("transformers.")
    assert json.loads((adapter / "adapter_config.json").read_text()) == config
    card = (publication.folder / "README.md").read_text()
    assert "base_model_relation: adapter" in card and "rank 8, alpha 16" in card


def test_a_data_set_is_published_as_one(hub, tmp_path):
    folder = tmp_path / "data-set"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.parquet").write_bytes(parquet(text=["A dog."]))
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Data\n")
    (folder / "ledger.jsonl").write_text("{}\n")
    push(gather(folder, "tester/data"), endpoint=hub.url)
    assert set(hub.files("tester/data", "dataset")) == {"README.md", "data/train.parquet", "ledger.jsonl"}


def test_a_run_of_the_data_engine_is_published_as_its_data_set(hub, tmp_path):
    """With a `dataset` folder that one, without it the JSON; ledger, record and contexts stay here."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("ledger.jsonl", "contexts.jsonl", "run.json", "instruct.json", "rejected.jsonl"):
        (run / name).write_text('{"images": "/home/someone/pictures"}' if name == "run.json" else "[]")
    card = '---\nlanguage:\n- en\n---\n\n# Data\n\nload_dataset("PATH OR REPOSITORY")\n'
    (run / "README.md").write_text(card)
    publication = gather(run, "tester/data", license="cc-by-4.0")
    assert set(publication.files) == {"README.md", "instruct.json", "rejected.jsonl"} and not publication.problems
    _, front, body = (publication.folder / "README.md").read_text().split("---\n")
    front = yaml.safe_load(front)
    assert front == {
        "license": "cc-by-4.0",
        "language": ["en"],
        "configs": [{"config_name": "default", "data_files": "instruct.json"}],
    }
    assert 'load_dataset("tester/data")' in body and (run / "README.md").read_text() == card

    (run / "dataset" / "data").mkdir(parents=True)
    (run / "dataset" / "data" / "train-00000.parquet").write_bytes(parquet(text=["A dog."]))
    problems = gather(run, "tester/data").problems
    assert [str(problem) for problem in problems] == [
        "README.md: is missing; say what the data is and under which licence."
    ]
    (run / "dataset" / "README.md").write_text(card)
    publication = gather(run, "tester/data")
    assert publication.folder == tmp_path / "run-to-publish"
    push(publication, endpoint=hub.url)
    assert set(hub.files("tester/data", "dataset")) == {"README.md", "data/train-00000.parquet"}


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path, model_folder):
    (tmp_path / "diary.json").write_text('{"dear": "diary"}')
    (model_folder / "results-mine.json").symlink_to(tmp_path / "diary.json")
    (model_folder / "vocab.json").symlink_to("nowhere")
    (model_folder / "special_tokens_map.json").symlink_to("added_tokens.json")
    (model_folder / "added_tokens.json").write_text("{}")
    publication = gather(model_folder, "tester/my-llava")
    assert [str(problem) for problem in publication.problems] == [
        f"results-mine.json: is a link out of this folder ({tmp_path / 'diary.json'}); put the file here.",
        "vocab.json: is a link to a file that is not there.",
    ]
    assert "results-mine.json" not in publication.files and "special_tokens_map.json" in publication.files


def test_a_folder_of_the_hubs_cache_is_published_though_its_files_are_links(tmp_path, model_folder):
    cached = tmp_path / "models--owner--name"
    shutil.copytree(model_folder, cached / "blobs")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    for file in (cached / "blobs").iterdir():
        (cached / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{file.name}")
    assert gather(cached / "snapshots" / "abc", "tester/x", tmp_path / "out").problems == []


def test_what_was_gathered_can_be_edited_without_changing_the_model(model_folder):
    before = (model_folder / "generation_config.json").read_text()
    publication = gather(model_folder, "tester/my-llava")
    with open(publication.folder / "generation_config.json", "a") as file:
        file.write(" ")
    assert (model_folder / "generation_config.json").read_text() == before
    assert (publication.folder / "model.safetensors").samefile(model_folder / "model.safetensors")


def test_places_within_a_line_of_the_recipe_are_shortened_too(model_folder):
    lines = ["vqa --questions /home/me/q.jsonl --images ~/my/pics --limit 200", "pope --questions owner/name"]
    recipe = {"model": "../start", "benchmarks": lines, "image_folder": "/data/my pictures", "lora_target": r"a\.b/.*"}
    (model_folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    publication = gather(model_folder, "tester/my-llava")
    assert publication.problems == []
    assert yaml.safe_load((publication.folder / "recipe.yaml").read_text()) == {
        "model": "start",
        "benchmarks": ["vqa --questions q.jsonl --images pics --limit 200", "pope --questions owner/name"],
        "image_folder": "my pictures",
        "lora_target": r"a\.b/.*",
    }


@pytest.mark.parametrize("name", ["config.json", "run.json", "recipe.yaml", "trainer_state.json"])
@pytest.mark.parametrize("content", [b"{ cut", b"[1]", "{}".encode("utf-16")])
def test_a_record_that_cannot_be_read_is_named(model_folder, name, content):
    """The one in the model's folder, not its copy, which the next try would replace."""
    (model_folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{model_folder / name} cannot be read"):
        gather(model_folder, "tester/my-llava")


@pytest.mark.parametrize("content", ["", "~", "# nothing"])
def test_an_empty_recipe_is_no_recipe(model_folder, content):
    (model_folder / "recipe.yaml").write_text(content)
    (model_folder / "run.json").write_text('{"data": null, "versions": null}')
    assert gather(model_folder, "tester/my-llava").problems == []


def test_what_the_hub_does_not_take_is_not_called_an_interruption(hub, model_folder):
    publication = gather(model_folder, "tester/my-llava")
    hub.fail_next("POST", "/commit/", "400")
    with pytest.raises(ValueError, match=r"does not take tester/my-llava as it is \(400: .*injected"):
        push(publication, endpoint=hub.url)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: (folder / "processor_config.json").unlink(), "processor_config.json: is missing"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "chat_template.jinja: is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "there are no weights"),
        (cut_weights, "model.safetensors: is damaged or cut short"),
        (name_lost_shard, "model.safetensors.index.json: names model-00002-of-00002.safetensors, which is not there"),
    ],
)
def test_an_incomplete_model_is_a_problem(model_folder, spoil, message):
    spoil(model_folder)
    publication = gather(model_folder, "tester/my-llava")
    assert message in "\n".join(map(str, publication.problems))


def test_wrong_places_and_names_are_one_clear_error(tmp_path, model_folder):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        gather(tmp_path / "nowhere", "tester/x")
    with pytest.raises(ValueError, match="not a name on the Hub"):
        gather(model_folder, "a/b/c")
    with pytest.raises(ValueError, match="was not made by this command"):
        gather(model_folder, "tester/x", tmp_path)
    with pytest.raises(ValueError, match="is being published"):
        gather(model_folder, "tester/x", model_folder / "inside")
    with pytest.raises(ValueError, match="'/home/me/base' is not a name on the Hub"):
        gather(model_folder, "tester/x", base_models=["/home/me/base"])
    gathered = gather(model_folder, "tester/x", tmp_path / "out").folder
    inside = shutil.copytree(model_folder, gathered / "copy")
    with pytest.raises(ValueError, match="which is being published, lies in .*, which is made anew"):
        gather(inside, "tester/x", gathered)
    assert (inside / "config.json").is_file()


def test_the_commands_mistakes_are_named_before_a_model_is_loaded(tmp_path, model_folder, capsys):
    def said(*words):
        assert main(["publish", *map(str, words), "--dry-run"]) == 2
        return capsys.readouterr().err

    (tmp_path / "cut.json").write_text("{ cut")
    (tmp_path / "list.json").write_text("[1]")
    assert "cut.json cannot be read" in said(model_folder, "tester/x", "--results", tmp_path / "cut.json")
    assert "list.json cannot be read" in said(model_folder, "tester/x", "--results", tmp_path / "list.json")
    assert "'a/b/c' is not a name on the Hub" in said(model_folder, "a/b/c", "--merge")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone/base", "peft_type": "LORA"}')
    (adapter / "adapter_model.safetensors").write_bytes(safetensors({}))
    (adapter / "processor_config.json").write_text("{}")
    message = said(adapter, "tester/x", "--base-model", "owner/base")
    assert "was trained on /gone/base, which is not there" in message and "--no-run" in message


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


def test_the_command_merges_checks_and_writes_the_runs_record_into_the_card(tmp_path, model_folder, capsys):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    get_peft_model(LlavaForConditionalGeneration.from_pretrained(model_folder), config).save_pretrained(
        tmp_path / "lora"
    )
    for name in ("recipe.yaml", "run.json"):
        (tmp_path / "lora" / name).write_text((model_folder / name).read_text())
    words = [str(tmp_path / "lora"), "tester/merged", "--merge", "--dry-run", "--results"]
    assert (
        main(["publish", *words, str(write_results(tmp_path / "pope", model={"name": "x", "fingerprint": "0"}))]) == 0
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert "ok: keys: stock transformers finds every weight" in printed and "The pipeline answers:" in printed
    assert "whose files are not those of" in printed and "Nothing was sent" in printed
    card = (tmp_path / "lora-to-publish" / "README.md").read_text()
    assert "1,234 samples" in card and "stock `llava` checkpoint" in card and "84.20 – 86.80" in card
    assert not list(tmp_path.glob(".merging-*"))


def test_gathering_again_replaces_what_was_gathered(model_folder):
    first = gather(model_folder, "tester/my-llava")
    (first.folder / "left-over.json").write_text("{}")
    second = gather(model_folder, "tester/my-llava")
    assert not (second.folder / "left-over.json").exists()


def write_results(folder, **fields):
    folder.mkdir(exist_ok=True)
    results = {
        "schema_version": 1,
        "benchmark": "POPE: adversarial",
        "primary_score": "accuracy",
        "model": {"name": "my-llava", "adapter": "/home/someone/adapter"},
        "samples": {"total": 3000, "scored": 3000},
        "complete": True,
        "scores": {"accuracy": {"value": 85.51234, "interval": [84.2, 86.8], "count": 3000}},
        **fields,
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "results.png").write_bytes(b"PNG")
    return folder


def test_results_of_evaluations_stand_in_card_and_index(tmp_path, model_folder):
    whole = write_results(tmp_path / "pope")
    part = write_results(tmp_path / "vqa", benchmark="VQA", complete=False, samples={"total": 500, "scored": 20})
    publication = gather(model_folder, "tester/my-llava", results=[whole, part / "results.json"])
    assert publication.problems == []
    assert {
        "results.json",
        "results-pope-adversarial.json",
        "results-pope-adversarial.png",
        "results-vqa.json",
    } <= set(publication.files)
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
        ({"text_config": {"model_type": "qwen2"}}, "| llama.cpp | no: `llava convert` writes its files for CLIP with"),
    ],
)
def test_card_promises_no_runtime_that_cannot_run_the_model(model_folder, fields, expected):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | fields))
    card = (gather(model_folder, "tester/my-llava").folder / "README.md").read_text()
    assert expected in card
    if "projector_num_layers" in fields and fields["projector_num_layers"] > 2:
        assert "import modeling_llava\nfrom transformers import pipeline" in card and "vllm serve" not in card


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("model-x.safetensors", safetensors({"note": "/home/someone/run"}), "a place on this machine"),
        ("answers.png", b"\x89PNG" + b"tEXtComment hf_" + b"a" * 34 + b"\0", "Hugging Face token"),
        ("LICENSE", b"see file:///home/someone/licence", "a place on this machine"),
        ("vocab.json", b'{"key": "AIza' + b"a" * 35 + b'"}', "Google key"),
        ("added_tokens.json", b'{"a": "~/models/llava"}', "a place on this machine"),
        ("added_tokens.json", b'{"a": "C:/Users/me"}', "a place on this machine"),
        ("added_tokens.json", b'{"a": "Q:\\nWhat? https://huggingface.co/data/x"}', None),
        ("added_tokens.json", b'{"a": "\\/home\\/me\\/x"}', "a place on this machine (/home/me/x)"),
        ("README.md", b"|/home/me/x|", "(/home/me/x)"),
        ("README.md", b"user@example.org, https://example.org:8000/a@b, sk-learn, eyJust, key: value", None),
        ("README.md", b"git clone https://me:hunter22@example.org/x", "a password in a URL"),
        ("recipe.yaml", b"aws_secret_access_key: wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "an AWS secret"),
        ("recipe.yaml", b"hub_token: abcdefghij0123456789", "a key"),
        ("results.json", '{"key": "hf_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}'.encode("utf-16"), "Hugging Face token"),
        ("model.gguf", b"GGUF\x0c\0\0\0\0/home/someone/llava\x05\0", "a place on this machine (/home/someone"),
        ("LICENSE", pickle.dumps({"a": 1}), "can hold a pickle"),
        ("weights.BIN", b"x", "can hold a pickle"),
        ("data.parquet", parquet(text=["fine", "hf_" + "a" * 30]), "Hugging Face token"),
        ("data.parquet", parquet(rows=[[{"value": "see /home/someone/x"}]]), "a place on this machine"),
        ("data.parquet", parquet(text=["fine"], image=[b"hf_" + b"a" * 30]), None),
        ("data.parquet", parquet(text=["fine"])[:-9], "data.parquet: is damaged or cut short"),
        ("data.parquet", parquet(text=pa.array([SECRET]).dictionary_encode()), "Hugging Face token"),
        (
            "data.parquet",
            parquet(text=pa.array([[("k", SECRET)]], pa.map_(pa.string(), pa.string()))),
            "Hugging Face token",
        ),
        ("data.parquet", parquet(text=pa.array([["k", SECRET]], pa.list_(pa.string(), 2))), "Hugging Face token"),
        ("data.parquet", parquet(**{SECRET: ["fine"]}), "Hugging Face token"),
        ("model-x.safetensors", save({"/home/someone/x": torch.zeros(1)}), "a place on this machine"),
        (
            "images.ipynb",
            '{"source": "open(\'/mnt/me/pictures\')  # \N{BLACK HEART SUIT}"}'.encode(),
            "(/mnt/me/pictures)",
        ),
        ("LICENSE.gz", gzip.compress(SECRET.encode()), "is an archive"),
        ("LICENSE", b"x-api-key: abcdefghij0123456789", "a key"),
    ],
)
def test_every_kind_of_file_is_searched(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    problems = [str(problem) for problem in find_problems(tmp_path)]
    assert len(problems) == (message is not None) and all(message in problem for problem in problems), problems


def test_card_without_any_record_says_what_is_not_known(tmp_path):
    card = render_model_card(tmp_path, "tester/x", kind="full")
    assert "left no record" in card and "No evaluation results" in card
    assert "None" not in card


def test_selection_takes_models_files_only_from_the_top(tmp_path):
    for name in (
        "config.json",
        "runs/events.json",
        "model-00001-of-00002.safetensors",
        ".cache/config.json",
        "notes.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    published, left = select_files(tmp_path, "model")
    assert [str(p) for p in published] == ["config.json", "model-00001-of-00002.safetensors"]
    assert [str(p) for p in left] == ["notes.txt", "runs/events.json"]
