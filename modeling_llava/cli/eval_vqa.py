"""`llava eval vqa MODEL …`."""

import argparse

from .eval_common import add_model_arguments, evaluate_with, finish


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Short answers: VQA's soft accuracy over ten people's answers (VQAv2, TextVQA, …), exact match where there is one "
        "(GQA, …)."
    )
    add_model_arguments(parser)
    data = parser.add_argument_group("the data")
    data.add_argument(
        "--questions",
        required=True,
        metavar="F",
        help="JSONL: question_id, image, question, answers or answer; or the official file of VQAv2, GQA, TextVQA, VizWiz",
    )
    data.add_argument("--annotations", metavar="F", help="where the answers are, if not with the questions")
    data.add_argument("--images", required=True, metavar="DIR", help="image folder")
    data.add_argument(
        "--image-name",
        metavar="F",
        help="name of an image of the official files (default: COCO_val2014_{image_id:012d}.jpg for VQAv2, else {image_id}.jpg)",
    )
    data.add_argument(
        "--instruction", metavar="TEXT", help="line after the question; '' for none (default: LLaVA-1.5's)"
    )


def make_benchmark(args: argparse.Namespace):
    """The benchmark that the arguments name, ready to be answered."""
    from ..evaluation import vqa

    questions = vqa.read_questions(args.questions, args.annotations, args.image_name)
    instruction = vqa.instruction_for(questions) if args.instruction is None else args.instruction
    files = [file for file in (args.questions, args.annotations) if file]
    return vqa.make_benchmark(questions, args.images, instruction=instruction or None, files=files)


def run(args: argparse.Namespace) -> int:
    return finish(args, evaluate_with(args, make_benchmark(args)))
