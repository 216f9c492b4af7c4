"""`llava eval BENCHMARK …`: each benchmark is one small module, `eval_BENCHMARK.py`."""

import argparse
import importlib
import shlex
from dataclasses import replace

from .data import _LazyParser
from .eval_common import tokens_of


SUBCOMMANDS: dict[str, str] = {
    "scienceqa": "multiple-choice science questions; also their training data and the ensembles with a language model",
    "llava-bench": "LLaVA-Bench (COCO) and (In-the-Wild): answers, and a judge's scores of them",
    "pope": "does it see objects that are not there?",
    "vqa": "short answers: VQA's soft accuracy and exact match",
    "captions": "captions: CIDEr and BLEU",
    "report": "runs beside each other: tables, paired differences, a plot",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True, parser_class=_LazyParser)
    parser.commands = commands.choices  # for the errors of misspelt words
    for name, summary in SUBCOMMANDS.items():
        child = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        child.module = _module(name)


def run(args: argparse.Namespace) -> int | None:
    return importlib.import_module(_module(args.benchmark)).run(args)


def slice_of(line: str, out: str):
    """
    The benchmark of a command line without `llava eval`, MODEL and --out, for a model that is being trained.

    Args:
        line (`str`): `vqa --questions q.jsonl --images val2014 --limit 200`.
        out (`str`): Folder for what a judge is asked (LLaVA-Bench).

    Returns:
        [`~modeling_llava.evaluation.benchmark.Benchmark`]

    Raises:
        ValueError: not a benchmark, a wrong option, or an option that the run decides.
    """
    name, *words = shlex.split(line) or [""]
    known = [command for command in SUBCOMMANDS if command != "report"]
    if name not in known:
        raise ValueError(f"benchmarks: {line!r} begins with no benchmark; there are {', '.join(known)}.")
    module = importlib.import_module(_module(name))
    parser = _RaisingParser(prog=f"benchmarks: {line!r}", add_help=False)
    module.add_arguments(parser)
    args = parser.parse_args(["-", *words, "--out", out])
    decided = (
        "adapter",
        "revision",
        "dtype",
        "device",
        "load_in_4bit",
        "system",
        "batch_size",
        "temperature",
        "top_p",
    )
    for option in (*decided, "seed", "shard", "partial", "language_model", "export_training"):
        if getattr(args, option, None) != parser.get_default(option):
            raise ValueError(f"benchmarks: {line!r}: --{option.replace('_', '-')} has no place in a training run.")
    benchmark = module.make_benchmark(args).first(args.limit)
    return replace(benchmark, max_new_tokens=tokens_of(args, benchmark))


class _RaisingParser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{self.prog}: {message}")


def _module(name: str) -> str:
    return f"modeling_llava.cli.eval_{name.replace('-', '_')}"
