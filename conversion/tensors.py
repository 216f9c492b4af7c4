"""
Tensors of checkpoint files, described without being read.

A conversion is a table of [`LazyTensor`]s, which give their content in pieces of a few megabytes, or as a range of a file
for the operating system to copy. A conversion holds a few pieces in memory, whatever the checkpoint's size.

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

from modeling_llava.compat import checkpoint_offset
from modeling_llava.io.load_errors import (
    AGAIN,
    EMPTY_TENSOR,
    LFS_ERROR,
    MODEL_FILES,
    is_lfs_pointer,
    safetensors_header,
)


PIECE_BYTES = 16 * 2**20
"""Maximum bytes that are computed or copied at once."""

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class FileRange:
    """`nbytes` bytes of the file `path`, from `offset` on (bytes)."""

    path: Path
    offset: int
    nbytes: int


class LazyTensor:
    """
    A tensor that is read or computed in pieces of rows (slices of the first dimension).

    Args:
        dtype (`torch.dtype`): Of the elements.
        shape (`tuple[int, ...]`): Sizes; `()` for a scalar, which counts as one row.
        read (`Callable[[int, int], torch.Tensor]`):
            Gives the rows `[start, stop)`, of `dtype` and with the trailing sizes of `shape`.
        origin (`str`): For errors: which tensor of which file.
        ranges (`Callable[[int], list[FileRange]]`, *optional*):
            Given a number of rows n, the file ranges that hold exactly the first n rows.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        read: Callable[[int, int], torch.Tensor],
        origin: str,
        ranges: Callable[[int], list[FileRange]] | None = None,
    ):
        self.dtype, self.shape, self.origin = dtype, tuple(shape), origin
        self.rows, self.ranges = read, ranges

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[FileRange | torch.Tensor]:
        """The content in order: file ranges where a file has the bytes as they are, tensors elsewhere."""
        if self.ranges is not None:
            yield from self.ranges(self.num_rows)
            return
        yield from self.row_pieces()

    def row_pieces(self) -> Iterator[torch.Tensor]:
        """The content in order, as tensors of at most [`PIECE_BYTES`] bytes (but at least one row)."""
        step = max(1, PIECE_BYTES // max(1, self.row_bytes))
        for start in range(0, self.num_rows, step):
            yield self.rows(start, min(start + step, self.num_rows))

    def tensor(self) -> torch.Tensor:
        """All of it, in memory."""
        return self.rows(0, self.num_rows).reshape(self.shape)

    def __repr__(self) -> str:
        return f"LazyTensor({self.dtype}, {list(self.shape)}, {self.origin})"


# Kinds of tensors


def stored(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...], key: str) -> LazyTensor:
    """A tensor in a file, from `offset` (bytes) on, row after row."""
    row_bytes = math.prod(shape[1:]) * dtype.itemsize

    def read(start: int, stop: int) -> torch.Tensor:
        data = bytearray((stop - start) * row_bytes)
        if not data:
            return torch.empty((stop - start, *shape[1:]), dtype=dtype)
        with open(path, "rb", buffering=0) as file:
            file.seek(offset + start * row_bytes)
            view = memoryview(data)
            while view:
                count = file.readinto(view)
                if not count:
                    raise ValueError(f"{path} ends inside tensor '{key}'. It changed or was cut while it was read.")
                view = view[count:]
        return torch.frombuffer(data, dtype=dtype).reshape(stop - start, *shape[1:])

    return LazyTensor(
        dtype, shape, read, f"tensor '{key}' of {path}", lambda rows: [FileRange(path, offset, rows * row_bytes)]
    )


def in_memory(tensor: torch.Tensor, origin: str) -> LazyTensor:
    """A tensor that is in memory already; it is never written to."""
    tensor = tensor.detach()
    rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
    return LazyTensor(tensor.dtype, tuple(tensor.shape), lambda a, b: rows[a:b].contiguous(), origin)


def cast(source: LazyTensor, dtype: torch.dtype | None) -> LazyTensor:
    """`source` in another dtype; `source` itself if it has that one, or if `dtype` is `None`."""
    if dtype is None or source.dtype == dtype:
        return source
    return LazyTensor(dtype, source.shape, lambda a, b: source.rows(a, b).to(dtype), source.origin)


def first_rows(source: LazyTensor, num_rows: int) -> LazyTensor:
    """The first `num_rows` rows of `source`."""
    if num_rows == source.num_rows:
        return source
    shape = (num_rows, *source.shape[1:])
    return LazyTensor(source.dtype, shape, source.rows, source.origin, source.ranges)


def permuted_rows(source: LazyTensor, order: torch.Tensor) -> LazyTensor:
    """`source` with its rows in another order: row i is row `order[i]` of `source`."""

    def read(start: int, stop: int) -> torch.Tensor:
        wanted = order[start:stop]
        low, high = int(wanted.min()), int(wanted.max()) + 1
        return source.rows(low, high)[wanted - low]

    return LazyTensor(source.dtype, source.shape, read, source.origin)


class Extended(LazyTensor):
    """
    `source` with rows added below it, each the mean of its first `num_known` rows.

    The logit of a new token is the mean of the known tokens' logits, so greedy continuations do not change.
    """

    def __init__(self, source: LazyTensor, num_rows: int, num_known: int):
        self.source, self.num_known, self._filler = source, num_known, None
        super().__init__(source.dtype, (num_rows, *source.shape[1:]), self._read, source.origin)

    def _read(self, start: int, stop: int) -> torch.Tensor:
        old = self.source.num_rows
        kept = self.source.rows(start, min(stop, old)) if start < old else None
        if stop <= old:
            return kept
        added = self._added_rows(stop - max(start, old))
        return added if kept is None else torch.cat([kept, added])

    def _added_rows(self, count: int) -> torch.Tensor:
        if self._filler is None:
            total = torch.zeros(self.shape[1:], dtype=torch.float64)
            for piece in first_rows(self.source, self.num_known).row_pieces():
                total += piece.sum(dim=0, dtype=torch.float64)
            self._filler = (total / self.num_known).to(self.dtype)
        return self._filler.expand(count, *self.shape[1:])

    def pieces(self) -> Iterator[FileRange | torch.Tensor]:
        yield from self.source.pieces()
        yield self._added_rows(self.num_rows - self.source.num_rows).contiguous()


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
    The tensors of a `.bin` file (a pickle). Of torch's zip form only the directory is read; the older form is loaded.

    Raises:
        ValueError: the pickle holds something other than tensors (its code is not run), or the file is damaged.
    """
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
        if isinstance(content, Mapping) and not all(_lies_in_file(value) for value in content.values()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "")
        what = "a pickle that holds more than tensors" if reason else "damaged, or not a pickle of torch"
        raise ValueError(
            f"{path} was refused: it is {what}, and such a file can run any program when it is opened. It was not run. "
            f"{reason}{' ' if reason else ''}Download it again, or ask for the weights as safetensors."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # torch seeks before the start of a cut file
            raise
        raise ValueError(
            f"{path} is damaged or cut off ({str(error).splitlines()[0] if str(error) else type(error).__name__}): {AGAIN}."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, but a dict of tensors was expected.")

    tensors, size = {}, path.stat().st_size
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path} holds {type(value).__name__} under '{key}', but only tensors were expected.")
        if value.device.type != "meta" or value.layout != torch.strided:
            tensors[key] = in_memory(value, f"tensor '{key}' of {path}")
            continue
        offset = checkpoint_offset(value) + value.storage_offset() * value.dtype.itemsize
        if offset + value.untyped_storage().nbytes() - value.storage_offset() * value.dtype.itemsize > size:
            raise ValueError(f"{path} is cut short: tensor '{key}' ends beyond its {size} bytes. Copy it again.")
        tensors[key] = _strided(path, offset, value, key)
    return tensors


def _lies_in_file(value) -> bool:
    """Whether torch told where in the file a tensor's bytes begin (it does so since 2.7, for the zip form)."""
    if not isinstance(value, torch.Tensor):
        return True
    return checkpoint_offset(value) is not None


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _strided(path: Path, offset: int, value: torch.Tensor, key: str) -> LazyTensor:
    """A saved tensor; one that was saved transposed or expanded is reordered when it is read."""
    if value.is_contiguous():
        return stored(path, offset, value.dtype, tuple(value.shape), key)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    flat = stored(path, offset, value.dtype, (extent,), key)

    def read(start: int, stop: int) -> torch.Tensor:
        whole = flat.tensor().as_strided(value.shape, value.stride())
        return whole[start:stop].contiguous()

    return LazyTensor(value.dtype, tuple(value.shape), read, flat.origin)


def read_tensor_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one `.safetensors` or `.bin` file. ValueError for a Git LFS pointer, and for a damaged file."""
    if is_lfs_pointer(path):
        raise ValueError(f"{path} {LFS_ERROR}")
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)


def find_weights(folder: Path, names: tuple[str, ...] = MODEL_FILES) -> Path | None:
    """The index or the single file of the weights in `folder`; `None` without any."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_checkpoint(file: Path) -> dict[str, LazyTensor]:
    """
    All tensors of a checkpoint, given its index (`*.index.json`) or its one file.

    Raises:
        ValueError: the index is damaged, a shard or a tensor in it is missing, two shards hold the same tensor, or a tensor
            is empty.
    """
    tensors = _read_checkpoint(file)
    for key, tensor in tensors.items():
        if 0 in tensor.shape:
            raise ValueError(f"{file}: {key} {EMPTY_TENSOR}")
    return tensors


def _read_checkpoint(file: Path) -> dict[str, LazyTensor]:
    if file.suffix != ".json":
        return read_tensor_file(file)
    try:
        weight_map = json.loads(file.read_text("utf-8"))["weight_map"]
        shards = dict.fromkeys(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not an index of weights ({error!r}).") from error

    tensors: dict[str, LazyTensor] = {}
    for name in shards:
        path = file.parent / name
        if os.path.basename(name) != name or not path.is_file():
            first = next(key for key, shard in weight_map.items() if shard == name)
            raise ValueError(
                f"{file.name} of {file.parent} names the shard '{name}', which is not there (it should hold "
                f"'{first}' and {sum(shard == name for shard in weight_map.values()) - 1} more tensors). Download it."
            )
        content = read_tensor_file(path)
        twice = sorted(tensors.keys() & content.keys())
        if twice:
            raise ValueError(f"Tensor '{twice[0]}' is in {path} and in another shard of {file.name}.")
        tensors.update(content)
    for key, name in weight_map.items():
        if key not in tensors:
            raise ValueError(f"{file} says that {name} holds tensor '{key}', but it does not.")
    return tensors
