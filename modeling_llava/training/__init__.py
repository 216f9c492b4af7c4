"""Training: recipes, stages, adapters, and a `Trainer` that resumes bit for bit."""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .arguments import LlavaTrainingArguments
    from .merge import merge_adapter
    from .recipes import parse_recipe, preset_names, read_recipe
    from .run import TrainResult, train
    from .trainer import LlavaTrainer

_MODULES = {
    "LlavaTrainer": "trainer",
    "LlavaTrainingArguments": "arguments",
    "TrainResult": "run",
    "merge_adapter": "merge",
    "parse_recipe": "recipes",
    "preset_names": "recipes",
    "read_recipe": "recipes",
    "train": "run",
}

__all__ = [
    "LlavaTrainer",
    "LlavaTrainingArguments",
    "TrainResult",
    "merge_adapter",
    "parse_recipe",
    "preset_names",
    "read_recipe",
    "train",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_MODULES])
