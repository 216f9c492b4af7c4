"""Makes the data set from the ledger: LLaVA's JSON, a `datasets` folder, what was left out, card and report.

It follows from the ledger and the contexts, so that it can be made again at any time.
"""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..endpoint import Ledger
from ..io.atomic import atomic_path
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
    with ExitStack() as stack:
        rejected, data = (
            stack.enter_context(
                open(stack.enter_context(atomic_path(folder.path / name, sync=True)), "w", encoding="utf-8")
            )
            for name in ("rejected.jsonl", "instruct.json")
        )
        for row in rejected_replies(folder, ledger, limit):
            summary.rejected.setdefault(row["type"], Counter())[row["reason"]] += 1
            rejected.write(json.dumps(row, ensure_ascii=False) + "\n")

        def leave_out(row: dict[str, Any]) -> None:
            rejected.write(json.dumps(row, ensure_ascii=False) + "\n")

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
    summary.files += [folder.path / "instruct.json", folder.path / "rejected.jsonl"]
    if settings.parquet and images is not None and summary.samples:
        samples = kept_samples(folder, ledger, settings, OutputSummary(), limit=limit)
        write_dataset(samples, images, folder.path / "dataset", summary, names)
    if not summary.fingerprint and (folder.path / "dataset").exists():
        summary.notes.append(
            f"{folder.path / 'dataset'} is of an earlier call: it may hold other samples than instruct.json does now."
        )
    if summary.samples:
        if settings.card:
            write_card(folder, ledger, settings, summary, limit)
        if settings.report_samples:
            write_report(folder, ledger, settings, summary, images, limit)
    return summary


def write_dataset(
    samples: Iterator[Sample], images: Path, target: Path, summary: OutputSummary, names: set[str]
) -> None:
    """Writes `data/train-*.parquet` with the images in it; the folder is whole or absent.

    Columns: `id`, `images` (encoded as in the image folder), `messages` (HF form), `type`. The files' names end with a
    fingerprint, which the card names: `load_dataset` caches by the card's text, and would else return older rows.
    """
    need = sum(path.stat().st_size for path in (find_image(images, name) for name in names) if path)
    need = int(need * summary.samples.total() / max(1, len(names)) * 1.05)
    free = shutil.disk_usage(target.parent).free
    if need > free:
        summary.notes.append(
            f"The datasets folder was not written: it holds an image per sample and would take about {need / 1e9:.1f} GB, "
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
    unnamed = target.with_name(target.name + ".part")
    shutil.rmtree(unnamed, ignore_errors=True)
    (unnamed / "data").mkdir(parents=True)
    shards: list[Path] = []
    writer, size, rows = None, 0, []
    fingerprint = hashlib.sha256()

    def flush() -> None:
        nonlocal writer, size, rows
        if rows:
            if writer is None:
                shards.append(unnamed / "data" / f"{len(shards)}.parquet")
                writer = pq.ParquetWriter(shards[-1], schema)
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            rows = []
        if writer is not None and size >= SHARD_BYTES:
            writer.close()
            writer, size = None, 0

    last, data = None, None  # the samples of an image come one after the other
    for sample in samples:
        if sample.context.image != last:
            last, data = sample.context.image, _read_image(images, sample.context.image)
        if data is None:
            summary.missing_images += 1
            continue
        fingerprint.update(json.dumps(sample.llava_row(), ensure_ascii=False).encode())
        fingerprint.update(data)
        image = {"bytes": data, "path": Path(sample.context.image).name}
        rows.append({"id": sample.id, "images": [image], "messages": sample.messages(), "type": sample.type})
        size += len(data)
        if len(rows) >= ROWS_PER_GROUP or size >= SHARD_BYTES:
            flush()
    flush()
    if writer is not None:
        writer.close()
    summary.fingerprint = fingerprint.hexdigest()[:16]
    for number, shard in enumerate(shards):
        name = f"train-{number:05d}-of-{len(shards):05d}-{summary.fingerprint}.parquet"
        os.replace(shard, shard.with_name(name))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(unnamed, target)
    summary.files.append(target)


def _read_image(images: Path, name: str) -> bytes | None:
    """The bytes of an image file; `None` if it is missing or not an image."""
    from PIL import Image

    path = find_image(images, name)
    if path is None:
        return None
    try:
        Image.open(path).close()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as PIL's readers put it
        logger.warning("The datasets folder lacks the image %s: %s", path, error)
        return None
    return path.read_bytes()
