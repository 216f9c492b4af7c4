"""`llava estimate RECIPE [key=value …]`: memory by part, download, disk and wall time, before anything is loaded."""

import argparse
from typing import Any


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
    from rich.console import Console

    from ..training import estimate as e
    from ..training.recipes import read_recipe

    recipe = read_recipe(args.recipe, args.overrides)
    if not recipe.get("model"):
        raise ValueError("model is not set. Give a LLaVA folder or Hub name: llava estimate RECIPE model=…")
    sizes = e.sizes_of(e.load_config(recipe["model"], recipe.get("model_revision")))
    settings = e.Settings(**recipe, devices=args.devices, sharding=args.sharding, device=args.device)
    if settings.activation_checkpointing == "auto":
        available = USABLE * (args.gpu or 0) * e.GIB - e.CUDA_CONTEXT
        settings.activation_checkpointing, _ = e.choose_checkpointing(sizes, settings, available)
    columns = {value: e.estimate(sizes, settings.replace(activation_checkpointing=value)) for value in e.CHECKPOINTING}
    result = columns[settings.activation_checkpointing]
    console = Console(soft_wrap=True)
    names = [f"{name}{'*' * (columns[value] is result)}" for value, name in e.CHECKPOINTING.items()]
    title = f"{recipe['model']}, one of {args.devices} device(s)\nGiB by activation checkpointing (*: the recipe)"
    console.print(_table(list(columns.values()), names, title), soft_wrap=False)
    console.print(
        f"{result.trained_parameters:,} trained parameters; {settings.micro_batch_tokens:,} tokens per micro-batch. "
        "Compared with measurements on the CPU (within 15 %), on a GPU not yet."
    )
    if sizes.config.text_config.model_type not in e.LIKE_LLAMA:
        console.print(
            f"The language model ({sizes.config.text_config.model_type}) is estimated as a Llama of its sizes. It may take "
            "more: the activations of a Gemma 2, whose attention keeps every score, took twice as much."
        )
    for line in needs(settings, result):
        console.print(line)
    console.print(f"Wall time: {_wall_time(args, recipe)}")
    if args.gpu is None:
        return 0
    if fits(result, args.gpu):
        console.print(f"It fits {args.gpu:g} GiB.")
        return 0
    changes = propose(sizes, settings, args.gpu)
    if changes is None:
        console.print(
            f"It does not fit {args.gpu:g} GiB, and no change of the recipe makes it fit. Use a smaller model."
        )
    else:
        after = e.estimate(sizes, settings.replace(**changes))
        words = " ".join(f"{name}={value}" for name, value in changes.items())
        console.print(f"It does not fit {args.gpu:g} GiB. It does with ({_gib(after.total)} GiB): {words}")
    return 1


USABLE = 0.98
"""Share of a GPU's memory; the driver takes the rest."""


def fits(result, gpu_gib: float) -> bool:
    return result.total <= USABLE * gpu_gib * 2**30


def propose(sizes, settings, gpu_gib: float) -> dict[str, Any] | None:
    """The settings to change for a recipe to fit, the mildest first; `None` if nothing helps."""
    from ..training.estimate import estimate

    def fit(changes: dict[str, Any]) -> bool:
        return fits(estimate(sizes, settings.replace(**changes, tokens=None, images=None)), gpu_gib)

    steps: list[dict[str, Any]] = []
    batch = settings.per_device_train_batch_size
    if (settings.per_device_eval_batch_size or 1) > 1:
        steps.append({"per_device_eval_batch_size": 1})
    steps += [{"activation_checkpointing": value} for value in (True, "offload")]
    steps += [{"per_device_train_batch_size": batch >> i} for i in range(1, batch.bit_length())]
    if settings.stage == "finetune":
        steps += [{"adapter": "lora"}] if settings.adapter == "none" else []
        steps += [{"adapter": "qlora"}, {"optim": "paged_adamw_8bit"}]
        steps += [{"lora_r": rank} for rank in (64, 32, 16, 8) if rank < settings.lora_r]
    steps += [{"max_length": length} for length in (1536, 1280, 1024, 768) if length < settings.max_length]
    changes: dict[str, Any] = {}
    for step in steps:
        changes |= step
        if fit(changes):
            for name in list(changes):  # those that turn out not to be needed
                fewer = {key: value for key, value in changes.items() if key != name}
                changes = fewer if fit(fewer) else changes
            return changes
    return None


def needs(settings, result) -> list[str]:
    """Lines on what a run takes besides memory: the download of its model, and the disk of its checkpoints and its result."""
    import os
    import shutil
    from pathlib import Path

    from huggingface_hub import snapshot_download

    lines, download = [], 0
    if not os.path.isdir(settings.model):
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
        try:
            files = snapshot_download(
                settings.model, revision=settings.model_revision, allow_patterns=patterns, dry_run=True
            )
            download = sum(file.file_size or 0 for file in files if file.will_download)
            lines.append(f"Download: {_gib(download)} GiB." if download else "Download: nothing, all is in the cache.")
        except OSError:
            lines.append("Download: unknown, since the Hub was not reached.")
    checkpoints = (settings.save_total_limit or 1) + 1  # a new one is written before the oldest is deleted
    disk = checkpoints * result.checkpoint * (settings.save_strategy != "no") + result.saved
    folder = Path(settings.output_dir or ".").absolute()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    lines.append(
        f"Disk: {_gib(disk)} GiB for {checkpoints} checkpoints and the result{' (more without save_total_limit)' * (settings.save_total_limit is None)}, "
        f"{_gib(free)} GiB are free{': too little' * (disk + download > free)}."
    )
    return lines


def _table(columns: list, names: list[str], title: str):
    """A column for each value of activation_checkpointing."""
    from rich.table import Table

    table = Table("part", title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)

    def row(name: str, values: list[float]) -> None:
        table.add_row(name, *map(_gib, values))

    for name in columns[0].weights:
        row(name, [result.weights[name] for result in columns])
    row("optimizer", [result.optimizer for result in columns])
    table.add_section()
    for name, field in _PEAKS.items():
        row(name, [getattr(result, field) for result in columns])
    row("peak of these six", [result.peak_of_step for result in columns])
    table.add_section()
    row("16-bit copies, sharding buffers", [result.buckets for result in columns])
    row("CUDA context, fragmentation", [result.overhead for result in columns])
    table.add_section()
    row("total (of the six, their peak)", [result.total for result in columns])
    return table


_PEAKS = {
    "gradients": "gradients", "activations": "activations", "loss": "loss", "backward pass of one layer": "working",
    "evaluation batch": "evaluation", "generation of an answer": "generation",
}  # fmt: skip


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _wall_time(args: argparse.Namespace, recipe: dict) -> str:
    """In words, if a throughput is given or measured; else how to get it."""
    import json
    from pathlib import Path

    rate = args.samples_per_second
    if args.measured is not None:
        path = Path(args.measured) / "train_results.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: --measured expects the output folder of a finished run.")
        rate = json.loads(path.read_text("utf-8"))["train_samples_per_second"]
    if rate is None:
        return f"llava train {args.recipe} … --trial 20 measures it; --samples-per-second and --samples compute it."
    if not rate > 0:
        raise ValueError(f"{rate:g} samples per second: the throughput must be above 0.")
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
    return f"{total / rate / 3600:.1f} h for {words} at {rate:g} samples/s."
