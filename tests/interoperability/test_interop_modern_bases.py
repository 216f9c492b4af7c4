"""
SigLIP with Llama-3.1, Qwen2.5 and Qwen3, the whole way in commands: init, pretrain, QLoRA, chat, merge, GGUF; stock
transformers on the adapter and on the merged model, and llama.cpp on the two files.
"""

import json
import re

import numpy as np
import pytest
from llama_cpp_runs import llava_with_llama_cpp, needs_llama_cpp, run_llama_cpp
from PIL import Image
from published import FORMS, QUESTION, build_language, build_tower
from test_interop_readme_path import ANSWERS, COLOURS, LEARN, MOST, assert_stock_answers, llava, workplace

from modeling_llava import LlavaProcessor


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["llama3", "qwen2.5", "qwen3"])
def walked(request, tmp_path_factory):
    """Folder of the walk up to the merged model, and the language model's name."""
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    folder = workplace(tmp_path_factory.mktemp(request.param), size=(28, 28))
    rows = json.loads((folder / "my.json").read_text())
    for row in rows:
        row["conversations"] = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": row["id"]}]
    (folder / "captions.json").write_text(json.dumps(rows))
    parts = build_tower("siglip"), build_language(request.param, wide=True)
    llava(folder, "init", *parts, "start", "--chat-template", "own")
    options = ["model=start", "image_folder=images", *LEARN]
    llava(folder, "train", "pretrain", *options, "data=captions.json", "output_dir=runs/pretrain", "max_steps=2")
    llava(folder, "train", "qlora", *options, "data=my.json", "projector=runs/pretrain", "output_dir=runs/my")
    llava(folder, "merge", "runs/my", "merged")
    return folder, request.param


def test_chat_and_stock_transformers_give_the_answers(walked):
    folder, language = walked
    command = ["chat", "runs/my", "--image", "images/green.png", "--max-new-tokens", MOST]
    done = llava(folder, *command, stdin=f"{QUESTION}\n")
    assert re.sub(r"<think>\s*</think>\s*", "", done.stdout).strip() == ANSWERS[1]
    for model in ("runs/my", "merged"):
        assert_stock_answers(folder, model, FORMS[language].prompt, thought="<think>\n\n</think>\n\n")


@needs_llama_cpp
def test_llama_cpp_gives_the_answers_of_the_merged_model(walked, tmp_path):
    """The image decides the answer, and so do adapter and projector: before training the answers are others."""
    folder, language = walked
    processor = LlavaProcessor.from_pretrained(folder / "merged")
    prompt = FORMS[language].prompt.replace("<image>", "<__media__>")
    images = [np.array(Image.open(folder / f"images/{colour}.png")) for colour in COLOURS]
    said = {}
    for model in ("merged", "start"):
        words = ["convert", folder / model, tmp_path / model, "--to", "gguf", "--dtype", "q8_0"]
        llava_with_llama_cpp(*words)
        results = run_llama_cpp(tmp_path / model, images, [prompt] * 4, tmp_path / "work", num_tokens=MOST)
        texts = [processor.tokenizer.decode(got["greedy"]) for got in results]
        said[model] = [re.split(r"<\|im_end\|>|<\|eot_id\|>", text.split("</think>")[-1])[0].strip() for text in texts]
    assert said["merged"] == ANSWERS
    assert not set(said["start"]) & set(ANSWERS)
