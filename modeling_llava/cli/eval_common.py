"""What the benchmarks' commands share: the options of the model and its answers, answering, the table at the end."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from .chat import add_loading_arguments


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The model, the run's folder, and how the model answers."""
    what = "folder or Hub name of a LLaVA, an adapter or a projector"
    parser.add_argument("model", metavar="MODEL", nargs=None if required else "?", help=what)
    parser.add_argument("--out", required=required, metavar="DIR", help="the run's folder; the same command resumes")
    model = parser.add_argument_group("the model")
    add_loading_arguments(model)
    model.add_argument("--system", metavar="TEXT", help="system message in place of the chat template's")
    how = parser.add_argument_group("how it answers")
    how.add_argument("--batch-size", type=int, metavar="N", help="most answers at a time (default: as memory allows)")
    how.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of an answer (default: the benchmark's)")
    how.add_argument("--temperature", type=float, metavar="T", help="sample at this temperature (default: greedy)")
    how.add_argument("--top-p", type=float, metavar="P", help="with --temperature")
    how.add_argument("--seed", type=int, default=0, help="with --temperature (default: %(default)s)")
    how.add_argument("--limit", type=int, metavar="N", help="the first N samples only; the results say of how many")
    how.add_argument("--follow-symlinks", action="store_true", help="allow links that lead out of the image folder")
    shard = "answer the I-th of N shards; the last to finish scores all (default: by accelerate or torchrun)"
    how.add_argument("--shard", metavar="I/N", help=shard)
    how.add_argument("--partial", action="store_true", help="score although samples are missing; results say how many")


def apply_options(args: argparse.Namespace, benchmark):
    """The benchmark with --limit, --max-new-tokens and --follow-symlinks."""
    tokens = benchmark.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens
    if tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {tokens}.")
    return replace(benchmark.first(args.limit), max_new_tokens=tokens, follow_symlinks=args.follow_symlinks)


def evaluate_with(args: argparse.Namespace, benchmark) -> dict | None:
    """Answers and scores a benchmark with the model of the arguments; `None` if other shards are not finished."""
    from ..evaluation.benchmark import Shard, evaluate
    from ..evaluation.results import describe_model
    from ..inference import DecodingSettings
    from ..inference.loading import choose_four_bits
    from ..io.checkpoints import checkpoint_kind

    benchmark = apply_options(args, benchmark)
    decoding = {}
    if args.temperature is not None:
        decoding = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
        DecodingSettings(**decoding)  # a mistake is found before the model is loaded
    elif args.top_p is not None:
        raise ValueError("--top-p requires --temperature; greedy answers are not sampled.")
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}.")
    shard = Shard.parse(args.shard)
    benchmark.check_images()  # before the Hub is asked and anything is written
    checkpoint_kind(args.model, args.revision)
    model = describe_model(args.model, args.revision, args.adapter)
    four_bits = choose_four_bits(args.model, args.load_in_4bit, adapter=args.adapter, revision=args.revision)
    model |= {"dtype": args.dtype, "load_in_4bit": four_bits, "system": args.system}
    samples = f"{len(benchmark.samples):,} of {benchmark.whole:,} samples"
    part = f" (shard {shard.index + 1} of {shard.count})" if shard.count > 1 else ""
    print(f"{benchmark.name}: {samples}, {args.model} → {args.out}{part}", file=sys.stderr)

    def make_predictor():
        import torch

        from ..inference import LlavaPredictor, load_model

        device, local_rank = args.device, os.environ.get("LOCAL_RANK")
        if device is None and shard.count > 1 and local_rank and torch.cuda.is_available():
            device = f"cuda:{local_rank}"
        options = {name: getattr(args, name) for name in ("dtype", "adapter", "base", "revision")}
        loaded = load_model(args.model, device=device, load_in_4bit=four_bits, **options)
        return LlavaPredictor(*loaded, system=args.system)

    how = {"batch_size": args.batch_size, "decoding": decoding, "partial": args.partial}
    return evaluate(benchmark, make_predictor, args.out, model=model, shard=shard, **how)


def finish(args: argparse.Namespace, results: dict | None, published: list[str] = ()) -> int:
    """Prints the table, draws the plot, names the next command."""
    if results is None:
        print("not scored: the last shard to finish scores all. Run the others, or add --partial.", file=sys.stderr)
        return 0
    from ..evaluation.report import Run, compare, markdown, plot

    out = Path(args.out)
    (comparison,) = compare([Run(results["model"]["name"], results, [])])
    print(markdown([comparison]))
    try:
        plot(comparison, out / "results.png", published)
    except ImportError as error:
        print(f"no plot: {error}", file=sys.stderr)
    print(f"written: {out / 'results.json'}; compare runs with: llava eval report {out} OTHER …", file=sys.stderr)
    return 0
