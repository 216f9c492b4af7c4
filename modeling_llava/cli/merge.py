"""`llava merge ADAPTER OUT`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="adapter folder or Hub name; or the output folder of a pretrain run")
    parser.add_argument("output", help="folder to write; new or empty")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float16", "bfloat16", "float32"],
        help="of the written weights; auto: the base model's (default)",
    )  # fmt: skip
    parser.add_argument("--base", help="the base model, if it is no longer where the adapter says")
    parser.add_argument("--revision", help="branch, tag or commit of the adapter on the Hub")


def run(args: argparse.Namespace) -> int:
    from ..training import merge_adapter

    print(
        f"reading the base of {args.adapter} in 16 bit and folding the adapter in (as long as reading the model takes)"
    )
    output = merge_adapter(args.adapter, args.output, args.dtype, args.base, args.revision)
    print(f"written: {output}, a stock llava checkpoint")
    print(f"next: llava chat {output}")
    return 0
