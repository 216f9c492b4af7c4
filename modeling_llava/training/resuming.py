"""Going on with a run: from which checkpoint, whether it fits the settings, and whether anything is left to do."""

import json
import logging
from pathlib import Path

import yaml
from transformers.trainer import TRAINER_STATE_NAME

from .arguments import LlavaTrainingArguments
from .distributed import is_sharded_checkpoint
from .output_folder import checkpoint_folders, find_resumable_checkpoint, why_incomplete
from .run_record import RECIPE_NAME
from .trainer import LlavaTrainer


logger = logging.getLogger(__name__)


def checkpoint_to_resume(args: LlavaTrainingArguments) -> Path | None:
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


def is_finished(trainer: LlavaTrainer, checkpoint: Path) -> bool:
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


def check_sharding(trainer: LlavaTrainer, checkpoint: Path) -> None:
    """Raise ValueError unless a checkpoint is of this run's kind; the number of processes does not matter."""
    is_sharded = is_sharded_checkpoint(checkpoint)
    if trainer.is_deepspeed_enabled or is_sharded == trainer.saves_shards:
        return
    was, now = ("in shards, by FSDP2", "is not sharded") if is_sharded else ("in one piece", "is sharded by FSDP2")
    raise ValueError(
        f"{checkpoint} was written {was}, and this run {now}: its optimizer's state cannot be read. Launch it as it was "
        "launched before (the number of processes may be another; FSDP2 takes one too), or choose another output_dir."
    )


TRAINED_PARTS = ("stage", "adapter", "lora_r", "lora_target", "lora_bias", "use_dora", "train_vision_tower")
"""Settings that decide which weights there are to train: a checkpoint written with others holds no state for them."""


def check_trained_parts(args: LlavaTrainingArguments, checkpoint: Path) -> None:
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


def report_changes(args: LlavaTrainingArguments, checkpoint: Path) -> None:
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


__all__ = [
    "TRAINED_PARTS",
    "check_sharding",
    "check_trained_parts",
    "checkpoint_to_resume",
    "is_finished",
    "report_changes",
]
