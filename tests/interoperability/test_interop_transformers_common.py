"""transformers' own common model and processor tests, from the source package of the installed version, over our classes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from published import copy
from tiny_predictor import picture


HERE = Path(__file__).parent
SOURCE = Path(sys.prefix) / "transformers-tests"  # unpacked by `make test-slow`
NOT_OURS = {"test_can_init_all_missing_weights": "looks for the model among the files of transformers itself"}
"""Tests that stock passes and ours do not, each with its reason."""


def passed(whose: str, folder: Path) -> set[str]:
    copy("llava-hf", folder / "model")
    picture(0).save(folder / "image.png")
    environment = {
        **os.environ, "LLAVA_UNDER_TEST": whose, "LLAVA_FOLDER": str(folder / "model"), "LLAVA_IMAGE": str(folder / "image.png"),
        "PYTHONPATH": str(SOURCE),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=no", "-p", "no:cacheprovider", "-o", "addopts="]
    done = subprocess.run(
        [*command, str(HERE / "transformers_common.py")], env=environment, cwd=folder, capture_output=True, text=True
    )
    return set(re.findall(r"^PASSED \S*::(\w+)", done.stdout, re.M))


@pytest.mark.slow
@pytest.mark.skipif(
    not SOURCE.is_dir(), reason="transformers' source package is not unpacked (make test-slow does it)"
)
def test_ours_pass_what_stock_passes(tmp_path):
    for name in ("stock", "ours"):
        (tmp_path / name).mkdir()
    stock, ours = (passed(name, tmp_path / name) for name in ("stock", "ours"))
    assert len(stock) > 120  # the tests were found, and ran
    assert stock - ours == set(NOT_OURS)
