"""The quickstart's figures: the loss curves, and answers next to their images."""

import random
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image

from ..io.atomic import atomic_path
from .exam import HELD_OUT_NAMES, KINDS


INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
RIGHT, WRONG, ACCENT = "#1a7f4b", "#c0392b", "#3b6fd4"
BARS = {
    "with the picture": ACCENT,
    "majority answer": "#9aa3b2",
    "blank pictures": "#c9ced8",
    "pictures shuffled": "#dfe3ea",
}


def _figure(width: float, height: float):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The figures need matplotlib: pip install 'modeling-llava[plots]'.") from error
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: Path) -> None:
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


def _clean(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c4c9d4")
    axes.tick_params(colors=MUTED, labelsize=8.5, length=3)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def smooth(losses: list[float], share: float = 0.06) -> list[float]:
    """Running mean over a window of `share` of all steps, at least three, that looks back only."""
    window = max(3, round(share * len(losses)))
    return [
        sum(losses[max(0, i - window + 1) : i + 1]) / len(losses[max(0, i - window + 1) : i + 1])
        for i in range(len(losses))
    ]


def plot_losses(curves: dict[str, list[float]], path: Path) -> None:
    """Loss over optimizer steps, one panel per training."""
    figure = _figure(3.3 * len(curves), 3.1)
    for index, (title, losses) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), index + 1)
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=ACCENT, alpha=0.25, linewidth=0.9)
        axes.plot(steps, smooth(losses), color=ACCENT, linewidth=2)
        axes.set_ylim(0, max(losses) * 1.05)
        axes.set_xlim(0, len(losses) + 1)
        axes.set_title("\n".join(textwrap.wrap(title, 34)), fontsize=10, color=INK, loc="left")
        axes.set_xlabel("optimizer step", fontsize=8.5, color=MUTED)
        if index == 0:
            axes.set_ylabel("loss (nats)", fontsize=8.5, color=MUTED)
        last = smooth(losses)[-1]
        axes.annotate(
            f"{last:.2f}",
            (len(losses), last),
            xytext=(-2, 7),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=ACCENT,
            fontweight="bold",
        )
        _clean(axes)
    figure.tight_layout(w_pad=2.2)
    _save(figure, path)


def choose_answers(answers: list[dict[str, Any]], number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Answers for the image: as many kinds as there are, each image once, right and wrong in their true proportion.

    At least one is wrong if any is, and at least one is about a held-out pair.
    """
    order = random.Random(f"{seed}:figure").sample(answers, len(answers))
    wrong = [row for row in order if not row["right"]]
    held_out = [row for row in order if any(name in row["expected"] for name in HELD_OUT_NAMES)]
    num_wrong = min(len(wrong), max(1, round(number * len(wrong) / max(1, len(answers))))) if wrong else 0
    chosen = wrong[:num_wrong]
    if held_out and not any(row in held_out for row in chosen):
        chosen = [held_out[0], *chosen[: number - 1]]
    right = [row for row in order if row["right"]]
    queues = [[row for row in right if row["kind"] == kind] for kind in KINDS]
    turn = 0
    while len(chosen) < number and any(queues):
        queue = queues[turn % len(queues)]
        turn += 1
        taken = {row["image"] for row in chosen}
        found = next((row for row in queue if row["image"] not in taken), None)
        if found is None:
            queue.clear()
        else:
            queue.remove(found)
            chosen.append(found)
    return random.Random(seed).sample(chosen, len(chosen))


def plot_answers(
    answers: list[dict[str, Any]], scores: dict[str, dict[str, float]], folder: Path, path: Path, seed: int = 0
) -> None:
    """A grid of images with question and answer, over bars that show what the model reaches without its image."""
    columns, rows = 5, 2
    chosen = choose_answers(answers, columns * rows, seed)
    figure = _figure(13, 11)
    share = {name: f"{kinds['all']:.0%}" for name, kinds in scores.items()}
    figure.text(0.03, 0.966, "A LLaVA that learnt to see in minutes", fontsize=19, color=INK, fontweight="bold")
    lines = [
        f"{share['with the picture']} of its answers about pictures never seen are right, {share['held-out pairs']} where "
        "a pair of colour and thing was in no training data.",
        f"Without the picture it cannot know: {share['blank pictures']} with blank pictures, "
        f"{share['pictures shuffled']} with the pictures shuffled; the most common answer gets "
        f"{share['majority answer']}.",
    ]
    for number, line in enumerate(lines):
        figure.text(0.03, 0.945 - 0.0185 * number, line, fontsize=11, color=MUTED)
    for index, row in enumerate(chosen):
        column, line = index % columns, index // columns
        left, top = 0.03 + column * 0.192, 0.907 - line * 0.33
        axes = figure.add_axes([left, top - 0.2056, 0.174, 0.2056])
        with Image.open(folder / row["image"]) as image:
            axes.imshow(image.convert("RGB"), interpolation="lanczos")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(GRID)
        mark, colour = ("✓", RIGHT) if row["right"] else ("✗", WRONG)
        texts = [(row["question"], INK, "normal"), (f"{mark} {row['answer'] or '(nothing)'}", colour, "bold")]
        if not row["right"]:
            texts.append((f"right: {row['expected']}", MUTED, "normal"))
        y = top - 0.223
        for text, ink, weight in texts:
            for part in textwrap.wrap(text, 28 if weight == "bold" else 32, max_lines=3, placeholder=" …"):
                figure.text(left, y, part, fontsize=9.8, color=ink, fontweight=weight)
                y -= 0.0168
    axes = figure.add_axes([0.055, 0.04, 0.915, 0.15])
    kinds = [kind for kind in ("all", *KINDS) if kind in scores["with the picture"]]
    width = 0.8 / len(BARS)
    for index, (name, colour) in enumerate(BARS.items()):
        heights = [scores[name].get(kind, 0.0) for kind in kinds]
        places = [position + (index - (len(BARS) - 1) / 2) * width for position in range(len(kinds))]
        bars = axes.bar(places, heights, width * 0.92, color=colour, label=name)
        if index == 0:
            axes.bar_label(bars, [f"{height:.0%}" for height in heights], fontsize=8.5, color=ACCENT, padding=1.5)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_xlim(-0.6, len(kinds) - 0.4)
    axes.set_ylim(0, 1.13)
    axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    _clean(axes)
    axes.tick_params(axis="x", labelsize=10, labelcolor=INK, length=0)
    axes.legend(
        frameon=False, fontsize=9.5, ncols=len(BARS), loc="lower left", bbox_to_anchor=(0, 1.0), labelcolor=INK
    )
    _save(figure, path)
