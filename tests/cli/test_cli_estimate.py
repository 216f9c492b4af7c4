"""`llava estimate`: weights by arithmetic, a card that is too small, and mistakes."""

import pytest

from modeling_llava.cli.main import main


MODEL = "model=llava-hf/llava-1.5-7b-hf"


def gib(printed, part):
    line = next(line for line in printed.splitlines() if part in line)
    return float(line.split("│")[2])


def test_weights_of_llava_7b_are_those_of_its_layers(capsys):
    assert main(["estimate", "lora", MODEL, "precision=bf16"]) in (0, 1)
    printed = capsys.readouterr().out
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096  # attention, MLP, norms
    assert gib(printed, "language model, layers") == pytest.approx((32 * layer + 4096) * 2 / 2**30, abs=0.02)
    assert gib(printed, "projector") == pytest.approx(
        (1024 * 4096 + 4096**2) * 4 / 2**30, abs=0.02
    )  # trained: float32


def test_a_card_that_is_too_small_is_said_with_the_change_that_helps(capsys):
    assert main(["estimate", "finetune", MODEL, "--gpu", "12"]) == 1
    printed = capsys.readouterr().out
    assert "does not fit 12 GiB" in printed and "adapter=qlora" in printed


@pytest.mark.parametrize("words, message", [(["qlora"], "model is not set"), (["qlora", "model=/nowhere"], "nowhere")])
def test_a_mistake_is_one_line(words, message, capsys):
    assert main(["estimate", *words]) == 2
    assert message in capsys.readouterr().err
