"""
Writing a converted checkpoint: streamed, resumable, and never half there.

A folder is built as `OUT.partial` and renamed when it is complete and checked. Each shard gets its name when it is complete,
and `config.json`, without which nothing loads a folder, gets its name last. A killed run leaves `OUT.partial`; the same
command again keeps its complete shards.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm

from modeling_llava.io.atomic import atomic_path, write_atomic
from modeling_llava.io.locks import lock

from .tensors import PIECE_BYTES, SAFETENSORS_DTYPES, FileRange, LazyTensor


DEFAULT_SHARD_SIZE = "2GB"
JOURNAL = ".conversion.json"
"""File of a partial folder that says which conversion it belongs to."""

UNFINISHED = ".*.[0-9]*"
"""Names of the files that `atomic_path` had open when a process died."""

PENDING_CONFIG = "config.json.pending"
"""Name of `config.json` until everything else is written."""

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes of `"2GB"` (10⁹), `"500MB"`, `"1GiB"` (2³⁰) or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B|)\s*", str(size).upper())
    if match is None or match[2] not in UNITS or float(match[1]) * UNITS[match[2]] < 1:
        raise ValueError(f"{size!r} is not a size. Write it like 2GB, 500MB or 1GiB.")
    return int(float(match[1]) * UNITS[match[2]])


def format_bytes(count: float) -> str:
    """`14.2 GB`, `310 MB`, `12 KB`: decimal units."""
    for unit in ("B", "KB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def plan_shards(tensors: dict[str, LazyTensor], max_shard_size: int | str) -> dict[str, dict[str, LazyTensor]]:
    """
    Tensors grouped into files of at most `max_shard_size`, in their order, under the names that transformers expects.
    """
    limit, groups, filled = parse_size(max_shard_size), [{}], 0
    for key, tensor in tensors.items():
        if groups[-1] and filled + tensor.nbytes > limit:
            groups.append({})
            filled = 0
        groups[-1][key] = tensor
        filled += tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def safetensors_header(tensors: dict[str, LazyTensor]) -> tuple[bytes, list[LazyTensor]]:
    """The first bytes of a safetensors file, and the tensors in the order in which their data must follow."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # stable: keeps the source's order
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for key, tensor in ordered:
        header[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [tensor for _, tensor in ordered]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor, without copying a contiguous one."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def copy_range(source: FileRange, target, advance: Callable[[int], None]) -> None:
    """Append a range of a file to the open file `target`, by the kernel where possible."""
    done = 0
    with open(source.path, "rb", buffering=0) as file:
        fast = hasattr(os, "copy_file_range")
        while done < source.nbytes:
            wanted = min(PIECE_BYTES, source.nbytes - done)
            if fast:
                try:
                    count = os.copy_file_range(file.fileno(), target.fileno(), wanted, source.offset + done)
                except OSError as error:
                    if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                        raise
                    fast, count = False, 0
                    continue
            else:
                file.seek(source.offset + done)
                piece = file.read(wanted)
                count = len(piece)
                write_all(target, piece)
            if count == 0:
                raise ValueError(f"{source.path} became shorter while it was read.")
            done += count
            advance(count)


def write_all(target, data) -> None:
    """Write all bytes to an unbuffered file (one `write` may take fewer)."""
    view = memoryview(data).cast("B")
    while view:
        view = view[target.write(view) :]


def write_safetensors(path: Path, tensors: dict[str, LazyTensor], advance: Callable[[int], None] = int) -> None:
    """Write a safetensors file, piece by piece."""
    header, ordered = safetensors_header(tensors)
    with atomic_path(path, sync=True) as partial, open(partial, "wb", buffering=0) as file:
        write_all(file, header)
        for tensor in ordered:
            written = 0
            for piece in tensor.pieces():
                if isinstance(piece, FileRange):
                    copy_range(piece, file, advance)
                    written += piece.nbytes
                else:
                    assert piece.dtype == tensor.dtype, f"{tensor} gave a piece of {piece.dtype}"
                    write_all(file, as_bytes(piece))
                    advance(piece.nbytes)
                    written += piece.nbytes
            assert written == tensor.nbytes, f"{tensor} gave {written} of {tensor.nbytes} bytes"


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed because the disk is full. Rust libraries raise an `Exception` with the number in its text."""
    numbers = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    return getattr(error, "errno", None) in numbers or any(f"(os error {n})" in str(error) for n in numbers)


def write_json(path: Path, content) -> None:
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", sync=True)


class OutputFolder:
    """
    The output of a conversion, as a context: built as `OUT.partial`, renamed by `commit`.

    Args:
        output (`str` or `Path`): The folder. It must not exist, or be empty, unless `overwrite`.
        fingerprint (`dict`): What the result depends on (sources, options); a partial folder of another one starts anew.
        total_bytes (`int`): What will be written, for the check of free space and the progress bar.
        overwrite (`bool`, *optional*, defaults to `False`): Replace `output` once the new folder is complete.

    Raises:
        ValueError: `output` exists, another conversion is writing it, or `OUT.partial` is not of a conversion.
        OSError: the disk is too small or full.
    """

    def __init__(self, output: str | Path, fingerprint: dict, total_bytes: int, *, overwrite: bool = False):
        self.output = Path(output)
        self.partial = self.output.with_name(self.output.name + ".partial")
        self.total_bytes, self.overwrite = total_bytes, overwrite
        text = json.dumps(fingerprint, sort_keys=True, default=str)
        self.journal = {"conversion": hashlib.sha256(text.encode()).hexdigest()}
        self.is_done = False
        self._sources = list(fingerprint.get("files", ()))
        self._lock = None

    def __enter__(self) -> "OutputFolder":
        if self.output.exists() and any(self._visible(self.output)):
            if self._read_journal(self.output) == self.journal:  # killed just before its end
                self._finish()
                self.is_done = True
                return self
            if not self.overwrite:
                raise ValueError(f"{self.output} exists already. Choose another folder, or add --overwrite.")
            if any(Path(path).resolve().is_relative_to(self.output.resolve()) for path in self._sources):
                raise ValueError(f"{self.output} is read from in this conversion and cannot be replaced by it.")
        if not self.output.is_dir() and self.output.exists():
            raise ValueError(f"{self.output} is a file; give a folder.")

        found = self._read_journal(self.partial)
        if self.partial.exists() and found is None and any(self._visible(self.partial)):
            raise ValueError(f"{self.partial} is in the way and was not made by a conversion. Move or delete it.")
        self._check_space(kept=found == self.journal)
        self.partial.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if found != self.journal:
            for path in self.partial.iterdir():
                if path.name != self._lock_name:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_json(self.partial / JOURNAL, self.journal)
        for path in [*self.partial.rglob(UNFINISHED), self.partial / PENDING_CONFIG]:
            path.unlink(missing_ok=True)
        self.progress = tqdm(total=self.total_bytes, unit="B", unit_scale=True, desc=self.output.name, leave=False)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if hasattr(self, "progress"):
            self.progress.close()
        if self._lock is not None:
            self._lock.close()
        if error is not None and is_full_disk(error):
            raise OSError(
                f"The disk of {self.partial} is full. Free some space and run the same command again: it resumes from what "
                "is there."
            ) from error

    def write_shards(self, shards: dict[str, dict[str, LazyTensor]]) -> None:
        """Write each missing safetensors file and, of several, their index."""
        for name, tensors in shards.items():
            if (self.partial / name).exists():
                self.progress.update(sum(tensor.nbytes for tensor in tensors.values()))
                continue
            write_safetensors(self.partial / name, tensors, self.progress.update)
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
            weight_map = {key: name for name, tensors in shards.items() for key in tensors}
            write_json(
                self.partial / "model.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
            )

    def write_config(self, text: str) -> Path:
        """Write `config.json` under its name until `commit`, and return the path."""
        write_atomic(self.partial / PENDING_CONFIG, text, sync=True)
        return self.partial / PENDING_CONFIG

    def commit(self) -> None:
        """Rename the folder, and then `config.json`."""
        for path in self.partial.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        old = self.output.with_name(self.output.name + ".old")
        if self.output.exists():
            if any(self.output.iterdir()):
                shutil.rmtree(old, ignore_errors=True)
                os.rename(self.output, old)
            else:
                self.output.rmdir()
        if self._lock is not None:
            self._lock.close()
            self._lock = None
            (self.partial / self._lock_name).unlink()
        os.rename(self.partial, self.output)
        self._finish()
        if self.overwrite:
            shutil.rmtree(old, ignore_errors=True)

    def _finish(self) -> None:
        if (self.output / PENDING_CONFIG).exists():
            os.replace(self.output / PENDING_CONFIG, self.output / "config.json")
        (self.output / JOURNAL).unlink()

    _lock_name = ".lock"

    @classmethod
    def _visible(cls, folder: Path) -> Iterator[Path]:
        """The files of a folder without the lock and an unfinished journal."""
        if not folder.is_dir():
            return iter(())
        return (path for path in folder.iterdir() if path.name != cls._lock_name and not path.match(f".{JOURNAL}.*"))

    @staticmethod
    def _read_journal(folder: Path) -> dict | None:
        try:
            return json.loads((folder / JOURNAL).read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def _check_space(self, kept: bool) -> None:
        parent = next(
            path for path in [self.output.absolute().parent, *self.output.absolute().parents] if path.exists()
        )
        there = 0
        if kept:
            there = sum(path.stat().st_size for path in self.partial.iterdir() if path.is_file())
        needed, free = max(0, self.total_bytes - there), shutil.disk_usage(parent).free
        if needed > free:
            raise OSError(
                f"The disk of {parent} is too small: the conversion writes {format_bytes(needed)}, "
                f"{format_bytes(free)} are free. Nothing was written. Free some space or choose another disk."
            )

    def _take_lock(self) -> None:
        """Two conversions into one folder would mix their shards."""
        if os.name == "nt":  # a folder with an open file cannot be renamed there
            return
        self._lock = open(self.partial / self._lock_name, "wb")
        if not lock(self._lock.fileno()):
            self._lock.close()
            self._lock = None
            raise ValueError(f"Another conversion is writing {self.partial}. Wait for it to end.")
