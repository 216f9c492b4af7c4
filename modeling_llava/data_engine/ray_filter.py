"""The concept filter on Ray Data: noun phrases, counts and the choice are worked out on a cluster.

What crosses to the driver is per phrase (counts, the smallest hashes of frequent ones) and one number per caption. The functions are those of `concepts.py`, so the choice is the same bit for bit.
"""

import hashlib
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..io.atomic import atomic_path
from .concepts import Chooser, ConceptSettings, Phrases, count_phrases, push_smallest, smallest_hashes
from .noun_phrases import DEFAULT_MODEL, SHARD_CAPTIONS, extract_phrases, load_spacy


logger = logging.getLogger(__name__)


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("--engine ray needs Ray Data: pip install 'modeling-llava[ray]'") from error
    return ray


def choose_with_ray(
    captions: Iterable[str],
    folder: Path,
    settings: ConceptSettings,
    *,
    model: str = DEFAULT_MODEL,
    workers: int | None = None,
) -> tuple[Iterator[bool], Counter[str], Callable[[], Iterator[Phrases]]]:
    """The choice of `concepts.make_chooser`, worked out by Ray Data.

    Args:
        captions: The captions.
        folder: Where captions and noun phrases go as parquet; on a cluster a folder that all nodes share. Noun phrases
            that lie there for the same captions and model are not extracted again.
        settings: How captions are chosen.
        model: spaCy's model, installed on all nodes.
        workers: Processes that extract noun phrases, at most one per core; default: one per core of the cluster.

    Returns:
        Whether each caption is chosen, in order; in how many each phrase occurs; and what gives each caption's phrases.
    """
    ray = _import_ray()
    load_spacy(model)
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    captions_of = _write_captions(captions, folder, model)
    extracted = folder / "ray-phrases"
    extracted.mkdir(exist_ok=True)
    _extract_all(ray, captions_of, extracted, model, workers)
    shards = _shards(extracted)

    counts: Counter[str] = Counter()
    for batch in _over(ray, shards, _count):
        for phrase, count in zip(batch["phrase"].to_pylist(), batch["count"].to_pylist()):
            counts[phrase] += count
    chooser = Chooser(counts, settings)
    if chooser.keys:
        heaps: dict[str, list[int]] = {}
        for batch in _over(ray, shards, _smallest, keys=[ray.put(chooser.keys)], most=settings.most):
            for phrase, value in zip(batch["phrase"].to_pylist(), batch["hash"].to_pylist()):
                push_smallest(heaps.setdefault(phrase, []), value, settings.most)
        chooser.set_thresholds(heaps)
    rank_of = np.full(_number_of_rows(shards), -1, np.int64)
    for batch in _over(ray, shards, _rank, chooser=[ray.put(chooser)]):
        rank_of[batch["row"].to_numpy()] = batch["rank"].to_numpy()
    values, numbers = np.unique(rank_of[rank_of >= 0], return_counts=True)
    chooser.set_target(Counter(dict(zip(values.tolist(), numbers.tolist()))))

    def per_caption() -> Iterator[Phrases]:
        return (phrases for path in shards for _, phrases in _rows_of(path))

    return (0 <= rank <= chooser.last_rank for rank in rank_of.tolist()), counts, per_caption


def _extract_all(ray: Any, captions_of: Path, extracted: Path, model: str, workers: int | None) -> None:
    """Noun phrases of every shard that has none yet, one file per shard: a killed run resumes there."""
    missing = [path for path in _shards(captions_of) if not (extracted / path.name).exists()]
    if not missing:
        return
    workers = min(workers or max(1, int(ray.cluster_resources().get("CPU", 1))), len(missing))
    # The actors read and write: separate tasks of Ray would wait forever where the actors have taken all cores.
    found = _files(ray, missing).map_batches(
        _Extract,
        fn_constructor_args=(model, str(extracted)),
        compute=ray.data.ActorPoolStrategy(size=workers),
        batch_size=1,
        batch_format="pyarrow",
    )
    for _ in found.iter_batches(batch_size=None, batch_format="pyarrow"):
        pass


def _over(ray: Any, shards: list[Path], function: Callable, **settings: Any) -> Iterator[Any]:
    """What a function gives for each shard, as Arrow tables in any order."""
    mapped = _files(ray, shards).map_batches(function, fn_kwargs=settings, batch_size=1, batch_format="pyarrow")
    return iter(mapped.iter_batches(batch_size=None, batch_format="pyarrow"))


def _files(ray: Any, shards: list[Path]) -> Any:
    """A dataset of file names, a block each."""
    return ray.data.from_items([{"path": str(path)} for path in shards], override_num_blocks=len(shards))


def _shards(folder: Path) -> list[Path]:
    """A folder's parquet files, in the order of the captions."""
    return sorted(folder.glob("*.parquet"))


def _number_of_rows(shards: list[Path]) -> int:
    import pyarrow.parquet as pq

    return sum(pq.ParquetFile(path).metadata.num_rows for path in shards)


def _write_captions(captions: Iterable[str], folder: Path, model: str) -> Path:
    """Captions with their numbers as parquet, one file per shard; drops the noun phrases of other captions."""
    import shutil

    import pyarrow as pa
    import pyarrow.parquet as pq

    target = folder / "ray-captions"
    unnamed = folder / "ray-captions.part"
    shutil.rmtree(unnamed, ignore_errors=True)
    unnamed.mkdir()
    digest = hashlib.sha256(model.encode())
    iterator, row = iter(captions), 0
    while part := list(itertools.islice(iterator, SHARD_CAPTIONS)):
        for caption in part:
            digest.update(caption.encode() + b"\n")
        table = pa.table({"row": range(row, row + len(part)), "caption": part})
        pq.write_table(table, unnamed / f"{row // SHARD_CAPTIONS:06d}.parquet")
        row += len(part)
    mark = folder / "ray-captions.sha256"
    if not mark.exists() or mark.read_text() != digest.hexdigest():
        shutil.rmtree(folder / "ray-phrases", ignore_errors=True)
        mark.write_text(digest.hexdigest())
    shutil.rmtree(target, ignore_errors=True)
    os.replace(unnamed, target)
    return target


def _rows_of(path: str | os.PathLike) -> Iterator[tuple[int, Phrases]]:
    """`(number, noun phrases)` of each caption of a shard."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    yield from zip(table["row"].to_pylist(), (tuple(phrases) for phrases in table["phrases"].to_pylist()))


def _rows(batch: Any) -> Iterator[tuple[int, Phrases]]:
    for path in batch["path"].to_pylist():
        yield from _rows_of(path)


class _Extract:
    """Extracts noun phrases; an actor, so that spaCy is loaded once per process."""

    def __init__(self, model: str, folder: str):
        self.model, self.folder = model, folder
        load_spacy(model)

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for path in batch["path"].to_pylist():
            table = pq.read_table(path)
            found = [list(phrases) for phrases in extract_phrases(table["caption"].to_pylist(), self.model)]
            target = os.path.join(self.folder, os.path.basename(path))
            phrases = pa.table({"row": table["row"], "phrases": pa.array(found, pa.list_(pa.string()))})
            with atomic_path(target) as partial:
                pq.write_table(phrases, partial)
        return batch


def _count(batch: Any) -> Any:
    import pyarrow as pa

    counts = count_phrases(phrases for _, phrases in _rows(batch))
    return pa.table({"phrase": pa.array(counts, pa.string()), "count": pa.array(counts.values(), pa.int64())})


def _smallest(batch: Any, keys: list[Any], most: int) -> Any:
    import pyarrow as pa
    import ray

    heaps = smallest_hashes(_rows(batch), ray.get(keys[0]), most)
    pairs = [(phrase, -value) for phrase, heap in heaps.items() for value in heap]
    return pa.table(
        {
            "phrase": pa.array([phrase for phrase, _ in pairs], pa.string()),
            "hash": pa.array([value for _, value in pairs], pa.uint64()),
        }
    )


def _rank(batch: Any, chooser: list[Any]) -> Any:
    import pyarrow as pa
    import ray

    own = ray.get(chooser[0])
    ranks = [(row, own.first_rank(row, phrases)) for row, phrases in _rows(batch)]
    ranks = [(row, rank) for row, rank in ranks if rank is not None]
    return pa.table(
        {
            "row": pa.array([row for row, _ in ranks], pa.int64()),
            "rank": pa.array([rank for _, rank in ranks], pa.int64()),
        }
    )
