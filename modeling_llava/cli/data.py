"""`llava data COMMAND …`: look at training data, or make it. Each sub-command is one small module, `data_COMMAND.py`."""

import argparse
import importlib


SUBCOMMANDS: dict[str, str] = {
    "check": "every record and image, before a run of days finds what is wrong",
    "preview": "samples as the model sees them, with what it learns marked",
    "expand": "captions into stage 1 data",
    "filter": "a concept-balanced choice of captions",
    "generate": "instruction data from captions and boxes, by a language model",
    "report": "samples of generated data to skim, and the data again without what was marked",
}


class _LazyParser(argparse.ArgumentParser):
    """Imports a sub-command's module when its arguments are parsed, and not before."""

    module: str | None = None

    def parse_known_args(self, args=None, namespace=None):
        if self.module is not None:
            module, self.module = self.module, None
            importlib.import_module(module).add_arguments(self)
        return super().parse_known_args(args, namespace)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True, parser_class=_LazyParser)
    parser.commands = commands.choices  # for the errors of misspelt words
    for name, summary in SUBCOMMANDS.items():
        child = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        child.module = f"modeling_llava.cli.data_{name}"


def run(args: argparse.Namespace) -> int | None:
    return importlib.import_module(f"modeling_llava.cli.data_{args.data_command}").run(args)
