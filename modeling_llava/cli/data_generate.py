"""
`llava data generate`: instruction data from captions and boxes, by a language model behind an endpoint; `llava data report`:
a page of samples to skim, and the data again without what was marked.
"""

import argparse
import sys
from pathlib import Path

from .endpoint_options import add_endpoint_arguments, make_chat_model, prices, run_settings, temperature


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Instruction data from captions and boxes (LLaVA, §3): for each image a conversation, a detailed description and "
        "complex reasoning, written by a language-only model behind any OpenAI-compatible endpoint. The same command resumes "
        "a stopped run; no reply is asked for again."
    )
    add = parser.add_argument_group("the data").add_argument
    add("--captions", required=True, metavar="F", help="COCO captions, or JSON(L) rows {image, captions, boxes}")
    add("--boxes", metavar="F", help="COCO instances, or rows as above (default: the boxes in --captions)")
    add("--images", metavar="DIR", help="image folder; images that are not in it are left out")
    add("--out", required=True, metavar="DIR", help="folder of the run")
    add("--types", default="conversation,detail,complex", help="types of data (default: %(default)s)")
    mix = "ratio conversation:detail:complex; every image gets the largest (default: %(default)s)"
    add("--mix", default="58:23:77", help=mix)
    add("--prompts", metavar="DIR", help="your own prompts, in the original's folder form")
    add("--limit", type=int, metavar="N", help="the first N images only; may be raised later")
    add("--max-boxes", type=int, metavar="N", help="keep the N largest boxes of an image")
    add("--language", default="en", help="language of the replies, or 'any' (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of all draws (default: %(default)s)")
    add = parser.add_argument_group("the language model").add_argument
    add("--model", required=True, metavar="NAME", help="its name at the endpoint")
    add("--temperature", default="0.7", help="for sampling, or 'default' for the endpoint's (default: %(default)s)")
    add("--send-seed", action="store_true", help="send a sampling seed with each request")
    add("--dry-run", action="store_true", help="send nothing; print an estimate and a full prompt of each type")
    add_endpoint_arguments(parser, concurrency=16, patience=600, max_reply_tokens=1024)
    batch = parser.add_argument_group("OpenAI's Batch API, for half the price").add_mutually_exclusive_group()
    batch.add_argument("--batch-out", metavar="DIR", help="write requests to files instead of sending them")
    batch.add_argument("--batch-in", nargs="+", metavar="FILE", help="read output and error files of batches")
    batch.add_argument("--batch-forget", action="store_true", help="ask again what waits in batch files")
    _add_output_arguments(parser.add_argument_group("the output"))


def run(args: argparse.Namespace) -> int:
    from ..data_engine.generate import Plan, check_images, generate, open_folder, open_ledger
    from ..endpoint import forget_batch

    config, out = make_config(args), Path(args.out)
    sources = {"captions": args.captions, "boxes": args.boxes, "prompts": args.prompts}
    if args.dry_run or args.batch_out or args.batch_in or args.batch_forget:
        folder = open_folder(out, config, **sources)
        images = check_images(folder, args.images, args.limit)
        if args.dry_run:
            return dry_run(args, folder, images)
        if args.batch_out:
            return batch_files_out(args, folder, images)
        if args.batch_in:
            return batch_results_in(args, folder, images)
        with open_ledger(folder) as ledger:
            print(f"{forget_batch(Plan(folder, ledger), ledger):,} requests can be asked again")
        return 0
    model = make_chat_model(args, args.model, optional=())
    print(f"asking {args.model} at {model.base_url or 'OpenAI'}; Ctrl-C finishes requests in flight", file=sys.stderr)
    budget = {"max_tokens": args.max_tokens, "max_cost": args.max_cost, "prices": _prices_given(args)}
    how = {"settings": run_settings(args, seed=args.seed), "output": _output_settings(args, out)}
    how |= {"images": args.images, "limit": args.limit, "progress": True, "handle_interrupt": True}
    return describe(args, generate(out, model, config, **sources, **budget, **how))


def make_config(args: argparse.Namespace):
    """`GenerateConfig` from arguments."""
    from ..data_engine.run import GenerateConfig
    from ..data_engine.validate import looks_like

    try:
        mix = tuple(float(number) for number in args.mix.split(":"))
    except ValueError:
        raise ValueError(f"--mix must be three numbers such as 58:23:77, got {args.mix}.") from None
    try:
        sampling_temperature = temperature(args.temperature)
    except ValueError:
        raise ValueError(f"--temperature must be a number or 'default', got {args.temperature}.") from None
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}.")
    if args.language != "any":
        looks_like("", args.language)  # raises if it is unknown
    return GenerateConfig(
        model=args.model,
        types=tuple(kind.strip() for kind in args.types.split(",") if kind.strip()),
        mix=mix,
        seed=args.seed,
        temperature=sampling_temperature,
        max_reply_tokens=args.max_reply_tokens,
        language=None if args.language == "any" else args.language,
        send_seed=args.send_seed,
        max_boxes=args.max_boxes,
    )


def _prices_given(args: argparse.Namespace):
    """The prices, `None` if none is given."""
    return prices(args) if args.price_in or args.price_out else None


def _times(counts) -> str:
    return ", ".join(f"{number:,} × {kind}" for kind, number in counts.most_common())


def describe(args: argparse.Namespace, summary) -> int:
    """Prints what was done and the next command; returns the exit code."""
    from ..data_engine.replies import LEFT_OUT

    run, counts = summary.run, summary.ledger
    print(f"{run.accepted:,} replies accepted, {run.rejected:,} rejected in {run.seconds:.0f} s", end="; ")
    print(f"{run.skipped:,} were settled earlier")
    if counts.rejected:
        print("rejected so far, with first attempts:")
        for reason, number in counts.rejected.most_common():
            print(f"  {number:7,}  {LEFT_OUT[reason]}")
    if counts.faults:
        print(f"faults of the endpoint, retried: {_times(counts.faults)}")
    if counts.unknown or counts.maybe_paid:
        print(
            f"{counts.unknown:,} requests were in flight when a run was killed, {counts.maybe_paid:,} timed out or were cut "
            "off: the endpoint may have billed them"
        )
    tokens = [a + b for a, b in zip(counts.used, counts.used_in_batch)]
    cost = f", ${summary.cost:,.4f}" if summary.cost else ""
    print(f"used so far: {tokens[0]:,} prompt and {tokens[1]:,} reply tokens{cost}")
    if summary.missing_images:
        print(f"{summary.missing_images:,} images are not in {args.images} and were left out")
    if summary.output:
        _describe_output(summary.output)
    if run.batched:
        print(f"{run.batched:,} requests wait in batch files: read their results with --batch-in")
    if run.given_up:
        print(f"{run.given_up.total():,} requests have no reply ({_times(run.given_up)}); the same command asks again")
    if run.last_error and run.last_error.partition(": ")[2] not in run.message:
        print(f"last error of the endpoint: {run.last_error}")
    if "temperature" in run.last_error:
        print("--temperature default uses the endpoint's")
    if run.stopped != "done":
        print(f"stopped: {run.message.rstrip('.')}. The same command resumes.", file=sys.stderr)
        return {"interrupt": 130, "budget": 3}.get(run.stopped, 1)
    if summary.output and summary.output.samples:
        page = Path(args.out) / "report.html"
        look = f"look at {page}; " if page in summary.output.files else ""
        print(f"{look}train on {Path(args.out) / 'instruct.json'}")
    elif run.rejected or run.skipped:
        print("no reply was accepted; rejected.jsonl has them with the reasons", file=sys.stderr)
        return 1
    return 1 if run.given_up else 0


def dry_run(args: argparse.Namespace, folder, images) -> int:
    """Prints the estimate and a full prompt of each type."""
    from ..data_engine.contexts import ContextCounts
    from ..data_engine.generate import estimate

    found, contexts = estimate(folder, images=images, limit=args.limit), folder.about["contexts"]
    total, usage, most = found.tasks.total(), found.usage, found.most_usage
    for kind, messages in found.samples.items():
        print(f"══ {kind} " + "═" * (70 - len(kind)))
        for message in messages:
            print(f"── {message['role']}\n{message['content']}")
    print("═" * 74)
    first = f"; the first {args.limit:,} are used" if args.limit and args.limit < contexts["number"] else ""
    print(f"{contexts['number']:,} images with captions, {contexts['boxes']:,} boxes{first}")
    counts = ContextCounts(clipped=contexts["clipped"], dropped=contexts["dropped"])
    for part in counts.summary().split("; ")[1:]:
        print(f"  {part}")
    if found.missing_images:
        print(f"{found.missing_images:,} images are not in {images} and are left out")
    print(f"{total:,} requests: {', '.join(f'{number:,} {kind}' for kind, number in found.tasks.items())}")
    replies = f"{usage.completion_tokens:,} reply tokens (at most {most.completion_tokens:,})"
    print(f"about {usage.prompt_tokens:,} prompt and {replies}, before retries")
    if given := _prices_given(args):
        live = given.cost(usage)
        print(f"about ${live:,.2f} (at most ${given.cost(most):,.2f}); as batches about ${live / 2:,.2f}")
    else:
        print("give --price-in and --price-out (dollars per million tokens) for the cost")
    limits = ((total, args.requests_per_minute), (most.total_tokens, args.tokens_per_minute))
    if minutes := max(number / limit if limit else 0 for number, limit in limits):
        print(f"the limits per minute take at least {minutes:,.0f} minutes")
    print(f"at 10 s a reply, {args.concurrency} at once take about {total * 10 / args.concurrency / 60:,.0f} minutes")
    print("nothing was sent; the same command without --dry-run starts")
    return 0


def batch_files_out(args: argparse.Namespace, folder, images) -> int:
    from ..data_engine.generate import Plan, open_ledger
    from ..endpoint import Budget, write_batch

    budget = Budget(args.max_tokens, args.max_cost, prices(args))
    model = make_chat_model(args, args.model, optional=(), api_key="none")  # writing files needs no key
    with open_ledger(folder) as ledger:
        plan = Plan(folder, ledger, images, args.limit)
        summary = write_batch(plan, model, ledger, args.batch_out, run_id=folder.id, budget=budget)
    print(f"{summary.requests:,} requests in {len(summary.files)} files; {summary.waiting:,} waited already")
    for path in summary.files:
        print(f"  {path}")
    if summary.message:
        print(summary.message)
    if summary.files:
        print("next: upload each as a batch for /v1/chat/completions; read the results with --batch-in FILE …")
    return 0


def batch_results_in(args: argparse.Namespace, folder, images) -> int:
    from ..data_engine.generate import batch_in

    output = _output_settings(args, folder.path)
    settings = {"images": images, "limit": args.limit, "prices": _prices_given(args), "output": output}
    read, summary = batch_in(folder, args.batch_in, **settings)
    print(
        f"{read.requests:,} results read: {read.accepted:,} accepted, {read.rejected:,} rejected for good, "
        f"{read.again:,} to be asked once more, {read.faults.total():,} without a reply, {read.refused:,} refused; "
        f"{read.unknown:,} belong to no waiting request, {read.waiting:,} requests still wait"
    )
    if read.faults:
        print(f"without a reply: {_times(read.faults)}")
    if read.message:
        print(f"last message of the endpoint: {read.message}")
    if read.again or read.faults:
        print("next: --batch-out DIR writes what is to be asked again; without it the command asks now")
    if summary.output:
        _describe_output(summary.output)
    answered = read.again or (summary.ledger.accepted and read.accepted + read.rejected)
    return 1 if read.requests and not answered else 0


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the data of a run of `llava data generate` again from its ledger, with an HTML page of samples to skim. "
        "Nothing is sent. --drop leaves out the samples that were marked in the page."
    )
    parser.add_argument("folder", metavar="RUN", help="folder of a run of `llava data generate`")
    parser.add_argument("--images", metavar="DIR", help="image folder (default: the one of the run)")
    parser.add_argument("--drop", metavar="drop.json", help="samples to leave out from now on, as the page saves them")
    _add_output_arguments(parser)


def _add_output_arguments(parser) -> None:
    add = parser.add_argument
    repeats = "near-duplicate questions to keep across the whole set, or 'all' (default: %(default)s)"
    add("--question-repeats", default="1", metavar="N", help=repeats)
    add("--samples", type=int, default=200, help="samples in the HTML page (default: %(default)s)")
    add("--no-parquet", action="store_true", help="leave out the `datasets` folder, with its copy of each image")


def _output_settings(args: argparse.Namespace, folder: Path):
    """`OutputSettings` from arguments and from the drop list in a run's folder."""
    from ..data_engine.report import read_drop_list
    from ..data_engine.samples import OutputSettings

    repeats = args.question_repeats
    if repeats != "all" and not (repeats.isdigit() and int(repeats) > 0):
        raise ValueError(f"--question-repeats must be a number from 1 up, or 'all', got {repeats}.")
    if args.samples < 0:
        raise ValueError(f"--samples must be 0 (no page) or more, got {args.samples}.")
    drop = folder / "drop.json"
    return OutputSettings(
        question_repeats=None if repeats == "all" else int(repeats),
        parquet=not args.no_parquet,
        drop=read_drop_list(drop) if drop.exists() else frozenset(),
        report_samples=args.samples,
    )


def _describe_output(output) -> None:
    samples = ", ".join(f"{number:,} {kind}" for kind, number in output.samples.items())
    print(f"{output.samples.total():,} conversations about {output.images:,} images: {samples or 'none'}")
    if output.near_duplicates:
        keeps = "`llava data report RUN --question-repeats all` keeps them"
        print(f"{output.near_duplicates.total():,} near-duplicate questions were left out; {keeps}")
    if output.missing_images:
        print(f"{output.missing_images:,} samples are not in the `datasets` folder: their images cannot be read")
    for line in output.notes:
        print(line)
    for path in output.files:
        print(f"  {path}")


def report(args: argparse.Namespace) -> int:
    from ..data_engine.generate import check_images, open_ledger
    from ..data_engine.output import write_output
    from ..data_engine.report import read_drop_list
    from ..data_engine.run import open_run, write_json

    folder = open_run(args.folder)
    images = check_images(folder, args.images or folder.about.get("images"), None)
    with open_ledger(folder) as ledger:
        if args.drop:
            kept = folder.path / "drop.json"
            names = read_drop_list(args.drop) | (read_drop_list(kept) if kept.exists() else frozenset())
            write_json(kept, {"run": folder.id, "drop": sorted(names)})
        output = write_output(folder, ledger, images=images, settings=_output_settings(args, folder.path))
    if not output.samples:
        print(f"{folder.path} holds no accepted reply yet")
        return 1
    _describe_output(output)
    if (page := folder.path / "report.html") in output.files:
        print(f"look at {page} in a browser")
    return 0
