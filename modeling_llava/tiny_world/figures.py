"""The quickstart's figures: the loss curves, and answers next to their images."""

import random
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image

from ..data_engine.plots import new_figure, save_figure
from .exam import HELD_OUT_NAMES, KINDS


INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
RIGHT, WRONG, ACCENT = "#1a7f4b", "#c0392b", "#3b6fd4"
BARS = {
    "with the image": ACCENT,
    "majority answer": "#9aa3b2",
    "blank images": "#c9ced8",
    "shuffled images": "#dfe3ea",
}


def _clean(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c4c9d4")
    axes.tick_params(colors=MUTED, labelsize=8.5, length=3)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def smooth(losses: list[float], fraction: float = 0.06) -> list[float]:
    """Running mean over the last `fraction` of all steps, at least three."""
    window = max(3, round(fraction * len(losses)))
    recent = [losses[max(0, i - window) : i] for i in range(1, len(losses) + 1)]
    return [sum(values) / len(values) for values in recent]


def plot_losses(curves: dict[str, list[float]], path: Path) -> None:
    """Loss over optimizer steps, one panel per training."""
    figure = new_figure(3.3 * len(curves), 3.1)
    for index, (title, losses) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), index + 1)
        steps, smoothed = range(1, len(losses) + 1), smooth(losses)
        axes.plot(steps, losses, color=ACCENT, alpha=0.25, linewidth=0.9)
        axes.plot(steps, smoothed, color=ACCENT, linewidth=2)
        axes.set_ylim(0, max(losses) * 1.05)
        axes.set_xlim(0, len(losses) + 1)
        axes.set_title("\n".join(textwrap.wrap(title, 34)), fontsize=10, color=INK, loc="left")
        axes.set_xlabel("optimizer step", fontsize=8.5, color=MUTED)
        if index == 0:
            axes.set_ylabel("loss (nats)", fontsize=8.5, color=MUTED)
        style = {"ha": "right", "fontsize": 9, "color": ACCENT, "fontweight": "bold"}
        end = (len(losses), smoothed[-1])
        axes.annotate(f"{smoothed[-1]:.2f}", end, xytext=(-2, 7), textcoords="offset points", **style)
        _clean(axes)
    figure.tight_layout(w_pad=2.2)
    save_figure(figure, path, dpi=130)


def choose_answers(answers: list[dict[str, Any]], number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Answers for the figure: right and wrong in their true proportion, each image once, one about a held-out pair."""
    order = random.Random(f"{seed}:figure").sample(answers, len(answers))
    order = list({row["image"]: row for row in order}.values())
    wrong, right = ([row for row in order if row["right"] is value] for value in (False, True))
    num_wrong = max(1, round(number * sum(not row["right"] for row in answers) / max(1, len(answers))))
    candidates = [*wrong[:num_wrong], *right]
    chosen = candidates[:number]
    held_out = [row for row in candidates if any(name in row["expected"] for name in HELD_OUT_NAMES)]
    if held_out and not any(row in held_out for row in chosen):
        chosen[-1] = held_out[0]
    return random.Random(seed).sample(chosen, len(chosen))


def plot_answers(
    answers: list[dict[str, Any]], scores: dict[str, dict[str, float]], folder: Path, path: Path, seed: int = 0
) -> None:
    """A grid of images with question and answer, above bars with the scores with and without the image."""
    columns, rows = 5, 2
    chosen = choose_answers(answers, columns * rows, seed)
    figure = new_figure(13, 11)
    percent = {name: f"{kinds['all']:.0%}" for name, kinds in scores.items()}
    figure.text(0.03, 0.966, "A LLaVA that learned to see in minutes", fontsize=19, color=INK, fontweight="bold")
    lines = [
        f"{percent['with the image']} of its answers about images never seen in training are right, "
        f"{percent['held-out pairs']} where a pair of colour and thing was in no training data.",
        f"Without the image it cannot know: {percent['blank images']} with blank images, {percent['shuffled images']} with "
        f"shuffled images; the most common answer gets {percent['majority answer']}.",
    ]
    for number, line in enumerate(lines):
        figure.text(0.03, 0.945 - 0.0185 * number, line, fontsize=11, color=MUTED)
    for index, row in enumerate(chosen):
        column, line = index % columns, index // columns
        left, top = 0.03 + column * 0.192, 0.907 - line * 0.33
        axes = figure.add_axes([left, top - 0.2056, 0.174, 0.2056])
        with Image.open(folder / row["image"]) as image:
            axes.imshow(image.convert("RGB"), interpolation="lanczos")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(GRID)
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
    kinds = [kind for kind in ("all", *KINDS) if kind in scores["with the image"]]
    width = 0.8 / len(BARS)
    for index, (name, colour) in enumerate(BARS.items()):
        heights = [scores[name].get(kind, 0.0) for kind in kinds]
        positions = [position + (index - (len(BARS) - 1) / 2) * width for position in range(len(kinds))]
        bars = axes.bar(positions, heights, width * 0.92, color=colour, label=name)
        if index == 0:
            axes.bar_label(bars, [f"{height:.0%}" for height in heights], fontsize=8.5, color=ACCENT, padding=1.5)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    axes.set(xlim=(-0.6, len(kinds) - 0.4), ylim=(0, 1.13))
    _clean(axes)
    axes.tick_params(axis="x", labelsize=10, labelcolor=INK, length=0)
    style = {"frameon": False, "fontsize": 9.5, "ncols": len(BARS), "labelcolor": INK}
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), **style)
    save_figure(figure, path, dpi=130)
