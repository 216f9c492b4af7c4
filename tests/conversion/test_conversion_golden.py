"""The five golden checkpoints, in the original's five forms, against what the original code computed from them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import run_golden
from conversion_cases import GOLDEN, GOLDEN_CASES, golden_arguments, same

from modeling_llava.conversion import convert_hf_to_original, convert_original_to_hf


PIXEL_TOLERANCE = 1e-6
TOLERANCE = 1e-4
ORIGINAL_IMAGE_ID = -200
TOKENS_PER_IMAGE = 9  # (42 / 14)²


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Name → the HF folder."""
    folder = tmp_path_factory.mktemp("hf")
    for name in GOLDEN_CASES:
        conversion = convert_original_to_hf(output=folder / name, **golden_arguments(name))
        assert conversion.check.is_stock_ready, str(conversion.check)
    return folder


@pytest.fixture(scope="module", params=["ours", "stock"])
def computed(request, converted, tmp_path_factory):
    """By our classes, and by stock transformers in a process that never imports this package, started elsewhere."""
    if request.param == "ours":
        return run_golden.run(GOLDEN, converted, list(GOLDEN_CASES))
    folder = tmp_path_factory.mktemp("stock")
    command = [sys.executable, Path(run_golden.__file__), GOLDEN, converted, folder / "result.npz", *GOLDEN_CASES]
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(folder / "result.npz")


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_converted_checkpoint_computes_what_the_original_did(name, computed):
    cases = json.loads((GOLDEN / name / "expected.json").read_text("utf-8"))
    arrays = np.load(GOLDEN / name / "expected.npz")
    assert len(cases) == 5
    for i, case in enumerate(cases):
        got = {key.split("/")[2]: computed[key] for key in computed if key.startswith(f"{name}/{i}/")}
        assert str(got["prompt"]) == case["prompt"]
        image = [int(got["image_token"])] * TOKENS_PER_IMAGE  # in place of the original's one
        ids = [new for old in case["input_ids"] for new in (image if old == ORIGINAL_IMAGE_ID else [old])]
        assert got["ids"].tolist() == ids
        assert np.abs(got["pixels"] - arrays["pixel_values"][i]).max() <= PIXEL_TOLERANCE
        known = arrays[f"logits_{i}"]
        assert np.abs(got["logits"][:, : known.shape[1]] - known).max() <= TOLERANCE
        if "image_features" in arrays:
            assert np.abs(got["features"] - arrays["image_features"][i]).max() <= TOLERANCE
        assert got["greedy"].tolist() == case["greedy_new_tokens"]


@pytest.mark.parametrize("name", ["llava_v15_tiny", "llava_v1_tiny"])
def test_original_to_hf_to_original_gives_back_every_byte(name, converted, tmp_path):
    """Tensors bit for bit, and configuration, tokenizer and tower files as they were."""
    conversion = convert_hf_to_original(converted / name, tmp_path / "back")
    assert conversion.check.is_sound
    for part in ("", "vision_tower"):
        assert same(GOLDEN / name / part, tmp_path / "back" / part)
    for file in [*GOLDEN.joinpath(name).glob("*.json"), GOLDEN / name / "tokenizer.model"]:
        if file.name != "expected.json":
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("name", ["llava_v15_tiny_lora", "llava_v15_tiny_projector", "llava_v1_tiny_delta"])
def test_what_was_folded_in_goes_back_as_a_whole_original(name, converted, tmp_path):
    """There and back again: the whole original that a LoRA, projector or delta stands for gives the same HF folder."""
    convert_hf_to_original(converted / name, tmp_path / "original")
    convert_original_to_hf(tmp_path / "original", tmp_path / "hf", check=False)
    assert same(converted / name, tmp_path / "hf")
