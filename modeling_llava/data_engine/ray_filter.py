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
        workers: Processes that extract noun phrases; default: one per core of the cluster.

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
    numbered = _write_captions(captions, folder, model)
    extracted = folder / "ray-phrases"
    if not (extracted / "DONE").exists():
        workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        found = ray.data.read_parquet(str(numbered)).map_batches(
            _Extract,
            fn_constructor_args=(model,),
            concurrency=workers,
            batch_size=SHARD_CAPTIONS,
            batch_format="pyarrow",
        )
        found.write_parquet(str(extracted), mode="overwrite")
        (extracted / "DONE").touch()
    phrases = ray.data.read_parquet(str(extracted), file_extensions=["parquet"])

    counts: Counter[str] = Counter()
    partial = phrases.map_batches(_count, batch_size=None, batch_format="pyarrow")
    for batch in partial.iter_batches(batch_size=None, batch_format="pyarrow"):
        for phrase, count in zip(batch["phrase"].to_pylist(), batch["count"].to_pylist()):
            counts[phrase] += count
    chooser = Chooser(counts, settings)
    if chooser.keys:
        keys = ray.put(chooser.keys)
        heaps: dict[str, list[int]] = {}
        partial = phrases.map_batches(
            _smallest, fn_kwargs={"keys": keys, "most": settings.most}, batch_size=None, batch_format="pyarrow"
        )
        for batch in partial.iter_batches(batch_size=None, batch_format="pyarrow"):
            for phrase, value in zip(batch["phrase"].to_pylist(), batch["hash"].to_pylist()):
                push_smallest(heaps.setdefault(phrase, []), value, settings.most)
        chooser.set_thresholds(heaps)
    shared = ray.put(chooser)
    ranked = phrases.map_batches(_rank, fn_kwargs={"chooser": shared}, batch_size=None, batch_format="pyarrow")
    rank_of = np.full(_number_of_rows(numbered), -1, np.int64)
    for batch in ranked.iter_batches(batch_size=None, batch_format="pyarrow"):
        rank_of[batch["row"].to_numpy()] = batch["rank"].to_numpy()
    values, numbers = np.unique(rank_of[rank_of >= 0], return_counts=True)
    chooser.set_target(Counter(dict(zip(values.tolist(), numbers.tolist()))))

    def per_caption() -> Iterator[Phrases]:
        return _in_order(extracted)

    return (0 <= rank <= chooser.last_rank for rank in rank_of.tolist()), counts, per_caption


def _number_of_rows(numbered: Path) -> int:
    """Rows of all parquet files of a folder."""
    import pyarrow.parquet as pq

    return sum(pq.ParquetFile(path).metadata.num_rows for path in numbered.glob("*.parquet"))


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


def _in_order(extracted: Path) -> Iterator[Phrases]:
    """Phrases of each caption in order; the files that Ray wrote hold whole shards, in any order."""
    import pyarrow.parquet as pq

    starts = []
    for path in extracted.glob("*.parquet"):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            first = file.metadata.row_group(group).column(0).statistics.min
            starts.append((first, path, group))
    expected = 0
    for _, path, group in sorted(starts):
        table = pq.ParquetFile(path).read_row_group(group)
        for row, phrases in zip(table["row"].to_pylist(), table["phrases"].to_pylist()):
            assert row == expected, f"row {row} stands where row {expected} belongs in {path}"
            expected += 1
            yield tuple(phrases)


def _rows(batch: Any) -> Iterator[tuple[int, Phrases]]:
    yield from zip(batch["row"].to_pylist(), (tuple(phrases) for phrases in batch["phrases"].to_pylist()))


class _Extract:
    """Extracts noun phrases; an actor, so that spaCy is loaded once per process."""

    def __init__(self, model: str):
        self.model = model
        load_spacy(model)

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa

        found = [list(phrases) for phrases in extract_phrases(batch["caption"].to_pylist(), self.model)]
        return pa.table({"row": batch["row"], "phrases": pa.array(found, pa.list_(pa.string()))})


def _count(batch: Any) -> Any:
    import pyarrow as pa

    counts = count_phrases(phrases for _, phrases in _rows(batch))
    return pa.table({"phrase": pa.array(counts, pa.string()), "count": pa.array(counts.values(), pa.int64())})


def _smallest(batch: Any, keys: dict[str, int], most: int) -> Any:
    import pyarrow as pa

    heaps = smallest_hashes(_rows(batch), keys, most)
    pairs = [(phrase, -value) for phrase, heap in heaps.items() for value in heap]
    return pa.table(
        {
            "phrase": pa.array([phrase for phrase, _ in pairs], pa.string()),
            "hash": pa.array([value for _, value in pairs], pa.uint64()),
        }
    )


def _rank(batch: Any, chooser: Chooser) -> Any:
    import pyarrow as pa

    ranks = [(row, chooser.first_rank(row, phrases)) for row, phrases in _rows(batch)]
    ranks = [(row, rank) for row, rank in ranks if rank is not None]
    return pa.table(
        {
            "row": pa.array([row for row, _ in ranks], pa.int64()),
            "rank": pa.array([rank for _, rank in ranks], pa.int64()),
        }
    )
