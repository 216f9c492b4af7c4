"""`llava data expand IN OUT`: captions into stage 1 data."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Captions into stage 1 data in LLaVA's JSON: each caption becomes the answer to a question drawn from a list."
    )
    parser.add_argument("source", metavar="IN.json", help="COCO captions, LLaVA's JSON, or {image, caption} rows")
    parser.add_argument("target", metavar="OUT.json", help="JSON, or JSONL by its name")
    parser.add_argument(
        "--style",
        choices=("brief", "detailed", "plain"),
        default="brief",
        help="which list of questions; 'plain' lets the image alone stand for the question (default: %(default)s)",
    )
    parser.add_argument("--questions", metavar="FILE", help="questions of your own, one per line")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from ..data_engine.captions import expand_captions

    summary = expand_captions(args.source, args.target, style=args.style, questions=args.questions, seed=args.seed)
    print(f"{args.target}: {summary.samples:,} samples of {summary.images:,} rows")
    if summary.empty:
        print(f"{summary.empty:,} rows had no caption and were left out")
    if summary.marked:
        print(f"{summary.marked:,} captions hold the text <image>, which would mark an image, and were left out")
    print(f"next: llava data check {args.target} --images DIR")
    return 0
