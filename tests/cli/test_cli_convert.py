"""`llava convert`, as a person types it."""

import json

import pytest

from modeling_llava.cli.main import main


def test_original_to_hf_and_back(golden, tmp_path, capsys):
    source = golden / "llava_v15_tiny"
    assert main(["convert", str(source), str(tmp_path / "hf")]) == 0
    printed = capsys.readouterr().out
    assert "written:" in printed and "next: llava chat" in printed
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "llava"
    assert main(["convert", "--check", str(tmp_path / "hf")]) == 0
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "back"), "--to", "original"]) == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "llava_llama"


@pytest.mark.parametrize(
    "words, message",
    [
        (["{nowhere}", "{out}"], "nowhere"),
        (["{source}"], "no output folder"),
        (["{source}", "{out}", "--to", "original", "--base", "x"], "--base has no effect"),
        (["{source}", "{out}", "--check"], "writes nothing"),
        (["{lora}", "{out}"], "base"),
    ],
)
def test_a_mistake_is_one_line(golden, tmp_path, capsys, words, message):
    places = {
        "nowhere": tmp_path / "nowhere",
        "out": tmp_path / "out",
        "source": golden / "llava_v15_tiny",
        "lora": golden / "llava_v15_tiny_lora" / "llava-lora",
    }
    assert main(["convert", *[word.format(**places) for word in words]]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("llava convert: error:") and message in error
    assert not (tmp_path / "out" / "config.json").exists()
