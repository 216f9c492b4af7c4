"""`llava eval captions MODEL …`."""

import argparse

from .eval_common import add_model_arguments, evaluate_with, finish


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Captions against people's captions: CIDEr-D (pycocoevalcap) and BLEU-4 (sacrebleu). Words are cut without COCO's Java "
        "tokenizer: compare among runs of this command."
    )
    add_model_arguments(parser)
    data = parser.add_argument_group("the data")
    data.add_argument("--annotations", required=True, metavar="F", help="COCO captions, or JSONL: image, captions")
    data.add_argument("--images", required=True, metavar="DIR", help="image folder")
    data.add_argument("--question", metavar="TEXT", help="what is asked")


def make_benchmark(args: argparse.Namespace):
    """The benchmark that the arguments name, ready to be answered."""
    from ..evaluation import captions

    images = captions.read_captions(args.annotations)
    return captions.make_benchmark(
        images, args.images, question=args.question or captions.QUESTION, files=[args.annotations]
    )


def run(args: argparse.Namespace) -> int:
    return finish(args, evaluate_with(args, make_benchmark(args)))
