"""`llava eval BENCHMARK …`: the table of benchmarks, the short ones, and `llava eval report`."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from . import eval_llava_bench, eval_scienceqa
from .eval_common import add_model_arguments, apply_options, evaluate_with, finish


SUBCOMMANDS: dict[str, str] = {
    "scienceqa": "multiple-choice science questions; also their training data and the ensembles with a language model",
    "llava-bench": "LLaVA-Bench (COCO) and (In-the-Wild): answers, and a judge's scores of them",
    "pope": "does it see objects that are not there? accuracy, precision, recall, F1 and yes-ratio",
    "vqa": "short answers: VQA's soft accuracy over ten people's answers, exact match if there is only one",
    "captions": "CIDEr-D and BLEU-4 of captions (without COCO's Java tokenizer: compare runs of this command only)",
    "report": "compare runs: tables, a plot, paired differences from the first run with their intervals",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    parser.commands = commands.choices  # for the errors of misspelt words
    for name, summary in SUBCOMMANDS.items():
        child = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:])
        (_add_report_arguments if name == "report" else BENCHMARKS[name][0])(child)


def run(args: argparse.Namespace) -> int:
    if args.benchmark == "report":
        return _report(args)
    if args.benchmark == "scienceqa":
        return eval_scienceqa.run(args)
    if args.benchmark == "llava-bench":
        return eval_llava_bench.run(args)
    return finish(args, evaluate_with(args, BENCHMARKS[args.benchmark][1](args)))


def slice_of(line: str, out: str):
    """
    The benchmark of a command line without `llava eval`, MODEL and --out, such as `vqa --questions q.jsonl --images val2014`,
    for a model that is being trained. `out` is the folder of the judge's ledger (LLaVA-Bench).

    Raises:
        ValueError: not a benchmark, a wrong option, or an option that the training run decides.
    """
    name, *words = shlex.split(line) or [""]
    if name not in BENCHMARKS:
        raise ValueError(f"benchmarks: {line!r} does not begin with a benchmark: {', '.join(BENCHMARKS)}.")
    add, make_benchmark = BENCHMARKS[name]
    parser = _RaisingParser(prog=f"benchmarks: {line!r}", add_help=False)
    add(parser)
    args = parser.parse_args(["-", *words, "--out", out])
    decided = "adapter base revision dtype device load_in_4bit system batch_size temperature top_p seed shard partial"
    for option in (*decided.split(), "language_model", "export_training"):
        if getattr(args, option, None) != parser.get_default(option):
            raise ValueError(f"benchmarks: {line!r}: --{option.replace('_', '-')} does not apply to a training run.")
    return apply_options(args, make_benchmark(args))


class _RaisingParser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{self.prog}: {message}")


def _add_question_arguments(parser: argparse.ArgumentParser):
    """The options of every benchmark of questions with short answers; returns the group of its data."""
    add_model_arguments(parser)
    data = parser.add_argument_group("the data")
    data.add_argument("--images", required=True, metavar="DIR", help="image folder")
    data.add_argument("--instruction", metavar="TEXT", help="after the question; '' for none (default: LLaVA-1.5's)")
    return data


def _add_pope_arguments(parser: argparse.ArgumentParser) -> None:
    what = "JSONL: image, text, label; random, popular or adversarial is in the file's name or in `category`"
    _add_question_arguments(parser).add_argument("--questions", required=True, nargs="+", metavar="F", help=what)


def _make_pope(args: argparse.Namespace):
    from ..evaluation import pope

    questions = pope.read_questions(args.questions)
    instruction = pope.INSTRUCTION if args.instruction is None else args.instruction
    return pope.make_benchmark(questions, args.images, instruction=instruction or None, files=args.questions)


def _add_vqa_arguments(parser: argparse.ArgumentParser) -> None:
    data = _add_question_arguments(parser)
    what = "JSONL: question_id, image, question, answers or answer; or the file of VQAv2, GQA, TextVQA or VizWiz"
    data.add_argument("--questions", required=True, metavar="F", help=what)
    data.add_argument("--annotations", metavar="F", help="file of the answers, if they are not with the questions")
    what = "image name in official files (default: COCO_val2014_{image_id:0>12}.jpg for VQAv2, else {image_id}.jpg)"
    data.add_argument("--image-name", metavar="F", help=what)


def _make_vqa(args: argparse.Namespace):
    from ..evaluation import vqa

    questions = vqa.read_questions(args.questions, args.annotations, args.image_name)
    instruction = vqa.instruction_for(questions) if args.instruction is None else args.instruction
    files = [file for file in (args.questions, args.annotations) if file]
    return vqa.make_benchmark(questions, args.images, instruction=instruction or None, files=files)


def _add_captions_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    data = parser.add_argument_group("the data")
    data.add_argument("--annotations", required=True, metavar="F", help="COCO captions, or JSONL: image, captions")
    data.add_argument("--images", required=True, metavar="DIR", help="image folder")
    data.add_argument("--question", metavar="TEXT", help="what is asked")


def _make_captions(args: argparse.Namespace):
    from ..evaluation import captions

    question, images = args.question or captions.QUESTION, captions.read_captions(args.annotations)
    return captions.make_benchmark(images, args.images, question=question, files=[args.annotations])


BENCHMARKS: dict[str, tuple[Callable, Callable]] = {
    "scienceqa": (eval_scienceqa.add_arguments, eval_scienceqa.make_benchmark),
    "llava-bench": (eval_llava_bench.add_arguments, eval_llava_bench.make_benchmark),
    "pope": (_add_pope_arguments, _make_pope),
    "vqa": (_add_vqa_arguments, _make_vqa),
    "captions": (_add_captions_arguments, _make_captions),
}
"""For each benchmark what adds its arguments, and what makes the benchmark from them."""


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of `llava eval`, the baseline first")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="names of the runs (default: their folders)")
    parser.add_argument("--out", metavar="DIR", help="write report.md, report.json and a plot per benchmark")
    what = "published rows to draw in the plots, such as LLaVA-13B"
    parser.add_argument("--published", nargs="*", metavar="ROW", default=(), help=what)
    what = "copy the results of these weights into MODEL's folder, for the model card of `llava publish`"
    parser.add_argument("--attach", metavar="MODEL", help=what)


def _report(args: argparse.Namespace) -> int:
    from ..evaluation.report import attach, compare, markdown, plot, published_for, read_runs
    from ..io.files import write_atomic

    runs = read_runs(args.runs, args.labels)
    comparisons = compare(runs)
    known = sorted({row for comparison in comparisons for row in published_for(comparison["benchmark"])})
    if unknown := [row for row in args.published if row not in known]:
        raise ValueError(f"--published: there is no row {', '.join(unknown)}; there are {', '.join(known) or 'none'}.")
    text = markdown(comparisons)
    print(text)
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"comparisons": comparisons}, indent=2, ensure_ascii=False)
        write_atomic(out / "report.md", "# Evaluation\n\n" + text)
        write_atomic(out / "report.json", content + "\n")
        for comparison in comparisons:
            plot(comparison, out / f"{comparison['benchmark']}.png", args.published)
        print(f"written: {out / 'report.md'}, report.json and {len(comparisons)} plots", file=sys.stderr)
    if args.attach:
        attached = attach(args.runs, args.attach)
        for path in attached:
            print(f"written: {path}; `llava publish` puts it into the model card", file=sys.stderr)
        if others := len(runs) - len(attached):
            print(f"not attached: {others} of {len(runs)} runs, which are of other weights", file=sys.stderr)
    return 0
