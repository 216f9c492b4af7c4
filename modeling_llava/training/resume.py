"""The output folder of a run: its lock, its records, and the checkpoint to resume from (data order: batches.py)."""

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer import TRAINER_STATE_NAME, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..constants import recorded_versions
from ..io.checkpoints import RUN_RECORD_NAME
from ..io.files import lock, safetensors_header, sha256_of, write_atomic
from .arguments import LlavaTrainingArguments
from .recipes import write_recipe


logger = logging.getLogger(__name__)

RECIPE_NAME = "recipe.yaml"

WAIT_FOR_WORKERS = 15.0
"""Seconds that a new run waits for the lock: the data loader's workers outlive a killed process by five."""


@contextlib.contextmanager
def output_dir_lock(folder: str | os.PathLike) -> Iterator[None]:
    """
    Create an output folder, check that it can be written, and lock it for this process.

    Raises:
        OSError: another run uses the folder, or it cannot be written.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):  # fails now, not at the first checkpoint
        pass
    with contextlib.ExitStack() as stack:
        if is_new:
            stack.callback(_remove_if_empty, folder)
        if os.name != "nt":  # Windows does not open folders
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            until = time.monotonic() + WAIT_FOR_WORKERS
            while not lock(descriptor):
                if time.monotonic() > until:
                    raise OSError(
                        f"{folder}: another run uses this folder, and both would resume from, and delete, each other's "
                        "checkpoints. Wait for it, stop it, or choose another output_dir."
                    )
                time.sleep(0.2)
        yield


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def full_disk_explained(output_dir: str | os.PathLike) -> Iterator[None]:
    """
    Around a run: explain that the disk is full, and from which checkpoint the run can resume.

    Raises:
        OSError: in place of what safetensors, tokenizers, torch and the system raise.
    """
    try:
        yield
    except Exception as error:  # tokenizers raise a bare Exception, torch's writer a RuntimeError
        cause = " ".join(str(error).split())
        if not any(sign in cause for sign in _FULL):
            raise
        last = find_resumable_checkpoint(output_dir)
        kept = f"The last complete checkpoint is {last.name}" if last else "There is no complete checkpoint yet"
        raise OSError(
            f"{output_dir} could not be written: {cause}. {shutil.disk_usage(output_dir).free / 2**30:.1f} GiB are free. {kept}. "
            "Free some space (or set save_total_limit, save_steps) and run the same command again."
        ) from error


_FULL = [*map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)), "PytorchStreamWriter", "inline_container"]


def checkpoint_folders(output_dir: str | os.PathLike) -> list[Path]:
    """All `checkpoint-N` folders of a run, complete or not, the newest first."""
    numbered = [
        (int(match[1]), path)
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def find_resumable_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The newest complete checkpoint of a run, or `None`. One that was being saved when the run was killed is incomplete."""
    for folder in checkpoint_folders(output_dir):
        reason = why_incomplete(folder)
        if reason is None:
            return folder
        logger.warning(f"{folder} is not complete ({reason}): trying an earlier checkpoint.")
    return None


def why_incomplete(checkpoint: str | os.PathLike) -> str | None:
    """
    Why a run cannot be resumed from a checkpoint; `None` if it can.

    `trainer_state.json` is written last: if it parses, everything was written. Weights and optimizer state are checked too
    (without reading them), for copies that were cut off.
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
        try:
            safetensors_header(file)
        except ValueError:
            return f"{file.name} is cut off"
    for index in checkpoint.glob("*.safetensors.index.json"):
        for name in set(json.loads(index.read_text("utf-8"))["weight_map"].values()):
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
    # plain, FSDP (a file or a folder), DeepSpeed
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


def checkpoint_to_resume(args: LlavaTrainingArguments) -> Path | None:
    """
    The checkpoint that `resume` asks for; `None` for a new run.

    Raises:
        FileNotFoundError: `resume` is a path that does not exist.
        ValueError: that checkpoint is not complete; or `resume="never"`, and `output_dir` holds checkpoints.
    """
    if args.resume == "auto":
        return find_resumable_checkpoint(args.output_dir)
    if args.resume == "never":
        left = checkpoint_folders(args.output_dir)
        if left:
            raise ValueError(
                f"resume=never, but {args.output_dir} holds {left[0].name} of an earlier run, from which this run "
                "would resume later. Choose another output_dir, or delete it."
            )
        return None
    checkpoint = Path(args.resume)
    if not checkpoint.is_dir():
        raise FileNotFoundError(
            f"resume={args.resume}: there is no such checkpoint. Set auto, never, or the path of one."
        )
    reason = why_incomplete(checkpoint)
    if reason is not None:
        raise ValueError(f"resume={args.resume}: the checkpoint is not complete ({reason}). Choose an earlier one.")
    return checkpoint


def is_finished(trainer: Trainer, checkpoint: Path) -> bool:
    """
    Whether a checkpoint is the last of a run: all steps done, or stopped early.

    `Trainer` checks only after a step: a finished run that is started again would train one step more.
    """
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
    max_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    if state["global_step"] >= max_steps:
        return True
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return bool(control.get("should_training_stop")) and state["global_step"] < state["max_steps"]


def changed_settings(args: LlavaTrainingArguments, checkpoint: Path) -> dict[str, str]:
    """Settings that differ from those of a checkpoint, as "before → now"; empty if it has no recipe."""
    before = _recipe_of(checkpoint)
    now = args.to_recipe() if before else {}
    if before:  # a setting of ours that is newer than the run
        before = {s.name: s.default for s in fields(args) if s.metadata.get("group") == "llava"} | before
    return {
        name: f"{before.get(name)!r} → {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in ("resume", "output_dir")
    }


def keep_resolved(args: LlavaTrainingArguments, checkpoint: Path) -> None:
    """Resolve what is `auto` as the run did before it stopped, in place."""
    before = _recipe_of(checkpoint)
    for name in ("activation_checkpointing", "eval_size"):
        if getattr(args, name) == "auto" and name in before:
            setattr(args, name, before[name])


def _recipe_of(checkpoint: Path) -> dict[str, Any]:
    """Not by `read_recipe`, which refuses a setting of another version of this package; empty if there is none."""
    file = checkpoint / RECIPE_NAME
    return (yaml.safe_load(file.read_text("utf-8")) if file.is_file() else None) or {}


def write_run_record(
    folder: str | os.PathLike, args: LlavaTrainingArguments, data: dict[str, Any] | None, base: dict[str, Any] | None
) -> None:
    """
    Write `recipe.yaml` (every setting, resolved) and `run.json`: versions, machine, the data ([`record_data`]) and, of an adapter,
    the weights on which it was trained ([`~modeling_llava.io.checkpoints.base_record`]).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(args.to_recipe(), folder / RECIPE_NAME, "The resolved recipe of this run: llava train recipe.yaml")
    record = {
        "versions": recorded_versions(),
        "machine": platform.platform(),
        "devices": args.world_size * max(args.n_gpu, 1),
        "data": data or {},
        **({"base": base} if base else {}),
    }
    write_atomic(folder / RUN_RECORD_NAME, json.dumps(record, indent=2) + "\n")


def record_data(sources: str | list[str] | dict[str, str] | None, dataset: Any = None) -> dict[str, Any]:
    """
    The data of a run: each source with the SHA-256 of its file, and the number of samples.

    A folder or a pattern is hashed by the names and sizes of its files. Data on the Hub has no hash.
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
    path = Path(source).expanduser()
    if path.is_file():
        return sha256_of(path)
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    files = sorted(p for p in found if p.is_file())
    listing = "\n".join(f"{p.relative_to(path) if path.is_dir() else p} {p.stat().st_size}" for p in files)
    return hashlib.sha256(listing.encode()).hexdigest() if files else None
