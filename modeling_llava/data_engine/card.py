"""The card of a data set: what it is, how it was made, what it cost, what was left out."""

from collections.abc import Iterable
from typing import Any

from ..endpoint import BATCH_PRICE, REFUSED, Ledger
from ..io.files import write_atomic
from .contexts import REASONS as CONTEXT_REASONS
from .plots import plot_lengths
from .replies import LEFT_OUT
from .run import RunFolder, write_json
from .samples import OutputSummary


def write_card(folder: RunFolder, ledger: Ledger, summary: OutputSummary, limit: int | None = None) -> None:
    """Writes `summary.json`, and `README.md` with a plot into the `datasets` folder, or the run's folder without one."""
    target = folder.path / "dataset" if summary.fingerprint else folder.path
    plot = ""
    try:
        plot_lengths(summary.answer_words, target / "lengths.png")
        plot = "## What is in it\n\n![Length of answers](lengths.png)\n\n"
    except ImportError as error:
        summary.notes.append(f"The card has no plot. {error}")
    figures = collect_figures(folder, ledger, summary, limit)
    write_json(folder.path / "summary.json", figures)
    write_atomic(target / "README.md", render_card(figures, plot, summary.fingerprint))
    summary.files += [target / "README.md", folder.path / "summary.json"]


def collect_figures(
    folder: RunFolder, ledger: Ledger, summary: OutputSummary, limit: int | None = None
) -> dict[str, Any]:
    """All figures about a run and its data, as plain values."""
    counts, about, cost = ledger.counts, folder.about, None
    boxes = {row["id"]: len(row["boxes"]) for task, row, _ in folder.plan(limit) if task in ledger.tasks}
    if prices := about.get("prices"):
        weights = ((counts.used, 1.0), (counts.used_in_batch, BATCH_PRICE), (counts.perhaps_used, 1.0))
        cost = sum(f * (tokens[0] * prices[0] + tokens[1] * prices[1]) for tokens, f in weights) / 1e6
    output = {key: value for key, value in vars(summary).items() if key not in ("files", "notes", "fingerprint")}
    return {
        **vars(counts),
        **output,
        "models": sorted(filter(None, counts.models)),
        "answer_words": {
            kind: round(sum(words * n for words, n in histogram.items()) / histogram.total(), 1)
            for kind, histogram in summary.answer_words.items()
        },
        "settings": about["settings"],
        "contexts": {key: value for key, value in about["contexts"].items() if key != "sources"},
        "contexts_asked": len(boxes),
        "boxes_asked": sum(boxes.values()),
        "cost_dollars": round(cost, 6) if cost is not None else None,
        "prices": prices,
    }


def table(header: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """A markdown table; numbers get thousands separators."""

    def cell(value: Any) -> str:
        return f"{value:,}" if isinstance(value, (int, float)) else str(value).replace("|", "\\|").replace("\n", " ")

    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def render_card(figures: dict[str, Any], plot: str, fingerprint: str) -> str:
    """The card's text from `collect_figures`."""
    settings, contexts, samples, rejected = (figures[key] for key in ("settings", "contexts", "samples", "rejected"))
    kinds, total = settings["types"], sum(samples.values())
    made = [
        [kind, samples[kind], f"{samples[kind] / total:.1%}", figures["turns"][kind], figures["answer_words"][kind]]
        for kind in kinds
        if kind in samples
    ]
    how = [
        ["model", f"`{settings['model']}`"],
        ["answered as", ", ".join(figures["models"]) or "–"],
        ["prompts (hash)", f"`{settings['prompts']}`"],
        ["mix asked for, conversation : detail : complex", " : ".join(f"{number:g}" for number in settings["mix"])],
        ["temperature", "the endpoint's" if settings["temperature"] is None else settings["temperature"]],
        ["maximum length of a reply (tokens)", settings["max_reply_tokens"]],
        ["seed", f"{settings['seed']}"],
        ["contexts asked about", figures["contexts_asked"]],
        ["their boxes", figures["boxes_asked"]],
        ["contexts in the captions and boxes given", contexts["number"]],
        *([CONTEXT_REASONS[reason], number] for reason, number in sorted(contexts["dropped"].items())),
        ["box cut at the image's edge", contexts["clipped"]],
    ]
    prompt, reply = (sum(pair) for pair in zip(figures["used"], figures["used_in_batch"]))
    spent = [["prompt tokens", prompt], ["reply tokens", reply]]
    if perhaps := sum(figures["perhaps_used"]):
        spent.append(["tokens that may have been billed without a reply (estimate)", perhaps])
    if figures["prices"]:
        price = f"${figures['prices'][0]:g} and ${figures['prices'][1]:g} per million tokens"
        spent.append([f"cost at {price}", f"${figures['cost_dollars']:,.4f}"])
    reasons = [
        [LEFT_OUT[reason], *(rejected.get(kind, {}).get(reason, 0) for kind in kinds)]
        for reason in LEFT_OUT
        if any(reason in counts for counts in rejected.values())
    ]
    reasons.append(["question that repeats another", *(figures["near_duplicates"].get(kind, 0) for kind in kinds)])
    is_refused = any(REFUSED in counts for counts in rejected.values())
    refused = " What the endpoint refused to answer is there too." if is_refused else ""
    use = 'import json\n\ndata = json.load(open("instruct.json", encoding="utf-8"))\nprint(data[0]["conversations"])'
    configs = ""
    if fingerprint:
        use = 'from datasets import load_dataset\n\ndata = load_dataset("PATH OR REPOSITORY", split="train")\n'
        use += 'print(data[0]["messages"])'
        configs = "configs:\n- config_name: default\n  data_files:\n  - split: train\n"
        configs += f"    path: data/train-*-{fingerprint}.parquet\n"
    language = f"language:\n- {settings['language']}\n" if settings["language"] else ""
    return f"""---
{configs}{language}task_categories:
- image-text-to-text
tags:
- llava
- visual-instruction-tuning
- synthetic
---

# Visual instruction data from captions and boxes

{total:,} conversations about {figures["images"]:,} images, written by the language model `{settings["model"]}`, which saw no image \
but its captions and boxes (LLaVA, [Visual Instruction Tuning](https://arxiv.org/abs/2304.08485), §3). Made with \
`llava data generate` of modeling-llava.

{table(["type", "conversations", "share", "questions", "words per answer"], made)}

## Use

```python
{use}
```

## How it was made

{table(["", ""], how)}

### Tokens and cost

{table(["", ""], spent)}

### Rejected

Every rejected reply was asked for once more with the reason; both are kept in `rejected.jsonl`.{refused}

{table(["reason", *kinds], reasons)}

{figures["emptied"]:,} conversations had no question left, {figures["dropped"]:,} were dropped by hand, \
{figures["missing_images"]:,} had no image.

{plot}## Limits

The model that wrote this saw captions and boxes, not images: it can be wrong about what neither names, and it repeats the \
errors of both. The licences of the images and captions and the terms of the model apply.
"""
