"""
`llava COMMAND …`: the table of commands.

Each command is a module with `add_arguments(parser)` and `run(args)`. A command without models has `USES_MODELS = False` and
starts at once.
"""

import argparse
import importlib
import logging
import os
import sys
import warnings

from ..constants import check_transformers


COMMANDS: dict[str, str] = {
    "quickstart": "a small LLaVA from data to evaluation on this machine's CPU, in minutes",
    "init": "compose a new LLaVA from a vision encoder and a language model",
    "train": "pretrain, finetune, LoRA or QLoRA, from a recipe",
    "estimate": "memory by part, before anything is loaded",
    "data": "check, preview, expand, filter or generate training data",
    "eval": "ScienceQA, LLaVA-Bench and more: answers, scores, tables, plots",
    "chat": "talk to a model in the terminal",
    "web": "talk to a model in the browser",
    "convert": "original, HF and GGUF checkpoints, in every direction",
    "merge": "fold an adapter into 16-bit weights",
    "publish": "check a model, write its card and push it to the Hub",
    "doctor": "versions, GPU, 4-bit support, disk: what will work here",
}


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser of `llava`. Only the module of `command` is imported, so that `llava --help` is instant."""
    from .. import __version__

    what = "LLaVA, HuggingFace-native: from captions and boxes to a published model."
    parser = argparse.ArgumentParser(prog="llava", description=what)
    parser.add_argument("--version", action="version", version=f"modeling-llava {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parser.commands = commands.choices  # for the errors of misspelt words
    for name, summary in COMMANDS.items():
        child = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == command:
            importlib.import_module(f"modeling_llava.cli.{name}").add_arguments(child)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script. A user's mistake is one line on stderr and exit code 2; `LLAVA_DEBUG=1` shows the
    traceback. Ctrl-C ends with exit code 130."""
    argv = sys.argv[1:] if argv is None else argv
    command = next((word for word in argv if word in COMMANDS), None)
    parser = build_parser(command)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        from .errors import unknown_words

        parser.exit(2, f"llava {args.command}: error: {unknown_words(unknown, parser, argv)}\n")
    if not os.environ.get("LLAVA_DEBUG"):  # warnings for other packages' developers
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    module = importlib.import_module(f"modeling_llava.cli.{args.command}")
    try:
        if args.command != "doctor":  # which reports it in full
            check_transformers()
        if getattr(module, "USES_MODELS", True):  # `import modeling_llava` does not register for the console script
            importlib.import_module("modeling_llava.compat").register_auto_classes()
        return module.run(args) or 0
    except KeyboardInterrupt:
        resumes = args.command in ("quickstart", "train", "eval", "data", "publish")
        print(f"\nstopped{'; the same command resumes' if resumes else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has read enough; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        from .errors import one_line

        line = None if os.environ.get("LLAVA_DEBUG") else one_line(error, args.command)
        if line is None:
            raise
        print(f"llava {args.command}: error: {line}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
