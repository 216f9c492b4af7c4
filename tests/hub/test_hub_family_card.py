"""MODEL_CARD.md, the card of the model family: what it says is what the package does."""

import re
import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from modeling_llava.cli.main import build_parser
from modeling_llava.evaluation import llava_bench, scienceqa


CARD = (Path(__file__).parents[2] / "MODEL_CARD.md").read_text("utf-8")


def test_the_hub_reads_its_metadata():
    data = ModelCard(CARD).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-text-to-text")


@pytest.mark.parametrize("line", re.findall(r"^llava .*$", CARD, re.MULTILINE))
def test_its_commands_parse(line):
    words = shlex.split(line)[1:]
    build_parser(words[0]).parse_args(words)


def test_its_figures_are_the_papers():
    table = (re.split(r" *\| *", row.strip("| ")) for row in re.findall(r"^\|.*", CARD, re.M))
    rows = {cells[0]: cells[1:] for cells in table}
    science = scienceqa.SCIENCEQA
    for name, value in {
        "LLaVA": science["LLaVA-13B"][-1],
        "with GPT-4 as judge": science["LLaVA-13B + GPT-4, judge"][-1],
        "GPT-4 alone, text only": science["GPT-4, text only"][-1],
        "without stage 1": 85.81,  # this and the next three: LLaVA, Table 8
        "features of the last layer": 89.96,
        "answer before reasoning": 89.77,
        "7B": 89.84,
    }.items():
        assert rows[name] == [f"{value:.2f}"], name
    for name, values in {
        "COCO": llava_bench.LLAVA_BENCH_COCO["LLaVA-13B"],
        "COCO, without instruction tuning": llava_bench.LLAVA_BENCH_COCO["no instruction tuning"],
        "In-the-Wild": llava_bench.LLAVA_BENCH_WILD["LLaVA-13B"],
    }.items():
        assert rows[name] == [f"{value:.1f}" for value in values], name


def test_its_counts_of_parameters_are_right():
    def linear(inputs, outputs):
        return inputs * outputs + outputs

    for hidden, matrix, two_layers in ((4096, "4.2 M", "21.0 M"), (5120, "5.2 M", "31.5 M")):
        assert f"{linear(1024, hidden) / 1e6:.1f} M" == matrix and matrix in CARD
        assert f"{(linear(1024, hidden) + linear(hidden, hidden)) / 1e6:.1f} M" == two_layers and two_layers in CARD
