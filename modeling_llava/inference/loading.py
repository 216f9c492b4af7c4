"""Load a LLaVA for use, whatever the folder holds: a full checkpoint, an adapter, or a pretrain run's projector."""

import importlib.util
import os

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from ..io.adapters import (
    find_base,
    forbid_inference_packing,
    four_bit_config,
    four_bits_of,
    load_adapter_for_inference,
)
from ..io.checkpoints import checkpoint_kind, has_processor, load_processor, load_projector


logger = logging.get_logger(__name__)


def load_model(
    path: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    load_in_4bit: bool | None = None,
    adapter: str | os.PathLike | None = None,
    base: str | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    A model in evaluation mode, and its processor.

    Args:
        path (`str` or `os.PathLike`):
            Folder or Hub name of a full checkpoint, or of an adapter or a pretrain run's output, which find their base.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Of the weights that are not quantised; `"auto"` is the checkpoint's own.
        device (`str` or `torch.device`, *optional*): By default the accelerator if there is one, else the CPU.
        load_in_4bit (`bool`, *optional*):
            Quantise the language model to 4 bits, those of an adapter's training or else NF4; tower, projector and head stay
            in `dtype`. By default an adapter that was trained on a 4-bit base is loaded on one; a line says so.
        adapter (`str` or `os.PathLike`, *optional*): An adapter to put on `path`, a full checkpoint.
        base (`str`, *optional*): Of an adapter or a projector, if it is no longer where its folder says.
        revision (`str`, *optional*): Branch, tag or commit of `path` on the Hub.
        attn_implementation (`str`, *optional*): As in `from_pretrained`.

    Raises:
        FileNotFoundError: `path` is neither a folder nor the form of a Hub name.
        ValueError: the folder holds no model, its base is gone, `adapter` is given with an adapter folder, or this machine
            does not have `device`.
        ImportError: `load_in_4bit` without bitsandbytes.
    """
    path = os.fspath(path)
    kind = checkpoint_kind(path, revision)
    base_revision = None
    if adapter is not None:
        if kind != "full":
            held = "an adapter" if kind == "adapter" else "a projector"
            raise ValueError(f"{path} holds {held} already; adapter={os.fspath(adapter)} needs a full model under it.")
        base, base_revision, path, revision, kind = path, revision, os.fspath(adapter), None, "adapter"
        if checkpoint_kind(path) != "adapter":
            raise ValueError(f"adapter={path} is not an adapter folder: it has no adapter_config.json.")
    if kind != "full":
        base, base_revision = find_base(path, revision, base, base_revision)

    device = default_device() if device is None else usable_device(device)
    settings = {"dtype": dtype, "device_map": {"": device}}
    if attn_implementation is not None:
        settings["attn_implementation"] = attn_implementation
    if kind == "adapter":
        load_in_4bit = choose_four_bits(path, load_in_4bit, revision=revision)
    if load_in_4bit:
        compute_dtype = default_dtype(device) if dtype == "auto" else getattr(torch, str(dtype).removeprefix("torch."))
        of_training = four_bits_of(path, revision) if kind == "adapter" else None
        settings["quantization_config"] = four_bit_config(compute_dtype, *(of_training or ()))
        settings["dtype"] = compute_dtype

    own = base is None or has_processor(path, revision)
    processor = load_processor(*((path, revision) if own else (base, base_revision)))
    source, source_revision = (path, revision) if base is None else (base, base_revision)
    model = AutoModelForImageTextToText.from_pretrained(source, revision=source_revision, **settings)
    if kind == "adapter":
        load_adapter_for_inference(model, path, revision=revision)
    elif kind == "projector":
        load_projector(model, path, revision)
    if load_in_4bit:
        forbid_inference_packing(model)
    return model.eval(), processor


def choose_four_bits(
    path: str | os.PathLike,
    load_in_4bit: bool | None = None,
    *,
    adapter: str | os.PathLike | None = None,
    revision: str | None = None,
) -> bool:
    """
    Whether [`load_model`] of these arguments quantises to 4 bits: as `load_in_4bit` says; by default where an adapter was
    trained on a 4-bit base and bitsandbytes is installed. What is chosen then is logged.
    """
    if load_in_4bit is not None:
        return load_in_4bit
    path, revision = (os.fspath(path), revision) if adapter is None else (os.fspath(adapter), None)
    if checkpoint_kind(path, revision) != "adapter" or four_bits_of(path, revision) is None:
        return False
    if importlib.util.find_spec("bitsandbytes") is None:
        logger.warning(
            f"{path} was trained on a 4-bit base, but bitsandbytes is not installed (pip install 'modeling-llava[qlora]'): the "
            "base is loaded in 16 bits, which takes about three times the memory (7B: 13 GiB) and may change answers."
        )
        return False
    logger.warning(
        f"{path} was trained on a 4-bit base and is loaded on one. For 16 bits: --no-4bit (load_in_4bit=False)."
    )
    return True


def default_device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    if torch.accelerator.is_available():
        return torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())
    return torch.device("cpu")


def usable_device(device: str | int | torch.device) -> torch.device:
    """The device of a name. ValueError: PyTorch does not know it, or this machine does not have it."""
    try:
        found = torch.device(device)
        module = torch.get_device_module(found)
        is_there = found.type == "cpu" or module.is_available() and (found.index or 0) < module.device_count()
    except (AttributeError, RuntimeError):
        is_there = False
    if not is_there:
        raise ValueError(
            f'PyTorch {torch.__version__} finds no device {str(device)!r} on this machine. Use device="cpu", or leave it out '
            "to take the GPU if there is one; `llava doctor` says what works here and why a GPU is not found."
        )
    return found


def default_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which 4-bit weights are computed with: bfloat16 where the device has it, float16 on other GPUs."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32 if device.type == "cpu" else torch.float16
