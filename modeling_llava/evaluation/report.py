"""Compares runs: one table per benchmark, paired differences with their intervals, a plot."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data_engine.plots import new_figure, save_figure
from .llava_bench import LLAVA_BENCH_COCO, LLAVA_BENCH_COLUMNS, LLAVA_BENCH_WILD
from .results import RESULTS_NAME, fingerprint, paired_difference, read_results
from .scienceqa import SCIENCEQA, SCIENCEQA_COLUMNS


COLOURS = ("#2f6f9f", "#d9822b", "#4f9d69", "#8b6bb1", "#c1554e", "#5d7b8a")
PUBLISHED = {
    "scienceqa": ("accuracy", SCIENCEQA_COLUMNS, SCIENCEQA),
    "llava-bench-coco": ("relative", LLAVA_BENCH_COLUMNS, LLAVA_BENCH_COCO),
    "llava-bench-in-the-wild": ("relative", LLAVA_BENCH_COLUMNS, LLAVA_BENCH_WILD),
}
PUBLISHED_COLOUR = "#b9c0c9"


@dataclass(frozen=True)
class Run:
    """One evaluated run, as in its folder."""

    label: str  # its name in tables
    results: dict
    rows: list[dict]

    @property
    def note(self) -> str:
        """How many samples are scored, unless all are."""
        samples = self.results["samples"]
        return "" if self.results["complete"] else f"{samples['scored']} of {samples['total']} samples scored"


def read_runs(paths: Sequence[str | os.PathLike], labels: Sequence[str] | None = None) -> list[Run]:
    """Reads runs. Labels are the folders' names by default, with their parents' where two are the same."""
    folders = [Path(path).resolve() for path in paths]
    folders = [folder.parent if folder.suffix == ".json" else folder for folder in folders]
    if labels is None:
        labels = [folder.name for folder in folders]
        if len(set(labels)) < len(labels):
            labels = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    if len(labels) != len(folders) or len(set(labels)) != len(labels):
        raise ValueError(f"--labels must be {len(folders)} different names, got {', '.join(labels)}.")
    return [Run(label, *read_results(path)) for label, path in zip(labels, paths)]


def compare(runs: Sequence[Run]) -> list[dict]:
    """
    One comparison per benchmark, in the runs' order. Its `differences` are each later run against the first one, over the
    samples that both have scored ([`paired_difference`]).
    """
    by_benchmark: dict[str, list[Run]] = {}
    for run in runs:
        by_benchmark.setdefault(run.results["benchmark"], []).append(run)
    return [
        {
            "benchmark": benchmark,
            "primary_score": group[0].results["primary_score"],
            "columns": list(dict.fromkeys(name for run in group for name in run.results["scores"])),
            "runs": [
                {
                    "label": run.label,
                    "model": run.results["model"],
                    "scores": run.results["scores"],
                    "note": run.note,
                    "counts": {name: n for name, n in run.results.get("counts", {}).items() if n},
                }
                for run in group
            ],
            "differences": [_difference(group[0], run) for run in group[1:]],
        }
        for benchmark, group in by_benchmark.items()
    ]


def _difference(first: Run, second: Run) -> dict:
    """Of the primary score, over the samples that both have: the same id, and the same question where both have one."""
    scored = {row["id"]: row for row in first.rows if row["score"] is not None}
    pairs = []
    for row in second.rows:
        other = scored.get(row["id"])
        if row["score"] is None or other is None:
            continue
        if "question" in row and row["question"] != other.get("question", row["question"]):
            continue  # another dataset that counts from 1 too
        pairs.append([(one["score"], one.get("out_of", 1.0)) for one in (other, row)])
    difference = {"from": first.label, "to": second.label, "samples": len(pairs)}
    if not pairs:
        return {**difference, "difference": None, "note": "no sample in common"}
    notes = []
    if first.results["data"] != second.results["data"]:
        notes.append("the data differ; compared over the samples that both have")
    judges = [run.results.get("judge", {}) for run in (first, second)]
    if len({(judge.get("prompt_hash"), *judge.get("answered_by", ())) for judge in judges}) > 1:
        notes.append("the judges differ")
    found = paired_difference([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    return {**difference, **found, "note": "; ".join(notes)}


def published_for(benchmark: str) -> dict[str, dict[str, float]]:
    """Published rows of a benchmark, by score; empty for benchmarks without."""
    primary, columns, table = PUBLISHED.get(benchmark, ("", (), {}))
    names = [primary if column in ("all", "average") else f"{primary}/{column}" for column in columns]
    return {row: dict(zip(names, values)) for row, values in table.items()}


def markdown(comparisons: Sequence[dict]) -> str:
    """The comparisons as Markdown: a table each, published rows in italics, then the differences."""
    parts = []
    for comparison in comparisons:
        columns, primary = comparison["columns"], comparison["primary_score"]
        titles = " | ".join(_title(name, primary) for name in columns)
        lines = [f"## {comparison['benchmark']}", "", f"| run | {titles} |", f"|---|{'---:|' * len(columns)}"]
        for run in comparison["runs"]:
            cells = [_cell(run["scores"].get(name)) for name in columns]
            lines.append(f"| {run['label']} | {' | '.join(cells)} |")
        for row, values in published_for(comparison["benchmark"]).items():
            cells = [f"*{values[name]:.2f}*" if name in values else "" for name in columns]
            lines.append(f"| *{row} (published)* | {' | '.join(cells)} |")
        lines.append("")
        for run in comparison["runs"]:
            remarks = [run["note"]] if run["note"] else []
            remarks += [f"{name.replace('_', ' ')}: {number}" for name, number in run["counts"].items()]
            if remarks:
                lines.append(f"- {run['label']}: {'; '.join(remarks)}")
        for difference in comparison["differences"]:
            lines.append(f"- {_sentence(difference)}")
        parts.append("\n".join(lines).rstrip() + "\n")
    return "\n".join(parts)


def _title(name: str, primary: str) -> str:
    """`accuracy/NAT` → `NAT` where accuracy is the primary score."""
    family, _, group = name.partition("/")
    return group if group and family == primary else name.replace("_", " ")


def _cell(score: dict | None) -> str:
    if score is None or score["value"] is None:
        return ""
    spread = f" ± {score['repeat_std']:.1f}" if "repeat_std" in score else ""
    if score.get("interval"):
        low, high = score["interval"]
        return f"{score['value']:.2f}{spread} ({low:.1f}–{high:.1f})"
    return f"{score['value']:.2f}{spread}"


def _sentence(difference: dict) -> str:
    start = f"{difference['to']} less {difference['from']}: "
    note = f" ({difference['note']})" if difference["note"] else ""
    if difference["difference"] is None:
        return f"{start}not comparable{note}"
    low, high = difference["interval"]
    sure = "the interval excludes 0" if low > 0 or high < 0 else "the interval includes 0"
    return (
        f"{start}{difference['difference']:+.2f} points (95 % interval {low:+.2f} to {high:+.2f}, p = "
        f"{difference['p_value']:.3g}, {difference['samples']} samples; {sure}){note}"
    )


def plot(comparison: dict, path: str | os.PathLike, published: Sequence[str] = ()) -> None:
    """A comparison as bars in a PNG, by group if the benchmark has groups, with these published rows in grey."""
    primary, runs = comparison["primary_score"], comparison["runs"]
    columns = [name for name in comparison["columns"] if name.partition("/")[0] == primary]
    if len(columns) == 1:
        columns = comparison["columns"]
    rows = published_for(comparison["benchmark"])
    series = [
        (f"{name} (published)", PUBLISHED_COLOUR, [{"value": rows[name].get(column)} for column in columns])
        for name in published
        if name in rows
    ]
    for number, run in enumerate(runs):
        scores = [run["scores"].get(column) or {"value": None} for column in columns]
        series.append((run["label"], COLOURS[number % len(COLOURS)], scores))
    counts = ", ".join(sorted({str(run["scores"][primary]["count"]) for run in runs}))
    note = "; ".join(f"{run['label']}: {run['note']}" for run in runs if run["note"]) or f"{counts} samples"

    inches, width = 0.3 * len(columns) * len(series) + 2, min(0.8 / len(series), 0.34)
    figure = new_figure(min(max(6.4, inches), 16), 4.4, layout="constrained")
    axes = figure.add_subplot()
    for number, (label, colour, scores) in enumerate(series):
        drawn = [(column, score) for column, score in enumerate(scores) if score["value"] is not None]
        values = [score["value"] for _, score in drawn]
        bounds = [score.get("interval") or [score["value"]] * 2 for _, score in drawn]
        # a bootstrap interval need not contain the value itself
        below = [max(0.0, value - low) for value, (low, _) in zip(values, bounds)]
        above = [max(0.0, high - value) for value, (_, high) in zip(values, bounds)]
        places = [column + (number - (len(series) - 1) / 2) * width for column, _ in drawn]
        errors = [below, above] if drawn else None
        bars = axes.bar(places, values, width * 0.92, yerr=errors, color=colour, label=label, capsize=2.5, zorder=2)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=7)
    axes.set_xticks(range(len(columns)), ["all" if name == primary else _title(name, primary) for name in columns])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("%")
    axes.grid(axis="y", alpha=0.3, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(
        f"{comparison['benchmark']}: {primary.replace('_', ' ')}\n{note}; lines: 95 % intervals", fontsize=10
    )
    if len(series) > 1:
        figure.legend(loc="outside lower left", ncols=min(4, len(series)), frameon=False, fontsize=9)
    save_figure(figure, path, dpi=150)


def attach(paths: Sequence[str | os.PathLike], model_folder: str | os.PathLike) -> list[Path]:
    """
    Copies results into the folder of the evaluated weights as `results-<benchmark>.json`, where `llava publish` finds them.
    Runs of other weights, such as the baseline of a comparison, are left out. Nothing is copied if one of the rest is refused.
    """
    folder = Path(model_folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of a model.")
    weights, sources = fingerprint(folder), {}
    for path in map(Path, paths):
        results, _ = read_results(path)
        if weights not in (results["model"].get("fingerprint"), results["model"].get("adapter_fingerprint")):
            continue
        if not results["complete"]:
            scored, total = results["samples"]["scored"], results["samples"]["total"]
            raise ValueError(f"{path} is of {scored} of {total} samples; a model card shows whole benchmarks only.")
        target = folder / f"results-{results['benchmark']}.json"
        if target in sources:
            raise ValueError(f"{sources[target]} and {path} are both of {results['benchmark']}; give one of them.")
        sources[target] = path
    if not sources:
        raise ValueError(f"None of {', '.join(map(str, paths))} is of the weights in {folder}: evaluate that folder.")
    for target, path in sources.items():
        shutil.copyfile(path / RESULTS_NAME if path.is_dir() else path, target)
    return list(sources)
