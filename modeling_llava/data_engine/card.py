"""The card of a data set: what it is, how it came about, what it cost, what was left out."""

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..endpoint import BATCH_PRICE, REFUSED, Ledger
from ..io.atomic import write_atomic
from .contexts import REASONS as CONTEXT_REASONS
from .noun_phrases import DEFAULT_MODEL, load_spacy
from .plots import plot_lengths, plot_verbs
from .replies import LEFT_OUT
from .run import RunFolder, write_json
from .samples import OutputSettings, OutputSummary, kept_samples


QUESTIONS_LOOKED_AT = 5000
FAULTS = {
    "429": "limit of the endpoint",
    "connection": "connection refused or cut",
    "malformed": "reply that is not a chat completion",
    "timeout": "timed out",
}


def count_verbs(questions: Iterable[str], model: str = DEFAULT_MODEL) -> Counter:
    """(first verb, first noun after it) → questions, as lemmas; without auxiliaries and "be".

    Raises:
        ImportError: spaCy or its model is absent.
    """
    nlp = load_spacy(model)
    pairs: Counter = Counter()
    for doc in nlp.pipe(questions, batch_size=256, disable=["ner"]):
        verb = next((token for token in doc if token.pos_ == "VERB"), None)
        if verb is not None:
            noun = next((token.lemma_.lower() for token in doc[verb.i + 1 :] if token.pos_ == "NOUN"), "")
            pairs[verb.lemma_.lower(), noun] += 1
    return pairs


def write_card(
    folder: RunFolder, ledger: Ledger, settings: OutputSettings, summary: OutputSummary, limit: int | None = None
) -> Path:
    """Writes `README.md` and its plots into the `datasets` folder, or into the run's folder where there is none.

    A plot whose library is absent is left out with a note.
    """
    target = folder.path / "dataset" if summary.fingerprint else folder.path
    plots = {}
    try:
        plot_lengths(summary.answer_words, target / "lengths.png")
        plots["Length of answers"] = "lengths.png"
        questions = [
            question
            for sample in kept_samples(folder, ledger, settings, OutputSummary(), limit=limit)
            if sample.type != "detail"
            for question, _ in sample.turns
        ]
        if len(questions) > QUESTIONS_LOOKED_AT:
            questions = random.Random(0).sample(questions, QUESTIONS_LOOKED_AT)
        pairs = count_verbs(questions)
        if pairs:
            plot_verbs(pairs, target / "questions.png")
            plots["Questions by first verb and noun"] = "questions.png"
    except ImportError as error:
        summary.notes.append(f"The card lacks plots. {error}")
    about = collect_figures(folder, ledger, summary, limit)
    write_json(folder.path / "summary.json", about)
    write_atomic(target / "README.md", render_card(about, plots, summary.fingerprint))
    summary.files += [target / "README.md", folder.path / "summary.json"]
    return target / "README.md"


def collect_figures(
    folder: RunFolder, ledger: Ledger, summary: OutputSummary, limit: int | None = None
) -> dict[str, Any]:
    """All figures about a run and its data, as plain values."""
    counts = ledger.counts
    asked: dict[str, int] = {}  # context → its boxes; a run with a limit takes the first of them
    for task_id, context, _ in folder.plan(limit):
        if task_id in ledger.tasks:
            asked[context.id] = len(context.row["boxes"])
    prices = folder.about.get("prices")
    cost = None
    if prices:
        weights = ((counts.used, 1.0), (counts.used_in_batch, BATCH_PRICE), (counts.perhaps_used, 1.0))
        cost = sum(f * (tokens[0] * prices[0] + tokens[1] * prices[1]) for tokens, f in weights) / 1e6
    return {
        "model": folder.config.model,
        "answered_as": sorted(name for name in counts.models if name),
        "settings": folder.about["settings"],
        "contexts": {key: value for key, value in folder.about["contexts"].items() if key != "sources"},
        "contexts_asked": len(asked),
        "boxes_asked": sum(asked.values()),
        "samples": dict(summary.samples),
        "turns": dict(summary.turns),
        "images": summary.images,
        "answer_words": {
            kind: round(sum(words * n for words, n in histogram.items()) / histogram.total(), 1)
            for kind, histogram in summary.answer_words.items()
        },
        "rejected": {kind: dict(reasons) for kind, reasons in summary.rejected.items()},
        "near_duplicates": dict(summary.near_duplicates),
        "emptied": summary.emptied,
        "dropped_by_hand": summary.dropped,
        "missing_images": summary.missing_images,
        "requests": counts.requests,
        "replies": counts.replies,
        "faults": dict(counts.faults),
        "maybe_paid_faults": counts.maybe_paid,
        "unknown_requests": counts.unknown,
        "torn_lines": counts.torn,
        "tokens": {
            "prompt": counts.used[0] + counts.used_in_batch[0],
            "completion": counts.used[1] + counts.used_in_batch[1],
            "in_batch": sum(counts.used_in_batch),
            "perhaps": sum(counts.perhaps_used),
        },
        "replies_without_usage": counts.missing_usage,
        "cost_dollars": round(cost, 6) if cost is not None else None,
        "prices": prices,
    }


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A markdown table; numbers get thousands separators."""

    def cell(value: Any) -> str:
        return f"{value:,}" if isinstance(value, (int, float)) else str(value).replace("|", "\\|").replace("\n", " ")

    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def render_card(about: dict[str, Any], plots: dict[str, str], fingerprint: str) -> str:
    """The card's text."""
    settings, contexts, samples = about["settings"], about["contexts"], about["samples"]
    total = sum(samples.values())
    size = next((name for most, name in SIZES if total < most), "n>1T")
    front = ["---"]
    if fingerprint:
        front += ["configs:", "- config_name: default", "  data_files:", "  - split: train"]
        front += [f"    path: data/train-*-{fingerprint}.parquet"]
    if settings["language"]:
        front += ["language:", f"- {settings['language']}"]
    front += ["task_categories:", "- image-text-to-text", "tags:", "- llava", "- visual-instruction-tuning"]
    front += ["- synthetic", "size_categories:", f"- {size}", "---"]
    types = [
        [kind, samples[kind], f"{samples[kind] / total:.1%}", about["turns"][kind], about["answer_words"][kind]]
        for kind in settings["types"]
        if kind in samples
    ]
    kinds = settings["types"]
    reasons = [
        [LEFT_OUT[reason], *[about["rejected"].get(kind, {}).get(reason, 0) for kind in kinds]]
        for reason in LEFT_OUT
        if any(about["rejected"].get(kind, {}).get(reason) for kind in kinds)
    ]
    reasons.append(["question that repeats another", *[about["near_duplicates"].get(kind, 0) for kind in kinds]])
    refused = any(REFUSED in counts for counts in about["rejected"].values())
    mix = " : ".join(f"{number:g}" for number in settings["mix"])
    tokens = about["tokens"]
    spent = [["prompt tokens", tokens["prompt"]], ["reply tokens", tokens["completion"]]]
    if tokens["perhaps"]:
        spent.append(["tokens that may have been billed without a reply (estimate)", tokens["perhaps"]])
    if about["cost_dollars"] is not None:
        price = f"${about['prices'][0]:g} and ${about['prices'][1]:g} per million tokens"
        spent.append([f"cost at {price}", f"${about['cost_dollars']:,.4f}"])
    happened = [["requests sent", about["requests"]], ["replies", about["replies"]]]
    happened += [[FAULTS.get(kind, f"fault {kind}"), number] for kind, number in sorted(about["faults"].items())]
    happened.append(["in flight when a run was killed", about["unknown_requests"]])
    left_out = [[CONTEXT_REASONS[reason], number] for reason, number in sorted(contexts["dropped"].items())]
    left_out += [["box cut at the image's edge", contexts["clipped"]]]
    answered = ", ".join(about["answered_as"]) or "–"
    use = (
        'from datasets import load_dataset\n\ndata = load_dataset("PATH OR REPOSITORY", split="train")\n'
        'print(data[0]["messages"])'
        if fingerprint
        else 'import json\n\ndata = json.load(open("instruct.json", encoding="utf-8"))\nprint(data[0]["conversations"])'
    )
    figures = "\n\n".join(f"![{title}]({name})" for title, name in plots.items())
    return "\n".join(
        [
            *front,
            "",
            "# Visual instruction data from captions and boxes",
            "",
            f"{total:,} conversations about {about['images']:,} images, written by the language model `{settings['model']}`, "
            "which saw no image but its captions and boxes (LLaVA, [Visual Instruction Tuning]"
            "(https://arxiv.org/abs/2304.08485), §3). Made with `llava data generate` of modeling-llava.",
            "",
            table(["type", "conversations", "share", "questions", "words per answer"], types),
            "",
            "## Use",
            "",
            f"```python\n{use}\n```",
            "",
            "## How it was made",
            "",
            table(
                ["", ""],
                [
                    ["model", f"`{settings['model']}`"],
                    ["answered as", answered],
                    ["prompts (hash)", f"`{settings['prompts']}`"],
                    ["mix asked for, conversation : detail : complex", mix],
                    [
                        "temperature",
                        settings["temperature"] if settings["temperature"] is not None else "the endpoint's",
                    ],
                    ["longest reply (tokens)", settings["max_reply_tokens"]],
                    ["seed", f"{settings['seed']}"],
                    ["contexts asked about", about["contexts_asked"]],
                    ["boxes of these", about["boxes_asked"]],
                    ["contexts in the captions and boxes given", contexts["number"]],
                    *left_out,
                ],
            ),
            "",
            "### Tokens and cost",
            "",
            table(["", ""], spent),
            "",
            "### What happened on the way",
            "",
            table(["", ""], happened),
            "",
            "### Rejected",
            "",
            "Every rejected reply was asked for once more with the reason; both are kept in `rejected.jsonl`."
            + (" What the endpoint refused to answer is there too." if refused else ""),
            "",
            table(["reason", *kinds], reasons),
            "",
            f"{about['emptied']:,} conversations had no question left, {about['dropped_by_hand']:,} were dropped by hand, "
            f"{about['missing_images']:,} had no image.",
            "",
            *(["## What is in it", "", figures, ""] if plots else []),
            "## Limits",
            "",
            "The model that wrote this saw captions and boxes, not images: it can be wrong about what neither names, and it "
            "repeats the errors of both. The licences of the images and captions and the terms of the model apply.",
            "",
        ]
    )


SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10**7, "1M<n<10M"))
