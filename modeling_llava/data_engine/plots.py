"""Plots of the data engine: lengths, questions by first verb and noun, concepts before and after the filter."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any


COLORS = {"conversation": "#4477aa", "detail": "#ccbb44", "complex": "#aa3377"}


def _figure(width: float, height: float) -> Any:
    """Without pyplot, which has a state of its own: in a notebook, the plots of others."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'modeling-llava[engine]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def plot_lengths(lengths: dict[str, Counter], path: Path) -> None:
    """Histogram of the answers' words, one line per type."""
    figure = _figure(7, 3.2)
    axes = figure.subplots()
    longest = max(max(histogram, default=1) for histogram in lengths.values())
    edges = [longest * i / 30 for i in range(31)]
    for kind, histogram in lengths.items():
        axes.hist(
            list(histogram),
            edges,
            weights=list(histogram.values()),
            histtype="step",
            lw=2,
            label=kind,
            color=COLORS[kind],
        )
    axes.set(xlabel="words in an answer", ylabel="answers", title="Length of answers")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def plot_verbs(pairs: Counter, path: Path, verbs: int = 16, nouns: int = 4) -> None:
    """Questions by their first verb (inner ring) and the first noun after it (outer ring), as in Self-Instruct's figure.

    Args:
        pairs: (verb, noun) → questions; the noun may be empty.
        path: PNG to write.
        verbs: Verbs shown, the commonest; the rest is "other".
        nouns: Nouns shown per verb.
    """
    figure = _figure(8, 8)
    from matplotlib import colormaps

    by_verb: Counter = Counter()
    for (verb, _), number in pairs.items():
        by_verb[verb] += number
    shown = by_verb.most_common(verbs)
    rest = by_verb.total() - sum(number for _, number in shown)
    colors = colormaps["tab20"].colors
    axes = figure.subplots()
    inner, outer = [], []  # (size, label, color)
    for i, (verb, number) in enumerate(shown):
        color = colors[i % len(colors)]
        inner.append((number, verb, color))
        of_verb = Counter({noun: n for (v, noun), n in pairs.items() if v == verb and noun})
        top = of_verb.most_common(nouns)
        outer += [(n, noun, (*color, 0.6)) for noun, n in top]
        outer.append((number - sum(n for _, n in top), "", (*color, 0.15)))
    if rest:
        inner.append((rest, "other", "#dddddd"))
        outer.append((rest, "", "#f2f2f2"))
    total = sum(size for size, _, _ in inner)
    for ring, radius, width, distance in ((inner, 0.72, 0.42, 0.62), (outer, 1.0, 0.27, 0.87)):
        axes.pie(
            [size for size, _, _ in ring],
            radius=radius,
            colors=[color for _, _, color in ring],
            labels=[label if size > 0.006 * total else "" for size, label, _ in ring],
            labeldistance=distance,
            rotatelabels=True,
            wedgeprops={"width": width, "edgecolor": "white", "linewidth": 0.6},
            textprops={"fontsize": 8, "ha": "center", "va": "center"},
            startangle=90,
            counterclock=False,
        )
    axes.set_title("Questions by first verb and the noun after it")
    figure.savefig(path, dpi=110)


def plot_concepts(before: Iterable[int], after: Iterable[int], least: int, path: Path) -> None:
    """Captions per noun phrase, phrases ordered by how common they are, before and after the filter."""
    figure = _figure(7, 3.6)
    axes = figure.subplots()
    for counts, label, color in ((before, "before", "#999999"), (after, "after", "#4477aa")):
        ordered = sorted((count for count in counts if count), reverse=True)
        axes.plot(range(1, len(ordered) + 1), ordered, label=f"{label}: {len(ordered):,} phrases", color=color, lw=2)
    axes.axhline(least, color="black", lw=0.7, ls=":", label=f"frequency {least}")
    axes.set(xscale="log", yscale="log", xlabel="noun phrases, commonest first", ylabel="captions", title="Concepts")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
