"""`llava publish MODEL REPO`: check a model (or a data set), write its card and push it to the Hub."""

import argparse


EPILOG = """\
examples:
  llava publish runs/my-merged my-name/my-llava --dry-run
  llava publish runs/my my-name/my-llava --merge --results runs/vqa --license llama2 --private
  llava publish runs/data my-name/my-instructions --license cc-by-4.0
Log in first: `hf auth login`. The same command resumes an interrupted upload.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add = parser.add_argument
    add("model", help="folder of a full model, an adapter, a projector, or a data set or run of the data engine")
    add("repo", help="name on the Hub: owner/name, or name for your own")
    add("--private", action="store_true", help="make the new repository private (an existing public one is refused)")
    add("--dry-run", action="store_true", help="gather and check everything, upload nothing")
    add("--merge", action="store_true", help="an adapter or projector: merge it and publish the full model")
    add("--base-model", action="append", metavar="NAME", help="Hub name of a base model (repeatable)")
    add("--dataset", action="append", metavar="NAME", help="Hub name of training data (repeatable)")
    add("--results", action="append", metavar="DIR", help="output of llava eval for the card (repeatable)")
    add("--license", help="the Hub's identifier, such as llama2 (default for models: other)")
    add("--data-license", metavar="TEXT", help="licence of the training data, for the card")
    add("--language", default="en", help="language of the answers, by its ISO 639 code (default: en)")
    add("--summary", help="first paragraph of the model card")
    add("--revision", help="branch to push to; created from main if absent")
    add("--tag", action="append", metavar="TAG", help="git tag for the commit (repeatable)")
    add("--message", default="Upload with llava publish", help="first line of the commit")
    add("--out", help="folder to gather in (default: MODEL-to-publish)")
    add("--no-run", action="store_true", help="do not try the model first, by a question or on its base")


def run(args: argparse.Namespace) -> int:
    import contextlib
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from ..hub.card_fields import check_card_fields
    from ..hub.publish import ask_once, check_names, check_refs, gather, push, require_base

    console = Console(markup=False, highlight=False, soft_wrap=True)  # names and answers may have brackets
    source = Path(args.model)
    # before a merge, which takes minutes
    check_names(args.repo, *(args.base_model or []), *(args.dataset or []))
    check_card_fields(args.license, args.language)
    check_refs(args.revision, *(args.tag or []))
    for path in args.results or []:
        warn_of_other_weights(console, path, source)
    with contextlib.ExitStack() as stack:
        if args.merge:
            source, args.out = merged(console, source, stack), args.out or f"{source.resolve()}-to-publish"
        card = {name: getattr(args, name) for name in ("results", "license", "data_license", "language", "summary")}
        card |= {"base_models": args.base_model, "datasets": args.dataset}
        publication = gather(source, args.repo, args.out, **card)
        table = Table("file", "size", title=f"{publication.repo} ({publication.kind})", title_justify="left")
        for name, size in publication.files.items():
            table.add_row(name, f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB")
        console.print(table)
        if publication.left_out:
            console.print(f"Not published: {', '.join(publication.left_out)}")
        for problem in publication.problems[:20]:
            console.print(f"problem: {problem}", style="red")
        if publication.problems:
            raise ValueError(f"cannot publish: {len(publication.problems):,} problems; nothing was uploaded.")
        if publication.kind == "full":
            say_who_runs_it(console, publication.folder)
        if publication.generate_kwargs:
            needs = f"to end its answers, stock transformers' generate needs {publication.generate_kwargs}"
            console.print(f"note: {needs}; the card says so.", style="yellow")
        if publication.kind in ("full", "adapter") and not args.no_run:
            console.print(f"The pipeline answers: {ask_once(publication.folder, source)!r}")
        if publication.kind == "projector" and not args.no_run:
            require_base(source)
        if args.dry_run:
            console.print(f"Nothing was uploaded. The publication is in {publication.folder}; read its README.md.")
            return 0
        url = push(publication, private=args.private, revision=args.revision, tags=args.tag, message=args.message)
    console.print(f"Published: {url}")
    return 0


def merged(console, source, stack):
    """The merged model of an adapter or projector, in a folder that is deleted when `stack` ends."""
    import tempfile

    from ..training import merge_adapter

    console.print(f"Merging {source} into its base …")
    source = source.resolve()  # the folder for temporary files may be small, or in memory
    scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=source.parent, prefix=".merging-"))
    merge_adapter(str(source), f"{scratch}/{source.name}")
    return type(source)(scratch, source.name)


def say_who_runs_it(console, folder) -> None:
    """Prints which runtimes load a full model. ValueError if neither stock transformers nor this package does."""
    from modeling_llava.conversion import check_stock_ready

    report = check_stock_ready(folder, logits=False)
    for item in report.items:
        if item.state != "skipped":
            console.print(f"{item.state}: {item.name}: {item.detail}")
    if not report.is_sound:
        raise ValueError(f"the model cannot be loaded: {report.failures()}; nothing was uploaded.")


def warn_of_other_weights(console, results, source) -> None:
    """Warns where the fingerprint in the results is not that of the published weights."""
    from pathlib import Path

    from ..evaluation.results import fingerprint
    from ..hub.files import read_record

    file = Path(results, "results.json") if Path(results).is_dir() else Path(results)
    about = read_record(file).get("model") or {}
    evaluated = [about[key] for key in ("fingerprint", "adapter_fingerprint") if about.get(key)]
    if source.is_dir() and evaluated and fingerprint(source) not in evaluated:
        differ = f"{results} is of {about.get('name')}, whose files differ from those of {source}"
        console.print(f"note: {differ}. Evaluate again if it is another model.", style="yellow")
