"""The five golden checkpoints, in the original's five forms, against what the original code computed from them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conversion_cases import GOLDEN, GOLDEN_CASES, golden_arguments, original_tensors
from PIL import Image

from modeling_llava import LlavaForConditionalGeneration, LlavaProcessor
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


def expected(name: str):
    cases = json.loads((GOLDEN / name / "expected.json").read_text("utf-8"))
    return cases, np.load(GOLDEN / name / "expected.npz")


def expand(ids: list[int], image_token_id: int) -> list[int]:
    """The original's ids with its one image position as the image tokens of HF."""
    return [new for i in ids for new in ([image_token_id] * TOKENS_PER_IMAGE if i == ORIGINAL_IMAGE_ID else [i])]


def messages(question: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_converted_checkpoint_computes_what_the_original_did(name, converted):
    processor = LlavaProcessor.from_pretrained(converted / name)
    model, info = LlavaForConditionalGeneration.from_pretrained(converted / name, output_loading_info=True)
    assert not any(info.values()), info
    cases, arrays = expected(name)
    assert len(cases) == 5
    for i, case in enumerate(cases):
        prompt = processor.apply_chat_template(messages(case["question"]), add_generation_prompt=True)
        assert prompt == case["prompt"]
        inputs = processor(images=Image.open(GOLDEN / name / case["image"]), text=prompt, return_tensors="pt")
        assert inputs.input_ids[0].tolist() == expand(case["input_ids"], model.config.image_token_id)
        assert np.abs(inputs.pixel_values[0].numpy() - arrays["pixel_values"][i]).max() <= PIXEL_TOLERANCE
        with torch.no_grad():
            logits = model(**inputs).logits[0].numpy()
            features = model.get_image_features(inputs.pixel_values).pooler_output[0].numpy()
            generated = model.generate(**inputs, max_new_tokens=len(case["greedy_new_tokens"]), do_sample=False)
        known = arrays[f"logits_{i}"]
        assert np.abs(logits[:, : known.shape[1]] - known).max() <= TOLERANCE
        if "image_features" in arrays:
            assert np.abs(features - arrays["image_features"][i]).max() <= TOLERANCE
        assert generated[0, inputs.input_ids.shape[1] :].tolist() == case["greedy_new_tokens"]


STOCK_PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

golden, converted, target = map(Path, sys.argv[1:4])
result = {}
for name in sys.argv[4:]:
    processor = AutoProcessor.from_pretrained(converted / name)
    model, info = AutoModelForImageTextToText.from_pretrained(converted / name, output_loading_info=True)
    assert not any(info.values()), (name, info)
    for i, case in enumerate(json.loads((golden / name / "expected.json").read_text("utf-8"))):
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": case["question"]}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(images=Image.open(golden / name / case["image"]), text=prompt, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0]
            features = model.get_image_features(inputs.pixel_values).pooler_output[0]
            generated = model.generate(**inputs, max_new_tokens=len(case["greedy_new_tokens"]), do_sample=False)
        values = {
            "prompt": np.array(prompt), "ids": inputs.input_ids[0], "pixels": inputs.pixel_values[0],
            "logits": logits, "features": features, "greedy": generated[0, inputs.input_ids.shape[1]:],
            "image_token": np.array(model.config.image_token_id),
        }
        result |= {f"{name}/{i}/{key}": np.asarray(value) for key, value in values.items()}
assert not any(module.split(".")[0] == "modeling_llava" for module in sys.modules)
np.savez(target, **result)
"""


@pytest.fixture(scope="module")
def stock_results(converted, tmp_path_factory):
    """What stock transformers computes, in a process that never imports this package, started elsewhere."""
    folder = tmp_path_factory.mktemp("stock")
    command = [sys.executable, "-c", STOCK_PROGRAM, GOLDEN, converted, folder / "result.npz", *GOLDEN_CASES]
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(folder / "result.npz")


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_stock_transformers_computes_what_the_original_did(name, stock_results):
    cases, arrays = expected(name)
    for i, case in enumerate(cases):
        got = {key: stock_results[f"{name}/{i}/{key}"] for key in ("prompt", "ids", "pixels", "logits", "greedy")}
        assert str(got["prompt"]) == case["prompt"]
        image_token = int(stock_results[f"{name}/{i}/image_token"])
        assert got["ids"].tolist() == expand(case["input_ids"], image_token)
        assert np.abs(got["pixels"] - arrays["pixel_values"][i]).max() <= PIXEL_TOLERANCE
        known = arrays[f"logits_{i}"]
        assert np.abs(got["logits"][:, : known.shape[1]] - known).max() <= TOLERANCE
        if "image_features" in arrays:
            features = stock_results[f"{name}/{i}/features"]
            assert np.abs(features - arrays["image_features"][i]).max() <= TOLERANCE
        assert got["greedy"].tolist() == case["greedy_new_tokens"]


@pytest.mark.parametrize("name", ["llava_v15_tiny", "llava_v1_tiny"])
def test_original_to_hf_to_original_gives_back_every_byte(name, converted, tmp_path):
    """Tensors bit for bit, and configuration, tokenizer and tower files as they were."""
    conversion = convert_hf_to_original(converted / name, tmp_path / "back")
    assert conversion.check.is_sound
    before, after = original_tensors(GOLDEN / name), original_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]), key
    for file in GOLDEN.joinpath(name).glob("*.json"):
        if file.name != "expected.json":
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name
    assert (tmp_path / "back/tokenizer.model").read_bytes() == (GOLDEN / name / "tokenizer.model").read_bytes()
    tower = original_tensors(tmp_path / "back/vision_tower")
    for key, tensor in original_tensors(GOLDEN / name / "vision_tower").items():
        assert torch.equal(tower[key], tensor), key


@pytest.mark.parametrize("name", ["llava_v15_tiny_lora", "llava_v15_tiny_projector", "llava_v1_tiny_delta"])
def test_what_was_folded_in_goes_back_as_a_whole_original(name, converted, tmp_path):
    """There and back again: the whole original that a LoRA, projector or delta stands for gives the same HF folder."""
    convert_hf_to_original(converted / name, tmp_path / "original")
    convert_original_to_hf(tmp_path / "original", tmp_path / "hf")
    first, second = original_tensors(converted / name), original_tensors(tmp_path / "hf")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
