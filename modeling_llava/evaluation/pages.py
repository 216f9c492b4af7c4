"""Pages of answers to skim, one HTML file each: images are embedded, and nothing is loaded from other hosts."""

import functools
import os
from collections.abc import Sequence
from html import escape

from ..data.schema import load_image
from ..data_engine.report import data_url
from ..io.files import write_atomic
from .report import Run, compare, markdown


THUMBNAIL = 448  # pixels of the longer side

_STYLE = """
:root { color-scheme: light dark; }
body { max-width: 64rem; margin: 0 auto; padding: 2rem 1rem; font: 15px/1.5 system-ui, sans-serif; }
article { display: grid; grid-template-columns: minmax(0, 15rem) minmax(0, 1fr); gap: 1.25rem; padding: 1.25rem 0;
  border-top: 1px solid #8884; }
img { max-width: 100%; border-radius: 8px; } p { margin: 0 0 .75rem; white-space: pre-wrap; overflow-wrap: anywhere; }
p b { display: block; font-size: .8rem; opacity: .65; } pre { overflow-x: auto; } summary { cursor: pointer; }
"""


def write_bench_page(
    path: str | os.PathLike, results: dict, rows: list[dict], image_folder: str, follow_symlinks: bool = False
) -> None:
    """Writes a run of LLaVA-Bench: its table, then by category each image, question, both answers and the judge's reviews."""
    judge, name = results["judge"], results["model"]["name"]
    order = "both orders" if judge["both_orders"] else "reference first"
    parts = [
        f"<p>Judge: {escape(judge['name'])} ({escape(', '.join(judge['answered_by']) or 'no reply')}), {judge['date']}, "
        f"prompts {judge['prompt_hash']}, {judge['repeats']} × {order}. Relative score: 100 · Σ own / Σ reference.</p>",
        f"<pre>{escape(markdown(compare([Run(name, results, [])])))}</pre>",
    ]

    @functools.cache
    def thumbnail(image: str) -> str:
        return data_url(load_image(image, image_folder, image, follow_symlinks=follow_symlinks), THUMBNAIL)

    for category in dict.fromkeys(row["category"] for row in rows):
        parts.append(f"<h2>{escape(category)}</h2>")
        for row in (row for row in rows if row["category"] == category):
            texts = {
                "question": row["question"],
                f"this model: {_points(row['score'])}": row["answer"],
                f"reference: {_points(row['out_of'])}": row["reference"] or "",
            }
            reviews = "".join(
                _text(f"{review['order']}, {review['repeat'] + 1}", review["text"] or "no reply")
                for review in row["reviews"]
            )
            more = f"<details><summary>reviews</summary>{reviews}</details>"
            parts.append(_card(row["id"], [thumbnail(row["image"])], texts, more))
    _write(path, f"{results['benchmark']}: {name}", parts)


def write_sample_page(
    path: str | os.PathLike, title: str, samples: Sequence[dict], rows: Sequence[tuple[str, str, str]]
) -> None:
    """Writes conversations (`samples`) with their first question, its reference and a model's answer (`rows`)."""
    cards = []
    for sample, (question, reference, answer) in zip(samples, rows):
        sample_id, texts = str(sample["id"]), {"question": question, "answer": answer, "reference": reference}
        images = [data_url(load_image(image, None, sample_id), THUMBNAIL) for image in sample["images"]]
        cards.append(_card(sample_id, images, texts))
    _write(path, title, cards)


def _write(path: str | os.PathLike, title: str, parts: Sequence[str]) -> None:
    write_atomic(
        path,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>{''.join(parts)}</html>\n",
    )


def _card(card_id: str, images: Sequence[str], texts: dict[str, str], more: str = "") -> str:
    shown = "".join(f'<img alt="" loading="lazy" src="{image}">' for image in images)
    lines = "".join(_text(name, text) for name, text in texts.items())
    return f'<article id="{escape(card_id)}"><div>{shown}</div><div>{lines}{more}</div></article>'


def _text(name: str, text: str) -> str:
    return f"<p><b>{escape(name)}</b>{escape(text.strip())}</p>"


def _points(score: float | None) -> str:
    return "no score" if score is None else f"{score:.1f}"
