"""What of a folder is published, and what is found in it that must not be."""

import gzip
import json
import pickle
import shutil

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save
from small_files import parquet, safetensors

from modeling_llava.hub.files import find_problems
from modeling_llava.hub.publish import gather, push


SECRET, TEXT = "hf_" + "a" * 30, pa.string()


def cut_weights(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-7])


def name_lost_shard(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_secrets_and_local_paths_stop_the_push(hub, model_folder):
    notes = {"key": SECRET, "note": "see C:\\Users\\me"}
    (model_folder / "results_notes.json").write_text(json.dumps(notes, indent=1))
    publication = gather(model_folder, "tester/my-llava")
    found = [str(problem) for problem in publication.problems]
    assert "results_notes.json:2: holds what looks like a Hugging Face token" in found[0] and SECRET not in found[0]
    assert "results_notes.json:3: names a path on this machine" in found[1] and len(found) == 2
    with pytest.raises(ValueError, match="2 problems"):
        push(publication, endpoint=hub.url)
    assert hub.requests == []


def test_pickles_optimizer_state_notes_and_checkpoints_stay(model_folder):
    for name in ("optimizer.pt", "pytorch_model.bin", "notes.txt"):
        (model_folder / name).write_bytes(b"x")
    (model_folder / "checkpoint-10").mkdir()
    (model_folder / "checkpoint-10" / "model.safetensors").write_bytes(b"x")
    publication = gather(model_folder, "tester/my-llava")
    assert not any(name.endswith((".pt", ".bin")) or "checkpoint-10" in name for name in publication.files)
    assert {"optimizer.pt", "pytorch_model.bin", "notes.txt"} <= set(publication.left_out)


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path, model_folder):
    (tmp_path / "diary.json").write_text('{"dear": "diary"}')
    (model_folder / "results-mine.json").symlink_to(tmp_path / "diary.json")
    (model_folder / "vocab.json").symlink_to("nowhere")
    (model_folder / "special_tokens_map.json").symlink_to("added_tokens.json")
    (model_folder / "added_tokens.json").write_text("{}")
    publication = gather(model_folder, "tester/my-llava")
    out, lost = map(str, publication.problems)
    assert "results-mine.json: is a link out of this folder" in out and str(tmp_path / "diary.json") in out
    assert "vocab.json: is a link to a missing file" in lost
    assert "results-mine.json" not in publication.files and "special_tokens_map.json" in publication.files


def test_a_folder_of_the_hubs_cache_is_published_though_its_files_are_links(tmp_path, model_folder):
    cached = tmp_path / "models--owner--name"
    shutil.copytree(model_folder, cached / "blobs")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    for file in (cached / "blobs").iterdir():
        (cached / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{file.name}")
    assert gather(cached / "snapshots" / "abc", "tester/x", tmp_path / "out").problems == []


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: (folder / "processor_config.json").unlink(), "processor_config.json: is missing"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "chat_template*: is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "*.safetensors: is missing"),
        (lambda folder: [file.unlink() for file in folder.glob("tokenizer.*")], "tokenizer.json: is missing"),
        (cut_weights, "model.safetensors: is damaged or cut off"),
        (name_lost_shard, "model.safetensors.index.json: names model-00002-of-00002.safetensors, which is not there"),
    ],
)
def test_an_incomplete_model_is_a_problem(model_folder, spoil, message):
    spoil(model_folder)
    publication = gather(model_folder, "tester/my-llava")
    assert message in "\n".join(map(str, publication.problems))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("model-x.safetensors", safetensors({"note": "/home/someone/run"}), "a path on this machine"),
        ("answers.png", b"\x89PNG" + b"tEXtComment hf_" + b"a" * 34 + b"\0", "Hugging Face token"),
        ("LICENSE", b"see file:///home/someone/licence", "a path on this machine"),
        ("vocab.json", b'{"key": "AIza' + b"a" * 35 + b'"}', "Google key"),
        ("added_tokens.json", b'{"a": "~/models/llava"}', "a path on this machine"),
        ("added_tokens.json", b'{"a": "C:/Users/me"}', "a path on this machine"),
        ("added_tokens.json", b'{"a": "Q:\\nWhat? https://huggingface.co/data/x"}', None),
        ("added_tokens.json", b'{"a": "\\/home\\/me\\/x"}', "a path on this machine (/home/me/x)"),
        ("README.md", b"|/home/me/x|", "(/home/me/x)"),
        ("README.md", b"user@example.org, https://example.org:8000/a@b, sk-learn, eyJust, key: value", None),
        ("README.md", b"git clone https://me:hunter22@example.org/x", "a password in a URL"),
        ("recipe.yaml", b"aws_secret_access_key: wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "an AWS secret"),
        ("recipe.yaml", b"hub_token: abcdefghij0123456789", "a key"),
        ("results.json", '{"key": "hf_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}'.encode("utf-16"), "Hugging Face token"),
        ("model.gguf", b"GGUF\x0c\0\0\0\0/home/someone/llava\x05\0", "a path on this machine (/home/someone"),
        ("LICENSE", pickle.dumps({"a": 1}), "can hold a pickle"),
        ("weights.BIN", b"x", "can hold a pickle"),
        ("data.parquet", parquet(text=["fine", "hf_" + "a" * 30]), "Hugging Face token"),
        ("data.parquet", parquet(rows=[[{"value": "see /home/someone/x"}]]), "a path on this machine"),
        ("data.parquet", parquet(text=["fine"], image=[b"hf_" + b"a" * 30]), None),
        ("data.parquet", parquet(text=["fine"])[:-9], "data.parquet: is damaged or cut short"),
        ("data.parquet", parquet(text=pa.array([SECRET]).dictionary_encode()), "Hugging Face token"),
        ("data.parquet", parquet(text=pa.array([[("k", SECRET)]], pa.map_(TEXT, TEXT))), "Hugging Face token"),
        ("data.parquet", parquet(text=pa.array([["k", SECRET]], pa.list_(TEXT, 2))), "Hugging Face token"),
        ("data.parquet", parquet(**{SECRET: ["fine"]}), "Hugging Face token"),
        ("model-x.safetensors", save({"/home/someone/x": torch.zeros(1)}), "a path on this machine"),
        ("images.ipynb", '{"source": "open(\'/mnt/me/x\')  # \N{BLACK HEART SUIT}"}'.encode(), "(/mnt/me/x)"),
        ("LICENSE.gz", gzip.compress(SECRET.encode(), mtime=0), "is an archive"),
        ("LICENSE", b"x-api-key: abcdefghij0123456789", "a key"),
    ],
)
def test_every_kind_of_file_is_searched(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    problems = [str(problem) for problem in find_problems(tmp_path)]
    assert len(problems) == (message is not None) and all(message in problem for problem in problems), problems
