"""Conversion of checkpoints: original ↔ HF, HF → GGUF. Installed as `modeling_llava.conversion`."""
