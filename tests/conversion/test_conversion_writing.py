"""Output folders: whole or not there, resumable, and never begun on a disk that is too small."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from unittest.mock import Mock

import pytest
import torch
from conversion_cases import GOLDEN, copy_original

from modeling_llava import LlavaProcessor
from modeling_llava.conversion import convert_original_to_hf, writing
from modeling_llava.conversion.tensors import LazyTensor, in_memory
from modeling_llava.conversion.writing import OutputFolder, plan_shards


SOURCE = GOLDEN / "llava_v15_tiny"


def tensors(**sizes: int) -> dict[str, LazyTensor]:
    return {key: in_memory(torch.full((size,), ord(key), dtype=torch.uint8), key) for key, size in sizes.items()}


def output(path, shards=None, files=(), **options) -> OutputFolder:
    return OutputFolder(path, "a test", files, shards or {}, **options)


def test_shards_keep_their_limit_and_their_index_is_the_one_transformers_reads(tmp_path):
    shards = plan_shards(tensors(b=40, a=50, c=30), 100)
    assert [list(group) for group in shards.values()] == [["b", "a"], ["c"]]
    assert list(plan_shards(tensors(a=40, b=50), "1KB")) == ["model.safetensors"]
    with output(tmp_path / "out", shards) as folder:
        folder.write_shards(shards)
        folder.commit()
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index == {"metadata": {"total_size": 120}, "weight_map": {"a": first, "b": first, "c": second}}
    assert sorted(os.listdir(tmp_path / "out")) == [first, second, "model.safetensors.index.json"]
    assert os.listdir(tmp_path) == ["out"]


def test_folder_that_is_there_is_replaced_only_when_asked(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already.*--overwrite"), output(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == ["out"]
    with output(tmp_path / "out", overwrite=True) as folder:
        assert (tmp_path / "out/mine.txt").exists()  # until the new one is whole
        folder.write_shards(plan_shards(tensors(a=1), 10))
        folder.commit()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["model.safetensors"]
    (tmp_path / "empty").mkdir()
    with output(tmp_path / "empty") as folder:
        folder.commit()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"), output(tmp_path / "file"):
        pass


@pytest.mark.parametrize("dies_at", ["rename", "rmtree"])
def test_a_run_that_is_killed_while_it_replaces_a_folder_loses_nothing(tmp_path, monkeypatch, dies_at):
    for name, content in (("out", "before"), ("out.old", "mine")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content.txt").write_text(content)

    def convert():
        with output(tmp_path / "out", overwrite=True) as folder:
            (folder.partial / "content.txt").write_text("after")
            folder.commit()

    def kill(source, *_, **options):
        if str(source).endswith("out"):  # what is there has moved out of the way by then
            return rename(source, *_)
        raise KeyboardInterrupt

    rename = os.rename
    monkeypatch.setattr({"rename": os, "rmtree": shutil}[dies_at], dies_at, kill)
    with pytest.raises(KeyboardInterrupt):
        convert()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="exists already"), output(tmp_path / "out"):
        pass
    assert (tmp_path / "out/content.txt").read_text() == ("before" if dies_at == "rename" else "after")
    convert()
    assert (tmp_path / "out/content.txt").read_text() == "after"
    assert sorted(os.listdir(tmp_path)) == ["out", "out.old"]  # which is somebody's own


def test_overwriting_what_is_read_is_refused(tmp_path):
    source = copy_original(tmp_path / "source")
    with pytest.raises(ValueError, match="is read from .*and cannot be replaced"):
        convert_original_to_hf(source, source, overwrite=True, check=False)
    assert (source / "config.json").exists()


def test_two_conversions_do_not_write_one_folder(tmp_path):
    pytest.importorskip("fcntl")
    with output(tmp_path / "out"):
        for shards in ({}, {"model.safetensors": tensors(a=1)}):  # the same one, and another
            with pytest.raises(ValueError, match="Another conversion is writing"), output(tmp_path / "out", shards):
                pass


def disk_with(monkeypatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, free))


def test_disk_that_is_too_small_is_said_before_writing(tmp_path, monkeypatch):
    disk_with(monkeypatch, 500_000)
    with pytest.raises(OSError, match=r"too small: the conversion writes 845kB, 500kB are free\. Nothing was written"):
        convert_original_to_hf(SOURCE, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_space_of_finished_shards_counts_when_a_conversion_resumes(tmp_path, monkeypatch):
    shards = plan_shards(tensors(a=60_000, b=50_000), 60_000)
    with output(tmp_path / "out", shards) as folder:
        folder.write_shards(dict(list(shards.items())[:1]))
    disk_with(monkeypatch, 40_000)
    with pytest.raises(OSError, match="too small"), output(tmp_path / "out", shards):
        pass
    disk_with(monkeypatch, 55_000)
    with output(tmp_path / "out", shards) as folder:
        folder.write_shards(shards)
        folder.commit()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    "place, name, error",
    [
        (writing, "write_safetensors", OSError(28, "No space left on device")),
        (
            LlavaProcessor,
            "save_pretrained",
            Exception("No space left (os error 28)"),
        ),  # as Rust's tokenizers raises it
    ],
)
def test_disk_that_fills_up_is_one_clear_error_and_the_next_run_resumes(tmp_path, monkeypatch, place, name, error):
    monkeypatch.setattr(place, name, Mock(side_effect=error))
    with pytest.raises(OSError, match=r"The disk of .*out\.partial.* is full"):
        convert_original_to_hf(SOURCE, tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    convert_original_to_hf(SOURCE, tmp_path / "out", check=False)
    assert os.listdir(tmp_path) == ["out"]


# Stopped on the way


@pytest.mark.parametrize("change", ["options", "source"])
def test_rerun_with_other_options_or_sources_starts_again(tmp_path, monkeypatch, change):
    source = copy_original(tmp_path / "source")
    monkeypatch.setattr(OutputFolder, "commit", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert_original_to_hf(source, tmp_path / "out", check=False)
    monkeypatch.undo()
    (before,) = tmp_path.glob("out.partial-*/model.safetensors")
    before = before.stat()
    (tmp_path / "out.partial-notes").mkdir()  # somebody else's
    if change == "source":
        os.utime(source / "model.safetensors", ns=(1, 1))
    convert_original_to_hf(source, tmp_path / "out", check=False, dtype="float16" if change == "options" else None)
    after = (tmp_path / "out/model.safetensors").stat()
    assert (after.st_size < before.st_size) if change == "options" else (after.st_mtime_ns > before.st_mtime_ns)
    assert sorted(os.listdir(tmp_path)) == ["out", "out.partial-notes", "source"]


KILLED = """
import os, sys
from modeling_llava.conversion import convert_original_to_hf, writing

del os.copy_file_range  # pieces are counted

pieces, real = [], writing.as_bytes

def die(piece):  # as by `kill -9`, in the middle of a shard: nothing is cleaned up
    pieces.append(piece)
    return os._exit(9) if len(pieces) == int(sys.argv[3]) else real(piece)

writing.as_bytes = die
convert_original_to_hf(sys.argv[1], sys.argv[2], max_shard_size="100KB", check=False)
"""


def test_killed_conversion_leaves_nothing_that_loads_and_is_completed_by_the_next(tmp_path):
    out = tmp_path / "out"
    died = subprocess.run([sys.executable, "-c", KILLED, str(SOURCE), str(out), "40"])
    assert died.returncode == 9 and not out.exists() and not list(tmp_path.glob("*/config.json"))
    assert list(tmp_path.glob("out.partial-*/.*.safetensors.*"))  # what it had open
    finished = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out.partial-*/model-*.safetensors")}
    convert_original_to_hf(SOURCE, out, max_shard_size="100KB", check=False)
    assert finished and all((out / name).stat().st_mtime_ns == time for name, time in finished.items())
    convert_original_to_hf(SOURCE, tmp_path / "whole", max_shard_size="100KB", check=False)
    assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "whole"))
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert not list(tmp_path.glob("*.partial*"))
