"""
Conversion of checkpoints: the original's five forms ↔ HF, HF → GGUF. Installed as `modeling_llava.conversion`.

| file | does |
|---|---|
| `tensors.py` | tensors of files, described without being read |
| `keymaps.py` | one table: every tensor's name in each form, and its shape |
| `overlays.py` | deltas, LoRA, projectors put together with their base |
| `folders.py`, `originals.py`, `hf_checkpoints.py` | what lies in a folder |
| `original_to_hf.py`, `hf_to_original.py`, `hf_to_gguf.py` | the three directions |
| `gguf_files.py` | GGUF files, written and read back |
| `writing.py` | output that is streamed, resumable and never half there |
| `checks.py`, `streamed.py` | proof of the result, for models larger than the memory |
"""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .checks import check_stock_ready
    from .hf_to_gguf import convert_hf_to_gguf
    from .hf_to_original import convert_hf_to_original
    from .original_to_hf import convert_original_to_hf

_MODULES = {
    "check_stock_ready": "checks",
    "convert_hf_to_gguf": "hf_to_gguf",
    "convert_hf_to_original": "hf_to_original",
    "convert_original_to_hf": "original_to_hf",
}

__all__ = ["check_stock_ready", "convert_hf_to_gguf", "convert_hf_to_original", "convert_original_to_hf"]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_MODULES])
