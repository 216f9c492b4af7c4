"""
LLaVA as a HuggingFace-native model contribution.

Importing this package registers `LlavaConfig`, the models, the processor and the image processor with transformers'
Auto classes and pipelines (`compat.py`). The public names below are imported when they are first used.
"""

import importlib
import sys
from typing import TYPE_CHECKING


__version__ = "0.1.0"

if TYPE_CHECKING:
    from .configuration_llava import LlavaConfig
    from .image_processing_llava import LlavaImageProcessor
    from .modeling_llava import LlavaForConditionalGeneration, LlavaModel
    from .processing_llava import LlavaProcessor

_MODULES = {
    "LlavaConfig": "configuration_llava",
    "LlavaForConditionalGeneration": "modeling_llava",
    "LlavaImageProcessor": "image_processing_llava",
    "LlavaModel": "modeling_llava",
    "LlavaProcessor": "processing_llava",
}

__all__ = ["LlavaConfig", "LlavaForConditionalGeneration", "LlavaImageProcessor", "LlavaModel", "LlavaProcessor"]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_MODULES])


if not getattr(sys.modules.get("llava_launcher"), "is_running", False):
    from .constants import check_transformers

    check_transformers()

    from .compat import register_auto_classes

    register_auto_classes()
