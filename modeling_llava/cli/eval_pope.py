"""`llava eval pope MODEL …`."""

import argparse

from .eval_common import add_model_arguments, evaluate_with, finish


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "POPE: does the model see objects that are not there? Accuracy, precision, recall, F1 and yes-ratio for random, "
        "popular and adversarial questions."
    )
    add_model_arguments(parser)
    data = parser.add_argument_group("the data")
    data.add_argument(
        "--questions",
        required=True,
        nargs="+",
        metavar="F",
        help="JSONL: image, text, label; random, popular or adversarial is in the file's name or in `category`",
    )
    data.add_argument("--images", required=True, metavar="DIR", help="image folder")
    data.add_argument(
        "--instruction", metavar="TEXT", help="line after the question; '' for none (default: LLaVA-1.5's)"
    )


def make_benchmark(args: argparse.Namespace):
    """The benchmark that the arguments name, ready to be answered."""
    from ..evaluation import pope

    questions = pope.read_questions(args.questions)
    instruction = pope.INSTRUCTION if args.instruction is None else args.instruction
    return pope.make_benchmark(questions, args.images, instruction=instruction or None, files=args.questions)


def run(args: argparse.Namespace) -> int:
    return finish(args, evaluate_with(args, make_benchmark(args)))
