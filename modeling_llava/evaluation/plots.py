"""Pictures of results: bars with their intervals, one group per column of a table."""

import os
from collections.abc import Sequence
from pathlib import Path


INK, QUIET, GRID = "#22252b", "#6b7280", "#e5e7eb"
COLOURS = ("#2f6f9f", "#d9822b", "#4f9d69", "#8b6bb1", "#c1554e", "#5d7b8a")
PUBLISHED_COLOUR = "#b9c0c9"


def plot_bars(
    path: str | os.PathLike,
    columns: Sequence[str],
    series: dict[str, Sequence[dict | None]],
    *,
    title: str,
    subtitle: str = "",
    published: dict[str, Sequence[float | None]] | None = None,
    unit: str = "%",
) -> None:
    """
    Draws grouped bars.

    Args:
        path (`str` or `os.PathLike`): The PNG.
        columns (`Sequence[str]`): Names of the groups.
        series (`dict[str, Sequence[dict | None]]`): For each run its score (`{"value", "interval"}`) in every column.
        title, subtitle (`str`)
        published (`dict`, *optional*): Published values in every column, drawn grey behind the runs.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'modeling-llava[plots]'") from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    published = published or {}
    names = [*published, *series]
    width = min(0.8 / max(1, len(names)), 0.34)
    with matplotlib.rc_context({"font.size": 10, "font.family": "sans-serif"}):
        inches = max(6.4, 0.9 * len(columns) * max(1.0, 0.32 * len(names)) + 1.2)
        figure = Figure(figsize=(min(inches, 16), 4.4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        highest = 0.0
        for number, name in enumerate(names):
            is_published = name in published
            scores = [{"value": value} for value in published[name]] if is_published else series[name]
            colour = PUBLISHED_COLOUR if is_published else COLOURS[(number - len(published)) % len(COLOURS)]
            offset = (number - (len(names) - 1) / 2) * width
            for column, score in enumerate(scores):
                if score is None or score["value"] is None:
                    continue
                value, place = score["value"], column + offset
                label = (
                    name if column == next(i for i, s in enumerate(scores) if s and s["value"] is not None) else None
                )
                axes.bar(place, value, width * 0.92, color=colour, label=label, zorder=2)
                top = value
                if score.get("interval"):
                    low, high = score["interval"]
                    # a bootstrap interval need not hold the value itself
                    reach = [[max(0.0, value - low)], [max(0.0, high - value)]]
                    axes.errorbar(place, value, reach, color=INK, linewidth=1, capsize=2.5, capthick=1, zorder=3)
                    top = max(value, high)
                axes.annotate(
                    f"{value:.1f}",
                    (place, top),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8 if width > 0.18 else 6.5,
                    color=QUIET if is_published else INK,
                )
                highest = max(highest, top)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_xlim(-0.55, len(columns) - 0.45)
        axes.set_ylim(0, (highest or 1.0) * 1.14)
        axes.set_ylabel(unit, color=QUIET)
        axes.grid(axis="y", color=GRID, zorder=0)
        axes.tick_params(length=0, colors=INK)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(QUIET)
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=22 if subtitle else 10)
        if subtitle:
            axes.text(0, 1.025, subtitle, transform=axes.transAxes, color=QUIET, fontsize=9)
        if len(names) > 1 and axes.containers:  # nothing to name where nothing could be scored
            figure.legend(
                loc="outside lower left", ncols=min(4, len(names)), frameon=False, labelcolor=INK, fontsize=9
            )
        path = Path(path)
        beside = path.with_name(f".{path.name}.{os.getpid()}.png")
        figure.savefig(beside, metadata={"Software": None})
        os.replace(beside, path)


__all__ = ["plot_bars"]
