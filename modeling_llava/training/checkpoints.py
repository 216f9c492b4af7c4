"""
A run's output folder, and how weights and state are written there and come back (its place in the data: batches.py).
`_save_checkpoint` itself is `Trainer`'s.

Under FSDP2 each process writes its own shard:

    checkpoint-N/pytorch_model_fsdp_0/   __0_0.distcp, __1_0.distcp, …, .metadata (written last)
                 optimizer_0/            the same, of the optimizer
                 …                       processor, recipe and what else every checkpoint holds

`Trainer` saves no weights at the end of such a run, and in its checkpoints the frozen ones too.
"""

import json
import logging
import os
import platform
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from transformers import GenerationConfig, Trainer
from transformers.trainer import FSDP_MODEL_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..compat import set_last_learning_rate
from ..constants import recorded_versions
from ..data.schema import summarize_drops
from ..io.checkpoints import (
    PROJECTOR_CONFIG_NAME,
    PROJECTOR_WEIGHTS_NAME,
    RUN_RECORD_NAME,
    component_of,
    load_full_weights,
    load_projector,
    save_projector,
)
from ..io.files import lock, safetensors_header, write_atomic
from ..text.stops import add_generation_stop, note_generation_stop
from .arguments import LlavaTrainingArguments
from .callbacks import SpeedCallback
from .recipes import write_recipe
from .setup import core_model, finish_adapter_folder, is_peft, load_unfinished


logger = logging.getLogger(__name__)

RECIPE_NAME = "recipe.yaml"

SHARDS_NAME = f"{FSDP_MODEL_NAME}_0"
"""In a sharded checkpoint: the weights, under the name that accelerate's own tools expect."""

WAIT_FOR_WORKERS = 15.0
"""Seconds that a new run waits for the lock: the data loader's workers outlive a killed process by five."""


@contextmanager
def output_dir_lock(folder: str | os.PathLike) -> Iterator[None]:
    """
    Create an output folder, check that it can be written, and lock it for this process.

    Raises:
        OSError: another run uses the folder, or it cannot be written.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # fails now, not at the first checkpoint
    descriptor = None if os.name == "nt" else os.open(folder, os.O_RDONLY)  # Windows does not open folders
    try:
        until = time.monotonic() + WAIT_FOR_WORKERS
        while descriptor is not None and not lock(descriptor):
            if time.monotonic() > until:
                raise OSError(
                    f"{folder}: another run uses this folder, and both would resume from, and delete, each other's "
                    "checkpoints. Wait for it, stop it, or choose another output_dir."
                )
            time.sleep(0.2)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
        if is_new:  # a run that failed before it wrote anything leaves no folder
            with suppress(OSError):
                folder.rmdir()


def checkpoint_folders(output_dir: str | os.PathLike) -> list[Path]:
    """All `checkpoint-N` folders of a run, complete or not, the newest first."""
    numbered = [
        (int(match[1]), path)
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def find_resumable_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The newest complete checkpoint of a run, or `None`. One that was being saved when the run was killed is incomplete."""
    for folder in checkpoint_folders(output_dir):
        if (reason := why_incomplete(folder)) is None:
            return folder
        logger.warning(f"{folder} is not complete ({reason}): trying an earlier checkpoint.")
    return None


def why_incomplete(checkpoint: str | os.PathLike) -> str | None:
    """
    Why a run cannot be resumed from a checkpoint; `None` if it can. `trainer_state.json` is written last: if it parses, everything was
    written. Weights and optimizer state are checked too (without reading them), for copies that were cut off.
    """
    checkpoint = Path(checkpoint)
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))["global_step"]
    except FileNotFoundError:
        return f"{TRAINER_STATE_NAME} is missing"
    except (ValueError, OSError, KeyError, TypeError) as error:
        return f"{TRAINER_STATE_NAME} does not parse: {error}"
    for file in checkpoint.glob("*.safetensors"):
        try:
            safetensors_header(file)
        except ValueError:
            return f"{file.name} is cut off"
    for index in checkpoint.glob("*.safetensors.index.json"):
        for name in set(json.loads(index.read_text("utf-8"))["weight_map"].values()):
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
    # plain, FSDP (a file or a folder), DeepSpeed
    for what, names in (
        ("weights", ("*.safetensors", "pytorch_model_fsdp*", "global_step*")),
        ("optimizer state (save_only_model)", ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")),
        ("state of the schedule", (SCHEDULER_NAME, "global_step*")),  # without it Trainer resumes without either
    ):
        if not any(any(checkpoint.glob(name)) for name in names):
            return f"it holds no {what}"
    for shards in (*checkpoint.glob("pytorch_model_fsdp_*"), *checkpoint.glob("optimizer_*")):
        if shards.is_dir() and not (shards / ".metadata").is_file():
            return f"{shards.name} is cut off"
    for file in (*checkpoint.glob("*.pt"), *checkpoint.glob("rng_state*.pth")):
        if not zipfile.is_zipfile(file):
            return f"{file.name} is cut off"
    return None


def checkpoint_to_resume(args: LlavaTrainingArguments) -> Path | None:
    """
    The checkpoint that `resume` asks for; `None` for a new run.

    Raises:
        FileNotFoundError: `resume` is a path that does not exist.
        ValueError: that checkpoint is not complete; or `resume="never"`, and `output_dir` holds checkpoints.
    """
    if args.resume == "auto":
        return find_resumable_checkpoint(args.output_dir)
    if args.resume == "never":
        if left := checkpoint_folders(args.output_dir):
            raise ValueError(
                f"resume=never, but {args.output_dir} holds {left[0].name} of an earlier run, from which this run "
                "would resume later. Choose another output_dir, or delete it."
            )
        return None
    checkpoint = Path(args.resume)
    if not checkpoint.is_dir():
        raise FileNotFoundError(
            f"resume={args.resume}: there is no such checkpoint. Set auto, never, or the path of one."
        )
    if reason := why_incomplete(checkpoint):
        raise ValueError(f"resume={args.resume}: the checkpoint is not complete ({reason}). Choose an earlier one.")
    return checkpoint


def changed_settings(args: LlavaTrainingArguments, checkpoint: Path) -> dict[str, str]:
    """Settings that differ from those of a checkpoint, as "before → now"; empty if it has no recipe."""
    before = _recipe_of(checkpoint)
    if not before:
        return {}
    # settings of ours that are newer than the run have their default
    before, now = (
        {s.name: s.default for s in fields(args) if s.metadata.get("group") == "llava"} | before,
        args.to_recipe(),
    )
    return {
        name: f"{before.get(name)!r} → {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in ("resume", "output_dir")
    }


def keep_resolved(args: LlavaTrainingArguments, checkpoint: Path) -> None:
    """Resolve what is `auto` as the run did before it stopped, in place."""
    before = _recipe_of(checkpoint)
    for name in ("activation_checkpointing", "eval_size"):
        if getattr(args, name) == "auto" and name in before:
            setattr(args, name, before[name])


def _recipe_of(checkpoint: Path) -> dict[str, Any]:
    """Not by `read_recipe`, which refuses a setting of another version of this package; empty if there is none."""
    file = checkpoint / RECIPE_NAME
    return (yaml.safe_load(file.read_text("utf-8")) if file.is_file() else None) or {}


def write_run_record(
    folder: str | os.PathLike, args: LlavaTrainingArguments, data: dict[str, Any] | None, base: dict[str, Any] | None
) -> None:
    """
    Write `recipe.yaml` (every setting, resolved) and `run.json`: versions, machine, the data ([`~modeling_llava.training.run.record_data`])
    and, of an adapter, the weights on which it was trained ([`~modeling_llava.io.checkpoints.base_record`]).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(args.to_recipe(), folder / RECIPE_NAME, "The resolved recipe of this run: llava train recipe.yaml")
    record = {
        "versions": recorded_versions(),
        "machine": platform.platform(),
        "devices": args.world_size * max(args.n_gpu, 1),
        "data": data or {},
        **({"base": base} if base else {}),
    }
    write_atomic(folder / RUN_RECORD_NAME, json.dumps(record, indent=2) + "\n")


# Saving and loading


class CheckpointingTrainer(Trainer):
    """The part of [`LlavaTrainer`] that saves, pushes, and resumes."""

    args: LlavaTrainingArguments
    data_record: dict[str, Any] | None
    base_generation_config: GenerationConfig
    base_record: dict[str, Any] | None = None
    initial_lora: dict[str, torch.Tensor]
    _num_supervised: int | torch.Tensor = 0
    """Supervised tokens trained on so far, by all processes together."""
    _speed: SpeedCallback
    _use_cache: dict[str, Any]
    """`use_cache` of the model's configuration as it was given, empty if it had none: `Trainer` writes its own into it."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if not self.args.should_save:
            return
        if self.args.stage == "pretrain":
            save_projector(self.accelerator.unwrap_model(self.model), folder, state_dict, self.args.model_revision)
        else:
            core, processor = core_model(self.model), self.processing_class
            if processor is not None and self.args.adapter == "none":
                add_generation_stop(core.generation_config, processor)
            settings = vars(core.config)
            in_training = dict(settings)
            settings.pop("use_cache", None)
            settings |= self._use_cache
            try:
                super()._save(str(folder), state_dict)
            finally:
                settings |= in_training
            if self.args.adapter != "none":
                finish_adapter_folder(folder, self.initial_lora)
                if processor is not None:
                    note_generation_stop(folder, self.base_generation_config, processor)
        self._save_companions(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`, which writes nothing here where checkpoints are sharded: not even the result of a run."""
        self._check_weights()
        is_checkpoint = _internal_call and output_dir is not None  # not the upload of a result
        if is_checkpoint and self.args.should_save:
            # A finished checkpoint is one with this file, which is written last: none may be left from before.
            Path(output_dir, TRAINER_STATE_NAME).unlink(missing_ok=True)
        if not self.saves_shards:
            super().save_model(output_dir, _internal_call)
            return
        if is_checkpoint:  # its weights come with the optimizer
            if self.args.should_save:
                self._save_companions(Path(output_dir))
        else:
            self._save(output_dir, gather_weights(self.model, self.args))
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _check_weights(self) -> None:
        """Raise ValueError if nothing was trained on or weights are not finite: saving would replace a good checkpoint."""
        if not self._speed.num_batches:
            return
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        own = [(name, p.to_local() if hasattr(p, "to_local") else p) for name, p in trained]  # this process's shard
        broken = [name for name, weights in own if not weights.isfinite().all()]
        num_broken = torch.tensor(len(broken), device=self.args.device)
        if self.args.is_sharded:  # every process saves then; otherwise one may save alone, and has all weights
            num_broken = self.accelerator.reduce(num_broken, reduction="sum")
        if num_broken:
            raise self._diverged(f"weights are not finite{f' ({broken[0]})' if broken else ''}")
        if not self._num_supervised:
            dropped = getattr(self.data_collator, "dropped", None)
            raise ValueError(
                f"nothing was learnt in {self.state.global_step} optimizer steps, so nothing is written: no sample could be "
                f"used. {summarize_drops(dropped) + '. ' if dropped else ''}`llava data check` says why."
            )

    def _diverged(self, what: str) -> ValueError:
        last = find_resumable_checkpoint(self.args.output_dir)
        kept = f"{last} is the last complete checkpoint" if last else "there is no complete checkpoint yet"
        return ValueError(
            f"at step {self.state.global_step} {what}: the run has diverged, and nothing more is written; {kept}. Give the "
            f"same command with a lower learning_rate (it is {self.args.learning_rate:g}), which resumes from there, or "
            "start again in another output_dir."
        )

    @property
    def saves_shards(self) -> bool:
        """Whether each process writes its own part of a checkpoint (FSDP2)."""
        return self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def _save_companions(self, folder: Path) -> None:
        """What a checkpoint holds besides its weights."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)
        write_run_record(folder, self.args, self.data_record, self.base_record)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.saves_shards:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_shards(self.model, output_dir, self.args)
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # what says that a checkpoint is complete comes after every process's part

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in `Trainer`, which copies the weights of a checkpoint by their names, and knows no projector."""
        if self.args.stage == "pretrain" and self.is_world_process_zero():
            for name in (PROJECTOR_CONFIG_NAME, PROJECTOR_WEIGHTS_NAME):
                shutil.copy(os.path.join(checkpoint_folder, name), self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def push_to_hub(self, *args, **kwargs):
        """As in `Trainer`; what was trained lies in the output folder, and an upload that fails says so."""
        try:
            return super().push_to_hub(*args, **kwargs)
        except Exception as error:
            folder, repo = self.args.output_dir, self.hub_model_id
            raise OSError(
                f"the result lies in {folder}, but could not be uploaded to {repo}: {' '.join(str(error).split())} Give the "
                f"same command again, which uploads and does not train again, or llava publish {folder} {repo}."
            ) from error

    def restore_result(self, checkpoint: str | os.PathLike) -> None:
        """Take over weights and state from the last checkpoint of a finished run, as if it had just ended."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_weights(resume_from_checkpoint, self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_weights(self.state.best_model_checkpoint, self.model):
            super()._load_best_model()

    def _load_weights(self, folder: str, model: nn.Module) -> bool:
        """Whether the weights were loaded here. PEFT, and sharded engines that write their own files, load as in `Trainer`."""
        if is_sharded_checkpoint(folder):
            load_shards(model, folder, self.args)
        elif self.initial_lora:
            load_unfinished(model, folder, self.initial_lora)
        elif self.is_deepspeed_enabled or self.is_fsdp_enabled or is_peft(self.model) or not os.path.isdir(folder):
            return False
        elif os.path.isfile(os.path.join(folder, PROJECTOR_CONFIG_NAME)):
            load_projector(self.accelerator.unwrap_model(model), folder)
        else:
            load_full_weights(self.accelerator.unwrap_model(model), folder)
        return True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in `Trainer`, but with the learning rates and weight decay of this run, not those of the one that stopped."""
        if checkpoint is None or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        groups, names = self.optimizer.param_groups, ("initial_lr", "weight_decay")
        settings = [{name: group[name] for name in names if name in group} for group in groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        page_optimizer_state(getattr(self.optimizer, "optimizer", self.optimizer))
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        for number, (group, ours) in enumerate(zip(self.optimizer.param_groups, settings)):
            loaded, rate = group.get("initial_lr"), ours.get("initial_lr")
            group.update(ours)
            if rate != loaded and loaded and isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
                group["lr"] *= rate / loaded
                scheduler.base_lrs[number] = rate
                set_last_learning_rate(scheduler, number, group["lr"])


@torch.no_grad()
def page_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Page the state of a bitsandbytes optimizer again: a checkpoint's is read into memory of the device."""
    if getattr(optimizer, "is_paged", False):
        for parameter, state in optimizer.state.items():
            for name in state.keys() & {"state1", "state2"}:
                buffer = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
                state[name] = buffer.copy_(state[name])


# Sharded checkpoints


def is_sharded_checkpoint(folder: str | os.PathLike) -> bool:
    return (Path(folder) / SHARDS_NAME).is_dir()


def weights_to_save(model: nn.Module, args: LlavaTrainingArguments) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint by their names in memory, not copied: all of a full model, otherwise what is trained."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    weights, trained = get_model_state_dict(model), {n for n, p in model.named_parameters() if p.requires_grad}
    if args.adapter != "none":
        return {name: w for name, w in weights.items() if name in trained or ".modules_to_save." in name}
    if args.stage == "pretrain":
        parts = set(map(component_of, trained))
        return {name: w for name, w in weights.items() if component_of(name) in parts}
    return weights


def save_shards(model: nn.Module, folder: str | os.PathLike, args: LlavaTrainingArguments) -> None:
    """Write the weights of a checkpoint, each process its shard. Every process must call it."""
    from torch.distributed import checkpoint

    with _one_error():
        checkpoint.save({"model": weights_to_save(model, args)}, checkpoint_id=Path(folder) / SHARDS_NAME)


def load_shards(model: nn.Module, folder: str | os.PathLike, args: LlavaTrainingArguments) -> None:
    """Read what [`save_shards`] wrote, into a model that is sharded over any number of processes, or not at all."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    weights = weights_to_save(model, args)
    with _one_error():
        checkpoint.load({"model": weights}, checkpoint_id=Path(folder) / SHARDS_NAME)
    set_model_state_dict(model, weights, options=StateDictOptions(strict=False))


@torch.no_grad()
def gather_weights(model: nn.Module, args: LlavaTrainingArguments) -> dict[str, torch.Tensor]:
    """Whole weights of a run's result in the first process's main memory, gathered one by one. Every process must call it."""
    from torch.distributed.tensor import DTensor

    is_full = args.adapter == "none" and args.stage == "finetune"
    gathered: dict[str, torch.Tensor] = {}
    for name, weight in weights_to_save(model, args).items():
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if args.should_save:  # in 16 bit, as published checkpoints are
            gathered[name] = whole.to("cpu", args.compute_dtype if is_full and whole.is_floating_point() else None)
    return gathered


@contextmanager
def _one_error() -> Iterator[None]:
    """`OSError` in place of torch's own exception, which no `except Exception` catches."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"process {rank}: {' '.join(str(cause).split())}") from error
