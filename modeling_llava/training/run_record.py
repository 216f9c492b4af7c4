"""What a run leaves beside its weights so that it can be repeated: settings, versions, machine, hash of the data."""

import hashlib
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from .arguments import LlavaTrainingArguments
from .recipes import write_recipe, write_whole


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


__all__ = ["RECIPE_NAME", "RUN_RECORD_NAME", "installed_versions", "record_data", "write_run_record"]
