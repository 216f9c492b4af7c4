"""`llava data check SOURCE`: what is wrong with a dataset, before a run finds it."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read every record and every image's header, in parallel, and report what cannot be trained on: missing and corrupt "
        "images, empty answers, roles out of order, samples over --max-length and what would be cut. The same command "
        "resumes a stopped check. Exit code 1 if there is a problem, 0 if there is none."
    )
    add = parser.add_argument
    what = "LLaVA JSON or JSONL, parquet, a folder written by datasets, a dataset on the Hub; several are read as one"
    add("source", nargs="+", help=what)
    add("--image-folder", "--images", metavar="DIR", help="folder of relative image paths")
    add("--processor", metavar="P", help="model folder or Hub name; adds the checks of tokens")
    add("--max-length", type=int, default=2048, metavar="N", help="tokens per sample (default: 2048)")
    add("--batch-size", type=int, default=128, metavar="N", help="samples per optimizer step (default: 128)")
    add("--decode", action="store_true", help="decode whole images, not only headers (slower)")
    add("--follow-symlinks", action="store_true", help="allow links that lead out of the image folder")
    add("--split", default="train", help="split of a dataset that has several (default: train)")
    add("--config-name", metavar="NAME", help="configuration of a dataset on the Hub")
    add("--workers", type=int, metavar="N", help="processes (default: one per core)")
    add("--out", metavar="DIR", help="write report.json, problems.jsonl and lengths.png there")
    add("--json", action="store_true", help="print the report as JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    from ..data.check import check_data
    from ..io.checkpoints import load_processor

    source = args.source if len(args.source) > 1 else args.source[0]
    processor = load_processor(args.processor) if args.processor is not None else None
    names = ("image_folder", "max_length", "split", "config_name", "batch_size", "decode", "follow_symlinks", "out")
    options = {name: getattr(args, name) for name in names}
    report = check_data(source, processor, num_workers=args.workers, show_progress=not args.json, **options)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    else:
        _show(report, args)
    return 0 if report.ok else 1


def _show(report, args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    if report.resumed_at:
        console.print(f"resumed after {report.resumed_at:,} samples of an earlier check")
    facts = Table(show_header=False, box=None)
    facts.add_row("samples", f"{report.samples:,}, of which {report.usable:,} have no problem")
    facts.add_row("images", f"{report.images:,}; {report.text_only:,} samples have none")
    if set(report.types) != {"without type"}:
        facts.add_row("types", ", ".join(f"{name} {number:,}" for name, number in report.types.items()))
    if report.tokens:
        share = report.supervised_tokens / report.tokens
        supervised = f"{report.supervised_tokens:,} supervised ({share:.1%})"
        facts.add_row("tokens", f"{report.tokens:,}: {report.image_tokens:,} of images, {supervised}")
        facts.add_row(
            "per sample",
            f"mean {report.length_mean:,.0f}, median {report.length_median:,.0f}, 95 % up to {report.length_95th:,.0f}, "
            f"longest {report.length_longest:,}",
        )
        facts.add_row(
            "an epoch",
            f"{report.steps:,} steps of {report.batch_size:,} samples, or {report.packed_steps:,} steps of "
            f"{report.batch_size:,} packs of {args.max_length:,} tokens ({report.pack_utilization:.1%} filled)",
        )
    if report.too_long["samples"]:
        facts.add_row(
            "too long",
            "{samples:,} samples; overflow=truncate_text would cut {tokens:,} tokens, {supervised_tokens:,} of them "
            "supervised, and would fail for {images_cut:,} whose image would be cut and {answers_lost:,} with no answer "
            "left".format(**report.too_long),
        )
    console.print(facts)
    for kind, counts, style in (("problem", report.problems, "red"), ("notice", report.notices, "yellow")):
        for reason, number in counts.items():
            console.print(f"\n[bold {style}]{number:,} × {reason}[/] ({kind})")
            for message in report.examples[reason]:
                console.print(f"  {escape(message)}")
            if number > len(report.examples[reason]):
                console.print(f"  … and {number - len(report.examples[reason]):,} more")
    console.print()
    if report.files:
        console.print(f"written: {', '.join(report.files)}")
        if report.tokens and not any(name.endswith(".png") for name in report.files):
            console.print("no lengths.png: it requires matplotlib (pip install 'modeling-llava\\[plots]')")
    if not report.ok:
        where = "" if report.files else " (--out DIR writes the whole list)"
        problems = f"[bold red]{sum(report.problems.values()):,} problems[/]"
        console.print(f"{problems}: fix them, or train with on_bad_sample=drop and overflow=drop{where}")
    elif args.processor is None:
        console.print("[bold green]no problem[/] in records and images; next: --processor MODEL, for tokens")
    else:
        console.print("[bold green]no problem[/]; next: llava data preview, or llava train RECIPE.yaml")
