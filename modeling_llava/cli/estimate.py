"""`llava estimate RECIPE [key=value …]`: memory by part and wall time, before anything is loaded."""

import argparse


EPILOG = """\
examples:
  llava estimate qlora-12gb model=llava-hf/llava-1.5-7b-hf --gpu 12
  llava estimate qlora model=llava-hf/llava-1.5-13b-hf --gpu 16 --samples 158000 --samples-per-second 2.5
Memory is that of the largest micro-batch: every sample has max_length tokens. Exit code 1: it does not fit.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("recipe", help="a recipe (YAML), or the name of a preset such as finetune, lora, qlora-12gb")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    parser.add_argument(
        "--gpu", type=float, metavar="GIB", help="memory of your GPU: whether the run fits, and what to change if not"
    )
    parser.add_argument("--devices", type=int, default=1, help="number of GPUs (default: 1)")
    parser.add_argument(
        "--sharding",
        choices=("ddp", "zero2", "zero3", "fsdp"),
        default="ddp",
        help="how the GPUs split the work (default: ddp)",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="device of the run (default: cuda)")
    parser.add_argument("--samples", type=int, help="samples of the data, for the wall time (default: max_samples)")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--samples-per-second", type=float, metavar="X", help="throughput, for the wall time")
    speed.add_argument(
        "--measured", metavar="RUN", help="take the throughput from the output folder of a finished run"
    )


def run(args: argparse.Namespace) -> int:
    import dataclasses

    from rich.console import Console

    from ..training.estimate import LIKE_LLAMA, Settings, estimate, fits, load_config, propose, sizes_of
    from ..training.recipes import read_recipe

    recipe = read_recipe(args.recipe, args.overrides)
    if not recipe.get("model"):
        raise ValueError("model is not set. Give a LLaVA folder or Hub name: llava estimate RECIPE model=…")
    sizes = sizes_of(load_config(recipe["model"], recipe.get("model_revision")))
    recipe.setdefault("activation_checkpointing", recipe.get("gradient_checkpointing"))  # its older name
    known = {field.name for field in dataclasses.fields(Settings)}
    settings = Settings(
        **{name: value for name, value in recipe.items() if name in known and value is not None},
        devices=args.devices,
        sharding=args.sharding,
        device=args.device,
    )
    both = [estimate(sizes, dataclasses.replace(settings, activation_checkpointing=on)) for on in (False, True)]
    result = both[settings.activation_checkpointing]
    console = Console()
    console.print(_table(both, settings, f"{recipe['model']}, one of {args.devices} device(s)"))
    console.print(
        f"{result.trained_parameters:,} trained parameters; {settings.micro_batch_tokens:,} tokens per micro-batch. "
        "Compared with measurements on the CPU (within 15 %), on a GPU not yet.",
        soft_wrap=True,
    )
    if sizes.text.model_type not in LIKE_LLAMA:
        console.print(
            f"The language model ({sizes.text.model_type}) is estimated as a Llama of its sizes. It may take more: the activations "
            "of a Gemma 2, whose attention keeps every score, took twice as much.",
            soft_wrap=True,
        )
    seconds = _seconds(args, recipe)
    if seconds is not None:
        console.print(f"Wall time: {seconds}", soft_wrap=True)
    if args.gpu is None:
        return 0
    if fits(result, args.gpu):
        console.print(f"It fits {args.gpu:g} GiB.")
        return 0
    changes = propose(sizes, settings, args.gpu)
    if changes is None:
        console.print(
            f"It does not fit {args.gpu:g} GiB, and no change of the recipe makes it fit. Use a smaller model.",
            soft_wrap=True,
        )
    else:
        after = estimate(sizes, dataclasses.replace(settings, **changes))
        words = " ".join(f"{name}={value}" for name, value in changes.items())
        console.print(
            f"It does not fit {args.gpu:g} GiB. It does with ({_gib(after.total)} GiB): {words}", soft_wrap=True
        )
    return 1


def _table(both: list, settings, title: str):
    """A column without and one with activation checkpointing; that of the recipe is marked."""
    from rich.table import Table

    marks = [" ", "*"] if settings.activation_checkpointing else ["*", " "]
    title += "\nGiB without and with activation checkpointing (*: the recipe)"
    table = Table("part", title=title, title_justify="left")
    for word, mark in zip(("without", "with"), marks):
        table.add_column(word + mark, justify="right", no_wrap=True)

    def row(name: str, values: list[float]) -> None:
        table.add_row(name, *map(_gib, values))

    for name in both[0].weights:
        row(name, [result.weights[name] for result in both])
    row("optimizer", [result.optimizer for result in both])
    table.add_section()
    row("gradients", [result.gradients for result in both])
    row("activations", [result.activations for result in both])
    row("loss", [result.loss for result in both])
    row("backward pass of one layer", [result.working for result in both])
    row("evaluation batch", [result.evaluation for result in both])
    row("peak of these five", [result.peak_of_step for result in both])
    table.add_section()
    row("16-bit copies, communication buffers", [result.buckets for result in both])
    row("CUDA context, workspaces, fragmentation", [result.overhead for result in both])
    table.add_section()
    row("total (the peak in place of the five)", [result.total for result in both])
    return table


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _seconds(args: argparse.Namespace, recipe: dict) -> str | None:
    """Wall time in words, if a throughput is given or measured."""
    import json
    from pathlib import Path

    from ..training.estimate import hours

    rate = args.samples_per_second
    if args.measured is not None:
        path = Path(args.measured) / "train_results.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: --measured expects the output folder of a finished run.")
        rate = json.loads(path.read_text("utf-8"))["train_samples_per_second"]
    if rate is None:
        return None
    per_step = recipe.get("global_batch_size") or (
        recipe.get("per_device_train_batch_size", 8) * recipe.get("gradient_accumulation_steps", 1) * args.devices
    )
    samples = args.samples or recipe.get("max_samples")
    if recipe.get("max_steps", -1) > 0:
        total, words = recipe["max_steps"] * per_step, f"{recipe['max_steps']:,} steps of {per_step} samples"
    elif samples:
        epochs = recipe.get("num_train_epochs", 3)
        total, words = samples * epochs, f"{epochs:g} epoch(s) of {samples:,} samples"
    else:
        raise ValueError("The wall time needs the number of samples: --samples N.")
    return f"{hours(total, rate):.1f} h for {words} at {rate:g} samples/s."
