"""docs/reading.md leads through files that are there and as long as it says; the main path is as short as it was measured."""

import re
from pathlib import Path

import pytest
from main_path import code_lines, measure


ROOT = Path(__file__).parent.parent
STEPS = re.findall(r"^\| \d+ \| `([\w./]+)` \| (\d+) \|", (ROOT / "docs" / "reading.md").read_text("utf-8"), re.M)


@pytest.mark.parametrize("file, lines", STEPS, ids=[file for file, _ in STEPS])
def test_a_step_is_there_and_as_long_as_it_says(file, lines):
    assert len((ROOT / "modeling_llava" / file).read_text("utf-8").splitlines()) == pytest.approx(int(lines), rel=0.15)


@pytest.mark.slow
def test_the_main_path_stays_short(tmp_path):
    files = measure(tmp_path)
    assert len(files["train"]) <= 30 and sum(map(code_lines, files["train"])) <= 7500
    assert len(files["chat"]) <= 10 and sum(map(code_lines, files["chat"])) <= 2400
