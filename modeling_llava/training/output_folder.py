"""The output folder of a run: one run at a time, which of its checkpoints is complete, what a full disk means."""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..io.locks import lock


logger = logging.getLogger(__name__)

WAIT_FOR_WORKERS = 15.0
"""Seconds that a new run waits for the old one's folder: workers of a killed process notice it after five."""


@contextlib.contextmanager
def only_run_in(folder: str | os.PathLike) -> Iterator[None]:
    """
    Make an output folder, see that it can be written, and keep it for this process until it ends, however it ends.

    Two runs in one folder would go on from, and delete, each other's checkpoints.

    Raises:
        OSError: another run is at work there, or the folder cannot be written.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):  # a folder that is not ours to write should not cost hours
        pass
    descriptor = _lock(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


def _lock(folder: Path) -> int | None:
    """An open folder that is locked; `None` on Windows, which does not open folders."""
    if os.name == "nt":
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    until = time.monotonic() + WAIT_FOR_WORKERS
    while not lock(descriptor):
        if time.monotonic() > until:
            os.close(descriptor)
            raise OSError(
                f"{folder}: another run is at work there, and both would go on from, and delete, each other's checkpoints. "
                "Wait for it, stop it, or choose another output_dir."
            )
        time.sleep(0.2)
    return descriptor


@contextlib.contextmanager
def disk_errors_explained(folder: str | os.PathLike, only_full: bool = False) -> Iterator[None]:
    """
    Around the writing of a checkpoint: say what could not be written, and from where the run can go on.

    Args:
        folder (`str` or `os.PathLike`):
            The checkpoint, or the run's output folder.
        only_full (`bool`, *optional*, defaults to `False`):
            Explain a full disk and leave every other error as it is: around work that reads files too.

    Raises:
        OSError: in place of what safetensors, tokenizers, torch and the system raise when a disk is full.
    """
    try:
        yield
    except _ExplainedError:
        raise
    except Exception as error:
        cause = " ".join(str(error).split())
        is_full = getattr(error, "errno", None) in _FULL or any(os.strerror(number) in cause for number in _FULL)
        if not is_full and (only_full or not _is_of_a_disk(error, cause)):
            raise
        folder = Path(folder)
        is_checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        complete = find_resumable_checkpoint(folder.parent if is_checkpoint else folder)
        place = next(p for p in (folder, *folder.parents) if p.exists())
        kept = (
            f"The last complete checkpoint is {complete.name}" if complete else "There is no complete checkpoint yet"
        )
        raise _ExplainedError(
            f"{folder} could not be written: {cause}. {shutil.disk_usage(place).free / 2**30:.1f} GiB are free there. "
            f"{kept}; make room (or set save_total_limit, save_steps) and give the same command again."
        ) from error


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _ExplainedError(OSError):
    """Says all there is to say; whoever is further out leaves it as it is."""


def _is_of_a_disk(error: Exception, cause: str) -> bool:
    if isinstance(error, OSError | SafetensorError):
        return True
    # torch's writer raises a bare RuntimeError, what it says depends on the moment; tokenizers' a bare Exception
    return any(sign in cause for sign in ("PytorchStreamWriter", "inline_container", "iostream", "(os error "))


def checkpoint_folders(output_dir: str | os.PathLike) -> list[Path]:
    """All `checkpoint-N` folders of a run, whether complete or not, the newest first."""
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return []
    numbered = [
        (int(match[1]), path)
        for path in output_dir.iterdir()
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def find_resumable_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """
    The newest complete checkpoint of a run, `None` if there is none.

    The newest folder by name need not be one: a run that was killed while saving leaves a part of a checkpoint.
    """
    for folder in checkpoint_folders(output_dir):
        reason = why_incomplete(folder)
        if reason is None:
            return folder
        logger.warning(f"{folder} is not complete ({reason}): an earlier checkpoint is looked for.")
    return None


def why_incomplete(checkpoint: str | os.PathLike) -> str | None:
    """
    Why a run cannot be resumed from a checkpoint; `None` if it can.

    `trainer_state.json` is written last: if it parses, everything was written. Weights and optimizer are looked at as
    well (not read), since a copy between machines can break off too.
    """
    checkpoint = Path(checkpoint)
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
        if not isinstance(state, dict) or "global_step" not in state:
            return f"{TRAINER_STATE_NAME} has no global_step"
    except FileNotFoundError:
        return f"{TRAINER_STATE_NAME} is missing"
    except (ValueError, OSError) as error:
        return f"{TRAINER_STATE_NAME} does not parse: {error}"
    for file in checkpoint.glob("*.safetensors"):
        if not _is_whole_safetensors(file):
            return f"{file.name} is cut off"
    for index in checkpoint.glob("*.safetensors.index.json"):
        for name in set(json.loads(index.read_text("utf-8"))["weight_map"].values()):
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
    # of a plain run, of FSDP (a file or a folder), of DeepSpeed
    for what, names in (
        ("weights", ("*.safetensors", "pytorch_model_fsdp*", "global_step*")),
        ("optimizer state (save_only_model)", ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")),
    ):
        if not any(any(checkpoint.glob(name)) for name in names):
            return f"it holds no {what}"
    for shards in (*checkpoint.glob("pytorch_model_fsdp_*"), *checkpoint.glob("optimizer_*")):
        if shards.is_dir() and not (shards / ".metadata").is_file():
            return f"{shards.name} is cut off"
    for file in (*checkpoint.glob("*.pt"), *checkpoint.glob("rng_state*.pth")):
        if not zipfile.is_zipfile(file):
            return f"{file.name} is cut off"
    return None


def _is_whole_safetensors(file: Path) -> bool:
    size = file.stat().st_size
    with open(file, "rb") as handle:
        header_size = int.from_bytes(handle.read(8), "little")
        if size < 8 + header_size:
            return False
        try:
            header = json.loads(handle.read(header_size))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + header_size + max(ends, default=0)


__all__ = [
    "checkpoint_folders",
    "disk_errors_explained",
    "find_resumable_checkpoint",
    "only_run_in",
    "why_incomplete",
]
