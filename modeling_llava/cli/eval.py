"""`llava eval BENCHMARK …`: each benchmark is one small module, `eval_BENCHMARK.py`."""

import argparse
import importlib

from .data import _LazyParser


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
    for name, summary in SUBCOMMANDS.items():
        child = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        child.module = _module(name)


def run(args: argparse.Namespace) -> int | None:
    return importlib.import_module(_module(args.benchmark)).run(args)


def _module(name: str) -> str:
    return f"modeling_llava.cli.eval_{name.replace('-', '_')}"
