"""
README's way on a checkpoint in llava-hf's form, each command in a process of its own: train QLoRA, chat, evaluate, merge,
publish; and stock transformers on the adapter and on the merged model, in processes that cannot import this package.
"""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from published import FORMS, QUESTION, copy
from stock import run, stock_answers


pytestmark = pytest.mark.slow

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "white": (240, 240, 240)}
ANSWERS = [f"It is {colour}, quite." for colour in COLOURS]
MOST = 30  # tokens: three times an answer
MODEL = "llava-hf/llava-1.5-7b-hf"
# Twice what a tiny model needs to know four answers by heart: no rounding of any processor decides.
LEARN = [
    "max_steps=50",
    "learning_rate=2e-3",
    "per_device_train_batch_size=4",
    "global_batch_size=4",
    "report_to=none",
]


def llava(folder, *arguments, stdin=""):
    return run(folder, "-m", "modeling_llava.cli.main", *arguments, stdin=stdin)


def assert_stock_answers(folder, model, prompt, base=None, thought="", **settings):
    """Stock transformers is asked as published, gives each answer whole, and ends by itself."""
    conversations = []
    for colour in COLOURS:
        content = [{"type": "image", "path": f"images/{colour}.png"}, {"type": "text", "text": QUESTION}]
        conversations.append([{"role": "user", "content": content}, {"role": "assistant"}])
    job = {"folder": model, "base": base, "most": MOST, "conversations": conversations, "settings": settings}
    (said,) = stock_answers(folder, [job])
    assert [turn["prompt"] for turn in said] == [prompt] * 4
    assert [turn["text"].removeprefix(thought) for turn in said] == ANSWERS
    assert max(len(turn["ids"]) for turn in said) < MOST


def workplace(folder, size=(40, 30)) -> Path:
    """What somebody has who follows the README: images, `my.json`, questions."""
    (folder / "images").mkdir()
    rows, questions = [], []
    for (colour, pixel), answer in zip(COLOURS.items(), ANSWERS):
        Image.new("RGB", size, pixel).save(folder / "images" / f"{colour}.png")
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": colour, "image": f"{colour}.png", "conversations": turns})
        questions.append({"question_id": colour, "image": f"{colour}.png", "question": QUESTION, "answer": answer})
    (folder / "my.json").write_text(json.dumps(rows))
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return folder


def train(folder, preset):
    data = ["data=my.json", "image_folder=images", "output_dir=runs/my"]
    done = llava(folder, "train", preset, f"model={MODEL}", *data, *LEARN)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    folder = workplace(tmp_path_factory.mktemp("readme"))
    copy("llava-hf", folder / MODEL)
    train(folder, "qlora")
    return folder


@pytest.fixture(scope="module")
def merged(trained) -> Path:
    llava(trained, "merge", "runs/my", "runs/my-merged")
    return trained


def test_chat_answers_and_ends(trained):
    command = ["chat", "runs/my", "--image", "images/green.png", "--max-new-tokens", MOST]
    done = llava(trained, *command, stdin=f"{QUESTION}\n")
    assert done.stdout.strip() == "It is green, quite."
    assert int(re.search(r"(\d+) tokens ·", done.stderr)[1]) < MOST


def test_the_stock_pipeline_answers_over_adapter_and_merged_model(merged):
    for model in ("runs/my", "runs/my-merged"):
        assert_stock_answers(merged, model, FORMS["llava-hf"].prompt)


def test_evaluation_finds_every_answer(trained):
    data = ["--questions", "questions.jsonl", "--images", "images", "--instruction", ""]
    llava(trained, "eval", "vqa", "runs/my", *data, "--out", "runs/vqa")
    results = json.loads((trained / "runs" / "vqa" / "results.json").read_text())
    assert results["scores"]["exact_match"]["value"] == 100


def test_the_merged_model_is_fit_to_be_published(merged):
    done = llava(merged, "publish", "runs/my-merged", "me/my-llava", "--dry-run")
    assert "It is" in done.stdout  # it has been asked, as its users will


def test_an_adapter_whose_base_lacks_the_stop_ends_with_what_training_prints(tmp_path):
    """Its base's generation configuration is what an adapter's users get, and that one ends at `<eos>` alone."""
    folder = workplace(tmp_path)
    path = copy("gemma", folder / MODEL) / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 1}))
    said = train(folder, "lora")
    ends = re.search(r"eos_token_id\W+(\[[\d, ]+\])", said)
    assert ends, said[-2000:]
    assert_stock_answers(folder, "runs/my", FORMS["gemma"].prompt, base=MODEL, eos_token_id=json.loads(ends[1]))
    said = llava(folder, "publish", "runs/my", "me/my", "--dry-run", "--base-model", "me/base").stdout
    assert ends[1] in said.replace("\n", " ")
