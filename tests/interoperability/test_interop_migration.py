"""docs/migration.md names only recipe keys, commands, options and templates that exist."""

import argparse
import dataclasses
import re
from pathlib import Path

import pytest

from modeling_llava.cli.main import COMMANDS, build_parser
from modeling_llava.processing_llava import load_chat_template


PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text("utf-8")


def test_every_recipe_key_is_a_setting():
    from modeling_llava.training import LlavaTrainingArguments

    settings = {field.name for field in dataclasses.fields(LlavaTrainingArguments)}
    table = PAGE.split("| original flag | recipe key |")[1].split("\n\n")[0]
    keys = [key for row in table.splitlines()[2:] for key in re.findall(r"`(\w+)`", row.split("|")[2])]
    assert len(keys) > 20 and set(keys) <= settings, set(keys) - settings


def test_every_template_and_recipe_is_there():
    row = next(row for row in PAGE.splitlines() if "`chat_template`" in row)
    names = re.findall(r"`(\w+)`", row.split("|")[3])
    assert len(names) == 8
    for name in names:
        load_chat_template(name)
    for path in re.findall(r"examples/recipes/\S+\.yaml", PAGE):
        assert (Path(__file__).parents[2] / path).is_file(), path


@pytest.mark.parametrize("command", sorted(set(re.findall(r"llava (\w+)", PAGE)) & set(COMMANDS)))
def test_every_option_of_a_command_is_there(command):
    known = set()
    parsers = [build_parser(command)]
    while parsers:
        for action in parsers.pop()._actions:
            known.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    for snippet in re.findall(r"`([^`]*)`", PAGE):
        if snippet.startswith(f"llava {command}"):
            options = re.findall(r"(?<!\S)--[\w-]+", snippet)
            assert set(options) <= known, set(options) - known
