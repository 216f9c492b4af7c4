"""`llava data report RUN`: look at what `llava data generate` made, and make it again without what was marked."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the data of a run of `llava data generate` again from its ledger, with an HTML page of samples to skim. "
        "Nothing is asked and nothing is paid. Samples marked in the page are left out by --drop."
    )
    parser.add_argument("folder", metavar="RUN", help="folder of a run of `llava data generate`")
    parser.add_argument("--images", metavar="DIR", help="image folder (default: the one of the run)")
    parser.add_argument(
        "--drop", metavar="drop.json", help="list of samples to leave out from now on, as the page downloads it"
    )
    add_output_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments on how data is written; shared with `llava data generate`."""
    parser.add_argument(
        "--question-repeats",
        default="1",
        metavar="N",
        help="how many nearly equal questions are kept across the whole set, or 'all' (default: %(default)s)",
    )
    parser.add_argument("--samples", type=int, default=200, help="samples in the HTML page (default: %(default)s)")
    parser.add_argument(
        "--no-parquet", action="store_true", help="leave out the `datasets` folder, which holds a copy of each image"
    )


def output_settings(args: argparse.Namespace, folder: Path):
    """`OutputSettings` from arguments and from the drop list in a run's folder."""
    from ..data_engine.report import read_drop_list
    from ..data_engine.samples import OutputSettings

    repeats = args.question_repeats
    if repeats != "all" and not (repeats.isdigit() and int(repeats) > 0):
        raise ValueError(f"--question-repeats is {repeats}; it is a number from 1 up, or 'all'.")
    if args.samples < 0:
        raise ValueError(f"--samples is {args.samples}; it is a number of samples, 0 for no page.")
    drop = folder / "drop.json"
    return OutputSettings(
        question_repeats=None if repeats == "all" else int(repeats),
        parquet=not args.no_parquet,
        drop=read_drop_list(drop) if drop.exists() else frozenset(),
        report_samples=args.samples,
    )


def describe_output(output) -> None:
    """Says what was written."""
    samples = ", ".join(f"{number:,} {kind}" for kind, number in output.samples.items())
    print(f"{output.samples.total():,} conversations about {output.images:,} images: {samples or 'none'}")
    if output.near_duplicates:
        print(
            f"{output.near_duplicates.total():,} questions repeat others and were left out; "
            "`llava data report RUN --question-repeats all` keeps them"
        )
    if output.missing_images:
        print(
            f"{output.missing_images:,} samples are not in the `datasets` folder: their images are gone or cannot be read"
        )
    for note in output.notes:
        print(note)
    for path in output.files:
        print(f"  {path}")


def run(args: argparse.Namespace) -> int:

    from ..data_engine.generate import check_images
    from ..data_engine.output import write_output
    from ..data_engine.report import read_drop_list
    from ..data_engine.run import open_run, write_json
    from ..endpoint import Ledger

    folder = open_run(args.folder)
    images = check_images(folder, args.images or folder.about.get("images"), None)
    with Ledger(folder.path / "ledger.jsonl") as ledger:
        if args.drop:
            kept = folder.path / "drop.json"
            names = read_drop_list(args.drop) | (read_drop_list(kept) if kept.exists() else frozenset())
            write_json(kept, {"run": folder.id, "drop": sorted(names)})
        output = write_output(folder, ledger, images=images, settings=output_settings(args, folder.path))
    if not output.samples:
        print(f"{folder.path} holds no accepted reply yet")
        return 1
    describe_output(output)
    if (page := folder.path / "report.html") in output.files:
        print(f"look at {page} in a browser")
    return 0
