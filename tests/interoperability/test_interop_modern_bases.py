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
from test_interop_readme_path import ANSWERS, COLOURS, LEARN, MOST, assert_stock_answers, llava

from modeling_llava import LlavaProcessor


pytestmark = pytest.mark.slow

DATA = ["data=my.json", "image_folder=images"]


@pytest.fixture(scope="module", params=["llama3", "qwen2.5", "qwen3"])
def walked(request, tmp_path_factory):
    """Folder of the walk up to the merged model, and the language model's name."""
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "images").mkdir()
    for colour, pixel in COLOURS.items():
        Image.new("RGB", (28, 28), pixel).save(folder / "images" / f"{colour}.png")
    for file, question, answers in (("captions", "<image>", COLOURS), ("my", f"<image>\n{QUESTION}", ANSWERS)):
        rows = [
            {
                "id": colour,
                "image": f"{colour}.png",
                "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
            }
            for colour, answer in zip(COLOURS, answers)
        ]
        (folder / f"{file}.json").write_text(json.dumps(rows))
    parts = build_tower("siglip"), build_language(request.param, wide=True)
    llava(folder, "init", *parts, "start", "--chat-template", "own")
    captions = ["data=captions.json", "image_folder=images", "output_dir=runs/pretrain"]
    llava(folder, "train", "pretrain", "model=start", *captions, *LEARN, "max_steps=2")
    options = ["model=start", "projector=runs/pretrain", "output_dir=runs/my"]
    llava(folder, "train", "qlora", *options, *DATA, *LEARN)
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
