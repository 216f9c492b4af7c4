"""`llava quickstart`: a small LLaVA from data to evaluation on this machine's CPU, in minutes."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draws a small world, writes instruction data from its captions and boxes, trains a vision encoder, a language "
        "model, stage 1 and stage 2 (LoRA), evaluates on unseen images, and reloads the result through pipeline(). No "
        "download, no GPU. The same command resumes."
    )
    add = parser.add_argument
    add("--out", default="quickstart", metavar="DIR", help="folder to write (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of everything (default: %(default)s)")
    add("--steps-scale", type=float, default=1.0, metavar="X", help="multiplies every number of training steps")
    add("--threads", type=int, help="CPU threads (default: all cores, at most 4)")
    add("--keep", action="store_true", help="keep intermediate results (DIR/parts)")
    add("--fast", action="store_true", help="every phase with almost no training: a minute's check")


def run(args: argparse.Namespace) -> int:
    import dataclasses
    import os
    import shutil
    import time
    from pathlib import Path

    from ..tiny_world.quickstart import FAST, PHASES, Quickstart, QuickstartSettings

    if not args.steps_scale > 0:
        raise ValueError(f"--steps-scale must be above 0, got {args.steps_scale}.")
    settings = dataclasses.replace(FAST if args.fast else QuickstartSettings(), seed=args.seed)
    out, display = Path(args.out), _Display(PHASES)
    quickstart = Quickstart(out, settings.scaled(args.steps_scale), on_phase=display.begin, on_step=display.step)
    done = [phase for phase in PHASES if phase in quickstart.progress["phases"]]
    if "figures" in done:
        print(f"{out} holds a finished quickstart with these settings. To run it again, delete {out} or change --out.")
        _report(quickstart.results(), out)
        return 0
    print(f"A small LLaVA from nothing, on this machine's CPU, into {out}: about three minutes on two cores.")
    if done:
        print(f"Resuming after: {', '.join(done)}.")

    import torch
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    logging.disable_progress_bar()
    disable_progress_bar()
    torch.set_num_threads(args.threads or min(4, os.cpu_count() or 1))
    begun = time.perf_counter()
    results = quickstart.run()
    display.end()
    if not args.keep:
        shutil.rmtree(out / "parts", ignore_errors=True)
    print(f"done in {time.perf_counter() - begun:.0f} s")
    _report(results, out)
    return 0


class _Display:
    """A line per phase, its seconds and last loss; in a terminal a progress bar while a phase trains."""

    def __init__(self, titles: dict[str, str]):
        self.titles, self.bar, self.begun = titles, None, None

    def begin(self, phase: str) -> None:
        import time

        self.end()
        self.begun = time.perf_counter()
        number = list(self.titles).index(phase) + 1
        print(f"[{number:2}/{len(self.titles)}] {self.titles[phase]} …", flush=True)

    def step(self, step: int, steps: int, loss: float) -> None:
        import sys

        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(total=steps, leave=False, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        self.bar.update(step - self.bar.n)
        self.loss = loss

    def end(self) -> None:
        import time

        if self.begun is None:
            return
        loss = ""
        if self.bar is not None:
            self.bar.close()
            self.bar, loss = None, f", loss {self.loss:.3f}"
        print(f"        {time.perf_counter() - self.begun:.1f} s{loss}", flush=True)


def _report(results: dict, out) -> None:
    from rich.console import Console
    from rich.table import Table

    scores = results["scores"]
    console = Console()
    # Kinds of questions as rows: eight columns do not fit into a terminal of 80 characters.
    table = Table(title="Right answers about unseen images", title_justify="left")
    table.add_column("questions", no_wrap=True)
    for name in scores:
        table.add_column(name, justify="right", style="bold green" if name == "with the image" else None)
    for kind in scores["with the image"]:
        table.add_row(kind, *(f"{found[kind]:.0%}" if kind in found else "–" for found in scores.values()))
    console.print(table)
    held_out, peak = ", ".join(results["held_out_pairs"]), results["peak_rss_bytes"] / 1e9
    print(f"Held out of all training: {held_out}. Peak memory {peak:.1f} GB.")
    print(f"Look at {out / 'answers.png'} and {out / 'loss_curve.png'}; everything is in {out / 'results.json'}.")
    print("\nThree things to try next:")
    for command in next_commands(out):
        print(f"  {command}")


def next_commands(out) -> list[str]:
    """The commands that the quickstart ends with."""
    return [
        f"llava chat {out / 'model'} --image {out / 'world' / 'unseen' / 'images' / '000000.jpg'}",
        f"llava data preview {out / 'data' / 'instruct' / 'instruct.json'} --image-folder "
        f"{out / 'world' / 'train' / 'images'} --processor {out / 'model'}",
        "llava train qlora model=llava-hf/llava-1.5-7b-hf data=my.json image_folder=images output_dir=runs/my",
    ]
