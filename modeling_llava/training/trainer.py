"""`LlavaTrainer`: HF's `Trainer` with LLaVA's learning rates, loss, checkpoints and resuming. Its loop is untouched."""

import copy
import inspect
import logging
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard, prepare_data_loader
from accelerate.utils import DistributedType, gather_object
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, set_seed
from transformers.trainer_callback import TrainerCallback

from ..compat import let_cpu_shard
from ..constants import IGNORE_INDEX
from ..data.collator import LlavaDataCollator
from ..data.packing import PackedDataset
from ..data.sampling import GroupedSampler, TypeMixtureSampler
from ..io.checkpoints import base_name_to_record, base_record
from ..kernels import KernelReport, apply_kernels
from ..modeling_llava import LlavaForConditionalGeneration
from .arguments import LlavaTrainingArguments
from .batches import (
    EndlessStream,
    ShardedStream,
    SkipBatchesCollator,
    grouped_sampler,
    pad_to_world_size,
    prepare_train_dataset,
    resolve_packing,
)
from .callbacks import CheckpointLanguageModel, SpeedCallback
from .checkpoints import CheckpointingTrainer
from .setup import (
    core_model,
    initial_lora,
    is_peft,
    optimizer_groups,
    prepare_model,
    require_new_rows_are_saved,
    resolve_checkpointing,
)


logger = logging.getLogger(__name__)


class LlavaTrainer(CheckpointingTrainer):
    """
    Trains a LLaVA, ours or stock transformers', as [`LlavaTrainingArguments`] say.

    Beyond [`~transformers.Trainer`]:

    - freezes what the stage freezes, adds the adapter (unless `model` is PEFT-wrapped), a learning rate per component;
    - packs samples instead of padding them, groups them by length and modality, and shards streams over processes;
    - `label_smoothing_factor` is computed in the model's loss (stock forgets to shift the labels of a `llava`);
    - an evaluation of the loss alone builds no logits;
    - a checkpoint holds the processor; in the stage `pretrain` what is trained, and not the frozen gigabytes;
    - resuming and `load_best_model_at_end` read the weights of a full checkpoint (stock finds none under their names).

    Args:
        model ([`~transformers.PreTrainedModel`] or `peft.PeftModel`):
            The model. Its parameters are frozen, unfrozen and converted to the dtypes of the run.
        args ([`LlavaTrainingArguments`]):
            The settings, which stay as they are: what is resolved from them (`packing`) is in `trainer.args`, a copy.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            A LLaVA processor; needed for conversations, saved with each checkpoint.
        data_collator (`Callable`, *optional*):
            By default a [`LlavaDataCollator`] with the settings of `args`, for datasets of conversations.
        train_dataset, eval_dataset, callbacks, model_init, kwargs:
            As in [`~transformers.Trainer`].
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: LlavaTrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        data_record: dict[str, Any] | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        **kwargs,
    ):
        if not isinstance(args, LlavaTrainingArguments):
            raise TypeError(f"LlavaTrainer takes LlavaTrainingArguments, not {type(args).__name__}.")
        if (model is None) == (model_init is None):
            raise ValueError("LlavaTrainer takes either `model` or `model_init`.")
        self.args = args = copy.copy(args)
        if model is None:
            set_seed(args.seed)
            self.model_init = model_init
            model = super().call_model_init()
        # Trainer writes its own `use_cache` into the configuration; what is saved has the model's, or none.
        self._use_cache = {name: value for name, value in vars(model.config).items() if name == "use_cache"}
        # Trainer adds the tokenizer's EOS token to the model's; an adapter is loaded with its base's all the same.
        self.base_generation_config = copy.deepcopy(core_model(model).generation_config)
        model = self._prepare_model(model, data_collator is not None)
        # Whether forward takes label_smoothing and skip_logits, and text alone runs the image path: stock's does not.
        self._has_own_forward = isinstance(core_model(model), LlavaForConditionalGeneration)
        if args.label_smoothing_factor and not self._has_own_forward:
            raise ValueError(
                f"label_smoothing_factor: {type(core_model(model)).__name__} of transformers does not shift the labels for it. Load "
                "the model with AutoModelForImageTextToText after `import modeling_llava`."
            )
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = not self._has_own_forward
        args.dataloader_persistent_workers = (
            bool(args.dataloader_num_workers) and args.dataloader_persistent_workers is not False
        )
        if data_collator is None and processing_class is not None:
            data_collator = default_collator(processing_class, args, core_model(model))
        self.data_record = data_record
        base = base_name_to_record(core_model(model)) if args.adapter != "none" and args.process_index == 0 else None
        if base and (os.path.isdir(base) or not os.path.isabs(base)):
            self.base_record = base_record(base, model.active_peft_config.revision)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=None if train_dataset is None else prepare_train_dataset(train_dataset, data_collator, args),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        self.model_init = model_init
        if self.is_fsdp_enabled:
            _configure_fsdp(self.accelerator, self.model, args)
        full = (args.pack_length or args.max_length) * args.train_batch_size if args.packing == "full" else None
        self._speed = SpeedCallback(full)
        self.add_callback(self._speed)
        if args.activation_checkpointing in ("every_second", "offload"):
            self.add_callback(CheckpointLanguageModel())
        # It would take the labels away from the model, and compare the logits of token t with label t.
        self.label_smoother = None

    kernel_report: KernelReport | None = None
    """What was exchanged by kernels; `None` with `kernels=False`."""

    def _prepare_model(self, model: nn.Module, has_own_collator: bool = False) -> nn.Module:
        self.initial_lora = initial_lora(model) if is_peft(model) else {}
        model = prepare_model(model, self.args)
        if is_peft(model):
            require_new_rows_are_saved(model)
        resolve_packing(core_model(model), self.args, has_own_collator)
        resolve_checkpointing(core_model(model), self.args)
        if self.args.kernels and not self.args.torch_compile:
            self.kernel_report = apply_kernels(model)
            logger.info("%s.", self.kernel_report)
        return model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return self._prepare_model(super().call_model_init(trial))

    def create_accelerator_and_postprocess(self) -> None:
        _allow_fsdp_on_cpu(self.args)
        super().create_accelerator_and_postprocess()

    # Optimizer and data

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """A group per component and weight decay; everything else as `Trainer` has it."""
        trained = self.model if model is None else model
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            return super().create_optimizer(model)
        optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, trained)
        if not {"params", "model", "optimizer_dict"} & kwargs.keys():  # optimizers that make their own groups
            kwargs["params"] = optimizer_groups(trained, self.args, self.get_decay_parameter_names(trained))
            self.optimizer_cls_and_kwargs = (optimizer_class, kwargs)
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = None

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length":
            if self._grouped_sampler is None:
                self._grouped_sampler = grouped_sampler(dataset, self.data_collator, self.args)
            sampler = self._grouped_sampler
        elif self.args.type_weights is not None and not isinstance(dataset, PackedDataset):
            sampler = TypeMixtureSampler.from_dataset(dataset, self.args.type_weights, self.args.sampling_seed)
        else:
            return super()._get_train_sampler(train_dataset)
        self.pop_callback(_AtBegin)
        self.add_callback(_AtBegin(sampler))
        return sampler

    _grouped_sampler: GroupedSampler | None = None

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        """In order; `Trainer` would group an evaluation as it groups training, by lengths that conversations do not have."""
        return torch.utils.data.SequentialSampler(eval_dataset) if hasattr(eval_dataset, "__len__") else None

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ) -> torch.utils.data.DataLoader:
        """As in `Trainer`, with equal evaluation shards; sharded streams are not sharded again, and batches go to the device one by one."""
        if description == "Evaluation" or not (is_training or hasattr(dataset, "__len__")):
            dataset = pad_to_world_size(dataset, self.data_collator, self.args)
        if not isinstance(dataset, EndlessStream | ShardedStream):
            loader = super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
            if is_training and isinstance(loader, DataLoaderShard):
                loader.device = None
            return loader
        collator = self.data_collator
        if is_training and self.args.dataloader_in_order:
            collator = SkipBatchesCollator(collator)
            self.pop_callback(_AtBegin)
            self.add_callback(_AtBegin(collator))
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
        )
        device = None if is_training else self.accelerator.device
        loader = prepare_data_loader(
            loader, device, num_processes=1, process_index=0, put_on_device=not is_training, dispatch_batches=False
        )
        if dataloader_key is not None:
            self._eval_dataloaders = {**getattr(self, "_eval_dataloaders", {}), dataloader_key: loader}
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """As in `Trainer`, which for every dataset gives the loader of the first, if its workers persist."""
        if eval_dataset is not self._evaluated_dataset and not isinstance(eval_dataset, str):
            getattr(self, "_eval_dataloaders", {}).pop("eval", None)
            self._evaluated_dataset = eval_dataset
        return super().get_eval_dataloader(eval_dataset)

    _evaluated_dataset: Any = None

    def _prepare_input(self, data):
        """As in `Trainer`, which waits for the device at each tensor that it copies there."""
        if isinstance(data, torch.Tensor) and not self.is_deepspeed_enabled:
            return data.to(self.args.device, non_blocking=self.args.device.type == "cuda")
        return super()._prepare_input(data)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._speed.begin_step()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self._speed.count(batch)
        self._num_supervised = self._num_supervised + (1 if num_items is None else num_items)
        return batches, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, with the speed; ValueError where the loss is not finite (with fp16 such a step is skipped)."""
        if not math.isfinite(logs.get("loss", 0.0)) and self.args.precision != "fp16":
            raise self._diverged(f"the loss is {logs['loss']}")
        speed = self._speed.report(self.state, self.args.world_size) if "loss" in logs else {}
        super().log({**logs, **speed}, start_time)

    # Loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.args.label_smoothing_factor and self._has_own_forward:
            inputs = {**inputs, "label_smoothing": self.args.label_smoothing_factor}
        if not model.training:
            num_items_in_batch = None  # evaluation_loop weights the batches: the mean of this one alone
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if prediction_loss_only and self._has_own_forward:
            inputs = {**inputs, "skip_logits": True}
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self._evaluated is not None and loss is not None and inputs.get("labels") is not None:
            count = (inputs["labels"][..., 1:] != IGNORE_INDEX).sum()
            total = torch.where(count > 0, loss * count, 0.0)  # stock's loss is NaN where nothing is supervised
            self._evaluated.append(torch.stack([total, count]))
        return loss, logits, labels

    _evaluated: list[torch.Tensor] | None = None
    """During an evaluation, of each batch: sum of the losses, and number of supervised tokens."""

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        """
        As in `Trainer`, but the loss is the mean over all supervised tokens, whatever batch size, packing and number of processes;
        `Trainer` averages the means of batches.
        """
        self._evaluated = []
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        # summed in float64 on the CPU: Apple's GPUs and Intel's consumer GPUs have none
        sums = [torch.stack(self._evaluated).cpu().double().sum(dim=0)] if self._evaluated else []
        total, count = sum(gather_object(sums), torch.zeros(2)).tolist()
        self._evaluated = None
        if count:
            output.metrics[f"{metric_key_prefix}_loss"] = total / count
        return output


def default_collator(processor: ProcessorMixin, args: LlavaTrainingArguments, model: nn.Module) -> LlavaDataCollator:
    """The collator for datasets of conversations, with the settings of a run and what the model's forward takes."""
    return LlavaDataCollator(
        processor,
        max_length=args.max_length,
        overflow=args.overflow,
        image_folder=args.image_folder,
        follow_symlinks=args.follow_symlinks,
        on_bad_sample=args.on_bad_sample,
        first_turn_order=args.first_turn_order,
        seed=args.sampling_seed,
        share_images="image_indices" in inspect.signature(model.forward).parameters,
        packing=args.packing in ("batch", "full"),
    )


def _allow_fsdp_on_cpu(args: LlavaTrainingArguments) -> None:
    """Let `accelerate` shard on the CPU too; it would silently leave FSDP out."""
    is_asked = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if is_asked and args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        let_cpu_shard()


def _configure_fsdp(accelerator: Accelerator, model: nn.Module, args: LlavaTrainingArguments) -> None:
    """
    What the launch configuration leaves open: one layer is gathered at a time (accelerate fails on class names that a LLaVA lists but
    does not have); in mixed precision gradients are summed in float32, and outputs keep their dtype.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        present = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(present.intersection(core_model(model)._no_split_modules or ()))
    if plugin.fsdp_version == 2 and args.compute_dtype != torch.float32:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=args.compute_dtype, reduce_dtype=torch.float32, output_dtype=None
        )


class _AtBegin(TrainerCallback):
    """Sets a sampler's epoch, also inside accelerate's wrappers; for a resumed stream, the number of batches to skip."""

    def __init__(self, told: GroupedSampler | TypeMixtureSampler | SkipBatchesCollator):
        self.told = told

    def on_train_begin(self, args, state, control, **kwargs):
        if isinstance(self.told, SkipBatchesCollator):
            self.told.skip(0 if args.ignore_data_skip else state.global_step * args.gradient_accumulation_steps)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if not isinstance(self.told, SkipBatchesCollator):
            self.told.set_epoch(int(state.epoch or 0))
