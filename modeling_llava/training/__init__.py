"""Training: recipes, stages, adapters, and a `Trainer` that resumes bit for bit."""

from .arguments import LlavaTrainingArguments
from .merge import merge_adapter
from .recipes import parse_recipe, preset_names, read_recipe
from .run import TrainResult, train
from .trainer import LlavaTrainer


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
