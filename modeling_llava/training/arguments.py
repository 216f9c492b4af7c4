"""`LlavaTrainingArguments`: every setting of a training run, checked, with one help text each. No I/O."""

import inspect
import itertools
import logging
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from ..kernels.packed_attention import VARLEN


logger = logging.getLogger(__name__)

DEFAULT_LEARNING_RATES = {"pretrain": 1e-3, "finetune": 2e-5, "lora": 2e-4, "qlora": 2e-4}
"""LLaVA-1.5's learning rates: of the two stages, and of the LoRA weights (its projector: 2e-5)."""

ADAPTER_PROJECTOR_LEARNING_RATE = 2e-5
"""LLaVA-1.5's learning rate of the projector next to LoRA weights."""


def _default(default: Any, help: str):
    """A setting of [`~transformers.TrainingArguments`] with a default of ours."""
    return field(default=default, metadata={"help": help})


def _setting(default: Any, help: str, choices: tuple[str, ...] | None = None):
    metadata = {"help": help, "group": "llava"} | ({"choices": list(choices)} if choices else {})
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


class _Resolved:
    """A value that follows from other settings: it is computed again for a copy (`dataclasses.replace`) with others."""


class _ResolvedInt(int, _Resolved):
    pass


class _ResolvedFloat(float, _Resolved):
    pass


class _ResolvedStr(str, _Resolved):
    pass


@dataclass
class LlavaTrainingArguments(TrainingArguments):
    """
    Every setting of a run: what to train on what data, and all of [`~transformers.TrainingArguments`].

    A recipe (YAML) has exactly these keys, flat. Each field's meaning is its `metadata["help"]`; `describe_settings`
    lists them. Where the defaults of [`~transformers.TrainingArguments`] do not fit LLaVA, they are the papers':
    cosine schedule, 3 % warm-up, no weight decay, a learning rate by stage and adapter.

    Raises:
        ValueError: settings that contradict each other; the message names both and says what to change.
    """

    # --- The model ---
    model: str | None = _setting(
        None, "Model to start from: a LLaVA folder or Hub name, or an adapter folder to be trained further."
    )
    model_revision: str | None = _setting(None, "Branch, tag or commit of `model` on the Hub.")
    processor: str | None = _setting(None, "Folder or Hub name of the processor; the model's own by default.")
    chat_template: str | None = _setting(
        None,
        "Name of one of our chat templates: chatml, llama_2, llava_v1, plain, v0_mmtag, v1_mmtag, vicuna_v0, vicuna_v1. "
        "By default the processor's own; where that ends an "
        "answer with white space alone, as llava-hf/llava-1.5-7b-hf's does, finetuning puts the EOS token there. keep: the "
        "processor's own as it is.",
    )
    projector: str | None = _setting(
        None, "Output folder of a pretrain run: its projector is put into `model` before training starts."
    )
    attn_implementation: str | None = _setting(
        None,
        "Attention: eager, sdpa, flex_attention, flash_attention_2. By default varlen for the language model when samples "
        "are packed (the fastest that is right on the device), else transformers' choice.",
    )
    precision: str = _setting(
        "auto",
        "Arithmetic: bf16 or fp16 (mixed precision), or fp32. auto: bf16 on a GPU that has it, else fp16; fp32 without a GPU.",
        ("auto", "bf16", "fp16", "fp32"),
    )
    trained_dtype: str = _setting(
        "float32",
        "Storage of trained weights and optimizer state. bfloat16 halves both and loses small updates.",
        ("float32", "bfloat16"),
    )

    # --- What is trained ---
    stage: str = _setting(
        "finetune",
        "pretrain: the projector alone, on captions. finetune: projector and language model, on instructions.",
        ("pretrain", "finetune"),
    )
    train_projector: str = _setting(
        "full",
        "full: train the projector's own weights; an adapter then stores all of them. lora: LoRA weights, the only kind of "
        "adapter that some servers accept. frozen: do not train it.",
        ("full", "lora", "frozen"),
    )
    train_vision_tower: bool = _setting(False, "Train the vision tower as well.")
    lora_vision_tower: bool = _setting(False, "LoRA weights for the vision tower's linear layers as well.")
    projector_learning_rate: float | None = _setting(
        None, "Learning rate of the projector; by default `learning_rate`, and 2e-5 next to an adapter."
    )
    vision_tower_learning_rate: float | None = _setting(
        None, "Learning rate of the vision tower; `learning_rate` by default. LLaVA-1.6 takes 2e-6."
    )
    learning_rate: float | None = _setting(
        None, "Highest learning rate. By default 1e-3 (pretrain), 2e-5 (finetune), 2e-4 (LoRA and QLoRA)."
    )
    lr_scheduler_type: str = _default("cosine", "Schedule of the learning rate.")
    warmup_steps: float = _default(0.03, "Optimizer steps of linear warm-up; below 1, a fraction of all steps.")

    # --- The adapter ---
    adapter: str = _setting(
        "none",
        "none: train the weights themselves. lora: LoRA weights for the language model's linear layers. "
        "qlora: the same on a 4-bit base.",
        ("none", "lora", "qlora"),
    )
    lora_r: int = _setting(128, "Rank of the LoRA weights.")
    lora_alpha: int = _setting(256, "The LoRA update is scaled by lora_alpha / lora_r (rsLoRA: / √lora_r).")
    lora_dropout: float = _setting(0.05, "Dropout on the input of the LoRA weights.")
    lora_bias: str = _setting(
        "none", "lora_only: train the biases of the layers with LoRA too.", ("none", "lora_only")
    )
    lora_target: str | list[str] | None = _setting(
        None,
        "Names of the language model's layers ([q_proj, v_proj]), or a regular expression over full module names; by default, "
        "and for all-linear, every linear layer of the language model but its head.",
    )
    use_dora: bool = _setting(False, "DoRA: learn the magnitude of each weight apart from its direction.")
    use_rslora: bool = _setting(False, "rsLoRA: scale by lora_alpha / √lora_r, which suits high ranks.")
    quant_type: str = _setting("nf4", "4-bit data type of QLoRA.", ("nf4", "fp4"))
    double_quant: bool = _setting(True, "QLoRA: quantise the quantisation constants too (0.4 bits per weight less).")

    # --- The data ---
    data: str | list[str] | dict[str, str] | None = _setting(
        None,
        "LLaVA JSON or JSONL, parquet, or a dataset with `messages` and `images`. Several: a list, or a mapping that "
        "gives the samples of each a type, {conversation: a.json, detail: b.json}.",
    )
    data_split: str = _setting("train", "Split of a dataset that has several.")
    image_folder: str | None = _setting(None, "Folder to which image paths in the data are relative.")
    follow_symlinks: bool = _setting(False, "Allow links inside image_folder to lead out of it.")
    eval_data: str | list[str] | dict[str, str] | None = _setting(
        None, "Evaluation data, in the same forms; its loss is reported."
    )
    eval_size: float | str | None = _setting(
        None,
        "Hold out this share (below 1) or number of samples of `data` for evaluation, drawn by `data_seed`; 0: none. auto, which "
        "`llava train` takes where there is no eval_data: 5 % of 50 to 5,000 samples.",
    )
    streaming: bool = _setting(
        False, "Read `data` while training, over and over, without loading it; needs max_steps."
    )
    shuffle_buffer: int = _setting(
        10_000, "streaming: size of the shuffle buffer, in samples; the next sample is drawn from it at random."
    )
    max_samples: int | None = _setting(None, "Use only this many samples of `data`, drawn by `data_seed`.")
    only_types: list[str] | None = _setting(
        None, "Use only conversations of these types (the paper's data ablation), such as [conversation, detail]."
    )
    type_weights: dict[str, float] | None = _setting(
        None, "Draw conversations by type with these weights; {conversation: 1, detail: 1, complex: 1} is the paper's."
    )
    max_length: int = _setting(2048, "Maximum tokens of one sample, image tokens included.")
    overflow: str = _setting(
        "error",
        "A sample above max_length: stop with an error, drop it, or truncate its text. Image tokens are never cut.",
        ("error", "drop", "truncate_text"),
    )
    on_bad_sample: str = _setting(
        "raise", "An unreadable image or a malformed sample: stop with an error, or drop and count.", ("raise", "drop")
    )
    first_turn_order: str = _setting(
        "as_is",
        "Image and question in the first turn: as in the data, or in random order as in the paper (seeded by sample).",
        ("as_is", "random"),
    )

    packing: str = _setting(
        "auto",
        "none: pad. batch: the samples of a micro-batch share a row; the same steps without padding. full: rows of "
        "pack_length, filled by best fit; batch sizes then count rows. auto, auto_full: batch, full where the language model "
        "allows it.",
        ("auto", "auto_full", "none", "batch", "full"),
    )
    pack_length: int | None = _setting(None, "packing=full: maximum tokens of a row; max_length by default.")
    group_by_modality: bool = _setting(
        False,
        "With train_sampling_strategy=group_by_length: batches have images in all samples or in none, as the original's "
        "group_by_modality_length.",
    )

    kernels: bool = _setting(
        True,
        "Memory-efficient layers in the language model; the same gradients. false: transformers' own layers.",
    )

    activation_checkpointing: bool | str | None = _setting(
        None,
        "Keep only the input of a layer and compute the rest again in the backward pass: less memory, more time. on, off, "
        "every_second (layer of the language model), offload (on, with these inputs in main memory), or auto: the fastest "
        "that the GPU's free memory has room for by the estimate, on without a GPU.",
    )

    # --- The run ---
    global_batch_size: int | None = _setting(
        None,
        "Samples per optimizer step over all devices; sets gradient_accumulation_steps = global_batch_size / "
        "(per_device_train_batch_size × devices), so one recipe fits any number of GPUs.",
    )
    resume: str = _setting(
        "auto",
        "auto: resume from the newest complete checkpoint in output_dir, if there is one. never: start from scratch. "
        "Or the path of a checkpoint.",
    )
    early_stopping_patience: int | None = _setting(
        None, "Stop after this many evaluations without a better metric_for_best_model."
    )
    early_stopping_threshold: float = _setting(0.0, "Smallest improvement of the metric that counts.")
    preview_samples: int = _setting(1, "Samples shown, decoded and with their supervised text marked, before step 1.")
    sample_answers: int = _setting(
        0,
        "Number of evaluation samples for which `llava train` writes the model's answers to an HTML page at each evaluation.",
    )
    benchmarks: list[str] | None = _setting(
        None,
        "Benchmarks to run at each evaluation: the arguments of `llava eval` without MODEL and --out, such as "
        "'vqa --questions q.jsonl --images val2014 --limit 200'. Their scores are metrics (eval_vqa_accuracy).",
    )
    logging_steps: float = _default(10, "Optimizer steps between logs; below 1, a fraction of all steps.")
    logging_nan_inf_filter: bool = _default(
        False, "Log the previous loss in place of one that is not finite. By default such a loss ends the run."
    )
    per_device_eval_batch_size: int | None = _default(
        None, "Samples of an evaluation batch; by default those of a training batch."
    )
    save_total_limit: int | None = _default(2, "Checkpoints kept; older ones are deleted.")
    remove_unused_columns: bool = _default(False, "Always False: conversations become model inputs in the collator.")
    dataloader_persistent_workers: bool | None = _default(
        None, "Keep the data loader's workers from one evaluation to the next; by default where there are any."
    )

    def __post_init__(self):
        for setting in fields(self):
            if isinstance(getattr(self, setting.name), _Resolved):  # of the arguments that were copied
                setattr(self, setting.name, setting.default)
        self._given = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        for setting in fields(self):
            choices = setting.metadata.get("choices")
            value = getattr(self, setting.name)
            if choices and value not in choices and value != setting.default:
                raise ValueError(f"{setting.name}={value!r} is not one of {', '.join(map(str, choices))}.")
        if not torch.accelerator.is_available():
            # Not told so, transformers starts several processes as so many single ones, which all write one folder.
            self.use_cpu = True
        checkpointing = self.activation_checkpointing
        self.activation_checkpointing = {"on": True, "off": False}.get(checkpointing, checkpointing)
        if isinstance(self.benchmarks, str):
            self.benchmarks = [self.benchmarks]
        if message := next(itertools.chain(self._faults(), self._faults_of_data(), self._faults_of_run()), None):
            raise ValueError(message)
        if self.early_stopping_patience is not None:
            self.metric_for_best_model = self.metric_for_best_model or "loss"
            # without its count of evaluations a resumed run would stop later than one that was not interrupted
            self.restore_callback_states_from_checkpoint = True
        self._resolve_precision()
        if self.learning_rate is None:
            rate = DEFAULT_LEARNING_RATES[self.stage if self.adapter == "none" else self.adapter]
            self.learning_rate = _ResolvedFloat(rate)
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = _ResolvedInt(self.per_device_train_batch_size)
        super().__post_init__()
        self._check_schedule()
        self._check_optimizer()
        if (visible := super().n_gpu) > 1:
            logger.warning(
                f"{visible} GPUs are visible and one process was started: it trains on {self.device} alone. For all of them: "
                f"accelerate launch --num_processes {visible} -m modeling_llava.cli.main train …"
            )
        if self.use_liger_kernel:
            self._keep_own_loss()
        self._normalised = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        if self.global_batch_size is not None:
            self._resolve_global_batch_size()

    def why_not_packed(self) -> str | None:
        """Why samples cannot be packed with these settings, whatever the model is."""
        attention = self.attn_implementation
        if attention is not None and attention != VARLEN and "flash" not in attention:
            return f"attn_implementation={attention} would build an attention mask of tokens × tokens for a pack"
        if self.torch_compile:
            return "torch_compile would recompile for each length of a pack"
        if self.neftune_noise_alpha is not None:
            return "neftune_noise_alpha is scaled by the length of a row, which would be that of a pack"
        return None

    def _faults(self) -> Iterator[str]:
        """What contradicts itself in the settings of what is trained, a sentence each; likewise of the data and of the run."""
        if self.adapter != "none" and self.stage == "pretrain":
            yield f"adapter={self.adapter} with stage=pretrain, which trains the projector itself. Set adapter=none."
        if self.train_projector != "full" and self.stage == "pretrain":
            yield f"train_projector={self.train_projector} with stage=pretrain, which trains the projector itself."
        for name, value in (
            ("use_dora", self.use_dora),
            ("use_rslora", self.use_rslora),
            ("lora_target", self.lora_target),
            ("lora_vision_tower", self.lora_vision_tower),
            ("train_projector", self.train_projector == "lora" and "lora"),
        ):
            if value and self.adapter == "none":
                yield f"{name}={value} has no effect with adapter=none. Set adapter=lora."
        if self.train_vision_tower and self.lora_vision_tower:
            yield "train_vision_tower and lora_vision_tower are both set. Keep one."
        if self.projector_learning_rate is not None and self.train_projector == "frozen":
            yield "projector_learning_rate is set, but train_projector=frozen. Leave one out."
        if self.vision_tower_learning_rate is not None and not (self.train_vision_tower or self.lora_vision_tower):
            yield "vision_tower_learning_rate is set, but the tower is frozen. Set train_vision_tower=true, or leave it out."
        if self.activation_checkpointing not in (None, False, True, "every_second", "offload", "auto"):
            words = f"activation_checkpointing={self.activation_checkpointing}"
            yield f"{words} is not one of on, off, every_second, offload, auto."
        if not 0 <= self.lora_dropout < 1:
            yield f"lora_dropout={self.lora_dropout} is not in [0, 1)."
        if isinstance(self.lora_target, str):
            try:
                re.compile(self.lora_target)
            except re.error as error:
                yield f"lora_target={self.lora_target!r} is not a regular expression: {error}."

    def _faults_of_data(self) -> Iterator[str]:
        if self.eval_data is not None and self.eval_size is not None:
            yield "eval_data and eval_size are both given. Keep one: own data, or a part of `data`."
        size = self.eval_size
        if size not in (None, "auto") and not (isinstance(size, int | float) and 0 <= size < math.inf):
            yield f"eval_size={size}: give a share in (0, 1), a number of samples, or auto."
        if self.packing in ("batch", "full") and (reason := self.why_not_packed()):
            yield f"packing={self.packing}, but {reason}. Set packing=none."
        if self.pack_length is not None and self.packing not in ("full", "auto_full"):
            yield f"pack_length={self.pack_length} requires packing=full (it is {self.packing})."
        if self.pack_length is not None and self.pack_length < self.max_length:
            yield f"pack_length={self.pack_length} tokens must be at least max_length={self.max_length}."
        if self.train_sampling_strategy == "batch_rebalance" and self.data is not None:
            yield (
                "train_sampling_strategy=batch_rebalance requires the lengths of samples, which conversations do not have. Take "
                "group_by_length, which measures them, or packing=full."
            )
        groups = self.train_sampling_strategy == "group_by_length"
        if self.group_by_modality and not groups:
            yield "group_by_modality=true requires train_sampling_strategy=group_by_length."
        for name, orders in (
            ("packing=full", self.packing == "full"),
            ("streaming", self.streaming),
            ("type_weights", self.type_weights is not None),
        ):
            if orders and groups:
                yield f"train_sampling_strategy=group_by_length and {name} both order the samples. Keep one."
        if self.streaming:
            for name in ("type_weights", "eval_size", "max_samples"):
                if getattr(self, name) is not None:
                    yield f"{name} requires all of the data before training. Set streaming=false."
            if self.max_steps <= 0:
                yield "streaming=true: the number of samples is not known. Set max_steps."
            for name in ("save", "eval", "logging"):
                if getattr(self, f"{name}_strategy") == "epoch":
                    logger.warning(
                        f"{name}_strategy=epoch, but streaming=true: the one end that is known is that of the run. Set "
                        f"{name}_strategy=steps and {name}_steps."
                    )
        weights = {} if self.type_weights is None else self.type_weights
        if not isinstance(weights, dict) or not all(isinstance(w, int | float) and w >= 0 for w in weights.values()):
            yield f"type_weights={weights!r} is not a mapping from type to a number of at least 0."
        if weights and not any(weights.values()):
            yield f"type_weights={weights!r}: at least one weight must be above 0."
        if outside := sorted(set(weights) - set(self.only_types or weights)):
            yield f"type_weights names {', '.join(outside)}, which only_types={self.only_types} excludes."

    def _faults_of_run(self) -> Iterator[str]:
        for name in (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "global_batch_size",
            "lora_r", "lora_alpha", "max_length", "max_samples", "early_stopping_patience",
        ):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} must be at least 1."
        for name in (
            "learning_rate", "projector_learning_rate", "vision_tower_learning_rate", "neftune_noise_alpha", "sample_answers",
            "weight_decay", "dataloader_num_workers",
        ):  # fmt: skip
            if getattr(self, name) is not None and not getattr(self, name) >= 0:  # nor is NaN
                yield f"{name}={getattr(self, name)} is not 0 or more."
        if self.max_steps <= 0 and not 0 < self.num_train_epochs < math.inf:
            yield f"num_train_epochs={self.num_train_epochs}: give a number above 0, or set max_steps."
        has_eval_data = self.eval_data is not None or self.eval_size not in (None, 0)
        evaluates = IntervalStrategy(self.eval_strategy) != IntervalStrategy.NO
        if evaluates and self.data is not None and not has_eval_data:
            yield f"eval_strategy={self.eval_strategy}, but there is no evaluation data. Set eval_size or eval_data."
        for name in ("sample_answers", "benchmarks"):
            if getattr(self, name) and not has_eval_data:
                yield f"{name} are run at each evaluation: set eval_size, or eval_data."
        for name, is_set in (
            ("early_stopping_patience", self.early_stopping_patience is not None),
            ("load_best_model_at_end", self.load_best_model_at_end),
            ("save_strategy=best", SaveStrategy(self.save_strategy) == SaveStrategy.BEST),
        ):
            if is_set and not evaluates:
                yield f"{name} requires evaluations: set eval_strategy=steps and eval_steps, and eval_size or eval_data."
        if self.remove_unused_columns:
            yield "remove_unused_columns=true would remove the conversations themselves. Leave it out."
        if self.global_batch_size is not None and self.auto_find_batch_size:
            yield "auto_find_batch_size changes the batch size during the run, and global_batch_size requires a fixed one. Keep one."

    def _check_schedule(self):
        """Build the schedule on one parameter: some require `lr_scheduler_kwargs`, and transformers says so after the model."""
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=self.learning_rate)
        try:
            get_scheduler(self.lr_scheduler_type, optimizer, 1, 1_000_000, self.lr_scheduler_kwargs)
        except (TypeError, ValueError) as error:
            taken = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[self.lr_scheduler_type]).parameters
            given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
            raise ValueError(
                f"lr_scheduler_type={self.lr_scheduler_type.value} with lr_scheduler_kwargs={self.lr_scheduler_kwargs}: {error} "
                f"Settings that lr_scheduler_kwargs can hold: {', '.join(name for name in taken if name not in given)}."
            ) from None

    def _check_optimizer(self):
        optim = OptimizerNames(self.optim).value
        if optim.startswith(("galore", "apollo", "lomo", "adalomo")):
            for name, rate in self.learning_rates().items():
                if rate != self.learning_rate and (name != "vision_tower" or self.train_vision_tower):
                    setting = f"{name.removeprefix('multi_modal_')}_learning_rate"
                    raise ValueError(
                        f"optim={optim} makes its own parameter groups and ignores {setting}={rate:g}. Choose another optimizer, "
                        f"such as adamw_torch, or set {setting}={self.learning_rate:g}, the learning_rate."
                    )

    def learning_rates(self) -> dict[str, float]:
        """Highest learning rate of each component."""
        projector, tower = self.projector_learning_rate, self.vision_tower_learning_rate
        if projector is None:
            is_next_to_lora = self.adapter != "none" and self.train_projector == "full"
            projector = ADAPTER_PROJECTOR_LEARNING_RATE if is_next_to_lora else self.learning_rate
        return {
            "language_model": self.learning_rate,
            "multi_modal_projector": projector,
            "vision_tower": self.learning_rate if tower is None else tower,
        }

    def _keep_own_loss(self):
        """Turn off the kernel of Liger that is a forward of its own, with another loss and other outputs."""
        config = self.liger_kernel_config or {}
        if config.get("fused_linear_cross_entropy"):
            raise ValueError(
                "fused_linear_cross_entropy=true in liger_kernel_config would replace the model's forward and loss, which is "
                "fused as well. Leave it out; use_liger_kernel=true keeps Liger's other kernels."
            )
        self.liger_kernel_config = {**config, "fused_linear_cross_entropy": False}
        logger.warning("use_liger_kernel=true: the loss stays the model's own (fused_linear_cross_entropy=false).")

    def _resolve_precision(self):
        """Turn `precision` into transformers' two switches, or take it from them where they are set."""
        switched = "bf16" if self.bf16 else "fp16" if self.fp16 else None
        if switched is not None and self.precision not in ("auto", switched):
            raise ValueError(f"precision={self.precision} contradicts {switched}=true. Leave {switched} out.")
        if self.precision == "auto":
            self.precision = _ResolvedStr(switched or ("fp32" if self.use_cpu else best_precision()))
        if self.precision == "fp16" and self.use_cpu:
            raise ValueError("precision=fp16 needs a GPU. On the CPU set precision=fp32, or bf16 (auto takes fp32).")
        if self.trained_dtype == "bfloat16" and self.precision != "bf16":
            raise ValueError(
                f"trained_dtype=bfloat16 requires precision=bf16; it is {self.precision}. Set trained_dtype=float32, or "
                "precision=bf16."
            )
        if switched is None:
            self.bf16, self.fp16 = _ResolvedInt(self.precision == "bf16"), _ResolvedInt(self.precision == "fp16")

    def _resolve_global_batch_size(self):
        per_step = self.train_batch_size * self.world_size
        if self.global_batch_size % per_step:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} samples is not a multiple of {per_step} samples "
                f"(per_device_train_batch_size={self.per_device_train_batch_size} × "
                f"{per_step // self.per_device_train_batch_size} device(s)). Change per_device_train_batch_size."
            )
        steps = self.global_batch_size // per_step
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"global_batch_size={self.global_batch_size} and gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps} are both given. Keep one."
            )
        self.gradient_accumulation_steps = _ResolvedInt(steps)

    def __copy__(self):
        """With its tokens, which a pickle leaves out."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __getstate__(self):
        # `training_args.bin` lies next to the weights and is uploaded with them: it must not hold a token.
        def without_tokens(settings):
            return {name: None if name.endswith("_token") else value for name, value in settings.items()}

        state = without_tokens(self.__dict__)
        return state | {name: without_tokens(state[name]) for name in ("_given", "_normalised") if name in state}

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: one at most. transformers takes all that it sees, and scales batch and loss by their number."""
        return min(super().n_gpu, 1)

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed cuts the parameters, as this run's settings or `accelerate launch` say."""
        launched = [os.environ.get(f"ACCELERATE_USE_{name}", "false") for name in ("FSDP", "DEEPSPEED")]
        return bool(self.fsdp or self.deepspeed) or "true" in [value.lower() for value in launched]

    @property
    def sampling_seed(self) -> int:
        """Seed of what is drawn from the data."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def output_is_default(self) -> bool:
        """Whether nobody said where to write."""
        return self._given["output_dir"] is None

    @property
    def compute_dtype(self):
        """`torch.dtype` of the arithmetic, and of frozen weights."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.precision]

    def to_recipe(self) -> dict[str, Any]:
        """
        The resolved settings as a flat recipe: all of ours, and those of transformers that are not at their default.

        `train(to_recipe())` repeats the run. Tokens are left out.
        """
        recipe = {}
        for setting in fields(self):
            name, value = setting.name, getattr(self, setting.name)
            if not setting.init or name.endswith("_token") or name in _DERIVED:
                continue
            if name == "gradient_accumulation_steps" and self.global_batch_size is not None:
                continue
            if name not in LlavaTrainingArguments.__annotations__:
                if value == self._normalised[name]:
                    value = self._given[name]  # as it was written, before transformers turned it into its own form
                if value == setting.default and name not in _ALWAYS_WRITTEN:
                    continue
            recipe[name] = _plain(value)
        return recipe


# Fields that other fields decide (bf16 and fp16 ← precision), that are deprecated, or that describe the launch.
_DERIVED = {
    "bf16", "fp16", "local_rank", "do_train", "do_eval", "do_predict", "remove_unused_columns",
    "gradient_checkpointing", "gradient_checkpointing_kwargs",
}  # fmt: skip
_ALWAYS_WRITTEN = {"output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "seed"}


def _plain(value: Any) -> Any:
    """A value as YAML has it."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, _Resolved):
        return next(kind for kind in (int, float, str) if isinstance(value, kind))(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def best_precision() -> str:
    """`"bf16"` on a device that computes in it, `"fp16"` on another CUDA device, `"fp32"` elsewhere.

    Turing and older GPUs report bfloat16 support that is an emulation, slower than float32; it does not count."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "bf16" if device is not None and device.type in ("xpu", "npu", "hpu") else "fp32"


def describe_settings() -> list[tuple[str, Any, str]]:
    """`(name, default, help)` of LLaVA's own settings, in order."""
    return [
        (setting.name, setting.default, setting.metadata["help"])
        for setting in fields(LlavaTrainingArguments)
        if setting.metadata.get("group") == "llava"
    ]
