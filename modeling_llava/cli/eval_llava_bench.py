"""`llava eval llava-bench MODEL …`."""

import argparse
import sys
from pathlib import Path

from .endpoint_options import add_endpoint_arguments, asking_options, make_chat_model, temperature
from .eval_common import add_model_arguments, evaluate_with, finish


EPILOG = """\
examples:
  llava eval llava-bench MODEL --questions qa90_questions.jsonl --contexts caps_boxes_coco2014_val_80.jsonl \\
      --references qa90_gpt4_answer.jsonl --images val2014 --judge gpt-4 --out runs/bench
  … --judge my-model --base-url http://localhost:8000/v1 --both-orders --repeats 3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "LLaVA-Bench (COCO) and (In-the-Wild) (LLaVA §5.1): a judge scores MODEL's answers and those of a language-only\n"
        "model that is given a text in place of the image. The contexts decide which of the two benchmarks it is."
    )
    parser.epilog = EPILOG
    add_model_arguments(parser)
    data = parser.add_argument_group("the data")
    data.add_argument("--questions", required=True, metavar="F", help="JSONL: question_id, image, category, text")
    what = "JSONL: image, captions and instances, or caption"
    data.add_argument("--contexts", required=True, metavar="F", help=what)
    data.add_argument("--references", metavar="F", help="JSONL: question_id, text (the published answers of GPT-4)")
    data.add_argument("--reference-model", metavar="NAME", help="without --references: the model that gives them")
    data.add_argument("--images", required=True, metavar="DIR", help="image folder")
    judge = parser.add_argument_group("the judge")
    judge.add_argument("--judge", required=True, metavar="NAME", help="the judge's name at the endpoint")
    judge.add_argument("--rules", metavar="F", help="the judge's rules, in the published form (default: ours)")
    judge.add_argument("--both-orders", action="store_true", help="judge each pair twice, with the answers swapped")
    judge.add_argument("--repeats", type=int, default=1, metavar="N", help="judge everything N times (default: 1)")
    what = "a number, or 'default' for the endpoint's (default: %(default)s)"
    judge.add_argument("--judge-temperature", type=temperature, default=0.2, metavar="T", help=what)
    add_endpoint_arguments(parser)


def make_benchmark(args: argparse.Namespace):
    """The benchmark of the arguments; its score asks the judge."""
    from ..evaluation import llava_bench
    from ..evaluation.judge import read_rules, rule_for

    if args.references is None and args.reference_model is None:
        raise ValueError("Give --references F, or --reference-model NAME to generate them.")
    questions = llava_bench.read_questions(args.questions, args.contexts, args.references, args.images)
    rules, longest = read_rules(args.rules), args.max_reply_tokens or 1024
    how = llava_bench.JudgeSettings(rules, args.both_orders, args.repeats, args.judge_temperature, longest)
    for question in questions:  # a missing rule is found before the model is loaded
        rule_for(how.rules, question.category, question.has_boxes)
    judge, ledgers = make_chat_model(args, args.judge), Path(args.out) / "judge"

    def score(answers: dict[str, str]):
        asked = [question for question in questions if question.id in answers]
        options = {"partial": args.partial, **asking_options(args)}
        if args.references is None:
            print(f"asking {args.reference_model} for the reference answers", file=sys.stderr)
            model = make_chat_model(args, args.reference_model)
            asked = llava_bench.ask_references(asked, model, ledgers, max_tokens=how.max_tokens, **options)
        print(f"asking {args.judge}; after Ctrl-C the same command resumes", file=sys.stderr)
        reviews = llava_bench.judge_answers(asked, answers, judge, ledgers, how, **options)
        return llava_bench.score(asked, answers, reviews, judge, how)

    files = [file for file in (args.questions, args.contexts, args.references) if file]
    return llava_bench.make_benchmark(questions, args.images, score, files)


def run(args: argparse.Namespace) -> int:
    from ..evaluation.pages import write_bench_page
    from ..evaluation.results import read_results

    results = evaluate_with(args, make_benchmark(args))
    code = finish(args, results, ["LLaVA-13B"])
    if results is not None:
        page = Path(args.out) / "index.html"
        write_bench_page(page, *read_results(args.out), args.images, args.follow_symlinks)
        if failed := results["counts"]["questions_without_score"]:
            print(f"{failed} questions have no score and are left out of the means.", file=sys.stderr)
        print(f"written: {page}", file=sys.stderr)
    return code
