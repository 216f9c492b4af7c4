"""Plots of the data engine: lengths of answers, concepts before and after the filter."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..io.files import atomic_path


COLORS = {"conversation": "#4477aa", "detail": "#ccbb44", "complex": "#aa3377"}


def new_figure(width: float, height: float, **options: Any) -> Any:
    """A matplotlib figure, in inches, without pyplot, whose global state a notebook may use."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'modeling-llava[plots]'") from error
    return Figure(figsize=(width, height), **options)


def save_figure(figure: Any, path: Path, dpi: int = 120) -> None:
    """Writes a figure as PNG."""
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=dpi, format="png")


def plot_lengths(lengths: dict[str, Counter], path: Path) -> None:
    """Histogram of the answers' words, one line per type."""
    figure = new_figure(7, 3.2, layout="constrained")
    axes = figure.subplots()
    longest = max(max(histogram, default=1) for histogram in lengths.values())
    edges = [longest * i / 30 for i in range(31)]
    for kind, histogram in lengths.items():
        style = {"histtype": "step", "lw": 2, "label": kind, "color": COLORS[kind]}
        axes.hist(list(histogram), edges, weights=list(histogram.values()), **style)
    axes.set(xlabel="words in an answer", ylabel="answers", title="Length of answers")
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_concepts(before: Iterable[int], after: Iterable[int], least: int, path: Path) -> None:
    """Captions per noun phrase, phrases ordered by how common they are, before and after the filter."""
    figure = new_figure(7, 3.6, layout="constrained")
    axes = figure.subplots()
    for counts, label, color in ((before, "before", "#999999"), (after, "after", "#4477aa")):
        ordered = sorted((count for count in counts if count), reverse=True)
        axes.plot(range(1, len(ordered) + 1), ordered, label=f"{label}: {len(ordered):,} phrases", color=color, lw=2)
    axes.axhline(least, color="black", lw=0.7, ls=":", label=f"frequency {least}")
    axes.set(xscale="log", yscale="log", xlabel="noun phrases, commonest first", ylabel="captions", title="Concepts")
    axes.legend(frameon=False)
    save_figure(figure, path)
