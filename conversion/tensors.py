"""
Tensors of checkpoint files, read piece by piece.

A conversion is a table of [`LazyTensor`]s, each of which gives its rows on request. Only a few megabytes are in memory at
once, whatever the checkpoint's size.

`.bin` files are pickles: only torch's restricted unpickler (`weights_only=True`) reads them.
"""

import errno
import json
import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from modeling_llava.io.files import AGAIN, EMPTY_TENSOR, LFS_ERROR, MODEL_FILES, is_lfs_pointer, safetensors_header


PIECE_BYTES = 16 * 2**20
"""Maximum bytes that are read or computed at once."""

SAFETENSORS_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(eq=False, repr=False)
class LazyTensor:
    """
    A tensor that is read or computed in pieces of rows (slices of the first dimension).

    `rows(start, stop)` gives the rows `[start, stop)`, of `dtype` and with the trailing sizes of `shape`; a scalar, of shape
    `()`, counts as one row. `origin` says for errors which tensor of which file it is, `place` in which file, from which byte
    on, its content lies as it is.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: Callable[[int, int], torch.Tensor]
    origin: str
    place: tuple[Path, int] | None = None

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[torch.Tensor]:
        """The content in order, as tensors of at most [`PIECE_BYTES`] bytes (but at least one row)."""
        step = max(1, PIECE_BYTES * self.num_rows // max(1, self.nbytes))
        for start in range(0, self.num_rows, step):
            yield self.rows(start, min(start + step, self.num_rows))

    def tensor(self) -> torch.Tensor:
        """All of it, in memory."""
        return self.rows(0, self.num_rows).reshape(self.shape)

    def __repr__(self) -> str:
        return f"LazyTensor({self.dtype}, {list(self.shape)}, {self.origin})"


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor, without copying a contiguous one."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


# Kinds of tensors


def stored(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...], key: str) -> LazyTensor:
    """A tensor in a file, from `offset` (bytes) on, row after row."""
    row_bytes = math.prod(shape[1:]) * dtype.itemsize

    def rows(start: int, stop: int) -> torch.Tensor:
        content = torch.empty(stop - start, *shape[1:], dtype=dtype)
        with open(path, "rb") as file:
            file.seek(offset + start * row_bytes)
            if file.readinto(as_bytes(content)) < content.nbytes:
                raise ValueError(f"tensor '{key}' of {path}: the file became shorter while it was read.")
        return content

    return LazyTensor(dtype, shape, rows, f"tensor '{key}' of {path}", (path, offset))


def in_memory(tensor: torch.Tensor, origin: str) -> LazyTensor:
    """A tensor that is in memory (or mapped into it) already; it is never written to."""
    rows = tensor.detach().reshape(tensor.shape or 1)
    return LazyTensor(tensor.dtype, tuple(tensor.shape), lambda start, stop: rows[start:stop].contiguous(), origin)


def cast(source: LazyTensor, dtype: torch.dtype | None) -> LazyTensor:
    """`source` in another dtype; `source` itself if it has that one, or if `dtype` is `None`."""
    if dtype is None or source.dtype == dtype:
        return source
    return LazyTensor(dtype, source.shape, lambda start, stop: source.rows(start, stop).to(dtype), source.origin)


def first_rows(source: LazyTensor, num_rows: int) -> LazyTensor:
    """The first `num_rows` rows of `source`."""
    return LazyTensor(source.dtype, (num_rows, *source.shape[1:]), source.rows, source.origin, source.place)


def permuted_rows(source: LazyTensor, order: torch.Tensor) -> LazyTensor:
    """`source` with its rows in another order: row i is row `order[i]` of `source`."""

    def rows(start: int, stop: int) -> torch.Tensor:
        wanted = order[start:stop]
        low, high = int(wanted.min()), int(wanted.max()) + 1
        return source.rows(low, high)[wanted - low]

    return LazyTensor(source.dtype, source.shape, rows, source.origin)


def below(upper: LazyTensor, lower: LazyTensor) -> LazyTensor:
    """The rows of `upper`, then those of `lower` in the dtype of `upper`."""
    split = upper.num_rows

    def rows(start: int, stop: int) -> torch.Tensor:
        first = upper.rows(min(start, split), min(stop, split))
        second = lower.rows(max(start, split) - split, max(stop, split) - split)
        return torch.cat([first, second.to(upper.dtype)])

    shape = (split + lower.num_rows, *upper.shape[1:])
    return LazyTensor(upper.dtype, shape, rows, f"{upper.origin} above {lower.origin}")


def extended(source: LazyTensor, num_rows: int) -> LazyTensor:
    """
    `source` with rows added below it, each the mean of its own.

    The logit of a new token is the mean of the known tokens' logits, so greedy continuations do not change.
    """
    mean: list[torch.Tensor] = []

    def rows(start: int, stop: int) -> torch.Tensor:
        if stop > start and not mean:
            total = sum(piece.sum(dim=0, dtype=torch.float64) for piece in source.pieces())
            mean.append((total / source.num_rows).to(source.dtype))
        return mean[0].expand(stop - start, *source.shape[1:]) if mean else source.rows(0, 0)

    shape = (num_rows - source.num_rows, *source.shape[1:])
    return below(source, LazyTensor(source.dtype, shape, rows, source.origin))


# Files


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """
    The tensors of a `.safetensors` file, in the order of their data. Only its header is read.

    Raises:
        ValueError: the file is damaged or cut off, or a tensor has a dtype that is not supported.
    """
    header = safetensors_header(path)
    header.pop("__metadata__", None)
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    tensors = {}
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"Tensor '{key}' of {path} has dtype {entry['dtype']}, which is not supported.")
        dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
        tensors[key] = stored(path, start + entry["data_offsets"][0], dtype, shape, key)
    return tensors


def read_torch_file(path: Path) -> dict[str, LazyTensor]:
    """
    The tensors of a `.bin` file (a pickle). torch's zip form is mapped into memory; the older form is loaded.

    Raises:
        ValueError: the pickle holds something other than tensors (its code is not run), or the file is damaged.
    """
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "")
        what = "a pickle that holds more than tensors" if reason else "damaged, or not a pickle of torch"
        raise ValueError(
            f"{path} was refused: it is {what}, and such a file can run any program when it is opened. It was not run. "
            f"{reason} Download it again, or ask for the weights as safetensors."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # torch seeks before the start of a cut file
            raise
        raise ValueError(f"{path} is damaged or cut off ({' '.join(str(error).split())}): {AGAIN}.") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, but a dict of tensors was expected.")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path} holds {type(value).__name__} under '{key}', but only tensors were expected.")
    return {key: in_memory(value, f"tensor '{key}' of {path}") for key, value in content.items()}


def find_weights(folder: Path, names: tuple[str, ...] = MODEL_FILES) -> Path | None:
    """The index or the single file of the weights in `folder`; `None` without any."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def shards_of(file: Path) -> list[Path]:
    """
    The files of a checkpoint, given its index (`*.index.json`) or its one file.

    Raises:
        ValueError: the index is damaged, or a shard is not there.
    """
    if file.suffix != ".json":
        return [file]
    try:
        weight_map = json.loads(file.read_text("utf-8"))["weight_map"]
        names = dict.fromkeys(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not an index of weights ({error!r}).") from error
    for name in names:
        if os.path.basename(name) != name or not (file.parent / name).is_file():
            first = next(key for key, shard in weight_map.items() if shard == name)
            missing = f"names the shard '{name}', which is not there (it should hold '{first}')"
            raise ValueError(f"{file.name} of {file.parent} {missing}. Download it.")
    return [file.parent / name for name in names]


def read_checkpoint(file: Path) -> dict[str, LazyTensor]:
    """
    All tensors of a checkpoint, given its index or its one file.

    Raises:
        ValueError: as [`shards_of`]; a tensor is empty or in two shards; a file is damaged, or Git LFS's pointer to it.
    """
    tensors: dict[str, LazyTensor] = {}
    for path in shards_of(file):
        if is_lfs_pointer(path):
            raise ValueError(f"{path} {LFS_ERROR}")
        content = read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)
        if twice := sorted(tensors.keys() & content.keys()):
            raise ValueError(f"Tensor '{twice[0]}' is in {path} and in another shard of {file.name}.")
        tensors.update(content)
    for key, tensor in tensors.items():
        if 0 in tensor.shape:
            raise ValueError(f"{file}: {key} {EMPTY_TENSOR}")
    return tensors
