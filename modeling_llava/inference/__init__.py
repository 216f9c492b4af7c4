"""Using a model: loading it from any kind of folder, asking it."""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .decoding_settings import DecodingSettings
    from .loading import load_model
    from .predictor import Answer, LlavaPredictor

_MODULES = {
    "Answer": "predictor",
    "DecodingSettings": "decoding_settings",
    "LlavaPredictor": "predictor",
    "load_model": "loading",
}

__all__ = ["Answer", "DecodingSettings", "LlavaPredictor", "load_model"]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_MODULES])
