"""One HTML page of samples with their images, to skim and to mark what is to be dropped. No server, no other file."""

import base64
import html
import io
import json
import logging
import random
from collections import Counter
from functools import lru_cache
from pathlib import Path
from string import Template

from PIL import Image

from ..endpoint import Ledger
from ..io.files import write_atomic
from ..io.images import ImageError, read_image
from .replies import LEFT_OUT
from .run import RunFolder
from .samples import OutputSettings, OutputSummary, Sample, find_image, kept_samples


logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("report.html")
THUMBNAIL = 320
"""Longest side of an image in the report, in pixels."""


def choose_samples(samples: list[tuple[str, str]], number: int, seed: int = 0) -> set[str]:
    """Ids of `number` samples, as evenly over the types as possible."""
    seen: Counter = Counter()
    in_rounds = []  # a sample of each type, a second one of each type, …
    for name, kind in random.Random(seed).sample(samples, len(samples)):
        seen[kind] += 1
        in_rounds.append((seen[kind], name))
    return {name for _, name in sorted(in_rounds)[:number]}


def write_report(
    folder: RunFolder,
    ledger: Ledger,
    settings: OutputSettings,
    summary: OutputSummary,
    images: Path | None,
    limit: int | None = None,
) -> None:
    """Writes `report.html` into the run's folder."""
    samples = ((sample.id, sample.type) for sample in kept_samples(folder, ledger, settings, limit=limit))
    chosen = choose_samples(list(samples), settings.report_samples)
    source_of = lru_cache(maxsize=1)(thumbnail)  # the samples of an image come one after the other
    articles = [
        _article(sample, source_of(images, sample.context.image))
        for sample in kept_samples(folder, ledger, settings, limit=limit)
        if sample.id in chosen
    ]
    path = folder.path / "report.html"
    write_atomic(path, _page(folder, summary, articles))
    summary.files.append(path)


def read_drop_list(path: str | Path) -> frozenset[str]:
    """The ids in a list that was downloaded from the report. ValueError if the file has another form."""
    try:
        names = json.loads(Path(path).read_text("utf-8"))["drop"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path} is not a drop list: {{"drop": ["id", …]}}, as the report downloads it.') from None
    return frozenset(names)


def thumbnail(images: Path | None, name: str) -> str:
    """An image as the value of `src`; empty if there is none or it cannot be read."""
    path = find_image(images, name) if images is not None else None
    if path is None:
        return ""
    try:
        image = read_image(path)
    except ImageError as error:
        logger.warning("An image is left out of the report. %s", error)
        return ""
    return data_url(image, THUMBNAIL)


def data_url(image: Image.Image, size: int) -> str:
    """A JPEG of an image, its longer side at most `size` pixels, as a `data:` URL; the image is not changed."""
    image = image.copy()
    image.thumbnail((size, size))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _article(sample: Sample, source: str) -> str:
    name, kind = html.escape(sample.id, quote=True), html.escape(sample.type)
    image = f'<img src="{source}" alt="">' if source else f"<p class=none>{html.escape(sample.context.image)}</p>"
    turns = "".join(
        f"<p class=q>{html.escape(question)}</p><p class=a>{html.escape(answer)}</p>"
        for question, answer in sample.turns
    )
    context = html.escape(f"{sample.context.caption_text}\n\n{sample.context.box_text}".strip())
    return (
        f'<article data-id="{name}" data-type="{kind}"><header><b class="{kind}">{kind}</b> <code>{name}</code>'
        f"<label><input type=checkbox> drop</label></header><div class=body><div class=left>{image}"
        f"<details><summary>context of the model</summary><pre>{context}</pre></details></div>"
        f"<div class=turns>{turns}</div></div></article>"
    )


def _bars(rows: list[tuple[str, int]]) -> str:
    most = max((number for _, number in rows), default=1) or 1
    total = sum(number for _, number in rows) or 1
    return "".join(
        f"<tr><td>{html.escape(label)}<td class=n>{number:,}<td class=n>{number / total:.1%}"
        f'<td><i style="width:{180 * number / most:.0f}px"></i>'
        for label, number in rows
    )


def _page(folder: RunFolder, summary: OutputSummary, articles: list[str]) -> str:
    kinds = [kind for kind in folder.config.types if summary.samples[kind]]
    rejected = sum(summary.rejected.values(), Counter())
    left_out = [(LEFT_OUT[reason], rejected[reason]) for reason in LEFT_OUT if rejected[reason]]
    left_out.append(("question that repeats another", summary.near_duplicates.total()))
    total = summary.samples.total()
    filters = "".join(f'<label><input type=checkbox checked data-filter="{k}"> {k}</label> ' for k in kinds)
    return Template(PAGE.read_text("utf-8")).substitute(
        title=f"{total:,} conversations by {html.escape(folder.config.model)}",
        intro=f"{len(articles):,} of {total:,} conversations about {summary.images:,} images. Mark what is bad, download the "
        "list, and run <code>llava data report RUN --drop drop.json</code> to make the data again without it.",
        balance=_bars([(kind, summary.samples[kind]) for kind in kinds]),
        rejections=_bars(left_out),
        filters=filters,
        cards="\n".join(articles),
        run=json.dumps(folder.id),
    )
