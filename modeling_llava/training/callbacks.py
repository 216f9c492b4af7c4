"""What a run shows: the table of components and a masked sample before step 1, the loss curve after the last."""

import io
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from ..data.preview import render_sample
from .recipes import write_whole
from .stages import ComponentSummary, summarise_components


logger = logging.getLogger(__name__)

LOSS_CURVE_NAME = "loss_curve.png"


class PreviewCallback(TrainerCallback):
    """
    Before step 1: parameters per component, and the first samples of the first batch with their supervised text marked.

    Args:
        trainer ([`LlavaTrainer`]):
            The trainer; its collator makes the batch.
        console (`rich.console.Console`, *optional*):
            Where to write; the terminal by default.
    """

    def __init__(self, trainer: Any, console: Any = None):
        self.trainer = trainer
        self.console = console

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        from rich.console import Console

        console = self.console or Console()
        console.print(component_table(summarise_components(self.trainer.model, args)))
        dataset, processor = self.trainer.train_dataset, self.trainer.processing_class
        if args.preview_samples < 1 or processor is None or isinstance(dataset, IterableDataset):
            return  # a stream would have to be begun, and what is read of it is not read again
        # The preview must not change the run: dropout and sampling continue from the state before it.
        random_state = torch.random.get_rng_state()
        batch = self.trainer.data_collator([dataset[i] for i in range(min(args.preview_samples, len(dataset)))])
        torch.random.set_rng_state(random_state)
        for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"])):
            attended = batch["attention_mask"][row].bool() if "attention_mask" in batch else slice(None)
            console.print(f"Sample {row + 1}, as the model sees it ([bold green]green[/]: what it learns):")
            console.print(render_sample(processor, ids[attended].tolist(), labels[attended].tolist()))


def component_table(rows: list[ComponentSummary]):
    """`rich.table.Table` of what is trained."""
    from rich.table import Table

    table = Table(title="What is trained")
    for name in ("component", "trained", "of", "dtype", "learning rate"):
        table.add_column(name, justify="left" if name in ("component", "dtype") else "right")
    for row in rows:
        rate = "frozen" if row.learning_rate is None else f"{row.learning_rate:g}"
        table.add_row(row.component, f"{row.num_trainable:,}", f"{row.num_parameters:,}", row.dtypes, rate)
    trainable, total = sum(row.num_trainable for row in rows), sum(row.num_parameters for row in rows)
    table.add_section()
    table.add_row("all", f"{trainable:,}", f"{total:,}", f"{100 * trainable / max(total, 1):.2f} %", "")
    return table


class LossCurveCallback(TrainerCallback):
    """After the last step: `loss_curve.png` in the output folder, if matplotlib is installed."""

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            plot_loss_curve(state.log_history, Path(args.output_dir) / LOSS_CURVE_NAME)


def plot_loss_curve(log_history: list[dict[str, Any]], path: str | os.PathLike) -> Path | None:
    """
    Draw training loss (with its centred moving mean) and evaluation loss over optimizer steps.

    Args:
        log_history (`list[dict]`):
            `trainer.state.log_history`, or that of a `trainer_state.json`.
        path (`str` or `os.PathLike`):
            The PNG to write.

    Returns:
        `Path` of the picture; `None` if matplotlib is not installed or nothing was logged.
    """
    trained = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    evaluated = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    if not trained and not evaluated:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.info(f"{path} is not drawn: matplotlib is not installed (pip install 'modeling-llava[plots]').")
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if trained:
        steps, losses = zip(*trained)
        axes.plot(steps, losses, color="#4c72b0", alpha=0.35, linewidth=1, label="training")
        # The mean of a window around each entry, narrower towards both ends; a trailing mean would lag behind.
        half = max(len(losses) // 40, 1)
        smoothed = []
        for i in range(len(losses)):
            reach = min(half, i, len(losses) - 1 - i)
            smoothed.append(sum(losses[i - reach : i + reach + 1]) / (2 * reach + 1))
        axes.plot(steps, smoothed, color="#4c72b0", linewidth=2, label=f"training, mean of {2 * half + 1} entries")
    if evaluated:
        axes.plot(*zip(*evaluated), color="#dd8452", marker="o", linewidth=2, label="evaluation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised token)", ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    write_whole(path, picture.getvalue())
    return path


__all__ = ["LossCurveCallback", "PreviewCallback", "component_table", "plot_loss_curve"]
