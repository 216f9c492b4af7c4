"""docs/commands.md: every line parses, every command has one, and what it names is there."""

import re
import shlex
from pathlib import Path

import pytest

from modeling_llava.cli import data, eval
from modeling_llava.cli.main import COMMANDS, build_parser


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "commands.md").read_text("utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
LINES = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines()]


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_an_example_parses(words):
    assert words[0] == "llava"
    build_parser(words[1]).parse_args(words[1:])


def test_every_command_has_an_example():
    assert {words[1] for words in LINES} == set(COMMANDS)
    for command, names in (("data", data.SUBCOMMANDS), ("eval", eval.SUBCOMMANDS)):
        assert {words[2] for words in LINES if words[1] == command} == set(names)


@pytest.mark.parametrize("words", [w for w in LINES if w[1] == "train" and "=" in w[-1]], ids=" ".join)
def test_an_example_of_training_is_a_recipe(words, monkeypatch):
    from modeling_llava.training import read_recipe

    monkeypatch.chdir(ROOT)
    settings = read_recipe(words[2], words[3:])
    assert settings["output_dir"].startswith("runs/")


def test_what_the_page_names_is_there():
    for name in re.findall(r"`((?:tests|examples)/[\w./-]+)`", PAGE):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
