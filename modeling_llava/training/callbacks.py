"""Callbacks of a run: a preview before step 1, speed in each log, and the loss curve."""

import io
import logging
import math
import os
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.data import IterableDataset
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from ..constants import IGNORE_INDEX
from ..data.labels import render_sample
from ..io.checkpoints import COMPONENTS, component_of
from ..io.files import write_atomic
from .arguments import LlavaTrainingArguments
from .setup import core_model


logger = logging.getLogger(__name__)

LOSS_CURVE_NAME = "loss_curve.png"


class PreviewCallback(TrainerCallback):
    """Before step 1: parameters per component, kernels, and the first samples with their supervised text marked."""

    def __init__(self, trainer: Any, console: Any = None):
        self.trainer = trainer
        self.console = console

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        from rich.console import Console

        console = self.console or Console()
        console.print(component_table(self.trainer.model, args))
        if self.trainer.kernel_report is not None:
            console.print(str(self.trainer.kernel_report))
        dataset, processor = self.trainer.train_dataset, self.trainer.processing_class
        if args.preview_samples < 1 or processor is None or isinstance(dataset, IterableDataset):
            return  # samples that are read from a stream would be missing in training
        with torch.random.fork_rng(devices=[]):  # the preview must not change the run
            batch = self.trainer.data_collator([dataset[i] for i in range(min(args.preview_samples, len(dataset)))])
        for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"])):
            attended = batch["attention_mask"][row].bool() if "attention_mask" in batch else slice(None)
            console.print(f"Sample {row + 1}, as the model sees it ([bold green]green[/]: what it learns):")
            console.print(render_sample(processor, ids[attended].tolist(), labels[attended].tolist()))


def component_table(model: nn.Module, args: LlavaTrainingArguments):
    """`rich.table.Table` of what is trained: parameters, dtype (trained ones first) and learning rate of each component."""
    from rich.table import Table

    table = Table(title="What is trained")
    for name in ("component", "trained", "of", "dtype", "learning rate"):
        table.add_column(name, justify="left" if name in ("component", "dtype") else "right")
    rates, all_trained, all_parameters = args.learning_rates(), 0, 0
    for component in COMPONENTS:
        # the frozen original of what PEFT trains as a copy is not counted
        named = [(n, p) for n, p in model.named_parameters() if ".original_module." not in n]
        parameters = [p for n, p in named if component_of(n) == component]
        parameters.sort(key=lambda p: not p.requires_grad)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        number = sum(p.quant_state.shape.numel() if _is_4_bit(p) else p.numel() for p in parameters)
        dtypes = dict.fromkeys("4-bit" if _is_4_bit(p) else str(p.dtype).removeprefix("torch.") for p in parameters)
        rate = f"{rates[component]:g}" if trained else "frozen"
        table.add_row(component, f"{trained:,}", f"{number:,}", " + ".join(dtypes), rate)
        all_trained, all_parameters = all_trained + trained, all_parameters + number
    table.add_section()
    share = f"{100 * all_trained / max(all_parameters, 1):.2f} %"
    table.add_row("all", f"{all_trained:,}", f"{all_parameters:,}", share, "")
    return table


def _is_4_bit(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "quant_state", None) is not None


class LossCurveCallback(TrainerCallback):
    """After the last step: `loss_curve.png` in the output folder."""

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            plot_loss_curve(state.log_history, Path(args.output_dir) / LOSS_CURVE_NAME)


def plot_loss_curve(log_history: list[dict[str, Any]], path: str | os.PathLike) -> Path | None:
    """
    Plot training loss (with its centred moving mean) and evaluation loss of `trainer.state.log_history` over optimizer steps, as PNG.
    Returns its path, or `None` if matplotlib is not installed or nothing was logged.
    """
    trained = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    evaluated = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    if not trained and not evaluated:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.info(f"{path} is not written: matplotlib is not installed (pip install 'modeling-llava[plots]').")
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if trained:
        steps, losses = zip(*trained)
        axes.plot(steps, losses, color="#4c72b0", alpha=0.35, linewidth=1, label="training")
        half, last = max(len(losses) // 40, 1), len(losses) - 1
        reach = [min(half, i, last - i) for i in range(len(losses))]  # narrower towards both ends: no lag
        smoothed = [fmean(losses[i - r : i + r + 1]) for i, r in enumerate(reach)]
        axes.plot(steps, smoothed, color="#4c72b0", linewidth=2, label=f"training, mean of {2 * half + 1} entries")
    if evaluated:
        axes.plot(*zip(*evaluated), color="#dd8452", marker="o", linewidth=2, label="evaluation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised token)", ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    png = io.BytesIO()
    figure.savefig(png, dpi=150)
    write_atomic(path, png.getvalue())
    return path


class SpeedCallback(TrainerCallback):
    """
    Measures optimizer steps, and adds to each log of the training loss:

    - `samples_per_second`, `supervised_tokens_per_second`: of all processes, over the steps since the last log, without
      evaluations and checkpoints.
    - `utilization`: fraction of a batch that is not padding or free space of packs, in [0, 1].
    - `memory_gib`: the most that the GPU held, CUDA's context and other programs included; without a GPU, current main memory.
    - `minutes_left`: until the last step, at the pace since the start of the run, evaluations and checkpoints included.

    Args:
        micro_batch_tokens (`int`, *optional*): With `packing="full"`: tokens for which the packs of a micro-batch have room.
    """

    def __init__(self, micro_batch_tokens: int | None = None):
        self.micro_batch_tokens = micro_batch_tokens
        self._step_began = self._run_began = None
        self._first_step = 0
        self.num_batches = 0  # of this process since training began
        self._clear()

    def _clear(self) -> None:
        self._seconds, self._samples, self._room = 0.0, 0, 0
        # Sums stay on their device until a log: reading them would synchronize with the GPU at each step
        self._supervised, self._filled = 0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._run_began, self._first_step = time.perf_counter(), state.global_step
        self.num_batches = 0
        self._clear()

    def begin_step(self) -> None:
        """Before the batches of an optimizer step are fetched."""
        self._step_began = time.perf_counter()

    def count(self, batch: dict[str, torch.Tensor]) -> None:
        """One micro-batch of this process."""
        labels, ids = batch.get("labels"), batch.get("input_ids")
        if labels is None or ids is None:
            return
        boundaries, mask = batch.get("cu_seq_lens_q"), batch.get("attention_mask")
        self._samples += ids.shape[0] if boundaries is None else boundaries.numel() - 1
        self.num_batches += 1
        self._supervised = self._supervised + (labels[..., 1:] != IGNORE_INDEX).sum()
        self._filled = self._filled + (ids.numel() if mask is None else mask.sum())
        self._room += self.micro_batch_tokens or ids.numel()

    def on_step_end(self, args, state, control, **kwargs):
        if self._step_began is not None:
            self._seconds += time.perf_counter() - self._step_began

    def report(self, state, num_processes: int) -> dict[str, float]:
        """The measurements since the last report; empty if no step was measured."""
        if not self._seconds or not self._samples:
            return {}
        measured = {
            "samples_per_second": round(num_processes * self._samples / self._seconds, 3),
            "supervised_tokens_per_second": round(num_processes * int(self._supervised) / self._seconds, 1),
            "utilization": round(int(self._filled) / self._room, 4),
            "memory_gib": round(_memory() / 2**30, 3),
        }
        done = state.global_step - self._first_step
        if done > 0:
            pace = (time.perf_counter() - self._run_began) / done
            measured["minutes_left"] = round(pace * (state.max_steps - state.global_step) / 60, 1)
        self._clear()
        return measured


def _memory() -> int:
    """Bytes that the GPU held at most, CUDA's context and paged state included; without a GPU, resident main memory."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return torch.cuda.max_memory_reserved() + total - free - torch.cuda.memory_reserved()
    import psutil

    return psutil.Process().memory_info().rss


class DurationCallback(TrainerCallback):
    """
    Says once, after eleven optimizer steps, how long the run takes (of `num_epochs` or `max_steps`; a trial cuts it short). The first
    step, which is slower, is not counted.
    """

    whole: str | None = None
    """The duration in words; `None` before the second step, and for a stream without `max_steps`."""

    def __init__(self, num_epochs: float, max_steps: int = -1):
        self.num_epochs = num_epochs
        self.max_steps = max_steps

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self._first_step, self._total = state.global_step, self.max_steps
        if self._total <= 0 and hasattr(train_dataloader, "__len__"):
            steps_per_epoch = max(math.ceil(len(train_dataloader) / args.gradient_accumulation_steps), 1)
            self._total = math.ceil(self.num_epochs * steps_per_epoch)

    def on_step_end(self, args, state, control, **kwargs):
        done = state.global_step - self._first_step
        if done == 1:
            self._began = time.perf_counter()
        elif self._total > 0:
            minutes = math.ceil((time.perf_counter() - self._began) / (done - 1) * self._total / 60)
            epochs = f"{self.num_epochs:g} epochs, " if self.max_steps <= 0 else ""
            hours = f"{minutes // 60} h " if minutes >= 60 else ""
            self.whole = f"about {hours}{minutes % 60} min ({epochs}{self._total:,} optimizer steps)"
            if done == 11 and state.max_steps > 20 and state.is_world_process_zero:
                logger.warning("By its first steps, the run takes %s.", self.whole)


class CheckpointLanguageModel(TrainerCallback):
    """
    `activation_checkpointing` where it concerns the language model alone.

    - every_second layer: transformers' `every_n_layers` counts the vision tower's layers too.
    - offload: what is kept next to checkpointed layers, their inputs, waits for the backward pass in main memory.
    """

    def on_train_begin(self, args, state, control, model, **kwargs):
        language_model = core_model(model).model.language_model
        if args.activation_checkpointing == "offload":
            kept = save_on_cpu(pin_memory=True)
            self.hooks = [
                language_model.register_forward_pre_hook(lambda *_: kept.__enter__()),
                language_model.register_forward_hook(lambda *_: kept.__exit__(), always_call=True),
            ]
            return
        layers = [layer for layer in language_model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = index % 2 == 0

    hooks = ()

    def on_train_end(self, args, state, control, **kwargs):
        for hook in self.hooks:
            hook.remove()
