"""`train(recipe)`: from a recipe to trained weights, a record of the run and its loss curve."""

import copy
import errno
import glob
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME

from ..data.schema import summarize_drops
from ..io.files import sha256_of, write_atomic
from ..text.stops import missing_stop
from .arguments import LlavaTrainingArguments
from .batches import load_datasets
from .callbacks import DurationCallback, LossCurveCallback, PreviewCallback
from .checkpoints import (
    changed_settings,
    checkpoint_to_resume,
    find_resumable_checkpoint,
    is_sharded_checkpoint,
    keep_resolved,
    output_dir_lock,
)
from .recipes import parse_recipe
from .setup import base_and_adapter, cast_weights, core_model, load_model_and_processor
from .trainer import LlavaTrainer


logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """The result of a run."""

    output_dir: Path
    """Folder with the weights, the processor, `recipe.yaml`, `run.json` and `loss_curve.png`."""
    kind: str
    """`full` (a stock checkpoint), `adapter` or `projector`."""
    global_step: int
    """Optimizer steps, those before a resume included."""
    metrics: dict[str, float]
    """`train_loss`, speed, and `eval_loss` where there is evaluation data."""
    log_history: list[dict[str, Any]]
    """Every log entry, those before a resume included."""
    resumed_from: Path | None
    """The checkpoint from which the run resumed."""


def train(
    recipe: str | os.PathLike | dict[str, Any] | LlavaTrainingArguments,
    overrides: Sequence[str] = (),
    callbacks: Sequence[TrainerCallback] = (),
    console: Any = None,
) -> TrainResult:
    """
    Train a LLaVA.

    Args:
        recipe (`str`, `dict` or [`LlavaTrainingArguments`]): Path of a recipe, name of a preset, its settings, or the arguments.
        overrides (`Sequence[str]`, *optional*): `key=value` pairs that replace settings of a recipe file.
        callbacks (`Sequence[TrainerCallback]`, *optional*): More callbacks, such as one that answers questions at each evaluation.
        console (`rich.console.Console`, *optional*): Where the preview is printed; the terminal by default.

    Returns:
        [`TrainResult`]

    Raises:
        ValueError: settings that contradict each other, data that does not fit the model, or `output_dir` is the model's
            folder, or holds checkpoints and `resume=never`.
        FileNotFoundError: a path does not exist.
        OSError: `output_dir` cannot be written, its disk is full, or another run uses it.
    """
    args = _arguments(recipe, overrides)
    with output_dir_lock(args.output_dir) if args.process_index == 0 else nullcontext():
        return _train(args, callbacks, console)


def _arguments(recipe, overrides) -> LlavaTrainingArguments:
    if overrides and not isinstance(recipe, str | os.PathLike):
        raise ValueError("overrides apply to a recipe file; change the settings instead.")
    if isinstance(recipe, dict):
        recipe = LlavaTrainingArguments(**recipe)
    args = copy.copy(recipe) if isinstance(recipe, LlavaTrainingArguments) else parse_recipe(recipe, overrides)
    if args.output_is_default:
        raise ValueError("output_dir is not set. Choose the folder of the result: output_dir=runs/my-run.")
    return args


def _preflight(args: LlavaTrainingArguments, callbacks: Sequence[TrainerCallback]) -> Path | None:
    """
    Raise what would otherwise fail after a model has been loaded, or after the first evaluation (settings have been checked against
    each other by [`LlavaTrainingArguments`]). Returns the checkpoint from which the run resumes, if there is one.
    """
    for callback in get_reporting_integration_callbacks(args.report_to):
        try:
            callback()
        except RuntimeError as error:
            raise ImportError(f"report_to={','.join(args.report_to)}: {error} Or set report_to=none.") from error
    metric = args.metric_for_best_model or "loss"
    if metric.removeprefix("eval_") != "loss" and not (args.benchmarks or callbacks):
        raise ValueError(
            f"metric_for_best_model={metric}, but an evaluation gives the loss alone. Set metric_for_best_model=loss, or "
            "benchmarks, whose scores are metrics."
        )
    base, _, _ = base_and_adapter(args)
    for name, place in (("model", args.model), ("model's base", base), ("projector", args.projector)):
        if place and os.path.isdir(place) and os.path.realpath(place) == os.path.realpath(args.output_dir):
            raise ValueError(
                f"output_dir={args.output_dir} is the folder of the {name}, whose files the run would replace. Choose another."
            )
    checkpoint = checkpoint_to_resume(args)
    if checkpoint is not None:
        keep_resolved(args, checkpoint)
        changed = changed_settings(args, checkpoint)
        if others := [f"{name} {changed[name]}" for name in TRAINED_PARTS if name in changed]:
            raise ValueError(
                f"{checkpoint} cannot be resumed: this run trains other weights ({'; '.join(others)}). Restore the settings, or "
                "choose another output_dir."
            )
    return checkpoint


TRAINED_PARTS = (
    "stage", "adapter", "lora_r", "lora_target", "lora_bias", "use_dora", "train_projector", "train_vision_tower",
    "lora_vision_tower",
)  # fmt: skip
"""Settings that decide which weights are trained; a checkpoint with other values holds no state for them."""


def _check_sharding(trainer: LlavaTrainer, checkpoint: Path) -> None:
    """Raise ValueError where a checkpoint is sharded and this run is not, or the reverse; the number of processes is free."""
    is_sharded = is_sharded_checkpoint(checkpoint)
    if not trainer.is_deepspeed_enabled and is_sharded != trainer.saves_shards:
        was, now = ("sharded by FSDP2", "is not sharded") if is_sharded else ("not sharded", "is sharded by FSDP2")
        raise ValueError(
            f"{checkpoint} is {was}, and this run {now}: the optimizer state cannot be read. Launch it as before (the number of "
            "processes may differ), or choose another output_dir."
        )


def _train(args: LlavaTrainingArguments, callbacks: Sequence[TrainerCallback], console: Any) -> TrainResult:
    checkpoint = _preflight(args, callbacks)
    train_dataset, eval_dataset = load_datasets(args)  # before the model: a mistyped path is reported at once
    set_seed(args.seed)  # before the LoRA weights are drawn
    model, processor = load_model_and_processor(args)

    if not any(isinstance(callback, DurationCallback) for callback in callbacks):  # a trial has its own
        callbacks = [*callbacks, DurationCallback(args.num_train_epochs, args.max_steps)]
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
    changed = changed_settings(trainer.args, checkpoint) if checkpoint is not None else {}
    if changed and args.process_index == 0:
        listed = "; ".join(f"{name} {change}" for name, change in changed.items())
        logger.warning("Resuming from %s with other settings: %s.", checkpoint, listed)

    metrics: dict[str, float] = {}
    with full_disk_explained(args.output_dir):
        has_ended = checkpoint is not None and _is_finished(trainer, checkpoint)
        if has_ended:
            logger.warning(
                "%s is the last of a finished run: the result is written again without training.", checkpoint
            )
            trainer.restore_result(checkpoint)
        else:
            if checkpoint is not None:
                _check_sharding(trainer, checkpoint)
            output = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            metrics |= output.metrics
            _save_metrics(trainer, "train", output.metrics)
        # FSDP2 shards a model only together with an optimizer; a finished run was evaluated at its end
        if eval_dataset is not None and not (has_ended and trainer.is_fsdp_enabled):
            evaluated = trainer.evaluate()
            metrics |= evaluated
            _save_metrics(trainer, "eval", evaluated)
        _save_result(trainer)
    if dropped := getattr(trainer.data_collator, "dropped", None):  # malformed rows were reported when they were read
        logger.warning("While training: %s. `llava data check` lists every such sample.", summarize_drops(dropped))
    written = trainer.base_generation_config if args.adapter != "none" else core_model(trainer.model).generation_config
    needed = missing_stop(written, processor)
    if needed and args.stage == "finetune" and args.process_index == 0:
        logger.warning(
            f"Stock transformers does not know where this model's answers end. Pass {needed} to model.generate(…) as arguments"
            f"{' together with tokenizer=…' if 'stop_strings' in needed else ''}, and to a pipeline as generate_kwargs={{…}} (it "
            "ignores them as arguments of its own). llava chat and llava eval need nothing."
        )
    return TrainResult(
        output_dir=Path(args.output_dir),
        kind="adapter" if args.adapter != "none" else "projector" if args.stage == "pretrain" else "full",
        global_step=trainer.state.global_step,
        metrics=metrics,
        log_history=trainer.state.log_history,
        resumed_from=checkpoint,
    )


def _is_finished(trainer: LlavaTrainer, checkpoint: Path) -> bool:
    """Whether a checkpoint is the last of a run: all steps done, or stopped early. `Trainer` would train one step more."""
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
    max_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    if state["global_step"] >= max_steps:
        return True
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return bool(control.get("should_training_stop")) and state["global_step"] < state["max_steps"]


@contextmanager
def full_disk_explained(output_dir: str | os.PathLike) -> Iterator[None]:
    """OSError, with the checkpoint to resume from, in place of what safetensors, tokenizers, torch and the system raise on a full disk."""
    try:
        yield
    except Exception as error:  # tokenizers raise a bare Exception, torch's writer a RuntimeError
        cause = " ".join(str(error).split())
        if not any(sign in cause for sign in _FULL):
            raise
        last = find_resumable_checkpoint(output_dir)
        kept = f"The last complete checkpoint is {last.name}" if last else "There is no complete checkpoint yet"
        raise OSError(
            f"{output_dir} could not be written: {cause}. {shutil.disk_usage(output_dir).free / 2**30:.1f} GiB are free. {kept}. "
            "Free some space (or set save_total_limit, save_steps) and run the same command again."
        ) from error


_FULL = [*map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)), "PytorchStreamWriter", "inline_container"]


def record_data(sources: str | list[str] | dict[str, str] | None, dataset: Any = None) -> dict[str, Any]:
    """
    The data of a run: each source with the SHA-256 of its file, and the number of samples. A folder or a pattern is hashed by the
    names and sizes of its files; data on the Hub has no hash.
    """
    if isinstance(sources, str):
        sources = [sources]
    elif isinstance(sources, dict):
        sources = list(sources.values())
    record: dict[str, Any] = {"sources": [{"name": str(s), "sha256": _hash(str(s))} for s in sources or []]}
    if getattr(dataset, "dropped", None):
        record["dropped"] = dict(dataset.dropped)
    if hasattr(dataset, "__len__"):
        record["num_samples"] = len(dataset)
    return record


def _hash(source: str) -> str | None:
    path = Path(source).expanduser()
    if path.is_file():
        return sha256_of(path)
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    files = sorted(p for p in found if p.is_file())
    listing = "\n".join(f"{p.relative_to(path) if path.is_dir() else p} {p.stat().st_size}" for p in files)
    return hashlib.sha256(listing.encode()).hexdigest() if files else None


def _save_metrics(trainer: LlavaTrainer, split: str, metrics: dict[str, float]) -> None:
    """As `Trainer.save_metrics`, which on a full disk leaves an empty `all_results.json` and fails at it in the next run."""
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    try:
        earlier = json.loads((folder / "all_results.json").read_text("utf-8"))
    except (OSError, ValueError):
        earlier = {}
    for name, content in ((f"{split}_results.json", metrics), ("all_results.json", {**earlier, **metrics})):
        write_atomic(folder / name, json.dumps(content, indent=4, sort_keys=True) + "\n")


def _save_result(trainer: LlavaTrainer) -> None:
    """Write the result: a full model in the 16-bit dtype of the run, as published checkpoints are; checkpoints keep float32."""
    args = trainer.args
    if args.adapter == "none" and args.stage == "finetune" and not trainer.is_fsdp_enabled:
        cast_weights(trainer.accelerator.unwrap_model(trainer.model), args.compute_dtype)
    trainer.save_state()
    trainer.save_model()
