"""Publishing to a server on this machine that speaks the Hub's API, with failures in the middle."""

import json
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import yaml
from local_hub import TOKEN
from published import copy
from safetensors.torch import save_file
from small_files import parquet, safetensors, write_results
from transformers import AutoModelForImageTextToText

from modeling_llava import LlavaForConditionalGeneration
from modeling_llava.cli.main import main
from modeling_llava.hub.publish import gather, push
from modeling_llava.io.checkpoints import save_projector


@pytest.mark.parametrize("bare_model", [None, "llava-hf"], ids=["ours", "llava-hf"], indirect=True)
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
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "weights.pt")]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    ours = AutoModelForImageTextToText.from_pretrained(model_folder).state_dict()
    downloaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert ours.keys() == downloaded.keys()
    assert all(torch.equal(ours[name], downloaded[name]) for name in ours)


def test_local_paths_of_the_run_are_shortened_and_the_source_is_not_changed(model_folder):
    lines = ["vqa --questions /home/me/q.jsonl --images ~/my/pics --limit 200", "pope --questions owner/name"]
    recipe = {"model": "../start", "benchmarks": lines, "image_folder": "/data/my pictures", "lora_target": r"a\.b/.*"}
    (model_folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    before = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    publication = gather(model_folder, "tester/my-llava")
    assert publication.problems == []
    for name in ("recipe.yaml", "run.json", "trainer_state.json", "README.md"):
        assert "/home" not in (publication.folder / name).read_text()
    assert yaml.safe_load((publication.folder / "recipe.yaml").read_text()) == {
        "model": "start",
        "benchmarks": ["vqa --questions q.jsonl --images pics --limit 200", "pope --questions owner/name"],
        "image_folder": "my pictures",
        "lora_target": r"a\.b/.*",
    }
    assert "instruct.json" in (publication.folder / "run.json").read_text()
    with open(publication.folder / "generation_config.json", "a") as file:  # what was gathered may be edited
        file.write(" ")
    assert {path.name: path.read_bytes() for path in model_folder.iterdir()} == before
    assert (publication.folder / "model.safetensors").samefile(model_folder / "model.safetensors")
    (publication.folder / "left-over.json").write_text("{}")
    assert not (gather(model_folder, "tester/my-llava").folder / "left-over.json").exists()


def test_an_interrupted_upload_resumes_without_sending_twice(hub, model_folder):
    publication = gather(model_folder, "tester/my-llava")
    hub.fail_next("POST", "/commit/", "500")
    with pytest.raises(OSError, match="interrupted .* to resume"):
        push(publication, endpoint=hub.url)
    sent = list(hub.uploads)
    assert sent and hub.files("tester/my-llava") == {}
    push(publication, endpoint=hub.url)
    assert hub.uploads == sent
    assert hub.files("tester/my-llava")["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "method, path, how, error, said",
    [
        ("PUT", "/lfs-storage/", "drop", None, None),  # huggingface_hub tries again
        ("PUT", "/lfs-storage/", "403", OSError, "interrupted .*uploading .* 403"),  # a RuntimeError there
        ("POST", "/repos/create", "drop", OSError, "interrupted"),
        ("POST", "/commit/", "drop", OSError, "interrupted"),
        ("GET", "/api/models/", "drop", OSError, "interrupted"),
        ("POST", "/commit/", "429", OSError, "too many requests"),
        ("POST", "/repos/create", "403", PermissionError, "may write there"),
        ("POST", "/commit/", "400", ValueError, r"rejects tester/my-llava \(400: .*injected"),
    ],
)
def test_a_failure_of_the_hub_is_one_clear_error_and_no_log_holds_the_token(
    hub, model_folder, caplog, method, path, how, error, said
):
    publication = gather(model_folder, "tester/my-llava")
    hub.fail_next(method, path, how)
    caplog.set_level("DEBUG")
    if error is not None:
        with pytest.raises(error, match=said) as raised:
            push(publication, endpoint=hub.url)
        assert TOKEN not in str(raised.value)
    push(publication, endpoint=hub.url)
    assert {"config.json", "model.safetensors"} <= set(hub.files("tester/my-llava"))
    assert caplog.records and TOKEN not in caplog.text


def test_a_defect_of_the_library_keeps_its_traceback(hub, model_folder, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a defect")

    monkeypatch.setattr("os.link", lambda *args: (_ for _ in ()).throw(OSError))  # on another file system: copied
    publication = gather(model_folder, "tester/my-llava")
    assert not (publication.folder / "model.safetensors").samefile(model_folder / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", broken)
    with pytest.raises(RuntimeError, match="^a defect$"):
        push(publication, endpoint=hub.url)


def test_without_a_token_the_login_is_named(hub, model_folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(model_folder / "none"))
    with pytest.raises(PermissionError, match="hf auth login"):
        push(gather(model_folder, "tester/my-llava"), endpoint=hub.url)


def test_private_is_never_sent_to_a_public_repository(hub, model_folder):
    publication = gather(model_folder, "tester/my-llava")
    push(publication, endpoint=hub.url)
    sent = len(hub.uploads)
    (model_folder / "config.json").write_text((model_folder / "config.json").read_text() + " ")
    with pytest.raises(ValueError, match="exists and is public: --private"):
        push(gather(model_folder, "tester/my-llava"), endpoint=hub.url, private=True)
    assert len(hub.uploads) == sent


def test_a_tag_that_is_taken_is_refused_before_anything_is_sent(hub, model_folder):
    push(gather(model_folder, "tester/my-llava"), endpoint=hub.url, tags=["v1"])
    before = dict(hub.files("tester/my-llava"))
    publication = gather(model_folder, "tester/my-llava", summary="Another.")
    with pytest.raises(ValueError, match="has a tag 'v1', of an earlier commit"):
        push(publication, endpoint=hub.url, tags=["v2", "v1"])
    for name in ("two words", "a..b", "", "-x"):
        with pytest.raises(ValueError, match="cannot be the name of a branch or a tag"):
            push(publication, endpoint=hub.url, tags=[name])
    assert hub.files("tester/my-llava") == before
    push(publication, endpoint=hub.url, tags=["v2", "v3"])
    assert set(hub.repositories["model", "tester/my-llava"]["tags"]) == {"v1", "v2", "v3"}


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
    with pytest.raises(ValueError, match="has no owner.* Give owner/name"):
        gather(model_folder, "my-llava")


def test_a_branch_is_made_and_main_stays(hub, model_folder):
    push(gather(model_folder, "tester/my-llava"), endpoint=hub.url, revision="trial")
    assert hub.files("tester/my-llava") == {}
    assert "config.json" in hub.files("tester/my-llava", revision="trial")


def adapter_of(base, folder, **settings):
    """A folder with an adapter, and its configuration."""
    config = {"base_model_name_or_path": str(base), "peft_type": "LORA", **settings}
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(safetensors({}))
    (folder / "adapter" / "processor_config.json").write_text("{}")
    return folder / "adapter", config


def test_an_adapter_names_its_base_by_its_hub_name(hub, tmp_path, model_folder):
    adapter, config = adapter_of(model_folder, tmp_path, r=8, lora_alpha=16)
    with pytest.raises(ValueError, match="--base-model"):
        gather(adapter, "tester/adapter")
    publication = gather(adapter, "tester/adapter", base_models=["org/base"])
    assert publication.kind == "adapter" and publication.problems == []
    staged = json.loads((publication.folder / "adapter_config.json").read_text())
    assert staged["base_model_name_or_path"] == "org/base"
    assert json.loads((adapter / "adapter_config.json").read_text()) == config
    card = (publication.folder / "README.md").read_text()
    assert "base_model_relation: adapter" in card and "rank 8, alpha 16" in card


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
    configs = [{"config_name": "default", "data_files": "instruct.json"}]
    assert yaml.safe_load(front) == {"license": "cc-by-4.0", "language": ["en"], "configs": configs}
    assert 'load_dataset("tester/data")' in body and (run / "README.md").read_text() == card

    (run / "dataset" / "data").mkdir(parents=True)
    (run / "dataset" / "data" / "train-00000.parquet").write_bytes(parquet(text=["A dog."]))
    (problem,) = gather(run, "tester/data").problems
    assert str(problem) == "README.md: is missing; say what the data is and under which licence."
    (run / "dataset" / "README.md").write_text(card)
    publication = gather(run, "tester/data")
    assert publication.folder == tmp_path / "run-to-publish"
    push(publication, endpoint=hub.url)
    assert set(hub.files("tester/data", "dataset")) == {"README.md", "data/train-00000.parquet"}


def test_wrong_places_and_names_are_one_clear_error(tmp_path, model_folder):
    gathered = gather(model_folder, "tester/x", tmp_path / "out").folder
    inside = shutil.copytree(model_folder, gathered / "copy")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    for source, words, said in (
        (tmp_path / "nowhere", ["tester/x"], "is not a folder"),
        (tmp_path / "other", ["tester/x"], "holds neither a model .* nor a data set.*notes.txt"),
        (model_folder, ["tester/x", tmp_path / "other"], "was not made by this command"),
        (model_folder, ["tester/x", model_folder / "inside"], "are inside each other"),
        (inside, ["tester/x", gathered], "are inside each other"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=said):
            gather(source, *words)
    with pytest.raises(ValueError, match="'/home/me/base' is not a name on the Hub"):
        gather(model_folder, "tester/x", base_models=["/home/me/base"])
    assert (inside / "config.json").is_file()


def test_the_commands_mistakes_are_named_before_a_model_is_loaded(tmp_path, model_folder, capsys):
    def said(*words):
        assert main(["publish", *map(str, words), "--dry-run"]) == 2
        return capsys.readouterr().err

    (tmp_path / "cut.json").write_text("{ cut")
    (tmp_path / "list.json").write_text("[1]")
    assert "cut.json is not JSON" in said(model_folder, "tester/x", "--results", tmp_path / "cut.json")
    assert "list.json holds no JSON object" in said(model_folder, "tester/x", "--results", tmp_path / "list.json")
    assert "'a/b/c' is not a name on the Hub" in said(model_folder, "a/b/c", "--merge")
    model = LlavaForConditionalGeneration.from_pretrained(model_folder).requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_()
    save_projector(model, tmp_path / "projector")
    save_file({"unknown": torch.zeros(1)}, tmp_path / "projector" / "projector.safetensors")
    assert "4 weights are missing" in said(tmp_path / "projector", "tester/x", "--base-model", "owner/base")
    save_file({"unknown": torch.zeros(1)}, model_folder / "model.safetensors")
    assert "the model cannot be loaded: keys: " in said(model_folder, "tester/x")
    (model_folder / "chat_template.jinja").unlink()
    assert "cannot publish: 1 problems" in said(model_folder, "tester/x")
    adapter, _ = adapter_of("/gone/base", tmp_path)
    message = said(adapter, "tester/x", "--base-model", "owner/base")
    assert "was trained on /gone/base, which is not there" in message and "--no-run" in message


@pytest.mark.parametrize("bare_model", [None, "llava-hf"], ids=["ours", "llava-hf"], indirect=True)
def test_the_command_merges_checks_and_writes_the_runs_record_into_the_card(tmp_path, model_folder, capsys):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    model = LlavaForConditionalGeneration.from_pretrained(model_folder)
    get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    for name in ("recipe.yaml", "run.json"):
        (tmp_path / "lora" / name).write_text((model_folder / name).read_text())
    results = write_results(tmp_path / "pope", model={"name": "x", "fingerprint": "0"})
    words = [str(tmp_path / "lora"), "tester/merged", "--merge", "--dry-run", "--results", str(results)]
    assert main(["publish", *words]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "ok: keys: stock transformers finds every weight" in printed and "The pipeline answers:" in printed
    assert "whose files differ from those of" in printed and "Nothing was uploaded" in printed
    card = (tmp_path / "lora-to-publish" / "README.md").read_text()
    assert "1,234 samples" in card and "stock `llava` checkpoint" in card and "84.20 – 86.80" in card
    assert not list(tmp_path.glob(".merging-*"))


def test_what_stock_needs_to_end_an_answer_is_said_and_stands_in_the_card(tmp_path):
    model = copy("gemma", tmp_path / "model")  # its generation configuration has <eos>, its turns end otherwise
    stop = json.loads((model / "tokenizer.json").read_text())["added_tokens"]
    stop = next(token["id"] for token in stop if token["content"] == "<end_of_turn>")
    eos = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
    publication = gather(model, "tester/gemma")
    assert publication.generate_kwargs == {"eos_token_id": [eos, stop]}
    assert f"ends = {{'eos_token_id': [{eos}, {stop}]}}" in (publication.folder / "README.md").read_text()
    assert gather(copy("qwen2.5", tmp_path / "qwen"), "tester/qwen").generate_kwargs is None


def test_an_adapters_note_of_its_stop_is_said(tmp_path):
    adapter, _ = adapter_of("org/base", tmp_path)
    (adapter / "generation_config.json").write_text('{"stop_strings": ["###"]}')
    publication = gather(adapter, "tester/adapter", base_models=["org/base"])
    assert publication.generate_kwargs == {"stop_strings": ["###"]} and "generation_config.json" in publication.files
    card = (publication.folder / "README.md").read_text()
    assert "{'stop_strings': ['###']} | {\"tokenizer\": pipe.tokenizer}" in card
