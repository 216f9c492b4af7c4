"""`train(recipe)`: from a recipe to trained weights, a record of the run and its loss curve."""

import json
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from ..io.atomic import write_atomic
from ..text.stops import missing_stop
from .arguments import LlavaTrainingArguments
from .callbacks import LossCurveCallback, PreviewCallback
from .recipes import parse_recipe
from .resume import (
    check_sharding,
    check_trained_parts,
    checkpoint_to_resume,
    disk_errors_explained,
    is_finished,
    only_run_in,
    record_data,
    report_changes,
)
from .setup import base_and_adapter, core_model, load_datasets, load_model_and_processor
from .stages import cast_weights
from .trainer import LlavaTrainer


logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a run gave."""

    output_dir: Path
    """Folder with the weights, the processor, `recipe.yaml`, `run.json` and `loss_curve.png`."""
    kind: str
    """`full` (a stock checkpoint), `adapter` or `projector`."""
    global_step: int
    """Optimizer steps in all, those before a resume included."""
    metrics: dict[str, float]
    """`train_loss`, speed, and `eval_loss` where there is evaluation data."""
    log_history: list[dict[str, Any]]
    """Every log entry of the run, those before a resume included."""
    resumed_from: Path | None
    """The checkpoint from which the run went on."""


def train(
    recipe: str | os.PathLike | dict[str, Any] | LlavaTrainingArguments,
    overrides: Sequence[str] = (),
    callbacks: Sequence[TrainerCallback] = (),
    console: Any = None,
) -> TrainResult:
    """
    Train a LLaVA.

    Args:
        recipe (`str`, `dict` or [`LlavaTrainingArguments`]):
            Path of a recipe, name of a preset, its settings, or the arguments.
        overrides (`Sequence[str]`, *optional*):
            `key=value` pairs that replace settings of a recipe file.
        callbacks (`Sequence[TrainerCallback]`, *optional*):
            Further callbacks, such as one that answers questions at each evaluation.
        console (`rich.console.Console`, *optional*):
            Where the table of components and the sample are shown; the terminal by default.

    Returns:
        [`TrainResult`]

    Raises:
        ValueError: settings that contradict each other, data that does not fit the model, or `output_dir` is the model's
            folder, or holds checkpoints and `resume=never`.
        FileNotFoundError: a path does not exist.
        OSError: `output_dir` cannot be written, is full, or another run is at work there.
    """
    args = _arguments(recipe, overrides)
    if args.output_is_default:
        raise ValueError("output_dir is not set. Say where the weights are to be written: output_dir=runs/my-run.")
    _check_reporting(args)
    _check_metric(args, callbacks)
    base, _, _ = base_and_adapter(args)  # its errors say more than what a checkpoint of another run would
    _check_place(args, base)
    with only_run_in(args.output_dir) if args.process_index == 0 else nullcontext():
        return _train(args, callbacks, console)


def _train(args: LlavaTrainingArguments, callbacks: Sequence[TrainerCallback], console: Any) -> TrainResult:
    checkpoint = checkpoint_to_resume(args)
    if checkpoint is not None:
        check_trained_parts(args, checkpoint)
    train_dataset, eval_dataset = load_datasets(args)  # first: a mistyped path should not cost the loading of a model
    set_seed(args.seed)  # before the adapter's matrices are drawn
    model, processor = load_model_and_processor(args)

    if args.early_stopping_patience is not None:
        callbacks = [*callbacks, EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold)]
    trainer = LlavaTrainer(
        model,
        args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        callbacks=[LossCurveCallback(), *callbacks],
        data_record=record_data(args.data, train_dataset) if args.process_index == 0 else None,
    )
    trainer.add_callback(PreviewCallback(trainer, console))
    if checkpoint is not None:
        report_changes(args, checkpoint)

    metrics: dict[str, float] = {}
    with disk_errors_explained(args.output_dir, only_full=True):
        has_ended = checkpoint is not None and is_finished(trainer, checkpoint)
        if has_ended:
            logger.warning(
                "%s is the end of the run already: nothing is trained, the result is written again.", checkpoint
            )
            trainer.restore_result(checkpoint)
        else:
            if checkpoint is not None:
                check_sharding(trainer, checkpoint)
            output = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            metrics |= output.metrics
            _save_metrics(trainer, "train", output.metrics)
        # FSDP2 shards a model only together with an optimizer: a finished run has been evaluated at its end
        if eval_dataset is not None and not (has_ended and trainer.is_fsdp_enabled):
            evaluated = trainer.evaluate()
            metrics |= evaluated
            _save_metrics(trainer, "eval", evaluated)
        save_result(trainer)
    _report_drops(trainer)
    written = trainer.base_generation_config if args.adapter != "none" else core_model(trainer.model).generation_config
    needed = missing_stop(written, processor)
    if needed and args.stage == "finetune" and args.process_index == 0:
        logger.warning(
            f"To end its answers, generate of stock transformers has to be given {needed} (with tokenizer=… for stop_strings): "
            "the model's generation configuration does not say it. llava chat and llava eval know it."
        )
    return TrainResult(
        output_dir=Path(args.output_dir),
        kind="adapter" if args.adapter != "none" else "projector" if args.stage == "pretrain" else "full",
        global_step=trainer.state.global_step,
        metrics=metrics,
        log_history=trainer.state.log_history,
        resumed_from=checkpoint,
    )


def _save_metrics(trainer: LlavaTrainer, split: str, metrics: dict[str, float]) -> None:
    """
    As `Trainer.save_metrics`, but whole or not at all: on a full disk that leaves an empty `all_results.json`, over which
    it stumbles in the next run.
    """
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    try:
        earlier = json.loads((folder / "all_results.json").read_text("utf-8"))
    except (OSError, ValueError):
        earlier = {}
    for name, content in ((f"{split}_results.json", metrics), ("all_results.json", {**earlier, **metrics})):
        write_atomic(folder / name, json.dumps(content, indent=4, sort_keys=True) + "\n")


def save_result(trainer: LlavaTrainer) -> None:
    """
    Write the trained weights into the output folder; with `push_to_hub`, upload them.

    A full model is written in the 16-bit dtype of the run, as published checkpoints are; checkpoints keep float32.
    """
    args = trainer.args
    if args.adapter == "none" and args.stage == "finetune" and not trainer.is_fsdp_enabled:
        cast_weights(trainer.accelerator.unwrap_model(trainer.model), args.compute_dtype)
    trainer.save_state()
    trainer.save_model()


def _arguments(recipe, overrides) -> LlavaTrainingArguments:
    if isinstance(recipe, LlavaTrainingArguments):
        if overrides:
            raise ValueError("overrides change a recipe file; change the LlavaTrainingArguments themselves.")
        return recipe
    if isinstance(recipe, dict):
        if overrides:
            raise ValueError("overrides change a recipe file; change the settings themselves.")
        return LlavaTrainingArguments(**recipe)
    return parse_recipe(recipe, overrides)


def _check_place(args: LlavaTrainingArguments, base: str) -> None:
    """Raise ValueError where the result would be written over what it is trained from."""
    for name, place in (("model", args.model), ("model's base", base), ("projector", args.projector)):
        if place and os.path.isdir(place) and os.path.realpath(place) == os.path.realpath(args.output_dir):
            raise ValueError(
                f"output_dir={args.output_dir} is the folder of the {name}, whose files the run would replace. Choose another."
            )


def _check_reporting(args: LlavaTrainingArguments) -> None:
    """Raise ImportError where a package of `report_to` is not installed; `Trainer` would say so behind the model."""
    from transformers.integrations import get_reporting_integration_callbacks

    for callback in get_reporting_integration_callbacks(args.report_to):
        try:
            callback()
        except RuntimeError as error:
            raise ImportError(f"report_to={','.join(args.report_to)}: {error} Or set report_to=none.") from error


def _check_metric(args: LlavaTrainingArguments, callbacks: Sequence[TrainerCallback]) -> None:
    """Raise ValueError for a metric that no evaluation gives, not after the first one. Callbacks may add some."""
    metric = args.metric_for_best_model
    if metric is None or metric.removeprefix("eval_") == "loss" or args.benchmarks or callbacks:
        return
    raise ValueError(
        f"metric_for_best_model={metric}, but an evaluation gives the loss alone. Set metric_for_best_model=loss, or "
        "benchmarks, whose scores are metrics."
    )


def _report_drops(trainer: LlavaTrainer) -> None:
    """Say once what the collator left out; what was wrong with the rows was said when they were read."""
    dropped = getattr(trainer.data_collator, "dropped", None)
    if dropped:
        from ..data.schema import summarize_drops

        logger.warning("While training: %s. `llava data check` lists every such sample.", summarize_drops(dropped))


__all__ = ["TrainResult", "save_result", "train"]
