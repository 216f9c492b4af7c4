"""MODEL_CARD.md, the card of the model family: the Hub reads it, and its commands exist."""

import re
import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from modeling_llava.cli.main import build_parser


CARD = (Path(__file__).parents[2] / "MODEL_CARD.md").read_text("utf-8")


def test_the_hub_reads_its_metadata():
    data = ModelCard(CARD).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-text-to-text")


@pytest.mark.parametrize("line", re.findall(r"^llava .*$", CARD, re.MULTILINE))
def test_its_commands_parse(line):
    words = shlex.split(line)[1:]
    build_parser(words[0]).parse_args(words)
