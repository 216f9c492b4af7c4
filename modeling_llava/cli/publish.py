"""`llava publish MODEL REPO`: check a model (or a data set), write its card and push it to the Hub."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="folder of a full model, an adapter, a projector, or a data set of the data engine"
    )
    parser.add_argument("repo", help="name on the Hub: owner/name, or name for your own")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="gather and check everything, send nothing")
    parser.add_argument(
        "--merge", action="store_true", help="an adapter: fold it into its base and publish the full model"
    )
    parser.add_argument("--base-model", action="append", metavar="NAME", help="Hub name of a base model (repeatable)")
    parser.add_argument("--dataset", action="append", metavar="NAME", help="Hub name of training data (repeatable)")
    parser.add_argument("--license", default="other", help="the Hub's identifier, such as llama2 (default: other)")
    parser.add_argument("--language", default="en", help="language of the answers (default: en)")
    parser.add_argument("--summary", help="first paragraph of the model card")
    parser.add_argument("--revision", help="branch to push to; made from main if absent")
    parser.add_argument("--tag", action="append", metavar="TAG", help="git tag for the commit (repeatable)")
    parser.add_argument("--message", default="Upload with llava publish", help="first line of the commit")
    parser.add_argument("--out", help="folder to gather in (default: MODEL-to-publish)")
    parser.add_argument(
        "--no-run", action="store_true", help="do not ask the model a question first (it is loaded for that)"
    )


def run(args: argparse.Namespace) -> int:
    import tempfile
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from ..hub.publish import gather, push

    console = Console()
    source = Path(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        if args.merge:
            from ..training import merge_adapter

            console.print(f"Folding {source} into its base …")
            merge_adapter(source, Path(scratch, source.resolve().name))
            source, args.out = Path(scratch, source.resolve().name), args.out or f"{args.model.rstrip('/')}-to-publish"
        publication = gather(
            source,
            args.repo,
            args.out,
            base_models=args.base_model,
            datasets=args.dataset,
            license=args.license,
            language=args.language,
            summary=args.summary,
        )
        table = Table("file", "size", title=f"{args.repo} ({publication.kind})", title_justify="left")
        for name, size in publication.files.items():
            table.add_row(name, f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB")
        console.print(table)
        if publication.left_out:
            console.print(f"Stays here: {', '.join(publication.left_out)}")
        for problem in publication.problems:
            console.print(f"[red]problem[/red] {problem}", highlight=False)
        if publication.problems:
            raise ValueError(f"{len(publication.problems)} problem(s) stand against publishing; nothing was sent.")
        if publication.kind != "dataset" and not args.no_run:
            from ..hub.trial import ask_once

            answer = ask_once(publication.folder, source)
            console.print(f"The pipeline answers: {answer!r}")
        if args.dry_run:
            console.print(f"Nothing was sent. What would be sent lies in {publication.folder}; read README.md there.")
            return 0
        url = push(publication, private=args.private, revision=args.revision, tags=args.tag, message=args.message)
    console.print(f"Published: {url}")
    return 0
