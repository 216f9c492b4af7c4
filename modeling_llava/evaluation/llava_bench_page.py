"""LLaVA-Bench as one HTML file: image, question, both answers, the judge's reviews. Nothing is loaded from other hosts."""

import base64
import html
import io
import os
from pathlib import Path

from PIL import Image

from ..data.images import load_image
from ..io.atomic import write_atomic


THUMBNAIL = 448  # pixels of the longer side

_STYLE = """
:root { color-scheme: light dark; --ink: #22252b; --quiet: #6b7280; --line: #e2e5ea; --card: #fff; --page: #f6f7f9;
  --own: #2f6f9f; --reference: #8a8f98; --bad: #b3403a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --quiet: #9aa1ad; --line: #343a44; --card: #1e222a;
  --page: #15181e; --own: #6fb0de; --reference: #9aa1ad; --bad: #e58a84; } }
* { box-sizing: border-box; } [hidden] { display: none !important; } small { white-space: nowrap; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } .quiet { color: var(--quiet); } .bad { color: var(--bad); }
table { border-collapse: collapse; margin: 1.25rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .9rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; } .published td { color: var(--quiet); }
nav { display: flex; gap: .5rem; flex-wrap: wrap; margin: 1.5rem 0 .5rem; }
nav button { font: inherit; border: 1px solid var(--line); background: var(--card); color: inherit; border-radius: 999px;
  padding: .25rem .9rem; cursor: pointer; } nav button[aria-pressed=true] { background: var(--own); color: #fff; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.25rem; margin: 1rem 0;
  display: grid; grid-template-columns: minmax(0, 15rem) minmax(0, 1fr); gap: 1.25rem; }
article img { width: 100%; border-radius: 8px; display: block; }
article h2 { font-size: 1.05rem; margin: 0 0 .75rem; } .answers { display: grid; gap: 1rem; grid-template-columns: 1fr 1fr; }
.answers section { border-top: 3px solid var(--reference); padding-top: .5rem; } .answers .own { border-color: var(--own); }
.answers h3 { margin: 0 0 .35rem; font-size: .85rem; display: flex; justify-content: space-between; color: var(--quiet); }
.answers p, details p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.answers p { max-height: 26rem; overflow-y: auto; }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--quiet); }
details p { margin-top: .5rem; padding-left: .9rem; border-left: 2px solid var(--line); }
@media (max-width: 46rem) { article, .answers { grid-template-columns: 1fr; } }
"""

_SCRIPT = """
for (const button of document.querySelectorAll("nav button")) button.onclick = () => {
  for (const other of document.querySelectorAll("nav button")) other.setAttribute("aria-pressed", other === button);
  for (const card of document.querySelectorAll("article"))
    card.hidden = button.value !== "all" && card.dataset.category !== button.value;
};
"""


def write_page(
    path: str | os.PathLike,
    results: dict,
    rows: list[dict],
    image_folder: str | os.PathLike,
    published: dict[str, dict[str, float]],
) -> None:
    """
    Writes the page of a LLaVA-Bench run.

    Args:
        path (`str` or `os.PathLike`): The HTML file.
        results (`dict`), rows (`list[dict]`): From [`read_results`].
        image_folder (`str` or `os.PathLike`): The images; thumbnails are embedded in the page.
        published (`dict`): Published scores, by row and score.
    """
    categories = [*dict.fromkeys(row["category"] for row in rows)]
    samples, judge = results["samples"], results["judge"]
    whole = (
        ""
        if results["complete"]
        else f"<p class=bad>{samples['scored']} of {samples['total']} questions are scored.</p>"
    )
    missing = {name: n for name, n in results["counts"].items() if n and name != "reviews"}
    buttons = "".join(
        f'<button value="{_escape(name)}" aria-pressed="{str(name == "all").lower()}">{_escape(name)}</button>'
        for name in ["all", *categories]
    )
    thumbnails: dict[str, str] = {}
    cards = []
    for row in rows:
        if row["image"] not in thumbnails:
            thumbnails[row["image"]] = thumbnail_of(load_image(row["image"], image_folder, Path(row["image"]).stem))
        cards.append(_card(row, thumbnails[row["image"]]))
    title = f"{results['benchmark']}: {results['model']['name']}"
    body = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{_escape(title)}</title>
<style>{_STYLE}</style><main>
<h1>{_escape(title)}</h1>
<p class=quiet>Judge: {_escape(judge["name"])} ({_escape(", ".join(judge["answered_by"]) or "no reply")}), {judge["date"]},
prompts {judge["prompt_hash"]}, {judge["repeats"]} × {"both orders" if judge["both_orders"] else "reference first"}.
Relative score: 100 · Σ own / Σ reference.</p>{whole}
{_table(results, published, categories)}
<p class=quiet>{_escape("; ".join(f"{name.replace('_', ' ')}: {n}" for name, n in missing.items()))}</p>
<nav>{buttons}</nav>
{"".join(cards)}
</main><script>{_SCRIPT}</script></html>
"""
    write_atomic(path, body)


def _table(results: dict, published: dict[str, dict[str, float]], categories: list[str]) -> str:
    columns = [*(f"relative/{name}" for name in categories), "relative"]
    heads = "".join(f"<th>{_escape(name)}</th>" for name in [*categories, "all"])
    cells = []
    for column in columns:
        score = results["scores"][column]
        value = "–" if score["value"] is None else f"{score['value']:.1f}"
        value += f" ± {score['repeat_std']:.1f}" if "repeat_std" in score else ""
        if score["interval"]:
            value += f"<br><small class=quiet>{score['interval'][0]:.1f} – {score['interval'][1]:.1f}</small>"
        cells.append(f"<td>{value}</td>")
    lines = [f"<tr><td><b>{_escape(results['model']['name'])}</b></td>{''.join(cells)}</tr>"]
    for name, values in published.items():
        published_cells = "".join(f"<td>{values[c]:.1f}</td>" if c in values else "<td></td>" for c in columns)
        lines.append(f"<tr class=published><td>{_escape(name)} (published)</td>{published_cells}</tr>")
    return f"<table><tr><th></th>{heads}</tr>{''.join(lines)}</table>"


def _card(row: dict, thumbnail: str) -> str:
    def points(value):
        return "<span class=bad>no score</span>" if value is None else f"<b>{value:.1f}</b>"

    reviews = "".join(
        f"<p><b>{_escape(review['order'])}, {review['repeat'] + 1}.</b> "
        f"{_escape(review['text'].strip()) if review['text'] else '<span class=bad>no reply</span>'}</p>"
        for review in row["reviews"]
    )
    return f"""<article data-category="{_escape(row["category"])}">
<div><img src="{thumbnail}" alt="" loading="lazy"><small class=quiet>{_escape(row["image"])}, {_escape(row["category"])}</small></div>
<div><h2>{_escape(row["question"])}</h2><div class=answers>
<section class=own><h3>this model {points(row["score"])}</h3><p>{_escape(row["answer"])}</p></section>
<section><h3>reference {points(row["out_of"])}</h3><p>{_escape(row["reference"] or "")}</p></section></div>
<details><summary>{len(row["reviews"])} review{"s" if len(row["reviews"]) != 1 else ""}</summary>{reviews}</details></div>
</article>
"""


def thumbnail_of(image: Image.Image) -> str:
    """A small JPEG of an image as a `data:` URL; the image is not changed."""
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _escape(text: str) -> str:
    return html.escape(str(text))


__all__ = ["thumbnail_of", "write_page"]
