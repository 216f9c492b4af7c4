"""One HTML page of samples with their images, to skim and to mark what is to be dropped. No server, no other file."""

import base64
import html
import io
import json
import logging
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..endpoint import Ledger
from ..io.atomic import write_atomic
from .replies import LEFT_OUT
from .run import RunFolder
from .samples import OutputSettings, OutputSummary, Sample, find_image, kept_samples


logger = logging.getLogger(__name__)

THUMBNAIL = 320
"""Longest side of a image in the report, in pixels."""


def choose_samples(samples: list[tuple[str, str]], number: int, seed: int = 0) -> set[str]:
    """Ids of `number` samples, as evenly over the types as there are samples."""
    rng = random.Random(seed)
    by_type: dict[str, list[str]] = {}
    for name, kind in samples:
        by_type.setdefault(kind, []).append(name)
    chosen: set[str] = set()
    # The smallest type first, so that what it cannot fill goes to the others.
    order = sorted(by_type, key=lambda kind: (len(by_type[kind]), kind))
    for i, kind in enumerate(order):
        share = (number - len(chosen)) // (len(order) - i)
        chosen.update(rng.sample(by_type[kind], min(share, len(by_type[kind]))))
    return chosen


def write_report(
    folder: RunFolder,
    ledger: Ledger,
    settings: OutputSettings,
    summary: OutputSummary,
    images: Path | None,
    limit: int | None = None,
) -> Path:
    """Writes `report.html` into the run's folder."""

    def all_samples() -> Any:
        return kept_samples(folder, ledger, settings, OutputSummary(), limit=limit)

    chosen = choose_samples([(sample.id, sample.type) for sample in all_samples()], settings.report_samples)
    source_of = lru_cache(maxsize=1)(thumbnail)  # the samples of an image come one after the other
    cards = [_card(sample, source_of(images, sample.context.image)) for sample in all_samples() if sample.id in chosen]
    path = folder.path / "report.html"
    write_atomic(path, _page(folder, summary, cards))
    summary.files.append(path)
    return path


def read_drop_list(path: str | Path) -> frozenset[str]:
    """The ids in a list that was downloaded from the report.

    Raises:
        ValueError: the file is not such a list.
        OSError: it is absent.
    """
    try:
        dropped = json.loads(Path(path).read_text("utf-8"))
        names = dropped["drop"] if isinstance(dropped, dict) else dropped
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path} is not a drop list: {{"drop": ["id", …]}}, as the report downloads it.') from None
    return frozenset(names)


def thumbnail(images: Path | None, name: str) -> str:
    """A image as the value of `src`; empty where there is none or it cannot be read."""
    path = find_image(images, name) if images is not None else None
    if path is None:
        return ""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))  # JPEG: decodes no larger than needed
            small = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as PIL's readers put it
        logger.warning("The report lacks the image %s: %s", path, error)
        return ""
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _card(sample: Sample, source: str) -> str:
    name, kind = html.escape(sample.id, quote=True), html.escape(sample.type)
    image = f'<img src="{source}" alt="">' if source else f"<p class=none>{html.escape(sample.context.image)}</p>"
    turns = "".join(
        f"<p class=q>{html.escape(question)}</p><p class=a>{html.escape(answer)}</p>"
        for question, answer in sample.turns
    )
    context = html.escape(
        sample.context.caption_text + ("\n\n" + sample.context.box_text if sample.context.boxes else "")
    )
    return (
        f'<article data-id="{name}" data-type="{kind}"><header><b class="{kind}">{kind}</b> <code>{name}</code>'
        f"<label><input type=checkbox> drop</label></header><div class=body><div class=left>{image}"
        f"<details><summary>the context of the model</summary><pre>{context}</pre></details></div>"
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


def _page(folder: RunFolder, summary: OutputSummary, cards: list[str]) -> str:
    kinds = [kind for kind in folder.config.types if summary.samples[kind]]
    rejected: dict[str, int] = {}
    for reasons in summary.rejected.values():
        for reason, number in reasons.items():
            rejected[reason] = rejected.get(reason, 0) + number
    left_out = [(LEFT_OUT[reason], rejected[reason]) for reason in LEFT_OUT if reason in rejected]
    left_out.append(("question that repeats another", summary.near_duplicates.total()))
    total = summary.samples.total()
    filters = "".join(f'<label><input type=checkbox checked data-filter="{k}"> {k}</label> ' for k in kinds)
    return PAGE.format(
        title=f"{total:,} conversations by {html.escape(folder.config.model)}",
        intro=f"{len(cards):,} of {total:,} conversations about {summary.images:,} images. Mark what is bad, download the "
        "list, and run <code>llava data report RUN --drop drop.json</code> to make the data again without it.",
        balance=_bars([(kind, summary.samples[kind]) for kind in kinds]),
        rejections=_bars(left_out),
        filters=filters,
        cards="\n".join(cards),
        run=json.dumps(folder.id),
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 0 16px 80px; color: #222 }}
nav {{ position: sticky; top: 0; background: #fffd; padding: 8px 0; border-bottom: 1px solid #ddd; z-index: 1 }}
nav button {{ float: right }} label {{ cursor: pointer }}
table {{ border-spacing: 8px 2px; display: inline-block; vertical-align: top; margin-right: 32px }}
.n {{ text-align: right }} td i {{ display: block; height: 10px; background: #4477aa }}
article {{ border: 1px solid #ddd; border-radius: 6px; margin: 14px 0; overflow: hidden }}
article.dropped {{ opacity: .45; background: #fdd }}
header {{ background: #f5f5f5; padding: 4px 10px }} header label {{ float: right; padding: 0 10px }}
header b {{ color: #fff; background: #777; border-radius: 4px; padding: 1px 7px; font-size: 12px }}
header b.conversation {{ background: #4477aa }} header b.detail {{ background: #998822 }} header b.complex {{ background: #aa3377 }}
.body {{ display: flex; gap: 16px; padding: 10px }} .left {{ flex: 0 0 320px }} .turns {{ flex: 1; min-width: 0 }}
img {{ max-width: 100%; border-radius: 4px }} pre {{ white-space: pre-wrap; font-size: 12px }} .none {{ color: #999 }}
.q {{ font-weight: 600; margin: 8px 0 2px }} .a {{ margin: 0 0 8px; white-space: pre-wrap }}
@media (max-width: 700px) {{ .body {{ display: block }} }}
</style></head><body>
<h1>{title}</h1><p>{intro}</p>
<table><caption>Balance of types</caption>{balance}</table><table><caption>Left out</caption>{rejections}</table>
<nav>{filters}<button id="save">Download drop list (<span id="count">0</span>)</button></nav>
<main>
{cards}
</main>
<script>
const key = "llava-drop-" + {run}, articles = [...document.querySelectorAll("article")];
let dropped = new Set();
try {{ dropped = new Set(JSON.parse(localStorage.getItem(key) || "[]")); }} catch (error) {{ console.warn(error); }}
const show = () => {{
  for (const a of articles) {{
    const on = dropped.has(a.dataset.id);
    a.classList.toggle("dropped", on);
    a.querySelector("header input").checked = on;
  }}
  document.getElementById("count").textContent = dropped.size;
  try {{ localStorage.setItem(key, JSON.stringify([...dropped])); }} catch (error) {{ console.warn(error); }}
}};
for (const a of articles) a.querySelector("header input").addEventListener("change", event => {{
  event.target.checked ? dropped.add(a.dataset.id) : dropped.delete(a.dataset.id);
  show();
}});
for (const box of document.querySelectorAll("[data-filter]")) box.addEventListener("change", () => {{
  const types = new Set([...document.querySelectorAll("[data-filter]:checked")].map(b => b.dataset.filter));
  for (const a of articles) a.hidden = !types.has(a.dataset.type);
}});
document.getElementById("save").addEventListener("click", () => {{
  const link = document.createElement("a");
  const list = JSON.stringify({{run: {run}, drop: [...dropped].sort()}}, null, 1);
  link.href = URL.createObjectURL(new Blob([list], {{type: "application/json"}}));
  link.download = "drop.json";
  link.click();
  URL.revokeObjectURL(link.href);
}});
show();
</script></body></html>
"""
