"""
`results.json`, one form for every benchmark, and `samples.jsonl` next to it; scores with their intervals; the fields of
benchmarks' files.

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

A line of `samples.jsonl` has `id`, `score` and `out_of` (1 if absent): the primary score is 100 · Σ score / Σ out_of.
`score` is `null` where a sample could not be scored.
"""

import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ..constants import recorded_versions
from ..data.json_rows import JsonRows
from ..io.files import sha256_of, write_atomic


SCHEMA_VERSION = 1
RUN_NAME, RESULTS_NAME, SAMPLES_NAME = "evaluation.json", "results.json", "samples.jsonl"
RESAMPLES = 2000
_REQUIRED = {"schema_version", "benchmark", "model", "samples", "complete", "primary_score", "scores"}
_MIB = 2**20
_CHUNK = 2**22  # indices drawn at a time


@dataclass
class Scored:
    """Answers with their scores."""

    rows: list[dict]  # one per sample, as in `samples.jsonl`
    scores: dict[str, dict]  # by name, from `score_of`
    primary: str  # the score that is the mean of the rows' scores
    counts: dict[str, int] = field(default_factory=dict)  # what went wrong, by reason
    more: dict[str, Any] = field(default_factory=dict)  # further fields of `results.json`


def score_of(scores: Sequence[float], out_of: Sequence[float] | None = None) -> dict:
    """
    A score: `value` in percent (`None` without samples), its 95 % `interval`, and the `count` of samples. `out_of` is what
    each sample can have; without it scores are shares, from 0 to 1.
    """
    total = len(scores) if out_of is None else sum(out_of)
    bounds = interval(scores, out_of) if total else None
    return {
        "value": 100 * sum(scores) / total if total else None,
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


def wilson_interval(successes: float, total: int) -> tuple[float, float]:
    """95 % interval of a share, in [0, 1] (Wilson 1927); valid at 0, at 1 and for few samples."""
    z, share = 1.959963984540054, successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    # Rounding would leave 0.9999… where it must be 1.
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == total else centre + half


def interval(scores: Sequence[float], out_of: Sequence[float] | None = None) -> tuple[float, float] | None:
    """95 % interval of Σ score / Σ out_of; `None` for fewer than two samples. Shares by Wilson, others by bootstrap."""
    if len(scores) < 2:
        return None
    if out_of is None and set(scores) <= {0.0, 1.0}:
        return wilson_interval(sum(scores), len(scores))
    scores = np.asarray(scores, float)
    out_of = np.ones_like(scores) if out_of is None else np.asarray(out_of, float)
    ratios = bootstrap(len(scores), lambda drawn: scores[drawn].sum(axis=1) / out_of[drawn].sum(axis=1))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def bootstrap(count: int, statistic: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`[RESAMPLES]`: a statistic of samples drawn with replacement; it is given their indices `[resamples, count]`."""
    rng, step = np.random.default_rng(0), max(1, _CHUNK // count)
    sizes = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
    return np.concatenate([statistic(rng.integers(0, count, (size, count))) for size in sizes])


def paired_difference(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]) -> dict:
    """
    Second minus first, in percentage points, on the same samples, of each of which (score, out of) is given.

    Returns:
        `dict`: `difference`; `interval`, 95 %, by a bootstrap that draws the same samples for both; `p_value`, two-sided: twice
        the share of resamples whose difference is on the other side of zero.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)

    def difference(drawn):
        a, b = first[drawn].sum(axis=-2), second[drawn].sum(axis=-2)  # [..., 2]
        return 100 * b[..., 0] / b[..., 1] - 100 * a[..., 0] / a[..., 1]

    differences = bootstrap(len(first), difference)
    low, high = np.quantile(differences, [0.025, 0.975])
    # One is added to both: with finitely many resamples no p-value is zero.
    tail = (1 + min((differences <= 0).sum(), (differences >= 0).sum())) / (1 + len(differences))
    return {
        "difference": float(difference(np.arange(len(first)))),
        "interval": [float(low), float(high)],
        "p_value": float(min(1.0, 2 * tail)),
        "samples": len(first),
    }


def write_results(
    folder: str | os.PathLike, benchmark: str, scored: Scored, *, total: int, answered: int, **about: dict
) -> dict:
    """Writes `samples.jsonl`, then `results.json`, whose content it returns. `about`: its `model`, `data` and `settings`."""
    num_scored = sum(row["score"] is not None for row in scored.rows)
    results = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": benchmark,
        **about,
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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scored.rows)
    write_atomic(folder / SAMPLES_NAME, lines, sync=True)
    write_atomic(folder / RESULTS_NAME, json.dumps(results, indent=2, ensure_ascii=False) + "\n", sync=True)
    return results


def read_results(path: str | os.PathLike) -> tuple[dict, list[dict]]:
    """Results and per-sample rows of a run's folder (or of its `results.json`)."""
    path = Path(path)
    file = path / RESULTS_NAME if path.is_dir() or not path.suffix else path
    if not file.is_file():
        started = " A run was started there and is not scored yet." if (file.parent / RUN_NAME).is_file() else ""
        raise FileNotFoundError(f"{file} does not exist.{started}")
    results = read_json(file)
    if not isinstance(results, dict) or not _REQUIRED <= results.keys():
        raise ValueError(f"{file} is not a result of an evaluation, which has {', '.join(sorted(_REQUIRED))}.")
    if (version := results["schema_version"]) != SCHEMA_VERSION:
        raise ValueError(f"{file} has schema version {version!r}; this package reads {SCHEMA_VERSION}. Upgrade it.")
    samples = file.parent / results["samples"]["file"]
    if not samples.is_file():
        raise FileNotFoundError(f"{samples}, which {file} names, does not exist.")
    return results, [row for row, _ in read_rows(samples)] if samples.stat().st_size else []


def read_rows(path: str | os.PathLike) -> list[tuple[dict, str]]:
    """The objects of JSON lines or of a JSON array, each with its place for errors (file and line, or row from 0)."""
    rows = JsonRows(Path(path))
    found = [(row, rows.where(index)) for index, row in enumerate(rows)]
    for row, place in found:
        if not isinstance(row, dict):
            raise ValueError(f"{place} is not a JSON object.")
    return found


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file; a `ValueError` names a file that is not JSON."""
    try:
        return json.loads(Path(path).read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def id_of(row: dict, place: str) -> str:
    """The `question_id` of a row; a `ValueError` that begins with `place` if there is none."""
    found = row.get("question_id")
    if isinstance(found, bool) or not isinstance(found, (int, str)):
        what = f"the question_id {found!r}, neither number nor text" if "question_id" in row else "no 'question_id'"
        raise ValueError(f"{place} has {what}; its fields are {fields_of(row)}.")
    return str(found)


def text_of(row: dict, key: str, place: str) -> str:
    """A text of a row; a `ValueError` that begins with `place` if there is none."""
    if not isinstance(row.get(key), str) or not row[key].strip():
        what = f"has {key} = {row[key]!r}, which is empty or not text" if key in row else f"has no {key!r}"
        raise ValueError(f"{place} {what}; its fields are {fields_of(row)}.")
    return row[key]


def fields_of(row: dict) -> str:
    """The fields of a row, for an error."""
    return ", ".join(list(map(str, row))[:10]) + (", …" if len(row) > 10 else "")


def hash_files(paths: Iterable[str | os.PathLike]) -> dict[str, str]:
    """SHA-256 of files, by name."""
    return {Path(path).name: sha256_of(path) for path in paths}


def hash_json(value: Any) -> str:
    """SHA-256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def describe_model(path: str, revision: str | None = None, adapter: str | None = None) -> dict:
    """Which weights were evaluated: name and [`fingerprint`] of a folder; revision and commit of a Hub name."""
    described: dict[str, Any] = {"name": path, "revision": revision, "adapter": adapter}
    parts = [("name", "", path, revision)]
    if adapter is not None:
        parts.append(("adapter", "adapter_", adapter, None))
    for key, prefix, source, version in parts:
        if Path(source).is_dir():
            described[key] = Path(source).resolve().name
            described[f"{prefix}fingerprint"] = fingerprint(source)
        elif commit := _commit_of(source, version):
            described[f"{prefix}commit"] = commit
    return described


def _commit_of(name: str, revision: str | None) -> str | None:
    """The commit of a Hub repository's revision; `None` where neither the Hub nor the cache has it."""
    from transformers.utils.hub import extract_commit_hash

    from ..io.checkpoints import PROJECTOR_CONFIG_NAME, checkpoint_kind, file_of

    kind = checkpoint_kind(name, revision)
    names = {"adapter": "adapter_config.json", "projector": PROJECTOR_CONFIG_NAME}
    file = file_of(name, names.get(kind, "config.json"), revision)
    return extract_commit_hash(file, None) if file else None


def fingerprint(folder: str | os.PathLike) -> str:
    """
    SHA-256 over names, sizes and the first and last MiB of a folder's configuration and weight files (all of 14 GB would
    take a minute).
    """
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
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    for line in info.read_text("utf-8").splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return f"{cpu}, {torch.get_num_threads()} threads"
