"""Makes the data set from the ledger: LLaVA's JSON, what was left out, a `datasets` folder, card and report.

It follows from the ledger and the contexts, so that it can be made again at any time.
"""

import hashlib
import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..endpoint import Ledger
from ..io.files import atomic_path, sha256_of
from ..io.images import ImageError, open_size
from .card import write_card
from .report import write_report
from .run import RunFolder
from .samples import OutputSettings, OutputSummary, Sample, find_image, kept_samples, rejected_replies
from .validate import count_words


logger = logging.getLogger(__name__)

SHARD_BYTES = 500_000_000
ROWS_PER_GROUP = 100


def write_output(
    folder: RunFolder,
    ledger: Ledger,
    *,
    images: Path | None,
    limit: int | None = None,
    settings: OutputSettings | None = None,
) -> OutputSummary:
    """Writes `instruct.json`, `rejected.jsonl`, `dataset/` with its card, and `report.html` into the run's folder."""
    settings = settings or OutputSettings()
    summary = OutputSummary()
    names = set()
    summary.files += [folder.path / "instruct.json", folder.path / "rejected.jsonl"]
    with ExitStack() as stack:
        partials = [stack.enter_context(atomic_path(path, sync=True)) for path in summary.files]
        data, rejected = (stack.enter_context(open(path, "w", encoding="utf-8")) for path in partials)

        def leave_out(row: dict[str, Any]) -> None:
            rejected.write(json.dumps(row, ensure_ascii=False) + "\n")

        for row in rejected_replies(folder, ledger, limit):
            summary.rejected.setdefault(row["type"], Counter())[row["reason"]] += 1
            leave_out(row)
        data.write("[")
        for sample in kept_samples(folder, ledger, settings, summary, leave_out, limit):
            data.write((",\n" if summary.samples else "\n") + json.dumps(sample.llava_row(), ensure_ascii=False))
            summary.samples[sample.type] += 1
            summary.turns[sample.type] += len(sample.turns)
            names.add(sample.context.image)
            lengths = summary.answer_words.setdefault(sample.type, Counter())
            lengths.update(count_words(answer) for _, answer in sample.turns)
        data.write("\n]\n")
    summary.images = len(names)
    if settings.parquet and images is not None and summary.samples:
        samples = kept_samples(folder, ledger, settings, limit=limit)
        write_dataset(samples, images, folder.path, summary, names)
    if not summary.fingerprint and (folder.path / "dataset").exists():
        summary.notes.append(
            f"{folder.path / 'dataset'} is of an earlier call: its samples may differ from instruct.json."
        )
    if summary.samples:
        if settings.card:
            write_card(folder, ledger, summary, limit)
        if settings.report_samples:
            write_report(folder, ledger, settings, summary, images, limit)
    return summary


def write_dataset(samples: Iterator[Sample], images: Path, run: Path, summary: OutputSummary, names: set[str]) -> None:
    """Writes `dataset/data/train-*.parquet` into a run's folder, with the images `names`.

    Columns: `id`, `images` (encoded as in the image folder), `messages` (HF form), `type`. The files' names end with a
    fingerprint of the content, which the card names: `load_dataset` caches by the card's text, and an interrupted call
    leaves the older files for the older card.
    """
    paths = {name: find_image(images, name) for name in sorted(names)}
    sizes = {name: path.stat().st_size for name, path in paths.items() if path}
    need = int(sum(sizes.values()) * summary.samples.total() / len(names) * 1.05)
    free = shutil.disk_usage(run).free
    if need > free:
        summary.notes.append(
            f"The datasets folder was not written: it contains an image per sample and would take about {need / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB are free. `llava train` reads instruct.json with the image folder just as well."
        )
        return
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Image, List, Value

    content = {"type": Value("string"), "text": Value("string")}
    features = Features(
        {
            "id": Value("string"),
            "images": List(Image()),
            "messages": List({"role": Value("string"), "content": List(content)}),
            "type": Value("string"),
        }
    )
    schema = features.arrow_schema  # carries the features, by which the Hub's viewer shows images
    content_of = f"{sha256_of(run / 'instruct.json')} {sizes}"
    summary.fingerprint = hashlib.sha256(content_of.encode()).hexdigest()[:16]
    data = run / "dataset" / "data"
    data.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []
    rows = _parquet_rows(samples, images, summary)
    with ExitStack() as shard:
        size = SHARD_BYTES
        while group := list(itertools.islice(rows, ROWS_PER_GROUP)):
            if size >= SHARD_BYTES:
                shard.close()
                shards.append(data / f"train-{len(shards):05d}-{summary.fingerprint}.parquet")
                writer = pq.ParquetWriter(shard.enter_context(atomic_path(shards[-1])), schema)
                shard.enter_context(writer)
                size = 0
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            size += sum(len(row["images"][0]["bytes"]) for row in group)
    for stale in set(data.iterdir()) - set(shards):
        stale.unlink()
    summary.files.append(run / "dataset")


def _parquet_rows(samples: Iterator[Sample], images: Path, summary: OutputSummary) -> Iterator[dict[str, Any]]:
    encoded_of = lru_cache(maxsize=1)(_read_image)  # the samples of an image come one after the other
    for sample in samples:
        name = sample.context.image
        if (encoded := encoded_of(images, name)) is None:
            summary.missing_images += 1
        else:
            image = {"bytes": encoded, "path": Path(name).name}
            yield {"id": sample.id, "images": [image], "messages": sample.messages(), "type": sample.type}


def _read_image(images: Path, name: str) -> bytes | None:
    """The bytes of an image file; `None` if it is missing or not an image."""
    if path := find_image(images, name):
        try:
            open_size(path, repr(str(path)))
            return path.read_bytes()
        except ImageError as error:
            logger.warning("An image is left out of the datasets folder. %s", error)
    return None
