"""
Conversion of checkpoints: the original's five forms ↔ HF, HF → GGUF. Installed as `modeling_llava.conversion`.

| file | does |
|---|---|
| `tensors.py` | tensors of files, read piece by piece |
| `keymaps.py` | every tensor's name in each form, and its shape |
| `overlays.py` | deltas, LoRA, projectors put together with their base |
| `folders.py`, `originals.py`, `hf_checkpoints.py` | what lies in a folder |
| `original_to_hf.py`, `hf_to_original.py`, `hf_to_gguf.py` | the three directions |
| `vocabularies.py`, `gguf_files.py` | tokenizers in other forms; GGUF files, written, quantised and read back |
| `writing.py`, `checks.py` | output that is streamed, resumable and never half there; proof of the result |
"""

import importlib


_MODULES = {
    "check_stock_ready": "checks",
    "convert_hf_to_gguf": "hf_to_gguf",
    "convert_hf_to_original": "hf_to_original",
    "convert_original_to_hf": "original_to_hf",
}

__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
