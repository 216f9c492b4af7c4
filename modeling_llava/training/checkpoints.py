"""
How a run's weights and state are written and read. `_save_checkpoint` itself is `Trainer`'s.

Under FSDP2 each process writes its own shard:

    checkpoint-N/pytorch_model_fsdp_0/   __0_0.distcp, __1_0.distcp, …, .metadata (written last)
                 optimizer_0/            the same, of the optimizer
                 …                       processor, recipe and what else every checkpoint holds

`Trainer` saves no weights at the end of such a run, and in its checkpoints the frozen ones too.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from transformers import GenerationConfig, Trainer
from transformers.trainer import FSDP_MODEL_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import TrainerState

from ..compat import set_last_learning_rate
from ..data.schema import summarize_drops
from ..io.checkpoints import (
    PROJECTOR_CONFIG_NAME,
    PROJECTOR_WEIGHTS_NAME,
    component_of,
    load_full_weights,
    load_projector,
    save_projector,
)
from ..text.stops import add_generation_stop, note_generation_stop
from .arguments import LlavaTrainingArguments
from .callbacks import SpeedCallback
from .resume import find_resumable_checkpoint, write_run_record
from .setup import core_model, finish_adapter_folder, is_peft, load_unfinished


logger = logging.getLogger(__name__)

ABSENT = object()

SHARDS_NAME = f"{FSDP_MODEL_NAME}_0"
"""In a sharded checkpoint: the weights, under the name that accelerate's own tools expect."""


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
    _use_cache: Any
    """`use_cache` of the model's configuration as it was given, or `ABSENT`: `Trainer` writes its own into it."""

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
            in_training = _set_or_remove(core.config, "use_cache", self._use_cache)
            try:
                super()._save(str(folder), state_dict)
            finally:
                _set_or_remove(core.config, "use_cache", in_training)
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
        """Raise ValueError if nothing was trained on so far or weights are not finite: saving would replace a good checkpoint."""
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
        """As in `Trainer`, but learning rates and weight decay are this run's, and not those of the run that stopped."""
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


def _set_or_remove(config: Any, name: str, value: Any) -> Any:
    """Set an attribute, or remove it if `value` is `ABSENT`; returns what it was."""
    before = vars(config).get(name, ABSENT)
    if value is not ABSENT:
        setattr(config, name, value)
    elif before is not ABSENT:
        delattr(config, name)
    return before


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

    weights = get_model_state_dict(model)
    if args.adapter != "none":
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {name: w for name, w in weights.items() if name in trained or ".modules_to_save." in name}
    if args.stage == "pretrain":
        trained = {component_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {name: w for name, w in weights.items() if component_of(name) in trained}
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
        if not args.should_save:
            continue
        if is_full and whole.is_floating_point():
            whole = whole.to(args.compute_dtype)  # as published checkpoints are
        gathered[name] = whole.cpu()
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
