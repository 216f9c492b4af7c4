"""`llava convert SRC OUT`: original, HF and GGUF checkpoints, in every direction."""

import argparse


EPILOG = """\
examples:
  llava convert liuhaotian/llava-v1.5-7b llava-hf                          original → HF
  llava convert llava-lora llava-hf --base lmsys/vicuna-7b-v1.5            a LoRA folder of the original, folded in
  llava convert mm_projector.bin llava-hf --base lmsys/vicuna-7b-v1.5      a projector with its language model
  llava convert delta llava-hf --base huggyllama/llama-7b                  a delta and its base
  llava convert llava-hf original --to original                            HF → original
  llava convert llava-hf gguf --to gguf --dtype q8_0                       HF → llama.cpp (also q4_k_m, q6_k)
  llava convert --check llava-hf                                           is it a stock checkpoint?
  llava convert --check llava-hf --against liuhaotian/llava-v1.5-7b        … and does it compute what this one does?
"""

FORMS = {"hf": "the HF form", "original": "the original's form", "gguf": "llama.cpp's files"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add = parser.add_argument
    add("source", help="folder or Hub name, or an mm_projector.bin; with --check, the folder to check")
    add("output", nargs="?", help="folder to write")
    add("--to", choices=list(FORMS), default="hf", help="the form to convert to (default: hf)")
    add("--base", help="language model of a LoRA, projector or delta: folder or Hub name")
    add("--vision-tower", help="vision tower, where the checkpoint does not hold it: folder or Hub name")
    types = "f32, f16, bf16, q8_0, and by llama.cpp q6_k, q4_k_m"
    add("--dtype", help=f"dtype of the weights (default: the source's); gguf: {types} (default: f16)")
    add("--max-shard-size", default="2GB", help="largest file of weights (default: 2GB)")
    add(
        "--chat-template", help="hf: name of a template, own, or a file (default: as the checkpoint's version implies)"
    )
    last = "gguf: for builds of llama.cpp since May 2025 that misplace CLIP's class token (its issue 25814)"
    add("--class-token-last", action="store_true", help=last)
    add("--overwrite", action="store_true", help="replace the folder OUT")
    add("--no-check", action="store_true", help="do not run the result on one image to check it (minutes for 7B)")
    add("--check", action="store_true", help="only check that stock transformers can use the folder")
    add("--against", help="with --check: the original whose logits the folder must give")


def run(args: argparse.Namespace) -> int:
    from modeling_llava import conversion

    if args.check:
        if args.output is not None:
            raise ValueError(f"--check reads one folder and writes nothing: leave {args.output} out.")
        print(f"checking {args.source}: the model runs on one image (seconds; minutes for 7B on a CPU)")
        parts = {"base": args.base, "vision_tower": args.vision_tower}
        report = conversion.check_stock_ready(args.source, reference=args.against, logits=not args.no_check, **parts)
        print(report)
        print("stock transformers runs it" if report.is_stock_ready else "stock transformers does not run it")
        return 0 if report.is_stock_ready else 1
    if args.against is not None:
        raise ValueError("--against goes with --check; a conversion always compares with its source.")
    if args.output is None:
        raise ValueError("no output folder is given: llava convert SRC OUT.")
    given = {"--base": args.base, "--chat-template": args.chat_template} if args.to != "hf" else {}
    given |= {"--vision-tower": args.vision_tower} if args.to == "gguf" else {}
    given |= {"--class-token-last": args.class_token_last or None} if args.to != "gguf" else {}
    if unused := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{' and '.join(unused)} has no effect with --to {args.to}: leave it out.")
    check = "" if args.no_check else ", then a check of the result (--no-check leaves it out)"
    print(f"converting {args.source} to {FORMS[args.to]}: about as long as copying the files{check}")
    options = {"check": not args.no_check, "overwrite": args.overwrite}
    if args.to == "gguf":
        options |= {"dtype": args.dtype or "f16", "class_token_last": args.class_token_last}
    else:
        options |= {"dtype": args.dtype, "vision_tower": args.vision_tower, "max_shard_size": args.max_shard_size}
    if args.to == "hf":
        options |= {"base": args.base, "chat_template": args.chat_template}
    source_form = "original" if args.to == "hf" else "hf"
    result = getattr(conversion, f"convert_{source_form}_to_{args.to}")(args.source, args.output, **options)
    if result.check is not None:
        print(result.check)
    for note in result.notes:
        print(f"note: {note}")
    print(f"written: {result.output}")
    if args.to == "hf":
        print(f"next: llava chat {result.output}")
    elif model := next(result.output.glob("model-*.gguf"), None):
        mmproj = next(result.output.glob("mmproj-*.gguf"))
        print(f"next: llama-mtmd-cli -m {model} --mmproj {mmproj} --image IMAGE -p QUESTION")
    return 0
