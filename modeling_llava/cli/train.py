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
    add = parser.add_argument
    presets = "pretrain, finetune, lora, qlora; by the GPU's memory: qlora-8gb, qlora-12gb, qlora-16gb, qlora-24gb"
    add("recipe", nargs="?", help=f"a recipe (YAML), or the name of a preset: {presets}")
    add("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    trial = "train STEPS steps into output_dir/trial; show answers before and after, and how long the whole run takes"
    add("--trial", type=int, metavar="STEPS", help=trial)
    add("--list-settings", action="store_true", help="print every setting with its default, and exit")


def run(args: argparse.Namespace) -> int:
    if args.list_settings:
        return _list_settings()
    if args.recipe is None:
        raise ValueError("RECIPE is missing: a YAML file, or the name of a preset (llava train --help).")
    if "=" in args.recipe:
        raise ValueError(f"RECIPE comes before key=value: llava train RECIPE {args.recipe}")

    from ..training import LlavaTrainingArguments, read_recipe, train
    from ..training.callbacks import DurationCallback

    recipe = read_recipe(args.recipe, args.overrides)
    if recipe.get("eval_data") is None and not recipe.get("streaming"):
        recipe.setdefault("eval_size", "auto")
    duration = DurationCallback(recipe.get("num_train_epochs", 3), recipe.get("max_steps", -1))
    if args.trial is not None:
        recipe = _trial_of(recipe, args.trial)
    settings = LlavaTrainingArguments(**recipe)
    is_main = settings.process_index == 0
    if is_main and settings.model and settings.data:  # else an error follows
        what = settings.stage if settings.adapter == "none" else f"{settings.stage} with {settings.adapter}"
        print(f"{what} of {settings.model} on {settings.data} → {settings.output_dir}")
        for line in _needs(settings):
            print(line)
    callbacks = [*([duration] if args.trial is not None else ()), *_callbacks(settings)]
    result = train(settings, callbacks=callbacks)
    if not is_main:
        return 0
    if args.trial is not None:
        _print_answers(callbacks[-1])
        whole = duration.whole
        print(f"the whole run takes {whole}" if whole else "run a trial of at least 2 steps to estimate the time")
        return 0
    losses = [entry["loss"] for entry in result.log_history if "loss" in entry]
    if losses:
        print(f"loss {losses[0]:.3f} → {losses[-1]:.3f} in {result.global_step} steps")
    if "eval_loss" in result.metrics:
        print(f"evaluation loss {result.metrics['eval_loss']:.3f}")
    print(f"written: {result.output_dir} ({result.kind})")
    print(f"next: {_next_command(result.kind, str(result.output_dir), settings.adapter)}")
    return 0


def _trial_of(recipe: dict, steps: int) -> dict:
    """The recipe of a trial: nothing of the run itself is read or written."""
    if steps < 1:
        raise ValueError(f"--trial {steps}: at least 1 step is needed.")
    trial = {
        "max_steps": steps, "logging_steps": min(steps, 5), "eval_strategy": "no", "eval_on_start": True, "save_strategy": "no",
        "resume": "never", "report_to": "none", "push_to_hub": False, "benchmarks": None, "load_best_model_at_end": False,
        "early_stopping_patience": None, "metric_for_best_model": None, "sample_answers": 4,
    }  # fmt: skip
    if not recipe.get("streaming"):
        trial |= {"eval_data": None, "eval_size": 4}
    elif recipe.get("eval_data") is None:
        trial |= {"eval_on_start": False, "sample_answers": 0}
    if recipe.get("output_dir"):
        trial["output_dir"] = os.path.join(recipe["output_dir"], "trial")
    return recipe | trial


def _print_answers(callback) -> None:
    """A row for each held-out sample: the model's answers before and after the trial."""
    from rich.console import Console
    from rich.table import Table

    answered = getattr(callback, "answered", None)  # none of a stream without evaluation data
    if not answered:
        return
    before, after = answered[min(answered)], answered[max(answered)]
    table = Table("question", "reference", "before", "after", show_lines=True)
    for (question, reference, old), (_, _, new) in zip(before, after):
        table.add_row(question, reference, old, new)
    Console(markup=False).print(table)


def _needs(settings) -> list[str]:
    """Lines on the download, the disk and the GPU's memory; none for a run on the CPU from a folder."""
    import torch

    on_gpu = torch.cuda.is_available() and not settings.use_cpu
    if not on_gpu and os.path.isdir(settings.model):
        return []
    from ..training import estimate as e
    from .estimate import needs

    try:
        sizes = e.sizes_of(e.load_config(settings.model, settings.model_revision))
    except (OSError, ValueError):
        return []  # a model that cannot be read: training says why, one that cannot be estimated trains
    run = e.Settings.of(settings)
    if run.activation_checkpointing == "auto":
        run.activation_checkpointing = "offload"  # the least
    result = e.estimate(sizes, run)
    lines = needs(run, result)
    if on_gpu:
        free, total = torch.cuda.mem_get_info(settings.device)
        least = result.total - e.CUDA_CONTEXT
        verdict = "" if least <= free else ": it may not fit, close other programs or see llava estimate --gpu"
        lines.append(
            f"GPU: {free / e.GIB:.1f} of {total / e.GIB:.1f} GiB are free, other programs and a desktop hold the rest; the run "
            f"takes an estimated {least / e.GIB:.1f} at least{verdict}."
        )
    return lines


def _callbacks(settings) -> list:
    """Callbacks that answer questions or score benchmarks during training."""
    callbacks = []
    if settings.sample_answers:
        from ..evaluation.callback import SampleAnswersCallback

        callbacks.append(SampleAnswersCallback(settings.sample_answers))
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
