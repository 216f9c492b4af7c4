"""`llava eval scienceqa MODEL …`."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from .endpoint_options import add_endpoint_arguments, asking_options, make_chat_model
from .eval_common import add_model_arguments, evaluate_with, finish


EPILOG = """\
examples:
  llava eval scienceqa MODEL --problems problems.json --splits pid_splits.json --split test --images images --out runs/sqa
  llava eval scienceqa --export-training train.json --problems problems.json --splits pid_splits.json --split train
  llava eval scienceqa MODEL … --language-model gpt-4 --out runs/sqa     (also the two ensembles with it)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "ScienceQA (LLaVA §5.2): the table of the paper next to the published rows. With --export-training FILE no model\n"
        "is run; the split is written as training data in the paper's form."
    )
    parser.epilog = EPILOG
    add_model_arguments(parser, required=False)  # an export needs neither MODEL nor --out
    data = parser.add_argument_group("the data")
    data.add_argument("--problems", metavar="F", help="problems.json")
    data.add_argument("--splits", metavar="F", help="pid_splits.json")
    what = "instead: a Hub dataset or folder in the form of derek-thomas/ScienceQA"
    data.add_argument("--dataset", metavar="NAME", help=what)
    data.add_argument("--split", default="test", help="which split (default: %(default)s)")
    data.add_argument("--images", metavar="DIR", help="folder with <split>/<id>/image.png")
    form = parser.add_argument_group("the form")
    what = "what is given and what is learned, such as QCM-ALE (answer first), QCM-A, QCM-LEPA (LLaVA's headings)"
    form.add_argument("--order", default="QCM-LEA", help=what + " (default: %(default)s, reasoning first)")
    form.add_argument("--direct", action="store_true", help="ask for the letter alone, as LLaVA-1.5 is evaluated")
    form.add_argument("--export-training", metavar="F", help="write the split as training data (LLaVA's JSON)")
    language = parser.add_argument_group("a language-only model, alone and together with MODEL")
    language.add_argument("--language-model", metavar="NAME", help="its name at the endpoint")
    what = "the model that decides where the two differ (default: --language-model)"
    language.add_argument("--judge", metavar="NAME", help=what)
    language.add_argument("--shots", type=int, default=2, help="worked examples (default: %(default)s)")
    language.add_argument("--shots-split", default="train", help="split of the worked examples (default: %(default)s)")
    add_endpoint_arguments(parser)


def make_benchmark(args: argparse.Namespace):
    """The benchmark of the arguments."""
    from ..evaluation import scienceqa

    order, _ = scienceqa.split_order(args.order)
    if args.images is None and not args.dataset:
        raise ValueError("Give --images, the folder with <split>/<id>/image.png.")
    problems = _read(args, args.split, args.images)
    files = [] if args.dataset else [args.problems, args.splits]
    return scienceqa.make_benchmark(problems, image_folder=args.images, order=order, direct=args.direct, files=files)


def run(args: argparse.Namespace) -> int:
    if args.export_training:
        return _export(args)
    if args.model is None or args.out is None:
        raise ValueError("Give MODEL and --out DIR, or --export-training F.")
    results = evaluate_with(args, make_benchmark(args))
    code = finish(args, results, ["LLaVA-13B"])
    if args.language_model and results is not None:
        _with_language_model(args, results)
    return code


def _read(args: argparse.Namespace, split: str, images: str | None) -> list:
    """The problems of a split."""
    from ..evaluation import scienceqa

    if args.dataset:
        if args.problems or args.splits:
            raise ValueError("--dataset replaces --problems and --splits; give one or the other.")
        from datasets import load_dataset

        split = {"val": "validation"}.get(split, split)
        return scienceqa.read_hub_problems(load_dataset(args.dataset, split=split), split)
    if not (args.problems and args.splits):
        raise ValueError("Give --problems and --splits (the official files), or --dataset.")
    return scienceqa.read_problems(args.problems, args.splits, split, images)


def _export(args: argparse.Namespace) -> int:
    from ..evaluation.scienceqa import to_llava_rows
    from ..io.files import write_atomic

    problems = _read(args, args.split, args.images)
    if args.dataset:
        problems = [_with_image_file(problem, args.images) for problem in problems]
    rows = list(to_llava_rows(problems, args.order))
    Path(args.export_training).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.export_training, json.dumps(rows, indent=1, ensure_ascii=False))
    with_image = sum("image" in row for row in rows)
    folder = args.images or "the folder of the images"
    print(f"{len(rows):,} samples, {with_image:,} with an image, {args.order} → {args.export_training}")
    print(f"next: llava train finetune data={args.export_training} image_folder={folder} model=… output_dir=…")
    return 0


def _with_image_file(problem, folder: str | None):
    """Writes a dataset's image in the official layout; returns the problem with its path."""
    if problem.image is None:
        return problem
    if folder is None:
        raise ValueError("Give --images, the folder to write the dataset's images to.")
    path = Path(problem.split, problem.id, "image.png")
    (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
    problem.image.save(Path(folder) / path)
    return replace(problem, image=path.as_posix())


def _with_language_model(args: argparse.Namespace, results: dict) -> None:
    from ..evaluation.report import Run, compare, markdown
    from ..evaluation.results import read_results, write_results
    from ..evaluation.scienceqa_language import choose_shots, score_with_language_model

    _, rows = read_results(args.out)
    shots = choose_shots(_read(args, args.shots_split, None), args.shots)
    print(f"asking {args.language_model}; after Ctrl-C the same command resumes", file=sys.stderr)
    scored = score_with_language_model(
        _read(args, args.split, args.images),
        {row["id"]: row["answer"] for row in rows},
        make_chat_model(args, args.language_model),
        Path(args.out) / "language",
        shots=shots,
        judge=make_chat_model(args, args.judge) if args.judge else None,
        max_tokens=args.max_reply_tokens or 512,
        partial=args.partial,
        **asking_options(args),
    )
    own = results["model"]["name"]
    names = {
        "language": args.language_model,
        "complement": f"{own} + {args.language_model}, complement",
        "judge": f"{own} + {args.judge or args.language_model}, judge",
    }
    runs = [Run(own, results, rows)]
    shared = {"data": results["data"], "settings": {"shots": [shot.id for shot in shots], "order": "QCM"}}
    shared["total"] = results["samples"]["total"]
    for kind, score in scored.items():
        about = {"model": {"name": names[kind]}, "answered": len(score.rows), **shared}
        one = write_results(Path(args.out) / kind, "scienceqa", score, **about)
        runs.append(Run(names[kind], one, score.rows))
    print(markdown(compare(runs)))
