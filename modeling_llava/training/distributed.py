"""
FSDP2: what is gathered at a time, checkpoints to which each process writes its own shard, whole weights at the end.

    checkpoint-N/pytorch_model_fsdp_0/   __0_0.distcp, __1_0.distcp, …, .metadata (written last)
                 optimizer_0/            the same, of the optimizer
                 …                       processor, recipe and what else every checkpoint holds

`Trainer` saves no weights at the end of a run whose checkpoints are sharded, and in a checkpoint the frozen ones too;
`accelerate` turns FSDP on for accelerators only, and fails on class names that a LLaVA lists but does not have.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers.trainer import FSDP_MODEL_NAME

from ..compat import let_cpu_shard
from ..io.checkpoints import component_of
from .arguments import LlavaTrainingArguments


WEIGHTS_FOLDER = f"{FSDP_MODEL_NAME}_0"
"""In a sharded checkpoint: the weights, under the name that accelerate's own tools expect."""


def allow_on_cpu(args: LlavaTrainingArguments) -> None:
    """Let `accelerate` shard on the CPU too; it would silently leave FSDP out."""
    is_asked = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if is_asked and args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        let_cpu_shard()


def configure(accelerator: Accelerator, model: nn.Module, args: LlavaTrainingArguments) -> None:
    """
    Fill in what the launch configuration leaves open: a layer is gathered at a time, and in mixed precision gradients
    are summed in float32 and outputs keep their dtype (accelerate would round the loss itself to 16 bit).
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        present = {type(module).__name__ for module in model.modules()}
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        plugin.transformer_cls_names_to_wrap = sorted(present.intersection(core._no_split_modules or ()))
    if plugin.fsdp_version == 2 and args.compute_dtype != torch.float32:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=args.compute_dtype, reduce_dtype=torch.float32, output_dtype=None
        )


def is_sharded_checkpoint(folder: str | os.PathLike) -> bool:
    return (Path(folder) / WEIGHTS_FOLDER).is_dir()


def weights_to_save(model: nn.Module, args: LlavaTrainingArguments) -> dict[str, torch.Tensor]:
    """
    The weights of a checkpoint of this run, by their names in memory: all of a full model, otherwise what is trained. No
    copies; this process's shard of sharded ones.
    """
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
        checkpoint.save({"model": weights_to_save(model, args)}, checkpoint_id=Path(folder) / WEIGHTS_FOLDER)


def load_shards(model: nn.Module, folder: str | os.PathLike, args: LlavaTrainingArguments) -> None:
    """Read what [`save_shards`] wrote, into a model that is sharded over any number of processes, or not at all."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    weights = weights_to_save(model, args)
    with _one_error():
        checkpoint.load({"model": weights}, checkpoint_id=Path(folder) / WEIGHTS_FOLDER)
    set_model_state_dict(model, weights, options=StateDictOptions(strict=False))


@torch.no_grad()
def gather_weights(model: nn.Module, args: LlavaTrainingArguments) -> dict[str, torch.Tensor]:
    """
    Whole weights of a run's result on the first process, in main memory; nothing on the others. A tensor at a time, so
    that no device must hold more. Every process must call it.
    """
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


__all__ = [
    "WEIGHTS_FOLDER",
    "allow_on_cpu",
    "configure",
    "gather_weights",
    "is_sharded_checkpoint",
    "load_shards",
    "save_shards",
    "weights_to_save",
]
