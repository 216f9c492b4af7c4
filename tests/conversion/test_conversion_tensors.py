"""Lazy tensors and the files they lie in: exact, in pieces, and safe with files that lie."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_llava.conversion import tensors as tensors_module
from modeling_llava.conversion.tensors import (
    cast,
    extended,
    first_rows,
    in_memory,
    permuted_rows,
    read_checkpoint,
    read_safetensors,
    read_torch_file,
)
from modeling_llava.conversion.writing import write_safetensors


@pytest.fixture
def values():
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(37, 5, generator=generator),
        "half": torch.randn(6, 4, generator=generator).half(),
        "bf16": torch.randn(3, 2, 2, generator=generator).bfloat16(),
        "vector": torch.arange(7, dtype=torch.int64),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(tensors_module, "PIECE_BYTES", 64)


def test_safetensors_are_read_as_the_library_reads_them(values, tmp_path, small_pieces):
    save_file(values, tmp_path / "a.safetensors")
    lazy = read_safetensors(tmp_path / "a.safetensors")
    assert lazy.keys() == values.keys()
    for key, value in values.items():
        assert lazy[key].dtype == value.dtype and lazy[key].shape == tuple(value.shape)
        assert torch.equal(lazy[key].tensor(), value)
        pieces = [value.new_zeros(0), *(piece.flatten() for piece in lazy[key].pieces())]
        assert torch.equal(torch.cat(pieces), value.flatten())
    assert len(list(lazy["matrix"].pieces())) == 13  # 3 rows of 20 bytes fit into 64


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_bin_files_are_read_as_torch_reads_them(values, tmp_path, is_zip):
    saved = {**values, "transposed": values["matrix"].t(), "rows": values["matrix"][3:9], "shared": values["matrix"]}
    torch.save(saved, tmp_path / "a.bin", _use_new_zipfile_serialization=is_zip)
    lazy = read_torch_file(tmp_path / "a.bin")
    for key, value in saved.items():
        assert torch.equal(lazy[key].tensor(), value), key
    assert torch.equal(lazy["transposed"].rows(1, 3), values["matrix"].t()[1:3])


def test_transformations_equal_those_of_whole_tensors(values, tmp_path, small_pieces):
    save_file(values, tmp_path / "a.safetensors")
    matrix, whole = read_safetensors(tmp_path / "a.safetensors")["matrix"], values["matrix"]
    assert torch.equal(cast(matrix, torch.bfloat16).tensor(), whole.bfloat16())
    assert cast(matrix, None) is matrix and cast(matrix, torch.float32) is matrix
    assert torch.equal(first_rows(matrix, 11).tensor(), whole[:11])
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat(list(permuted_rows(matrix, order).pieces())), whole[order])
    longer, mean = extended(matrix, 40), whole.double().mean(0).float()
    assert torch.equal(longer.tensor(), torch.cat([whole, mean.expand(3, 5)]))
    assert torch.equal(longer.rows(36, 38), torch.stack([whole[36], mean]))
    assert torch.equal(longer.rows(38, 40), mean.expand(2, 5))


def test_copy_that_fails_half_way_is_not_taken_for_one_between_file_systems(values, tmp_path, monkeypatch):
    save_file(values, tmp_path / "a.safetensors")
    lazy = read_safetensors(tmp_path / "a.safetensors")
    done = []

    def fail(source, target, count, offset):
        done.append(count)
        if len(done) > 1:
            raise OSError(28, "No space left on device")
        return 4

    monkeypatch.setattr(os, "copy_file_range", fail, raising=False)
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(tmp_path / "b.safetensors", {"matrix": lazy["matrix"]})
    assert not (tmp_path / "b.safetensors").exists()
    write_safetensors(tmp_path / "b.safetensors", {"matrix": lazy["matrix"]})  # fails at once: another file system
    assert torch.equal(load_file(tmp_path / "b.safetensors")["matrix"], values["matrix"])


@pytest.mark.parametrize("by_kernel", [True, False])
def test_written_safetensors_are_read_by_the_library(values, tmp_path, small_pieces, monkeypatch, by_kernel):
    if not by_kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    save_file(values, tmp_path / "a.safetensors")
    lazy = read_safetensors(tmp_path / "a.safetensors")
    written = {**lazy, "more": extended(lazy["matrix"], 64), "small": in_memory(torch.ones(2), "x")}
    counts = []
    write_safetensors(tmp_path / "b.safetensors", written, counts.append)
    loaded = load_file(tmp_path / "b.safetensors")
    assert loaded.keys() == written.keys()
    for key, value in loaded.items():
        assert torch.equal(value, written[key].tensor()), key
    assert sum(counts) == sum(tensor.nbytes for tensor in written.values())


@pytest.mark.parametrize("kept", [0.5, 0.0], ids=["within", "before"])
@pytest.mark.parametrize("by_kernel", [True, False])
def test_source_that_becomes_shorter_while_it_is_read_is_an_error(tmp_path, monkeypatch, by_kernel, kept):
    if not by_kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    save_file({"matrix": torch.ones(64, 64)}, tmp_path / "a.safetensors")
    lazy = read_safetensors(tmp_path / "a.safetensors")
    size = os.path.getsize(tmp_path / "a.safetensors")
    os.truncate(tmp_path / "a.safetensors", size - int((1 - kept) * 64 * 64 * 4))
    with pytest.raises(ValueError, match="matrix.*became shorter"):
        write_safetensors(tmp_path / "b.safetensors", lazy)
    assert not (tmp_path / "b.safetensors").exists()


# Files that are damaged, or worse


class Touch:
    """A pickle of this runs `open(path, "w")` in whoever unpickles it freely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, is_zip):
    evil = {"model.norm.weight": torch.ones(3), "x": Touch(str(tmp_path / "touched"))}
    torch.save(evil, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin was refused.*can run any program.*safetensors"):
        read_torch_file(tmp_path / "pytorch_model.bin")
    assert not (tmp_path / "touched").exists()
    # the file is what it claims to be: read without care, it does run
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)["x"].close()
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": "text"}, {"a": {"b": torch.ones(2)}}, {3: torch.ones(1)}])
def test_bin_file_must_hold_tensors_by_name(tmp_path, content):
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"a\.bin holds"):
        read_torch_file(tmp_path / "a.bin")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.95])
@pytest.mark.parametrize("size", [10, 5000])  # torch fails in another way where the end lies far behind the cut
def test_truncated_bin_file_is_one_clear_error(values, tmp_path, kept, size):
    torch.save(values | {"more": torch.ones(size)}, tmp_path / "a.bin")
    data = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match=r"a\.bin (is|was refused: it is) damaged"):
        read_torch_file(tmp_path / "a.bin")


def test_file_that_cannot_be_opened_is_not_called_damaged(tmp_path):
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(IsADirectoryError):
        read_torch_file(tmp_path / "a.bin")


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "entry",
    [
        {**ENTRY, "shape": [40], "data_offsets": [0, 160]},  # cut
        {**ENTRY, "data_offsets": [0, 12]},
        {**ENTRY, "dtype": "Q4"},
        {"shape": [4], "data_offsets": [0, 16]},
        ENTRY,  # and 48 bytes that belong to nothing
        None,
    ],
    ids=str,
)
def test_damaged_safetensors_are_found(tmp_path, entry):
    text = json.dumps({"w": entry}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)
    with pytest.raises(Exception, match="(?i)header|buffer"):
        load_file(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged or cut off"):
        read_safetensors(tmp_path / "a.safetensors")


def test_safetensors_of_a_dtype_that_is_not_read_are_named(tmp_path):
    save_file({"w": torch.ones(2, dtype=torch.complex64)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="'w' of .*a.safetensors has dtype C64"):
        read_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_pointer_of_git_lfs_is_not_taken_for_weights(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 41961648\n")
    with pytest.raises(ValueError, match=f"{name} is Git LFS's pointer.*git lfs pull"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "weight_map, message",
    [
        ({"a": "one.safetensors", "b": "gone.safetensors"}, r"names the shard 'gone\.safetensors', which is not"),
        ({"a": "../one.safetensors"}, r"names the shard '\.\./one\.safetensors'"),
        ({"a": "one.safetensors", "b": "two.safetensors"}, "'a' is in .*two.safetensors and in another shard"),
        ({"a": "empty.safetensors"}, "nothing is empty .*ZeRO-3"),
        (["a"], "is not an index of weights"),
    ],
)
def test_index_that_lies_is_one_clear_error(tmp_path, weight_map, message):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (tmp_path, folder):
        save_file({"a": torch.ones(1)}, path / "one.safetensors")
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, folder / "two.safetensors")
    save_file({"nothing": torch.ones(0)}, folder / "empty.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        read_checkpoint(folder / "model.safetensors.index.json")
