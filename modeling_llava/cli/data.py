"""`llava data COMMAND …`: look at training data, or make it. Here: the table of commands, `expand` and `filter`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from . import data_check, data_generate, data_preview


SUBCOMMANDS: dict[str, str] = {
    "check": "check every record and image before training",
    "preview": "samples as the model sees them, with the supervised tokens marked",
    "expand": "captions into stage 1 data",
    "filter": "a concept-balanced choice of captions",
    "generate": "instruction data from captions and boxes, by a language model",
    "report": "samples of generated data to skim, and the data again without what was marked",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    parser.commands = commands.choices  # for the errors of misspelt words
    for name, summary in SUBCOMMANDS.items():
        child = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        _FUNCTIONS[name][0](child)


def run(args: argparse.Namespace) -> int | None:
    return _FUNCTIONS[args.data_command][1](args)


def _add_source_and_target(parser: argparse.ArgumentParser, target: str) -> None:
    parser.add_argument("source", metavar="IN.json", help="COCO captions, LLaVA's JSON, or {image, caption} rows")
    parser.add_argument("target", metavar="OUT.json", help=f"{target}JSON, or JSONL by its name")


def _add_expand_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Captions into stage 1 data: each caption becomes the answer to a question drawn from a list."
    _add_source_and_target(parser, "")
    add, styles = parser.add_argument, ("brief", "detailed", "plain")
    what = "the list of questions; 'plain': the image without a question (default: %(default)s)"
    add("--style", choices=styles, default="brief", help=what)
    add("--questions", metavar="FILE", help="your own questions, one per line")
    add("--seed", type=int, default=0, help="seed of the draws (default: %(default)s)")


def _expand(args: argparse.Namespace) -> int:
    from ..data_engine.captions import expand_captions

    summary = expand_captions(args.source, args.target, style=args.style, questions=args.questions, seed=args.seed)
    print(f"{args.target}: {summary.samples:,} samples of {summary.images:,} rows")
    if summary.empty:
        print(f"left out: {summary.empty:,} rows without a caption")
    if summary.marked:
        print(f"left out: {summary.marked:,} captions that contain the text <image>, which stands for an image")
    print(f"next: llava data check {args.target} --images DIR")
    return 0


def _add_filter_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Choose captions so that rare and common concepts are balanced (LLaVA, appendix): noun phrases by spaCy; those of "
        "fewer than --least captions are skipped; from the rarest up all captions with a phrase are chosen, at most --most. "
        "OUT.report.json, OUT.concepts.png and OUT.phrases/, from which a stopped run resumes, are written next to OUT.json."
    )
    _add_source_and_target(parser, "the chosen rows, unchanged; ")
    add, engines = parser.add_argument, ("local", "ray")
    add("--least", type=int, default=3, help="skip phrases of fewer captions (default: %(default)s)")
    add("--most", type=int, default=100, help="most captions per phrase (default: %(default)s)")
    add("--target-size", type=int, metavar="N", help="stop with the phrase at which N captions are chosen")
    add("--seed", type=int, default=0, help="seed of the random choices (default: %(default)s)")
    add("--spacy-model", default="en_core_web_sm", help="spaCy's model (default: %(default)s)")
    add("--phrases", metavar="DIR", help="folder of the noun phrases (default: OUT.phrases)")
    add("--workers", type=int, help="processes that extract noun phrases (default: one per core)")
    add("--engine", choices=engines, default="local", help="'ray': Ray Data, on a cluster (default: %(default)s)")


def _filter(args: argparse.Namespace) -> int:
    from ..data_engine.captions import filter_captions
    from ..data_engine.concepts import ConceptSettings

    settings = ConceptSettings(args.least, args.most, args.seed, args.target_size)
    options = {"phrases": args.phrases, "workers": args.workers, "engine": args.engine, "progress": True}
    summary = filter_captions(args.source, args.target, settings, model=args.spacy_model, **options)
    target = Path(args.target)
    print(f"{args.target}: {summary.chosen:,} of {summary.captions:,} captions ({summary.rows_chosen:,} rows)")
    print(
        f"noun phrases: {summary.phrases:,} before, {summary.phrases_after:,} after; {summary.skipped:,} rarer than "
        f"{args.least} skipped, {summary.capped:,} cut to {args.most} captions"
    )
    print("report:", *(target.with_name(f"{target.stem}.{name}") for name in ("report.json", "concepts.png")))
    print(f"next: llava data expand {args.target} STAGE1.json")
    return 0


_FUNCTIONS: dict[str, tuple[Callable, Callable]] = {
    "check": (data_check.add_arguments, data_check.run),
    "preview": (data_preview.add_arguments, data_preview.run),
    "expand": (_add_expand_arguments, _expand),
    "filter": (_add_filter_arguments, _filter),
    "generate": (data_generate.add_arguments, data_generate.run),
    "report": (data_generate.add_report_arguments, data_generate.report),
}
