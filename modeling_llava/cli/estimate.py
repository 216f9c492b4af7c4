"""`llava estimate RECIPE [key=value …]`: memory by part, before anything is loaded."""

import argparse


USES_MODELS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe (YAML), or the name of a preset: pretrain, finetune, lora, qlora")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    parser.add_argument(
        "--gpu", type=float, metavar="GIB", help="memory of your GPU: say whether it fits, and what to change"
    )
    parser.add_argument("--devices", type=int, default=1, help="GPUs that train together (default: 1)")
    parser.add_argument(
        "--sharding", choices=("ddp", "zero2", "zero3", "fsdp"), default="ddp", help="how they share (default: ddp)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what it runs on (default: cuda)")


def run(args: argparse.Namespace) -> int:
    import dataclasses

    from rich.console import Console
    from rich.table import Table

    from ..training.estimate import GIB, Settings, estimate, fits, propose
    from ..training.recipes import read_recipe
    from ..training.shapes import find_config, shapes_of

    recipe = read_recipe(args.recipe, args.overrides)
    if not recipe.get("model"):
        raise ValueError("model is not set. Give a LLaVA folder or Hub name: llava estimate RECIPE model=…")
    shapes = shapes_of(find_config(recipe["model"], recipe.get("model_revision")))
    known = {field.name for field in dataclasses.fields(Settings)}
    settings = Settings(
        **{name: value for name, value in recipe.items() if name in known and value is not None},
        devices=args.devices,
        sharding=args.sharding,
        device=args.device,
    )
    result = estimate(shapes, settings)
    table = Table("part", "GiB", title=f"{recipe['model']}, one of {args.devices} device(s)", title_justify="left")
    for name, size in result.weights.items():
        table.add_row(f"weights: {name}", f"{size / GIB:.2f}")
    table.add_row("optimizer", f"{result.optimizer / GIB:.2f}")
    table.add_row("gradients, activations and loss, at their common highest", f"{result.peak_of_step / GIB:.2f}")
    if result.buckets:
        table.add_row("in transit between devices", f"{result.buckets / GIB:.2f}")
    table.add_row("device: context, workspaces, fragmentation", f"{result.overhead / GIB:.2f}")
    table.add_section()
    table.add_row("all", f"{result.total / GIB:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"{result.trained_parameters:,} trained parameters; {settings.micro_positions:,} positions at a time. "
        "A formula that has not been held against a GPU yet."
    )
    if args.gpu is None:
        return 0
    if fits(result, args.gpu):
        console.print(f"It fits {args.gpu:g} GiB.")
        return 0
    changes = propose(shapes, settings, args.gpu)
    if changes is None:
        console.print(
            f"It does not fit {args.gpu:g} GiB, and no change of the recipe makes it fit. Take a smaller model."
        )
    else:
        words = " ".join(f"{name}={value}" for name, value in changes.items())
        console.print(f"It does not fit {args.gpu:g} GiB. With this it does: {words}", soft_wrap=True)
    return 1
