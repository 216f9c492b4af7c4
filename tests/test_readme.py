"""The README's own words, and those of docs/: Python runs, commands parse, files exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
from published import copy
from tiny_predictor import picture

from modeling_llava.cli import data, eval
from modeling_llava.cli.main import COMMANDS


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODEL = "llava-hf/llava-1.5-7b-hf"


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def tiny_checkpoint(tmp_path, monkeypatch):
    """A checkpoint in the same form, in a folder of the same name, next to a photo: the code runs with small changes."""
    copy("llava-hf", tmp_path / MODEL)
    picture(0).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_blocks_run(number, tiny_checkpoint, capsys):
    code = blocks("python")[number]
    code = code.replace('dtype="bfloat16", device="cuda"', 'dtype="float32", device="cpu"')
    assert MODEL in code
    exec(compile(code, f"README.md, block {number}", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_first_block_is_ten_lines_and_needs_nothing_of_ours():
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 10 and not any("modeling_llava" in line for line in lines)


def test_every_command_is_in_the_table_and_no_other():
    table = README.split("## Commands")[1].split("\n## ")[0]
    named = set(re.findall(r"`llava (\w+)", table))
    assert named >= set(COMMANDS) and named <= {*COMMANDS, "COMMAND"}


COMMAND_LINES = [
    line
    for page in PAGES
    if page.stem != "migration"  # it has tests of its own
    for block in blocks("bash", page.read_text("utf-8"))
    for line in block.splitlines()
    if line.startswith("llava ")
]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_commands_parse(line):
    from modeling_llava.cli.main import build_parser

    words = shlex.split(line, comments=True)[1:]
    build_parser(words[0]).parse_args(words)


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if re.match("llava train .*=", line)])
def test_training_commands_are_recipes(line, monkeypatch):
    from modeling_llava.training import read_recipe

    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    settings = read_recipe(words[2], [word for word in words[3:] if "=" in word])
    assert words[2] != "qlora" or (settings["adapter"], settings["model"]) == ("qlora", MODEL)


def test_every_command_has_an_example_on_its_page():
    page = (ROOT / "docs" / "commands.md").read_text("utf-8")
    lines = [shlex.split(line, comments=True) for block in blocks("bash", page) for line in block.splitlines()]
    assert {words[1] for words in lines} == set(COMMANDS)
    for command, names in (("data", data.SUBCOMMANDS), ("eval", eval.SUBCOMMANDS)):
        assert {words[2] for words in lines if words[1] == command} == set(names)


def test_the_make_target_exists():
    assert "make quickstart" in "".join(blocks("bash"))
    assert re.search(r"^quickstart:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_data_example_is_a_conversation():
    from modeling_llava.data import from_llava_row

    (row,) = json.loads(blocks("json")[0])
    conversation = from_llava_row(row)
    assert [message["role"] for message in conversation["messages"]] == ["user", "assistant"]


def test_files_that_are_named_exist():
    tree = README.split("## The tree")[1].split("```")[1]
    folder = ROOT
    for line in tree.strip().splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        folder = ROOT / "modeling_llava" if indent else ROOT
        assert (folder / name).exists(), name
    table = README.split("## From the paper to the file")[1].split("\n## ")[0]
    for row in table.splitlines():
        names = re.findall(r"`([\w./]+)`", row.rsplit("|", 2)[1]) if row.startswith("|") else []
        for name in names:
            if "/" not in name and "." not in name:
                continue  # a function
            places = [ROOT / name, ROOT / "modeling_llava" / name, *(ROOT / "modeling_llava").glob(f"*/{name}")]
            assert any(place.exists() for place in places), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8")):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"`((?:tests|examples)/[\w./-]+)`", page.read_text("utf-8")):
        assert (ROOT / name).exists(), name


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200
