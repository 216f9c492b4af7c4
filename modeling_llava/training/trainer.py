"""`LlavaTrainer`: HF's `Trainer` with LLaVA's learning rates, loss, checkpoints and resuming. Its loop is untouched."""

import inspect
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints import (
    PROJECTOR_CONFIG_NAME,
    PROJECTOR_WEIGHTS_NAME,
    load_full_weights,
    load_projector,
    save_projector,
)
from ..constants import IGNORE_INDEX
from ..data.packing import PackedDataset
from ..data.sampler import GroupedSampler
from ..data.schema import summarize_drops
from ..onednn import use_onednn
from . import sharding
from .adapters import finish_adapter_folder
from .arguments import LlavaTrainingArguments
from .batches import SkimmingCollator, arrange, data_seed, even, grouped_sampler, shares_by_itself
from .lean import make_lean
from .mixture import TypeMixtureSampler
from .noise import NoiseBySample
from .output_folder import disk_errors_explained, find_resumable_checkpoint
from .preparation import core_model, is_peft, prepare_model, resolve_packing
from .progress import SpeedCallback
from .run_record import write_run_record
from .stages import optimizer_groups


logger = logging.getLogger(__name__)


class LlavaTrainer(Trainer):
    """
    Trains a LLaVA, ours or stock transformers', as [`LlavaTrainingArguments`] say.

    Beyond [`~transformers.Trainer`]:

    - freezes what the stage freezes, and adds the adapter (unless `model` is PEFT-wrapped already);
    - a learning rate per component;
    - packs samples instead of padding them, groups them by length and modality, and shares streams among processes;
    - `neftune_noise_alpha` is scaled by the length of each sample of a pack;
    - `label_smoothing_factor` is computed in the model's loss (stock forgets to shift the labels of a `llava`);
    - an evaluation of the loss alone builds no logits;
    - a checkpoint holds the processor with its chat template; in the stage `pretrain` it holds what is trained, and
      not the frozen gigabytes;
    - resuming and `load_best_model_at_end` read the weights of a full checkpoint (stock looks for them under other
      names, finds none, and goes on with a warning).

    Args:
        model ([`~transformers.PreTrainedModel`] or `peft.PeftModel`):
            The model. Its parameters are frozen, unfrozen and converted to the dtypes of the run.
        args ([`LlavaTrainingArguments`]):
            The settings.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            A LLaVA processor; needed for conversations, saved with each checkpoint.
        data_collator (`Callable`, *optional*):
            By default a [`LlavaDataCollator`] with the settings of `args`, for datasets of conversations.
        train_dataset, eval_dataset, callbacks, kwargs:
            As in [`~transformers.Trainer`].
    """

    args: LlavaTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: LlavaTrainingArguments,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        data_record: dict[str, Any] | None = None,
        **kwargs,
    ):
        if not isinstance(args, LlavaTrainingArguments):
            raise TypeError(f"LlavaTrainer takes LlavaTrainingArguments, not {type(args).__name__}.")
        if args.fp16 and args.device.type == "cpu":
            raise ValueError("precision=fp16 needs a GPU. On the CPU set precision=fp32, or bf16 (auto takes fp32).")
        # Trainer writes its own `use_cache` into the configuration; what is saved has the model's, or none.
        self._use_cache = vars(model.config).get("use_cache", _ABSENT)
        model = prepare_model(model, args)
        resolve_packing(core_model(model), args, has_own_collator=data_collator is not None)
        if args.lean and not args.torch_compile:
            logger.info("Lean layers: %s.", make_lean(core_model(model).model.language_model))
            if args.device.type == "cpu":
                logger.info("Linear layers computed by oneDNN: %d.", use_onednn(model))
        if data_collator is None and processing_class is not None:
            data_collator = default_collator(processing_class, args, core_model(model))
        self.data_record = data_record
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=None if train_dataset is None else arrange(train_dataset, data_collator, args),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        full = (args.pack_length or args.max_length) * args.train_batch_size if args.packing == "full" else None
        if self.is_fsdp_enabled:
            sharding.configure(self.accelerator, self.model, args)
        self._speed = SpeedCallback(full)
        self.add_callback(self._speed)
        if self.neftune_noise_alpha is not None and args.packing != "none":
            self.add_callback(NoiseBySample(self.neftune_noise_alpha))
            self.neftune_noise_alpha = None
        core = core_model(self.model)
        parameters = inspect.signature(core.forward).parameters
        self._model_skips_logits = "skip_logits" in parameters
        self._model_smooths_labels = "label_smoothing" in parameters
        if self.label_smoother is not None:
            # Trainer would take the labels away from the model, and compare position t with label t.
            self.label_smoother = None
            if not self._model_smooths_labels:
                self.compute_loss_func = _smoothed_loss(args.label_smoothing_factor)

    def create_accelerator_and_postprocess(self) -> None:
        sharding.allow_on_cpu(self.args)
        super().create_accelerator_and_postprocess()

    # Optimizer and data

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """A group per component and weight decay; everything else as `Trainer` has it."""
        trained = self.model if model is None else model
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, trained)
            if not {"params", "model", "optimizer_dict"} & kwargs.keys():  # optimizers that choose by themselves
                groups = optimizer_groups(trained, self.args, self.get_decay_parameter_names(trained))
                self.optimizer_cls_and_kwargs = (optimizer_class, {**kwargs, "params": groups})
                try:
                    return super().create_optimizer(model)
                finally:
                    self.optimizer_cls_and_kwargs = None
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length":
            if self._grouped_sampler is None:
                self._grouped_sampler = grouped_sampler(dataset, self.data_collator, self.args)
            sampler = self._grouped_sampler
        elif self.args.type_weights is not None and not isinstance(dataset, PackedDataset):
            sampler = TypeMixtureSampler.from_dataset(dataset, self.args.type_weights, data_seed(self.args))
        else:
            return super()._get_train_sampler(train_dataset)
        self.pop_callback(_EpochOfSampler)
        self.add_callback(_EpochOfSampler(sampler))
        return sampler

    _grouped_sampler: GroupedSampler | None = None

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        """In order: `Trainer` groups an evaluation as it groups training, by lengths that conversations do not have yet."""
        return torch.utils.data.SequentialSampler(eval_dataset) if hasattr(eval_dataset, "__len__") else None

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ) -> torch.utils.data.DataLoader:
        """As in `Trainer`, but what is evaluated comes out even, and a stream that is shared out already is left so."""
        if description == "Evaluation" or not (is_training or hasattr(dataset, "__len__")):
            dataset = even(dataset, self.data_collator, self.args)
        if not shares_by_itself(dataset):
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        collator = self.data_collator
        if is_training and self.args.dataloader_in_order:
            collator = SkimmingCollator(collator)
            self.pop_callback(_SkimOnResume)
            self.add_callback(_SkimOnResume(collator))
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=is_training and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
        )
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._speed.begin_step()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self._speed.count(batch)
        return batches, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        As in `Trainer`; beside the training loss stands how fast it goes (see [`SpeedCallback`]).

        Raises:
            ValueError: the loss is not finite. (With fp16 that may pass: such a step is left out, and the scale lowered.)
        """
        if not math.isfinite(logs.get("loss", 0.0)) and self.args.precision != "fp16":
            raise self._diverged(f"the loss is {logs['loss']}")
        speed = self._speed.report(self.state, self.args.world_size) if "loss" in logs else {}
        super().log({**logs, **speed}, start_time)

    # Loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.args.label_smoothing_factor and self._model_smooths_labels:
            inputs = {**inputs, "label_smoothing": self.args.label_smoothing_factor}
        if not model.training:
            num_items_in_batch = None  # an evaluation adds up by itself: the mean of the batch alone
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if prediction_loss_only and self._model_skips_logits:
            inputs = {**inputs, "skip_logits": True}
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if loss is not None and inputs.get("labels") is not None:
            count = (inputs["labels"][..., 1:] != IGNORE_INDEX).sum()
            # A stock model's loss of a batch with nothing supervised is not a number
            self._evaluated = (
                self._evaluated + torch.stack([torch.where(count > 0, loss * count, 0.0), count]).double()
            )
        return loss, logits, labels

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        """
        As in `Trainer`, but the loss is the mean over all supervised positions, whatever the batch size, the packing and
        the number of processes. `Trainer` averages the means of batches, a last and smaller one as if it were whole.
        """
        self._evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, count = self.accelerator.reduce(self._evaluated, reduction="sum").tolist()
        if count:
            output.metrics[f"{metric_key_prefix}_loss"] = total / count
        return output

    # Checkpoints. `_save_checkpoint` itself is never overridden: the original lost its resumable pretraining that way.

    @property
    def _saves_projector_only(self) -> bool:
        return self.args.stage == "pretrain"

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if not self.args.should_save:
            return
        with disk_errors_explained(folder):
            self._write_weights(folder, state_dict)
            write_run_record(folder, self.args, self.data_record)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`, which writes nothing here where checkpoints are sharded: not even the result of a run."""
        self._check_weights()
        if not self.saves_shards:
            super().save_model(output_dir, _internal_call)
        elif _internal_call:  # a checkpoint: its weights come with the optimizer
            self._save_companions(Path(output_dir))
        else:
            self._save(output_dir, sharding.gather_weights(self.model, self.args))
            self.accelerator.wait_for_everyone()
            if self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _check_weights(self) -> None:
        """
        Raise ValueError where nothing was learnt so far, or weights are not finite: a checkpoint of them would be gone on
        from, and take the place of one that is worth it.
        """
        if not self._speed.num_batches:
            return
        broken = [name for name, p in self.model.named_parameters() if p.requires_grad and not _is_finite(p)]
        counts = torch.tensor([int(self._speed.total_supervised), len(broken)], device=self.args.device)
        supervised, num_broken = self.accelerator.reduce(counts, reduction="sum").tolist()
        if num_broken:
            raise self._diverged(f"weights are not finite{f' ({broken[0]})' if broken else ''}")
        if not supervised:
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
            f"same command with a lower learning_rate (it is {self.args.learning_rate:g}), which goes on from there, or "
            "begin anew in another output_dir."
        )

    @property
    def saves_shards(self) -> bool:
        """Whether each process writes its own part of a checkpoint (FSDP2)."""
        return self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def _save_companions(self, folder: Path) -> None:
        """What a checkpoint holds beside its weights."""
        if self.args.should_save:
            with disk_errors_explained(folder):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(folder)
                torch.save(self.args, folder / TRAINING_ARGS_NAME)
                write_run_record(folder, self.args, self.data_record)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with disk_errors_explained(output_dir):
            if not self.saves_shards:
                return super()._save_optimizer_and_scheduler(output_dir)
            sharding.save_shards(self.model, output_dir, self.args)
            save_fsdp_optimizer(
                self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
            )
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        with disk_errors_explained(output_dir):
            super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # what says that a checkpoint is complete comes after every process's part

    def _write_weights(self, folder: Path, state_dict: dict | None) -> None:
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            # A finished checkpoint is one with this file, which is written last: none may be left from before.
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        if self._saves_projector_only:
            save_projector(self.accelerator.unwrap_model(self.model), folder, state_dict, self.args.model_revision)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)
        else:
            config = core_model(self.model).config
            in_training = _set_or_remove(config, "use_cache", self._use_cache)
            try:
                super()._save(str(folder), state_dict)
            finally:
                _set_or_remove(config, "use_cache", in_training)
            if self.args.adapter != "none":
                finish_adapter_folder(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in `Trainer`, which copies the weights of a checkpoint by their names, and knows no projector."""
        for name in (PROJECTOR_CONFIG_NAME, PROJECTOR_WEIGHTS_NAME):
            if self._saves_projector_only and self.is_world_process_zero():
                shutil.copy(os.path.join(checkpoint_folder, name), os.path.join(self.args.output_dir, name))
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
        target = self.model if model is None else model
        if sharding.is_sharded_checkpoint(resume_from_checkpoint):
            sharding.load_shards(target, resume_from_checkpoint, self.args)
        elif self._loads_by_itself(resume_from_checkpoint):
            self._load_weights(target, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in `Trainer`, but learning rates and weight decay are this run's, and not those of the run that stopped."""
        if checkpoint is None or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        groups, names = self.optimizer.param_groups, ("initial_lr", "weight_decay")
        settings = [{name: group[name] for name in names if name in group} for group in groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        for number, (group, ours) in enumerate(zip(self.optimizer.param_groups, settings)):
            loaded, rate = group.get("initial_lr"), ours.get("initial_lr")
            group.update(ours)
            if rate != loaded and loaded and isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
                group["lr"] *= rate / loaded
                scheduler.base_lrs[number], scheduler._last_lr[number] = rate, group["lr"]

    def _load_best_model(self) -> None:
        if sharding.is_sharded_checkpoint(self.state.best_model_checkpoint):
            sharding.load_shards(self.model, self.state.best_model_checkpoint, self.args)
        elif self._loads_by_itself(self.state.best_model_checkpoint):
            logger.info(f"Loading the best model, {self.state.best_model_checkpoint} ({self.state.best_metric}).")
            self._load_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _loads_by_itself(self, folder: str) -> bool:
        """Full and projector checkpoints. PEFT, and sharded engines that write their own files, load as in Trainer."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or is_peft(self.model):
            return False
        return os.path.isdir(folder)

    def _load_weights(self, model: nn.Module, folder: str) -> None:
        model = self.accelerator.unwrap_model(model)
        if os.path.isfile(os.path.join(folder, PROJECTOR_CONFIG_NAME)):
            load_projector(model, folder)
        else:
            load_full_weights(model, folder)


def default_collator(processor: ProcessorMixin, args: LlavaTrainingArguments, model: nn.Module):
    """The collator for datasets of conversations, with the settings of a run and what the model's forward takes."""
    from ..data.collator import LlavaDataCollator

    return LlavaDataCollator(
        processor,
        max_length=args.max_length,
        overflow=args.overflow,
        image_folder=args.image_folder,
        on_bad_sample=args.on_bad_sample,
        first_turn_order=args.first_turn_order,
        seed=data_seed(args),
        share_images="image_indices" in inspect.signature(model.forward).parameters,
        packing=args.packing in ("batch", "full"),
    )


def _is_finite(parameter: nn.Parameter) -> bool:
    """Whether all of a parameter is, or this process's part of a sharded one."""
    part = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return bool(part.isfinite().all())


_ABSENT = object()


def _set_or_remove(config: Any, name: str, value: Any) -> Any:
    """Set an attribute, or remove it if `value` is `_ABSENT`; returns what it was."""
    before = vars(config).get(name, _ABSENT)
    if value is not _ABSENT:
        setattr(config, name, value)
    elif before is not _ABSENT:
        delattr(config, name)
    return before


def _smoothed_loss(label_smoothing: float):
    """For stock models: cross-entropy with label smoothing, labels shifted, normalised as the stock loss is."""

    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"][:, :-1].float()  # [batch_size, sequence_length - 1, vocabulary]
        targets = labels[:, 1:].to(logits.device)
        total = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=label_smoothing
        )
        return total / (num_items_in_batch if num_items_in_batch is not None else (targets != IGNORE_INDEX).sum())

    return loss


class _EpochOfSampler(TrainerCallback):
    """Tells the sampler its epoch, also after a resume and behind accelerate's wrappers."""

    def __init__(self, sampler: TypeMixtureSampler | GroupedSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))


class _SkimOnResume(TrainerCallback):
    """Tells the collator of a stream how many batches were trained on already, and will be skipped."""

    def __init__(self, collator: SkimmingCollator):
        self.collator = collator

    def on_train_begin(self, args, state, control, **kwargs):
        self.collator.skim(0 if args.ignore_data_skip else state.global_step * args.gradient_accumulation_steps)


__all__ = ["LlavaTrainer", "default_collator"]
