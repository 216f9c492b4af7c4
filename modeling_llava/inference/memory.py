"""What rows take of a device's memory, and what is left of it."""

import psutil
import torch


MARGIN = 0.1
"""Share of the free memory that is left alone: fragmentation, what else computes on the device."""

WORKING_BYTES = 2**28
"""What a pass takes besides its activations: attention scores, logits, the vision tower on a few images."""


def compute_device(model, module) -> torch.device:
    """The device on which a part of a model computes, wherever accelerate keeps its weights meanwhile (disk, CPU)."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    places = [place for place in model.hf_device_map.values() if place not in ("cpu", "disk")]
    return torch.device(places[0] if places else "cpu")


def free_memory(device: torch.device) -> int:
    """
    Bytes that can be allocated: of a GPU what it has free, within this process's share of it
    (`set_per_process_memory_fraction`), and the segments of PyTorch's allocator that hold nothing. On the CPU, and where
    a GPU shares its memory (MPS), what the machine has available.
    """
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return psutil.virtual_memory().available
    free, total = module.mem_get_info(device)
    stats = module.memory_stats(device)
    reserved, active, split = (
        stats.get(f"{name}_bytes.all.current", 0) for name in ("reserved", "active", "inactive_split")
    )
    if hasattr(module, "get_per_process_memory_fraction"):
        free = min(free, int(module.get_per_process_memory_fraction(device) * total) - reserved)
    return free + reserved - active - split


def key_value_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers of a language model."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize


def pass_bytes(config, dtype: torch.dtype, num_tokens: int) -> int:
    """Bytes that a pass over so many new tokens takes at most: one layer's activations, a 4-bit matrix in 16 bits."""
    hidden = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    return (num_tokens * (4 * intermediate + 8 * hidden) + hidden * intermediate) * dtype.itemsize + WORKING_BYTES


__all__ = ["MARGIN", "compute_device", "free_memory", "key_value_bytes", "pass_bytes"]
