"""`llava convert SRC OUT`: original, HF and GGUF checkpoints, in every direction."""

import argparse


EPILOG = """\
examples:
  llava convert liuhaotian/llava-v1.5-7b llava-hf                          original → HF
  llava convert llava-lora llava-hf --base lmsys/vicuna-7b-v1.5            a LoRA folder of the original, folded in
  llava convert mm_projector.bin llava-hf --base lmsys/vicuna-7b-v1.5      a projector with its language model
  llava convert delta llava-hf --base huggyllama/llama-7b                  a delta and its base
  llava convert llava-hf original --to original                            HF → original
  llava convert llava-hf gguf --to gguf --dtype q8_0                       HF → llama.cpp, Ollama
  llava convert --check llava-hf                                           is it a stock checkpoint?
  llava convert --check llava-hf --against liuhaotian/llava-v1.5-7b        … and does it compute what this one does?
"""

FORMS = {"hf": "the HF form", "original": "the original's form", "gguf": "llama.cpp's files"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("source", help="folder or Hub name, or an mm_projector.bin; with --check, the folder to check")
    parser.add_argument("output", nargs="?", help="folder to write")
    parser.add_argument(
        "--to", choices=("hf", "original", "gguf"), default="hf", help="the form to convert to (default: hf)"
    )
    parser.add_argument("--base", help="language model of a LoRA, projector or delta: folder or Hub name")
    parser.add_argument(
        "--vision-tower", help="vision tower, where the checkpoint does not hold it: folder or Hub name"
    )
    parser.add_argument(
        "--dtype", help="dtype of the weights; gguf: f32, f16, bf16 or q8_0 (default: the source's; f16)"
    )
    parser.add_argument("--max-shard-size", default="2GB", help="largest file of weights (default: 2GB)")
    parser.add_argument(
        "--chat-template",
        help="hf: name of a template, own, or a file; by default as the checkpoint's version implies",
    )
    parser.add_argument(
        "--class-token-last",
        action="store_true",
        help="gguf: for builds of llama.cpp since May 2025 that misplace CLIP's class token (its issue 25814)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the folder OUT")
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not check the result (which runs the model on one image: minutes for 7B on a CPU)",
    )
    parser.add_argument("--check", action="store_true", help="only check that stock transformers can use the folder")
    parser.add_argument("--against", help="with --check: the original whose logits the folder must give")


def run(args: argparse.Namespace) -> int:
    from modeling_llava.conversion import (
        check_stock_ready,
        convert_hf_to_gguf,
        convert_hf_to_original,
        convert_original_to_hf,
    )

    if args.check:
        if args.output is not None:
            raise ValueError(f"--check reads one folder and writes nothing: leave {args.output} out.")
        print(f"checking {args.source}: the model runs on one image (seconds; minutes for 7B on a CPU)")
        report = check_stock_ready(
            args.source,
            reference=args.against,
            base=args.base,
            vision_tower=args.vision_tower,
            logits=not args.no_check,
        )
        print(report)
        print("stock transformers runs it" if report.is_stock_ready else "stock transformers does not run it")
        return 0 if report.is_stock_ready else 1
    if args.against is not None:
        raise ValueError("--against goes with --check; a conversion always compares with its source.")
    if args.output is None:
        raise ValueError("no output folder is given: llava convert SRC OUT.")
    given = {"--base": args.base, "--chat-template": args.chat_template} if args.to != "hf" else {}
    if args.to == "gguf":
        given["--vision-tower"] = args.vision_tower
    elif args.class_token_last:
        given["--class-token-last"] = True
    unused = [name for name, value in given.items() if value is not None]
    if unused:
        raise ValueError(f"{' and '.join(unused)} has no effect with --to {args.to}: leave it out.")
    print(
        f"converting {args.source} to {FORMS[args.to]}: about as long as copying the files"
        + ("" if args.no_check else ", then a check of the result (--no-check leaves it out)")
    )
    options = {"check": not args.no_check, "overwrite": args.overwrite}
    if args.to == "gguf":
        options |= {"dtype": args.dtype or "f16", "class_token_last": args.class_token_last}
    else:
        options |= {"dtype": args.dtype, "vision_tower": args.vision_tower, "max_shard_size": args.max_shard_size}
    if args.to == "hf":
        options |= {"base": args.base, "chat_template": args.chat_template}
    convert = {"hf": convert_original_to_hf, "original": convert_hf_to_original, "gguf": convert_hf_to_gguf}[args.to]
    result = convert(args.source, args.output, **options)
    if result.check is not None:
        print(result.check)
    for note in result.notes:
        print(f"note: {note}")
    print(f"written: {result.output}")
    if args.to == "hf":
        print(f"next: llava chat {result.output}")
    elif args.to == "gguf":
        model, mmproj = (next(result.output.glob(f"{name}-*.gguf")) for name in ("model", "mmproj"))
        print(f"next: llama-mtmd-cli -m {model} --mmproj {mmproj} --image IMAGE -p QUESTION")
    return 0 if result.check is None or result.check.is_sound else 1
