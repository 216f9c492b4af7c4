"""`llava data generate`: instruction data from captions and boxes, by a language model behind an endpoint."""

import argparse
import sys
from pathlib import Path

from .data_report import add_output_arguments, describe_output, output_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Instruction data from captions and boxes (LLaVA, §3): for each image a conversation, a detailed description and "
        "complex reasoning, written by a language-only model behind any OpenAI-compatible endpoint. A run that was "
        "stopped goes on by the same command; nothing that was received is asked for again."
    )
    data = parser.add_argument_group("what is made")
    data.add_argument(
        "--captions", required=True, metavar="F", help="COCO captions, or {image, captions, boxes} rows (JSONL, JSON)"
    )
    data.add_argument(
        "--boxes", metavar="F", help="COCO instances, or rows as above (default: the boxes in --captions)"
    )
    data.add_argument("--images", metavar="DIR", help="image folder; images that are not in it are not asked for")
    data.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    data.add_argument("--types", default="conversation,detail,complex", help="types of data (default: %(default)s)")
    data.add_argument(
        "--mix",
        default="58:23:77",
        help="relative numbers conversation:detail:complex; the largest is asked of every image (default: %(default)s)",
    )
    data.add_argument("--prompts", metavar="DIR", help="prompts of your own, in the original's folder form")
    data.add_argument("--limit", type=int, metavar="N", help="first N images only; may be raised later")
    data.add_argument("--max-boxes", type=int, metavar="N", help="most boxes per image, the largest")
    data.add_argument("--language", default="en", help="language of the replies, or 'any' (default: %(default)s)")
    data.add_argument("--seed", type=int, default=0, help="seed of all draws (default: %(default)s)")
    model = parser.add_argument_group("who is asked")
    model.add_argument("--model", required=True, metavar="NAME", help="the model's name at the endpoint")
    model.add_argument(
        "--base-url",
        metavar="URL",
        help="the endpoint (default: OPENAI_BASE_URL, or OpenAI); the key is OPENAI_API_KEY",
    )
    model.add_argument(
        "--temperature",
        default="0.7",
        help="sampling temperature, or 'default' for the endpoint's (default: %(default)s)",
    )
    model.add_argument(
        "--max-reply-tokens", type=int, default=1024, help="longest reply, thoughts included (default: %(default)s)"
    )
    model.add_argument(
        "--length-parameter",
        choices=("max_tokens", "max_completion_tokens"),
        default="max_tokens",
        help="how the longest reply is named; the second is taken when the endpoint asks for it (default: %(default)s)",
    )
    model.add_argument("--send-seed", action="store_true", help="send a sampling seed with each request")
    model.add_argument("--timeout", type=float, default=120, help="seconds for one whole reply (default: %(default)g)")
    limits = parser.add_argument_group("how fast, and for how much")
    limits.add_argument(
        "--concurrency", type=int, default=16, metavar="N", help="requests in flight (default: %(default)s)"
    )
    limits.add_argument("--requests-per-minute", type=float, metavar="N", help="limit of requests")
    limits.add_argument(
        "--tokens-per-minute", type=float, metavar="N", help="limit of tokens, prompts and longest replies"
    )
    limits.add_argument(
        "--patience",
        type=float,
        default=600,
        metavar="S",
        help="stop after so many seconds without a reply (default: %(default)g)",
    )
    limits.add_argument("--max-tokens", type=int, metavar="N", help="budget: most tokens of the whole run")
    limits.add_argument(
        "--max-cost", type=float, metavar="USD", help="budget: most dollars of the whole run; needs prices"
    )
    limits.add_argument("--price-in", type=float, default=0.0, metavar="USD", help="dollars per million prompt tokens")
    limits.add_argument("--price-out", type=float, default=0.0, metavar="USD", help="dollars per million reply tokens")
    limits.add_argument(
        "--dry-run", action="store_true", help="ask nobody; print an estimate and a full prompt of each type"
    )
    batch = parser.add_argument_group("OpenAI's Batch API, for half the price").add_mutually_exclusive_group()
    batch.add_argument("--batch-out", metavar="DIR", help="write requests to files instead of asking")
    batch.add_argument("--batch-in", nargs="+", metavar="FILE", help="read output and error files of batches")
    batch.add_argument("--batch-forget", action="store_true", help="ask again for what waits in batch files")
    add_output_arguments(parser.add_argument_group("how it is written"))


def run(args: argparse.Namespace) -> int:
    from ..data_engine.generate import batch_forget, check_images, generate, open_folder
    from ..endpoint import Backoff, Prices, RunSettings

    config = make_config(args)
    prices = Prices(args.price_in, args.price_out)
    out = Path(args.out)
    asking = {"captions": args.captions, "boxes": args.boxes, "prompts": args.prompts}
    if args.dry_run or args.batch_out or args.batch_in or args.batch_forget:
        folder = open_folder(out, config, **asking)
        images = check_images(folder, args.images, args.limit)
        if args.dry_run:
            return dry_run(args, folder, images, prices)
        if args.batch_forget:
            print(f"{batch_forget(folder):,} requests are free to be asked again")
            return 0
        return run_batch(args, folder, images, prices)
    settings = RunSettings(
        args.concurrency,
        args.requests_per_minute,
        args.tokens_per_minute,
        Backoff(patience=args.patience),
        seed=args.seed,
    )
    model = make_model(args)
    print(f"asking {args.model} at {model.base_url or 'OpenAI'}; Ctrl-C finishes what is in flight", file=sys.stderr)
    summary = generate(
        out,
        model,
        config,
        **asking,
        images=args.images,
        limit=args.limit,
        settings=settings,
        max_tokens=args.max_tokens,
        max_cost=args.max_cost,
        prices=prices if prices != Prices() else None,
        output=output_settings(args, out),
        progress=True,
        handle_interrupt=True,
    )
    return describe(args, summary)


def make_config(args: argparse.Namespace):
    """`GenerateConfig` from arguments."""
    from ..data_engine.run import GenerateConfig

    try:
        mix = tuple(float(number) for number in args.mix.split(":"))
    except ValueError:
        raise ValueError(
            f"--mix is {args.mix}; it is three numbers with colons between them, like 58:23:77."
        ) from None
    try:
        temperature = None if args.temperature == "default" else float(args.temperature)
    except ValueError:
        raise ValueError(f"--temperature is {args.temperature}; it is a number or 'default'.") from None
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit is {args.limit}; it is a number of images from 1 up.")
    if args.language != "any":
        from ..data_engine.languages import looks_like

        looks_like("", args.language)
    return GenerateConfig(
        model=args.model,
        types=tuple(kind.strip() for kind in args.types.split(",") if kind.strip()),
        mix=mix,
        seed=args.seed,
        temperature=temperature,
        max_reply_tokens=args.max_reply_tokens,
        language=None if args.language == "any" else args.language,
        send_seed=args.send_seed,
        max_boxes=args.max_boxes,
    )


def make_model(args: argparse.Namespace, api_key: str | None = None):
    """`OpenAIModel` from arguments and the environment."""
    from ..endpoint import OpenAIModel

    return OpenAIModel(
        args.model,
        base_url=args.base_url,
        api_key=api_key,
        timeout=args.timeout,
        length_parameter=args.length_parameter,
    )


def describe(args: argparse.Namespace, summary) -> int:
    """Says what was done, and what to do next; returns the exit code."""
    run, counts = summary.run, summary.ledger
    print(
        f"{run.accepted:,} replies accepted, {run.rejected:,} rejected in {run.seconds:.0f} s; "
        f"{run.skipped:,} were settled before"
    )
    if counts.rejected:
        from ..data_engine.replies import LEFT_OUT

        print("rejected so far, with first attempts:")
        for reason, number in counts.rejected.most_common():
            print(f"  {number:7,}  {LEFT_OUT[reason]}")
    if counts.faults:
        faults = ", ".join(f"{number:,} × {kind}" for kind, number in counts.faults.most_common())
        print(f"faults of the endpoint, borne: {faults}")
    if counts.unknown or counts.maybe_paid:
        print(
            f"{counts.unknown:,} requests were in flight when a run was killed, {counts.maybe_paid:,} timed out or broke "
            "off: the endpoint may have billed them"
        )
    tokens = [a + b for a, b in zip(counts.used, counts.used_in_batch)]
    cost = f", ${summary.cost:,.4f}" if summary.cost else ""
    print(f"used so far: {tokens[0]:,} prompt and {tokens[1]:,} reply tokens{cost}")
    if summary.missing_images:
        print(f"{summary.missing_images:,} images are not in {args.images}; they were not asked for")
    if summary.output:
        describe_output(summary.output)
    if run.batched:
        print(f"{run.batched:,} requests wait in batch files: give their results by --batch-in")
    if run.given_up:
        left = ", ".join(f"{number:,} × {kind}" for kind, number in run.given_up.most_common())
        print(f"{run.given_up.total():,} requests are left open ({left}); the same command asks them again")
    if run.said and run.said.partition(": ")[2] not in run.message:
        print(f"the endpoint said last: {run.said}")
    if "temperature" in run.said:
        print("--temperature default leaves the endpoint's own")
    if run.stopped != "done":
        print(f"stopped: {run.message.rstrip('.')}. The same command goes on.", file=sys.stderr)
        return {"interrupt": 130, "budget": 3}.get(run.stopped, 1)
    if summary.output and summary.output.samples:
        page = Path(args.out) / "report.html"
        look = f"look at {page}; " if page in summary.output.files else ""
        print(f"{look}train on {Path(args.out) / 'instruct.json'}")
    elif run.rejected or run.skipped:
        print("no reply was accepted; rejected.jsonl has them with the reasons", file=sys.stderr)
        return 1
    return 0 if not run.given_up else 1


def dry_run(args: argparse.Namespace, folder, images, prices) -> int:
    """Prints the estimate and a full prompt of each type."""
    from ..data_engine.contexts import ContextCounts
    from ..data_engine.generate import estimate

    found = estimate(folder, images=images, limit=args.limit)
    total = found.tasks.total()
    contexts = folder.about["contexts"]
    for kind, messages in found.samples.items():
        print(f"══ {kind} " + "═" * (70 - len(kind)))
        for message in messages:
            print(f"── {message['role']}\n{message['content']}")
    print("═" * 74)
    first = f"; the first {args.limit:,} are asked about" if args.limit and args.limit < contexts["number"] else ""
    print(f"{contexts['number']:,} images with captions, {contexts['boxes']:,} boxes{first}")
    counts = ContextCounts(clipped=contexts["clipped"], dropped=contexts["dropped"])
    print("".join(f"  {part}\n" for part in counts.summary().split("; ")[1:]), end="")
    if found.missing_images:
        print(f"{found.missing_images:,} images are not in {images} and are not asked for")
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in found.tasks.items())
    print(f"{total:,} requests: {kinds}")
    print(
        f"about {found.usage.prompt_tokens:,} prompt and {found.usage.completion_tokens:,} reply tokens "
        f"(at most {found.most_usage.completion_tokens:,}), before retries"
    )
    if prices.prompt or prices.completion:
        live, most = prices.cost(found.usage), prices.cost(found.most_usage)
        print(f"about ${live:,.2f} (at most ${most:,.2f}); as batches about ${live / 2:,.2f}")
    else:
        print("give --price-in and --price-out (dollars per million tokens) for the cost")
    if args.requests_per_minute or args.tokens_per_minute:
        minutes = max(
            total / args.requests_per_minute if args.requests_per_minute else 0,
            found.most_usage.total_tokens / args.tokens_per_minute if args.tokens_per_minute else 0,
        )
        print(f"the limits per minute take at least {minutes:,.0f} minutes")
    print(f"at 10 s a reply, {args.concurrency} at once take about {total * 10 / args.concurrency / 60:,.0f} minutes")
    print("nobody was asked; the same command without --dry-run begins")
    return 0


def run_batch(args: argparse.Namespace, folder, images, prices) -> int:
    """Batch files out, or results in."""
    from ..data_engine.generate import batch_in, batch_out
    from ..endpoint import Budget, Prices

    if args.batch_out:
        budget = Budget(args.max_tokens, args.max_cost, prices)
        # No key is needed to write files.
        summary = batch_out(
            folder, make_model(args, "none"), args.batch_out, images=images, limit=args.limit, budget=budget
        )
        print(f"{summary.requests:,} requests in {len(summary.files)} files; {summary.waiting:,} waited before")
        for path in summary.files:
            print(f"  {path}")
        if summary.message:
            print(summary.message)
        if summary.files:
            print(
                "next: upload each as a batch for /v1/chat/completions; when done, give the results by --batch-in FILE …"
            )
        return 0
    given = prices if prices != Prices() else None
    read, summary = batch_in(
        folder,
        args.batch_in,
        images=images,
        limit=args.limit,
        prices=given,
        output=output_settings(args, folder.path),
    )
    print(
        f"{read.requests:,} results read: {read.accepted:,} accepted, {read.rejected:,} rejected for good, "
        f"{read.again:,} to be asked once more, {read.faults.total():,} without a reply, {read.refused:,} refused; "
        f"{read.unknown:,} belong to no waiting request, {read.waiting:,} requests still wait"
    )
    if read.faults:
        print("without a reply: " + ", ".join(f"{number:,} × {kind}" for kind, number in read.faults.most_common()))
    if read.message:
        print(f"the endpoint said last: {read.message}")
    if read.again or read.faults:
        print("next: --batch-out DIR writes what is to be asked again, or the command without it asks live")
    if summary.output:
        describe_output(summary.output)
    answered = read.again or (summary.ledger.accepted and read.accepted + read.rejected)
    return 1 if read.requests and not answered else 0
