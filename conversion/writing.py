"""
Writing a converted checkpoint: streamed, resumable, and never half there.

A folder is built as `OUT.partial-HASH` and renamed when it is complete and checked. Each shard gets its name when it is
complete, and `config.json`, without which nothing loads a folder, gets its name last. The same command keeps the complete
shards of a run that was interrupted; the hash is of what they depend on.
"""

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import split_state_dict_into_shards_factory
from tqdm.auto import tqdm

from modeling_llava import __version__
from modeling_llava.io.files import atomic_path, lock, write_atomic

from .tensors import SAFETENSORS_DTYPES, LazyTensor, as_bytes


DEFAULT_SHARD_SIZE = "2GB"
UNFINISHED = ".*.[0-9]*"
"""Names of the files that `atomic_path` had open when a process died."""

PENDING_CONFIG = "config.json.pending"
"""Name of `config.json` until everything else is written and checked."""

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def plan_shards(tensors: dict[str, LazyTensor], max_shard_size: int | str) -> dict[str, dict[str, LazyTensor]]:
    """
    Tensors grouped into files of at most `max_shard_size` (bytes, or such as `"500MB"`), under the names that transformers
    expects.
    """
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    return {name: {key: tensors[key] for key in keys} for name, keys in split.filename_to_tensors.items()}


def write_safetensors(path: Path, tensors: dict[str, LazyTensor], advance: Callable[[int], None] = int) -> None:
    """Write a safetensors file, piece by piece."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # stable: keeps the source's order
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path, sync=True) as partial, open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            write_tensor(tensor, file, advance)


def write_tensor(tensor: LazyTensor, file: BinaryIO, advance: Callable[[int], None]) -> None:
    """Append a tensor's content to a file; what another file holds as it is, by the kernel where it can."""
    done = 0
    if tensor.place is not None and hasattr(os, "copy_file_range"):
        file.flush()
        path, offset = tensor.place
        with open(path, "rb") as source:
            try:
                while count := os.copy_file_range(source.fileno(), file.fileno(), tensor.nbytes - done, offset + done):
                    advance(count)
                    done += count
            except OSError:
                if done:
                    raise  # otherwise it is on another file system
        if 0 < done < tensor.nbytes:
            raise ValueError(f"{tensor.origin}: the file became shorter while it was read.")
    for piece in tensor.pieces() if not done else ():
        advance(file.write(as_bytes(piece)))


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed because the disk is full. Rust libraries raise an `Exception` with the number in its text."""
    numbers = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    return getattr(error, "errno", None) in numbers or any(f"(os error {n})" in str(error) for n in numbers)


def write_json(path: Path, content) -> None:
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", sync=True)


class OutputFolder:
    """
    The output of a conversion, as a context: built as `OUT.partial-HASH`, renamed by `commit`.

    The hash is of `direction` (with the options that change what is written), the `files` that are read, and the `plan`: the
    tensors of each file that is written, with their `nbytes`. With `overwrite`, `output` is replaced once the new folder is
    complete.

    Raises:
        ValueError: `output` exists, the check failed, or another process is writing it.
        OSError: the disk is too small or full.
    """

    def __init__(
        self,
        output: str | Path,
        direction: str,
        files: Iterable[Path],
        plan: Mapping[str, Mapping],
        *,
        overwrite: bool = False,
    ):
        self.output, self.files, self.overwrite = Path(output), list(files), overwrite
        self.total_bytes = sum(tensor.nbytes for tensors in plan.values() for tensor in tensors.values())
        states = {str(path.absolute()): [path.stat().st_size, path.stat().st_mtime_ns] for path in self.files}
        content = [direction, __version__, states, {name: str(tensors) for name, tensors in plan.items()}]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
        self.partial, self.replaced = (
            self.output.with_name(f"{self.output.name}.{what}-{digest}") for what in ("partial", "replaced")
        )

    def __enter__(self) -> "OutputFolder":
        if self.output.is_file():
            raise ValueError(f"{self.output} is a file; give a folder.")
        for replaced in self._left_by_runs("replaced"):
            if self.output.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            else:
                os.rename(replaced, self.output)
        if self.output.exists() and any(self.output.iterdir()):
            if not self.overwrite:
                raise ValueError(f"{self.output} exists already. Choose another folder, or add --overwrite.")
            if any(path.resolve().is_relative_to(self.output.resolve()) for path in self.files):
                raise ValueError(f"{self.output} is read from in this conversion and cannot be replaced by it.")
        for other in self._left_by_runs("partial"):
            self._lock(other)
            if other != self.partial:
                shutil.rmtree(other)
        self._check_space()
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock(self.partial)
        for path in self.partial.rglob(UNFINISHED):
            path.unlink()
        self.progress = tqdm(total=self.total_bytes, unit="B", unit_scale=True, desc=self.output.name, leave=False)
        return self

    def _left_by_runs(self, what: str) -> list[Path]:
        """Folders of runs that were killed, of any HASH."""
        return list(self.output.parent.glob(f"{glob.escape(self.output.name)}.{what}-{'[0-9a-f]' * 12}"))

    def __exit__(self, kind, error, traceback) -> None:
        self.progress.close()
        self._unlock()
        if error is not None and is_full_disk(error):
            what = f"The disk of {self.partial} is full"
            raise OSError(f"{what}. Free some space; the same command resumes from what is there.") from error

    def write_shards(self, shards: dict[str, dict[str, LazyTensor]], subfolder: str = "") -> None:
        """Write each missing safetensors file and, of several, their index."""
        folder = self.partial / subfolder
        folder.mkdir(exist_ok=True)
        for name, tensors in shards.items():
            if (folder / name).exists():
                self.progress.update(sum(tensor.nbytes for tensor in tensors.values()))
            else:
                write_safetensors(folder / name, tensors, self.progress.update)
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
            weight_map = {key: name for name, tensors in shards.items() for key in tensors}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(folder / "model.safetensors.index.json", index)

    def write_config(self, text: str) -> Path:
        """Write `config.json` under its name until `commit`, and return the path."""
        write_atomic(self.partial / PENDING_CONFIG, text, sync=True)
        return self.partial / PENDING_CONFIG

    def commit(self, report=None) -> None:
        """Give the folder its name, unless the [`CheckReport`] of a check says that something failed."""
        if report is not None and not report.is_sound:
            raise ValueError(f"The conversion to {self.output} does not hold: {report.failures()}")
        for path in self.partial.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        if (self.partial / PENDING_CONFIG).exists():
            os.replace(self.partial / PENDING_CONFIG, self.partial / "config.json")
        if self.output.exists():
            os.rename(self.output, self.replaced)
        os.rename(self.partial, self.output)
        shutil.rmtree(self.replaced, ignore_errors=True)

    def _check_space(self) -> None:
        parent = next(path for path in self.output.absolute().parents if path.exists())
        there = sum(path.stat().st_size for path in self.partial.rglob("*") if path.is_file())
        needed, free = max(0, self.total_bytes - there), shutil.disk_usage(parent).free
        if needed > free:
            self._unlock()
            sizes = f"{tqdm.format_sizeof(needed, 'B')}, {tqdm.format_sizeof(free, 'B')} are free"
            raise OSError(f"The disk of {parent} is too small: the conversion writes {sizes}. Nothing was written.")

    _descriptor: int | None = None

    def _lock(self, folder: Path) -> None:
        """Two conversions into one folder would mix their shards."""
        if os.name == "nt":  # has no locks of folders
            return
        self._unlock()
        self._descriptor = os.open(folder, os.O_RDONLY)
        if not lock(self._descriptor):
            self._unlock()
            raise ValueError(f"Another conversion is writing {folder}. Wait for it to end.")

    def _unlock(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
