"""
`results.json`, one form for every benchmark, and `samples.jsonl` next to it; how benchmarks read their files.

    {
      "schema_version": 1,
      "benchmark": "scienceqa",
      "model": {"name", "revision", "adapter", "fingerprint" or "commit"},
      "data": {"files": {name: sha256}, "split", …},
      "settings": {…},                                  how answers were made and scored
      "versions": {…}, "machine": …, "created": …,
      "samples": {"file", "total", "answered", "scored"},   total: of the whole benchmark
      "complete": true,                                 all samples of the benchmark are scored
      "primary_score": "accuracy",
      "scores": {"accuracy": {"value": 90.92, "interval": [90.0, 91.8], "count": 4241}, …},   in percent
      "counts": {"unparsed": 3, …}
    }

A line of `samples.jsonl` has `id`, `score` and `out_of` (1 if absent): the primary metric is 100 · Σ score / Σ out_of.
`score` is `null` where a sample could not be scored.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..io.atomic import sha256_of, write_atomic
from ..versions import recorded_versions
from .statistics import interval


SCHEMA_VERSION = 1
RUN_NAME, RESULTS_NAME, SAMPLES_NAME = "evaluation.json", "results.json", "samples.jsonl"
_REQUIRED = ("schema_version", "benchmark", "model", "samples", "complete", "primary_score", "scores")
_MIB = 2**20
_BOM = b"\xef\xbb\xbf"  # which Windows' editors put in front


@dataclass
class Scored:
    """
    Answers with their scores.

    Attributes:
        rows (`list[dict]`): One per sample, as in `samples.jsonl`.
        scores (`dict[str, dict]`): By name, from [`interval_of`].
        primary (`str`): The metric that is the mean of the rows' scores.
        counts (`dict[str, int]`): What went wrong, by reason.
        more (`dict`): Further fields of `results.json`.
    """

    rows: list[dict]
    scores: dict[str, dict]
    primary: str
    counts: dict[str, int] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


def interval_of(scores: Sequence[float], out_of: Sequence[float] | None = None, is_share: bool = True) -> dict:
    """
    A metric: `value` in percent (`None` without samples), its 95 % `interval`, and the `count` of samples.

    Args:
        scores, out_of: Of each sample; `out_of` is 1 by default.
        is_share (`bool`, defaults to `True`): The metric cannot be above 100 %.
    """
    total = len(scores) if out_of is None else sum(out_of)
    if not total:
        return {"value": None, "interval": None, "count": len(scores)}
    bounds = interval(scores, out_of if is_share or out_of else [1.0] * len(scores))
    return {
        "value": 100 * sum(scores) / total,
        "interval": None if bounds is None else [100 * bound for bound in bounds],
        "count": len(scores),
    }


def scores_by_group(
    rows: Sequence[dict], groups: Iterable[str], table: Callable[[list[dict]], dict[str, dict]]
) -> dict[str, dict]:
    """The scores that `table` makes of rows, for each group as `score/group`, then for all rows as `score`."""
    scores = {}
    for group in [*dict.fromkeys(groups), "all"]:
        suffix = "" if group == "all" else f"/{group}"
        for name, score in table([row for row in rows if group in row["groups"]]).items():
            scores[f"{name}{suffix}"] = score
    return scores


def make_results(
    benchmark: str, scored: Scored, *, model: dict, data: dict, settings: dict, total: int, answered: int
) -> dict:
    """The content of `results.json`."""
    num_scored = sum(row["score"] is not None for row in scored.rows)
    return {
        "schema_version": SCHEMA_VERSION,
        "benchmark": benchmark,
        "model": model,
        "data": data,
        "settings": settings,
        "versions": recorded_versions(),
        "machine": machine(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "samples": {"file": SAMPLES_NAME, "total": total, "answered": answered, "scored": num_scored},
        "complete": num_scored == total,
        "primary_score": scored.primary,
        "scores": scored.scores,
        "counts": scored.counts,
        **scored.more,
    }


def write_results(folder: str | os.PathLike, results: dict, rows: Iterable[dict]) -> None:
    """Writes `samples.jsonl`, then `results.json`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(folder / SAMPLES_NAME, lines, sync=True)
    write_atomic(folder / RESULTS_NAME, json.dumps(results, indent=2, ensure_ascii=False) + "\n", sync=True)


def read_results(path: str | os.PathLike) -> tuple[dict, list[dict]]:
    """
    Results and per-sample rows of a run's folder (or of its `results.json`).

    Raises:
        FileNotFoundError: there are no results; the message says whether a run was started there.
        ValueError: a file of another kind, or of a newer schema.
    """
    path = Path(path)
    file = path / RESULTS_NAME if path.is_dir() or not path.suffix else path
    if not file.is_file():
        begun = " A run was started there and is not scored yet." if (file.parent / RUN_NAME).is_file() else ""
        raise FileNotFoundError(f"{file} is not there.{begun}")
    results = read_json(file)
    missing = [key for key in _REQUIRED if not isinstance(results, dict) or key not in results]
    if not missing and not isinstance(results["schema_version"], int):
        missing = ["schema_version that is a number"]
    if missing:
        raise ValueError(f"{file} is not a result of an evaluation: it has no {', '.join(missing)}.")
    if results["schema_version"] > SCHEMA_VERSION:
        raise ValueError(
            f"{file} has schema version {results['schema_version']}, this package reads up to {SCHEMA_VERSION}. Upgrade it."
        )
    samples = file.parent / results["samples"]["file"]
    if not samples.is_file():
        raise FileNotFoundError(f"{samples}, which {file} names, is not there.")
    return results, read_jsonl(samples)


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """The objects of a JSONL file; a `ValueError` names a line that is not a JSON object."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().removeprefix(_BOM).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}, is not a JSON object: {line.decode().strip()[:80]}")
        rows.append(row)
    return rows


def read_rows(path: str | os.PathLike) -> Any:
    """The content of a JSON file, or the objects of a JSONL file of several lines."""
    try:
        return read_json(path)
    except ValueError:
        return read_jsonl(path)


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file; a `ValueError` names a file that is not JSON."""
    try:
        return json.loads(Path(path).read_bytes().removeprefix(_BOM))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def id_of(row: dict, place: str) -> str:
    """The `question_id` of a row; a `ValueError` that begins with `place` (file and row) if there is none."""
    found = row.get("question_id")
    if not isinstance(found, (int, str)) or isinstance(found, bool):
        what = (
            f"the question_id {found!r}, which is neither number nor text"
            if "question_id" in row
            else "no 'question_id'"
        )
        raise ValueError(f"{place} has {what}; its fields are {fields_of(row)}.")
    return str(found)


def fields_of(row: dict) -> str:
    """The fields of a row, for an error."""
    return ", ".join(list(map(str, row))[:10]) + (", …" if len(row) > 10 else "")


def text_of(row: dict, key: str, place: str) -> str:
    """A text of a row; a `ValueError` that begins with `place` if there is none."""
    if not isinstance(row.get(key), str) or not row[key].strip():
        what = f"has {key} = {row[key]!r}, which is empty or not text" if key in row else f"has no {key!r}"
        raise ValueError(f"{place} {what}; its fields are {fields_of(row)}.")
    return row[key]


def hash_files(paths: Iterable[str | os.PathLike]) -> dict[str, str]:
    """SHA-256 of files, by name."""
    return {Path(path).name: sha256_of(path) for path in paths}


def hash_json(value: Any) -> str:
    """SHA-256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def describe_model(path: str, revision: str | None = None, adapter: str | None = None) -> dict:
    """
    Which weights were evaluated: name and fingerprint of a folder; revision and commit of a Hub name. The fingerprint is a
    SHA-256 over names, sizes and the first and last MiB of the configuration and weight files (all of 14 GB would take a
    minute).
    """
    described: dict[str, Any] = {"name": path, "revision": revision, "adapter": adapter}
    if Path(path).is_dir():
        described["name"] = Path(path).resolve().name
        described["fingerprint"] = fingerprint(path)
    elif commit := _commit_of(path, revision):
        described["commit"] = commit
    if adapter is not None and Path(adapter).is_dir():
        described["adapter"] = Path(adapter).resolve().name
        described["adapter_fingerprint"] = fingerprint(adapter)
    elif adapter is not None and (commit := _commit_of(adapter)):
        described["adapter_commit"] = commit
    return described


def _commit_of(name: str, revision: str | None = None) -> str | None:
    """The commit of a Hub repository's revision; `None` where neither the Hub nor the cache has it."""
    from transformers.utils.hub import extract_commit_hash

    from ..io.checkpoints import PROJECTOR_CONFIG_NAME, checkpoint_kind, file_of

    kind = checkpoint_kind(name, revision)
    names = {"adapter": "adapter_config.json", "projector": PROJECTOR_CONFIG_NAME}
    file = file_of(name, names.get(kind, "config.json"), revision)
    return extract_commit_hash(file, None) if file else None


def fingerprint(folder: str | os.PathLike) -> str:
    """See [`describe_model`]."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix not in (".safetensors", ".bin") and not path.name.endswith("config.json"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_MIB))
            file.seek(max(0, size - _MIB))
            digest.update(file.read(_MIB))
    return digest.hexdigest()


def machine() -> str:
    """The accelerator, or the CPU and its threads."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a CPU without a name
    return f"{cpu}, {torch.get_num_threads()} threads"


__all__ = [
    "SCHEMA_VERSION",
    "Scored",
    "describe_model",
    "fields_of",
    "fingerprint",
    "hash_files",
    "hash_json",
    "id_of",
    "interval_of",
    "make_results",
    "read_json",
    "read_jsonl",
    "read_results",
    "read_rows",
    "scores_by_group",
    "text_of",
    "write_results",
]
