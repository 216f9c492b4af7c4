"""`train(recipe)`: from a recipe to trained weights, a record of the run and its loss curve."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    AutoModelForImageTextToText,
    EarlyStoppingCallback,
    PreTrainedModel,
    ProcessorMixin,
    TrainerCallback,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from ..checkpoints import (
    base_model_of,
    base_revision_of,
    checkpoint_kind,
    four_bit_config,
    has_processor,
    load_processor,
    load_projector,
)
from .adapters import load_adapter
from .arguments import LlavaTrainingArguments
from .callbacks import LOSS_CURVE_NAME, LossCurveCallback, PreviewCallback
from .recipes import parse_recipe, write_whole
from .run_record import (
    RECIPE_NAME,
    checkpoint_folders,
    disk_errors_explained,
    find_resumable_checkpoint,
    record_data,
    why_incomplete,
)
from .sharding import is_sharded_checkpoint
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
        ValueError: settings that contradict each other, data that does not fit the model, or `output_dir` holds
            checkpoints and `resume=never`.
        FileNotFoundError: a path does not exist.
    """
    args = _arguments(recipe, overrides)
    if args.output_is_default:
        raise ValueError("output_dir is not set. Say where the weights are to be written: output_dir=runs/my-run.")
    _check_reporting(args)
    _check_metric(args, callbacks)
    base_and_adapter(args)  # its errors say more than what a checkpoint of another run would
    checkpoint = _checkpoint_to_resume(args)
    if checkpoint is not None:
        _check_trained_parts(args, checkpoint)
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
        _report_changes(args, checkpoint)

    metrics: dict[str, float] = {}
    with disk_errors_explained(args.output_dir, only_full=True):
        is_finished = checkpoint is not None and _is_finished(trainer, checkpoint)
        if is_finished:
            logger.warning(
                "%s is the end of the run already: nothing is trained, the result is written again.", checkpoint
            )
            trainer.restore_result(checkpoint)
        else:
            if checkpoint is not None:
                _check_sharding(trainer, checkpoint)
            output = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            metrics |= output.metrics
            _save_metrics(trainer, "train", output.metrics)
        # FSDP2 shards a model only together with an optimizer: a finished run has been evaluated at its end
        if eval_dataset is not None and not (is_finished and trainer.is_fsdp_enabled):
            evaluated = trainer.evaluate()
            metrics |= evaluated
            _save_metrics(trainer, "eval", evaluated)
        save_result(trainer)
    _report_drops(trainer)
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
        write_whole(folder / name, (json.dumps(content, indent=4, sort_keys=True) + "\n").encode())


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


def base_and_adapter(args: LlavaTrainingArguments) -> tuple[str, str | None, str | None]:
    """
    Where the weights of a run lie: the full model, its revision, and the adapter that is trained further, if any.

    Raises:
        ValueError: `model` is not set, is a pretrain run's output, or an adapter that the settings do not fit.
        FileNotFoundError: `model` does not exist.
    """
    if args.model is None:
        raise ValueError("model is not set. Give a LLaVA folder or Hub name, such as llava-hf/llava-1.5-7b-hf.")
    kind = checkpoint_kind(args.model, args.model_revision)
    if kind == "projector":
        raise ValueError(
            f"model={args.model} is the output of a pretrain run: a projector. "
            f"Set projector={args.model} and model={base_model_of(args.model)}."
        )
    if kind == "adapter":
        if args.adapter == "none":
            raise ValueError(
                f"model={args.model} is an adapter, but adapter=none. Set adapter=lora or qlora to train it further, "
                "or make a full model of it first (llava merge)."
            )
        return (
            base_model_of(args.model, args.model_revision),
            base_revision_of(args.model, args.model_revision),
            args.model,
        )
    return args.model, args.model_revision, None


def load_model_and_processor(args: LlavaTrainingArguments) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    The model of a run, with the pretrain run's projector and the adapter to be trained further where they are asked
    for, and its processor.

    Weights come in the dtype of their file: trained ones become float32 later, without a loss on the way.

    Raises:
        ValueError: `model` is a pretrain run's output or an adapter that the settings do not fit.
        FileNotFoundError: `model` or `projector` does not exist.
    """
    base, revision, adapter_path = base_and_adapter(args)
    own = args.model if has_processor(args.model, args.model_revision) else base
    processor = load_processor(
        args.processor or own, args.model_revision if own == args.model and not args.processor else None
    )
    if args.chat_template is not None:
        from ..processing_llava import load_chat_template

        processor.chat_template = load_chat_template(args.chat_template)
    settings: dict[str, Any] = {"dtype": "auto", "revision": revision}
    if args.attn_implementation is not None:
        settings["attn_implementation"] = args.attn_implementation
    if args.adapter == "qlora":
        settings["quantization_config"] = four_bit_config(args.compute_dtype, args.quant_type, args.double_quant)
    if args.device.type == "cuda" and not args.fsdp and not args.deepspeed:
        settings["device_map"] = {"": args.device}  # straight to this process's GPU: main memory may be too small
    model = AutoModelForImageTextToText.from_pretrained(base, **settings)

    if args.projector is not None:
        replaced = load_projector(model, args.projector)
        if args.adapter != "none" and "vision_tower" in replaced and not args.train_vision_tower:
            raise ValueError(
                f"projector={args.projector} brings a trained vision tower, which an adapter would not hold. Make a "
                "full model of it first (llava merge), or set train_vision_tower=true."
            )
    if adapter_path is not None:
        model = load_adapter(model, adapter_path, args, args.model_revision)
    return model, processor


def load_datasets(args: LlavaTrainingArguments) -> tuple[Any, Any]:
    """
    Training and evaluation data of a run: conversations, chosen and split as the settings say.

    Raises:
        ValueError: `data` is not set, or nothing is left of it.
    """
    from ..data.sources import load_conversations

    if args.data is None:
        raise ValueError("data is not set. Give a LLaVA JSON file, or a dataset with `messages` and `images`.")
    seed = args.seed if args.data_seed is None else args.data_seed
    reading = {"image_folder": args.image_folder, "on_bad_sample": args.on_bad_sample}
    train_dataset = load_conversations(
        args.data,
        split=args.data_split,
        types=args.only_types,
        streaming=args.streaming,
        shuffle_buffer=args.shuffle_buffer if args.streaming else 0,
        seed=seed,
        **reading,
    )
    if args.only_types is not None and not args.streaming:
        absent = sorted(set(args.only_types) - set(train_dataset.types))
        if absent:
            raise ValueError(f"only_types names {', '.join(absent)}, but no sample of {args.data} has that type.")
    if args.max_samples is not None and args.max_samples < len(train_dataset):
        train_dataset = train_dataset.select(_shuffled(len(train_dataset), seed)[: args.max_samples])
    eval_dataset = None
    if args.eval_data is not None:
        eval_dataset = load_conversations(args.eval_data, split=args.data_split, types=args.only_types, **reading)
    elif args.eval_size is not None:
        total = len(train_dataset)
        held_out = round(args.eval_size * total) if args.eval_size < 1 else int(args.eval_size)
        if not 0 < held_out < total:
            raise ValueError(f"eval_size={args.eval_size} holds out {held_out} of {total} samples. Choose another.")
        order = _shuffled(total, seed)
        eval_dataset = train_dataset.select(sorted(order[:held_out]))
        train_dataset = train_dataset.select(sorted(order[held_out:]))
    return train_dataset, eval_dataset


def _shuffled(total: int, seed: int) -> list[int]:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()


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


def _checkpoint_to_resume(args: LlavaTrainingArguments) -> Path | None:
    if args.resume == "auto":
        return find_resumable_checkpoint(args.output_dir)
    if args.resume == "never":
        left = checkpoint_folders(args.output_dir)
        if left:
            raise ValueError(
                f"resume=never, but {args.output_dir} holds {left[0].name} of an earlier run, which a later resume "
                "would take for this run's. Choose another output_dir, or delete it."
            )
        return None
    checkpoint = Path(args.resume)
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"resume={args.resume}: there is no such checkpoint (or say auto or never).")
    reason = why_incomplete(checkpoint)
    if reason is not None:
        raise ValueError(f"resume={args.resume}: the checkpoint is not complete ({reason}). Choose an earlier one.")
    return checkpoint


def _is_finished(trainer: LlavaTrainer, checkpoint: Path) -> bool:
    """
    Whether a checkpoint is a run's last: all steps done, or stopped early.

    `Trainer` itself looks only after a step, so that a finished run that is started again would train one step more.
    """
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
    max_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    if state["global_step"] >= max_steps:
        return True
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return bool(control.get("should_training_stop")) and state["global_step"] < state["max_steps"]


def _check_sharding(trainer: LlavaTrainer, checkpoint: Path) -> None:
    """Raise ValueError unless a checkpoint is of this run's kind; the number of processes does not matter."""
    is_sharded = is_sharded_checkpoint(checkpoint)
    if trainer.is_deepspeed_enabled or is_sharded == trainer.saves_shards:
        return
    was, now = ("in shards, by FSDP2", "is not sharded") if is_sharded else ("in one piece", "is sharded by FSDP2")
    raise ValueError(
        f"{checkpoint} was written {was}, and this run {now}: its optimizer's state cannot be read. Launch it as it was "
        "launched before (the number of processes may be another; FSDP2 takes one too), or choose another output_dir."
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


TRAINED_PARTS = ("stage", "adapter", "lora_r", "lora_target", "lora_bias", "use_dora", "train_vision_tower")
"""Settings that decide which weights there are to train: a checkpoint written with others holds no state for them."""


def _check_trained_parts(args: LlavaTrainingArguments, checkpoint: Path) -> None:
    """Raise ValueError where the weights of a checkpoint cannot be those of this run, before a model is loaded."""
    before, now = _recipe_of(checkpoint), args.to_recipe()
    changed = [
        f"{name} {before[name]!r} → {now.get(name)!r}"
        for name in TRAINED_PARTS
        if name in before and before[name] != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{checkpoint} cannot be gone on from: this run trains other weights ({'; '.join(changed)}). Give the settings "
            "back, or choose another output_dir."
        )


def _recipe_of(checkpoint: Path) -> dict:
    # not `read_recipe`: a setting that another version of this package had is no reason not to go on
    file = checkpoint / RECIPE_NAME
    return (yaml.safe_load(file.read_text("utf-8")) if file.is_file() else None) or {}


def _report_changes(args: LlavaTrainingArguments, checkpoint: Path) -> None:
    """Say which settings differ from those with which the checkpoint was written."""
    before, now = _recipe_of(checkpoint), args.to_recipe()
    if args.process_index != 0 or not before:
        return
    changed = [
        f"{name} {before.get(name)!r} → {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in ("resume", "output_dir")
    ]
    if changed:
        logger.warning("Going on from %s with other settings: %s.", checkpoint, "; ".join(changed))


__all__ = ["LOSS_CURVE_NAME", "TrainResult", "load_datasets", "load_model_and_processor", "save_result", "train"]
