"""`llava eval report RUN …`."""

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs beside each other: a table for each benchmark, the published rows, and how much better each run is than the "
        "first one, over the samples that both have, with a 95 % interval (paired bootstrap)."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of `llava eval`, the baseline first")
    parser.add_argument(
        "--labels", nargs="+", metavar="NAME", help="what the runs are called (default: their folders)"
    )
    parser.add_argument("--out", metavar="DIR", help="write report.md, report.json and a plot for each benchmark")
    parser.add_argument(
        "--published",
        nargs="*",
        metavar="ROW",
        default=(),
        help="published rows to draw in the plots, such as LLaVA-13B",
    )
    parser.add_argument(
        "--attach",
        metavar="MODEL",
        help="put those of the results that are of these weights beside them, for the model card of `llava publish`",
    )


def run(args: argparse.Namespace) -> int:
    from ..evaluation.report import attach, compare, markdown, model_index, plot, published_for, read_runs
    from ..evaluation.results import write_text

    runs = read_runs(args.runs, args.labels)
    comparisons = compare(runs)
    unknown = [row for row in args.published if not any(row in published_for(c["benchmark"]) for c in comparisons)]
    if unknown:
        known = sorted({row for comparison in comparisons for row in published_for(comparison["benchmark"])})
        raise ValueError(
            f"--published: there is no row {', '.join(map(repr, unknown))}; "
            + (f"there are {', '.join(known)}." if known else "none is known for these benchmarks.")
        )
    text = markdown(comparisons)
    print(text)
    if args.out:
        out = Path(args.out)
        content = {
            "comparisons": comparisons,
            "model_index": {run.label: model_index([run.results], run.label) for run in runs},
        }
        write_text(out / "report.md", "# Evaluation\n\n" + text)
        write_text(out / "report.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        for comparison in comparisons:
            plot(comparison, out / f"{comparison['benchmark']}.png", args.published)
        print(f"written: {out / 'report.md'}, report.json and {len(comparisons)} plots", file=sys.stderr)
    if args.attach:
        attached = attach(args.runs, args.attach)
        for path in attached:
            print(f"written: {path}; `llava publish` puts it into the model card", file=sys.stderr)
        if others := len(runs) - len(attached):
            print(f"not attached: {others} of {len(runs)} runs, which are of other weights", file=sys.stderr)
    return 0
