"""`llava quickstart`: a small LLaVA from data to evaluation on this machine's CPU, in minutes."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draws a small world, writes instruction data from its captions and boxes, trains a vision encoder, a language "
        "model, stage 1 and stage 2 (LoRA), evaluates on unseen images, and reloads the result through pipeline(). No "
        "download, no GPU. The same command resumes."
    )
    parser.add_argument("--out", default="quickstart", metavar="DIR", help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the world and of all training (default: %(default)s)")
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, metavar="X", help="multiplies every number of training steps"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores, at most 4)")
    parser.add_argument("--keep", action="store_true", help="keep intermediate results (DIR/parts)")
    parser.add_argument("--fast", action="store_true", help="every phase with almost no training: a minute's check")


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
    settings = settings.scaled(args.steps_scale)
    out = Path(args.out)
    display = _Display(len(PHASES), PHASES)
    quickstart = Quickstart(out, settings, on_phase=display.begin, on_step=display.step)
    if "figures" in quickstart.progress["phases"]:
        print(
            f"{out} holds a finished quickstart with these settings. To run it again, delete it or give another --out."
        )
        _report(quickstart.results(), out)
        return 0
    done = [phase for phase in PHASES if phase in quickstart.progress["phases"]]
    print(f"A small LLaVA from nothing, on this machine's CPU, into {out}: about three minutes on two cores.")
    if done:
        print(f"Resuming after: {', '.join(done)}.")
    display.number = len(done)

    import torch
    from datasets.utils.logging import disable_progress_bar as quiet_datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    quiet_datasets()
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
    """A line per phase; a bar with the loss while a phase trains."""

    def __init__(self, phases: int, titles: dict[str, str]):
        self.phases, self.titles, self.number = phases, titles, 0
        self.bar, self.begun, self.phase = None, 0.0, None

    def begin(self, phase: str) -> None:
        import time

        self.end()
        self.number += 1
        self.phase, self.begun = phase, time.perf_counter()
        print(f"[{self.number:2}/{self.phases}] {self.titles[phase]} …", flush=True)

    def step(self, step: int, steps: int, loss: float) -> None:
        import sys

        from tqdm import tqdm

        if self.bar is None:
            # A terminal gets a bar, a log file only the line at the end.
            self.bar = tqdm(total=steps, leave=False, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.bar.update(step - self.bar.n)
        self.loss = loss

    def end(self) -> None:
        import time

        if self.phase is None:
            return
        loss = ""
        if self.bar is not None:
            self.bar.close()
            self.bar, loss = None, f", loss {self.loss:.3f}"
        print(f"        {time.perf_counter() - self.begun:.1f} s{loss}", flush=True)
        self.phase = None


def _report(results: dict, out) -> None:
    from rich.console import Console
    from rich.table import Table

    scores = results["scores"]
    console = Console()
    # Kinds of questions as rows: eight columns do not fit into a terminal of 80 characters.
    table = Table(title="Right answers about unseen images", title_justify="left")
    table.add_column("questions", no_wrap=True)
    for name in scores:
        table.add_column(name, justify="right", style="bold green" if name == "with the picture" else None)
    for kind in scores["with the picture"]:
        table.add_row(kind, *(f"{shares[kind]:.0%}" if kind in shares else "–" for shares in scores.values()))
    console.print(table)
    console.print(
        f"Held out of all training: {', '.join(results['held_out_pairs'])}. "
        f"Peak memory {results['peak_rss_bytes'] / 1e9:.1f} GB.",
        soft_wrap=True,
        highlight=False,
    )
    console.print(
        f"Look at {out / 'answers.png'} and {out / 'loss_curve.png'}; everything is in {out / 'results.json'}."
    )
    console.print("\nThree things to try next:", highlight=False)
    for command in next_commands(out):
        console.print(f"  {command}", soft_wrap=True, highlight=False, markup=False)


def next_commands(out) -> list[str]:
    """The commands that the quickstart ends with."""
    return [
        f"llava chat {out / 'model'} --image {out / 'world' / 'unseen' / 'images' / '000000.jpg'}",
        f"llava data preview {out / 'data' / 'instruct' / 'instruct.json'} --image-folder "
        f"{out / 'world' / 'train' / 'images'} --processor {out / 'model'}",
        "llava train qlora model=llava-hf/llava-1.5-7b-hf data=my.json image_folder=images output_dir=runs/my",
    ]
