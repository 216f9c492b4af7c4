"""Lazy tensors and the files they lie in: exact, in pieces, and safe with files that lie."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_llava.conversion import tensors as tensors_module
from modeling_llava.conversion.tensors import (
    Extended,
    FileRange,
    cast,
    find_weights,
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
        pieces = list(lazy[key].row_pieces())
        assert torch.equal(
            torch.cat([p.reshape(-1) for p in pieces]) if pieces else value.reshape(-1), value.reshape(-1)
        )
    assert len(list(lazy["matrix"].row_pieces())) == 13  # 3 rows of 20 bytes fit into 64


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_bin_files_are_read_as_torch_reads_them(values, tmp_path, is_zip):
    saved = {**values, "transposed": values["matrix"].t(), "rows": values["matrix"][3:9], "shared": values["matrix"]}
    torch.save(saved, tmp_path / "a.bin", _use_new_zipfile_serialization=is_zip)
    lazy = read_torch_file(tmp_path / "a.bin")
    for key, value in saved.items():
        assert torch.equal(lazy[key].tensor(), value), key
        if key == "transposed":
            assert torch.equal(lazy[key].rows(1, 3), value[1:3])
    assert (lazy["matrix"].ranges is not None) == is_zip  # of the zip form nothing is in memory


def test_transformations_equal_those_of_whole_tensors(values, tmp_path, small_pieces):
    save_file(values, tmp_path / "a.safetensors")
    matrix, whole = read_safetensors(tmp_path / "a.safetensors")["matrix"], values["matrix"]
    assert torch.equal(cast(matrix, torch.bfloat16).tensor(), whole.bfloat16())
    assert cast(matrix, None) is matrix and cast(matrix, torch.float32) is matrix
    assert torch.equal(first_rows(matrix, 11).tensor(), whole[:11])
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat(list(permuted_rows(matrix, order).row_pieces())), whole[order])
    longer = Extended(matrix, 40, 37)
    mean = whole.double().mean(0).float()
    assert torch.equal(longer.tensor(), torch.cat([whole, mean.expand(3, 5)]))
    assert torch.equal(longer.rows(38, 40), mean.expand(2, 5))
    assert torch.equal(Extended(matrix, 40, 20).rows(39, 40)[0], whole[:20].double().mean(0).float())


def test_unchanged_content_is_a_range_of_its_file(values, tmp_path):
    save_file(values, tmp_path / "a.safetensors")
    matrix = read_safetensors(tmp_path / "a.safetensors")["matrix"]
    (piece,) = matrix.pieces()
    assert isinstance(piece, FileRange) and piece.nbytes == 37 * 5 * 4
    (prefix,) = first_rows(matrix, 10).pieces()
    assert prefix == FileRange(piece.path, piece.offset, 10 * 5 * 4)
    kept, added = Extended(matrix, 40, 37).pieces()
    assert kept == piece and added.shape == (3, 5)


def test_written_safetensors_are_read_by_the_library(values, tmp_path, small_pieces):
    save_file(values, tmp_path / "a.safetensors")
    lazy = read_safetensors(tmp_path / "a.safetensors")
    written = {**lazy, "more": Extended(lazy["matrix"], 64, 37), "small": in_memory(torch.ones(2), "x")}
    counts = []
    write_safetensors(tmp_path / "b.safetensors", written, counts.append)
    loaded = load_file(tmp_path / "b.safetensors")
    assert loaded.keys() == written.keys()
    for key, value in loaded.items():
        assert torch.equal(value, written[key].tensor()), key
    assert sum(counts) == sum(tensor.nbytes for tensor in written.values())
    with open(tmp_path / "b.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"] == {"format": "pt"}


def test_copying_works_without_the_kernels_help(values, tmp_path, monkeypatch):
    save_file(values, tmp_path / "a.safetensors")
    lazy = read_safetensors(tmp_path / "a.safetensors")
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    write_safetensors(tmp_path / "b.safetensors", lazy)
    assert all(torch.equal(value, values[key]) for key, value in load_file(tmp_path / "b.safetensors").items())


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
    with pytest.raises(ValueError, match=r"a\.bin (is|was refused: it is) damaged.*[dD]ownload (or copy )?it again"):
        read_torch_file(tmp_path / "a.bin")


def test_truncated_safetensors_names_the_file(values, tmp_path):
    save_file({"first": torch.zeros(8), "second": torch.zeros(100)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:-40])
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged or cut off"):
        read_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "content", [b"", b"\x05", b"\xff" * 8, b"\x00\x10" + b"\x00" * 6 + b"{", struct.pack("<Q", 2) + b"[]"]
)
def test_file_that_is_no_safetensors_is_one_clear_error(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        read_safetensors(tmp_path / "a.safetensors")


def write_header(path, entries, data=b"\0" * 64):
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, -16]},
        {"dtype": "Q4", "shape": [4], "data_offsets": [0, 2]},
        {"dtype": "F32", "shape": [40], "data_offsets": [0, 160]},
        {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
        {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]},
        {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]},
    ],
)
def test_safetensors_header_that_lies_is_found(tmp_path, entry):
    write_header(tmp_path / "a.safetensors", {"w": entry})
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged or cut off"):
        read_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "entries",
    [
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0]}},
        {"w": {"shape": [4], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "x": {**{"dtype": "F32", "shape": [4]}, "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},  # and 48 bytes that belong to nothing
    ],
)  # fmt: skip
def test_safetensors_that_the_library_would_not_read_are_not_read_here(tmp_path, entries):
    write_header(tmp_path / "a.safetensors", entries)
    with pytest.raises(Exception, match="(?i)header|buffer"):
        load_file(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors .*damaged"):
        read_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_pointer_of_git_lfs_is_not_taken_for_weights(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 41961648\n")
    with pytest.raises(ValueError, match=f"{name} is Git LFS's pointer.*git lfs pull"):
        read_checkpoint(tmp_path / name)


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder / "model.safetensors.index.json"


def test_index_that_names_a_missing_shard(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    index = write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    with pytest.raises(ValueError, match=r"names the shard 'two\.safetensors', which is not there.*'b' and 1 more"):
        read_checkpoint(index)


def test_index_that_names_a_tensor_its_shard_lacks(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    index = write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(ValueError, match="one.safetensors holds tensor 'b', but it does not"):
        read_checkpoint(index)


def test_index_does_not_lead_out_of_its_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    with pytest.raises(ValueError, match=r"names the shard '\.\./outside\.safetensors'"):
        read_checkpoint(write_index(folder, {"a": "../outside.safetensors"}))


def test_tensor_in_two_shards_is_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="'a' is in .*two.safetensors and in another shard"):
        read_checkpoint(write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}))


def test_safetensors_are_preferred_to_pickles(tmp_path):
    assert find_weights(tmp_path) is None
    (tmp_path / "pytorch_model.bin").touch()
    assert find_weights(tmp_path).name == "pytorch_model.bin"
    (tmp_path / "model.safetensors").touch()
    assert find_weights(tmp_path).name == "model.safetensors"
