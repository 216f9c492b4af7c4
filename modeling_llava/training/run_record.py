"""What a run leaves beside its weights so that it can be repeated, and which checkpoint it can be resumed from."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .arguments import LlavaTrainingArguments
from .recipes import write_recipe, write_whole


logger = logging.getLogger(__name__)

RECIPE_NAME = "recipe.yaml"
RUN_RECORD_NAME = "run.json"

_RECORDED_PACKAGES = ("modeling-llava", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets")


def write_run_record(
    folder: str | os.PathLike, args: LlavaTrainingArguments, data_record: dict[str, Any] | None = None
) -> None:
    """
    Write `recipe.yaml` (every setting, resolved) and `run.json` (versions, machine, hash of the data).

    Args:
        folder (`str` or `os.PathLike`):
            Where the weights lie.
        args ([`LlavaTrainingArguments`]):
            The settings of the run.
        data_record (`dict`, *optional*):
            See [`record_data`].
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(args.to_recipe(), folder / RECIPE_NAME, "The resolved recipe of this run: llava train recipe.yaml")
    record = {
        "versions": installed_versions(),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "devices": args.world_size * max(args.n_gpu, 1),
        "data": data_record or {},
    }
    write_whole(folder / RUN_RECORD_NAME, (json.dumps(record, indent=2) + "\n").encode())


def installed_versions() -> dict[str, str]:
    """Versions of the packages on which the numbers of a run depend."""
    versions = {}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def record_data(sources: str | list[str] | dict[str, str] | None, dataset: Any = None) -> dict[str, Any]:
    """
    What the data was: each source with the SHA-256 of its file, and the number of samples.

    A folder is hashed by the names and sizes of its files. Data on the Hub has no hash here.
    """
    if isinstance(sources, str):
        sources = [sources]
    elif isinstance(sources, dict):
        sources = list(sources.values())
    record: dict[str, Any] = {"sources": [{"name": str(s), "sha256": _hash(str(s))} for s in sources or []]}
    if getattr(dataset, "dropped", None):
        record["dropped"] = dict(dataset.dropped)
    if hasattr(dataset, "__len__"):
        record["num_samples"] = len(dataset)
    return record


def _hash(source: str) -> str | None:
    path = Path(source)
    if path.is_file():
        with open(path, "rb") as file:
            if sys.version_info >= (3, 11):
                return hashlib.file_digest(file, "sha256").hexdigest()
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
            return digest.hexdigest()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        listing = "\n".join(f"{p.relative_to(path)} {p.stat().st_size}" for p in files)
        return hashlib.sha256(listing.encode()).hexdigest()
    return None


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
    "RECIPE_NAME",
    "RUN_RECORD_NAME",
    "checkpoint_folders",
    "disk_errors_explained",
    "find_resumable_checkpoint",
    "installed_versions",
    "record_data",
    "why_incomplete",
    "write_run_record",
]
