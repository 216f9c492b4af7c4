"""`llava merge ADAPTER OUT`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, dtypes = parser.add_argument, ["auto", "float16", "bfloat16", "float32"]
    add("adapter", help="adapter folder or Hub name; or the output folder of a pretrain run")
    add("output", help="folder to write; new or empty")
    add("--dtype", default="auto", choices=dtypes, help="of the written weights; auto: the base model's (default)")
    add("--base", help="the base model, if it has moved")
    add("--as-trained", action="store_true", help="QLoRA: add the adapter to the dequantized NF4 base of its training")
    add("--revision", help="branch, tag or commit of the adapter on the Hub")


def run(args: argparse.Namespace) -> int:
    from ..io.adapters import four_bits_of
    from ..training import merge_adapter

    print(f"merging {args.adapter} into its base, read in 16 bit")
    print("this takes about as long as reading the model")
    output = merge_adapter(args.adapter, args.output, args.dtype, args.base, args.revision, args.as_trained)
    print(f"written: {output}, a stock llava checkpoint")
    if not args.as_trained and four_bits_of(args.adapter, args.revision) is not None:
        print("The adapter was trained on a 4-bit base; if answers have become worse, merge with --as-trained.")
    print(f"next: llava chat {output}")
    return 0
