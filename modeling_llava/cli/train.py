"""`llava train RECIPE [key=value …]`."""

import argparse
import os
import shlex


EPILOG = """\
examples:
  llava train qlora model=llava-hf/llava-1.5-7b-hf data=my.json image_folder=images output_dir=runs/my
  llava train qlora-12gb model=llava-hf/llava-1.5-13b-hf data=my.json image_folder=images output_dir=runs/my
  llava train examples/recipes/llava-1.5-7b/pretrain.yaml output_dir=runs/pretrain
  accelerate launch --num_processes 8 -m modeling_llava.cli.main train RECIPE.yaml
An interrupted run resumes when the same command is given again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "recipe",
        nargs="?",
        help="a recipe (YAML), or the name of a preset: pretrain, finetune, lora, qlora; for one GPU by its memory: "
        "qlora-8gb, qlora-12gb, qlora-16gb, qlora-24gb (llava estimate shows what a run needs)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    parser.add_argument("--list-settings", action="store_true", help="print every setting with its default, and exit")


def run(args: argparse.Namespace) -> int:
    if args.list_settings:
        return _list_settings()
    if args.recipe is None:
        raise ValueError("RECIPE is missing: a YAML file, or the name of a preset (llava train --help).")
    if "=" in args.recipe:
        raise ValueError(f"RECIPE comes before key=value: llava train RECIPE {args.recipe}")

    from ..training import parse_recipe, train

    settings = parse_recipe(args.recipe, args.overrides)
    is_main = settings.process_index == 0
    if is_main and settings.model and settings.data:  # else an error follows
        what = settings.stage if settings.adapter == "none" else f"{settings.stage} with {settings.adapter}"
        print(f"{what} of {settings.model} on {settings.data} → {settings.output_dir}")
    result = train(settings, callbacks=_callbacks(settings))
    if not is_main:
        return 0
    losses = [entry["loss"] for entry in result.log_history if "loss" in entry]
    if losses:
        print(f"loss {losses[0]:.3f} → {losses[-1]:.3f} in {result.global_step} steps")
    if "eval_loss" in result.metrics:
        print(f"evaluation loss {result.metrics['eval_loss']:.3f}")
    print(f"written: {result.output_dir} ({result.kind})")
    print(f"next: {_next_command(result.kind, str(result.output_dir), settings.adapter)}")
    return 0


def _callbacks(settings) -> list:
    """Callbacks that answer questions or score benchmarks during training."""
    callbacks = []
    if settings.sample_answers:
        from ..evaluation.sample_answers import SampleAnswersCallback

        callbacks.append(SampleAnswersCallback(settings.sample_answers, is_sharded=settings.is_sharded))
    if settings.benchmarks:
        from ..evaluation.callback import EvaluationCallback
        from .eval import slice_of

        out = os.path.join(settings.output_dir, "benchmarks")
        callbacks.append(EvaluationCallback([slice_of(line, out) for line in settings.benchmarks]))
    return callbacks


def _next_command(kind: str, folder: str, adapter: str) -> str:
    folder, merged = shlex.quote(folder), shlex.quote(f"{folder}-merged")
    if kind == "projector":
        return f"llava train finetune projector={folder} model=… data=… output_dir=…"
    if kind == "adapter":
        on_base = "on a 4-bit base, as trained; --no-4bit: in 16 bits; " if adapter == "qlora" else ""
        return f"llava chat {folder}   ({on_base}or: llava merge {folder} {merged})"
    return f"llava chat {folder}"


def _list_settings() -> int:
    from ..training.arguments import describe_settings

    for name, default, help_text in describe_settings():
        print(f"{name} = {default}\n    {help_text}")
    print("… and every setting of transformers.TrainingArguments.")
    return 0
