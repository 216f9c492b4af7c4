"""
README's way on a checkpoint in llava-hf's form, each command in a process of its own: train QLoRA, chat, evaluate, merge,
publish; and stock transformers on the adapter and on the merged model, in processes that cannot import this package.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from published import FORMS, QUESTION, copy


pytestmark = pytest.mark.slow

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "white": (240, 240, 240)}
ANSWERS = [f"It is {colour}, quite." for colour in COLOURS]
MOST = 30  # tokens: three times an answer
MODEL = "llava-hf/llava-1.5-7b-hf"
# Long enough for a tiny model to know four answers by heart.
LEARN = [
    "max_steps=25",
    "learning_rate=5e-3",
    "per_device_train_batch_size=4",
    "global_batch_size=4",
    "report_to=none",
]

STOCK = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_llava":
            raise ModuleNotFoundError("modeling_llava is not installed here")
sys.meta_path.insert(0, Absent())
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder, base, most, settings, *images = json.loads(sys.argv[1])
if base is None:
    pipe = pipeline("image-text-to-text", model=folder)
else:
    model = AutoModelForImageTextToText.from_pretrained(base)
    model.load_adapter(folder)
    pipe = pipeline("image-text-to-text", model=model, processor=AutoProcessor.from_pretrained(folder))
settings["max_new_tokens"] = most
said = []
for image in images:
    content = [{"type": "image", "path": image}, {"type": "text", "text": "QUESTION"}]
    messages = [{"role": "user", "content": content}]
    text = pipe(text=messages, return_full_text=False, generate_kwargs=settings)[0]["generated_text"]
    inputs = pipe.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(pipe.model.dtype)
    length = pipe.model.generate(**inputs, **settings).shape[1] - inputs["input_ids"].shape[1]
    said.append([pipe.processor.apply_chat_template(messages, add_generation_prompt=True), text.strip(), length])
print(json.dumps(said))
""".replace("QUESTION", QUESTION)


def run(folder, *command, stdin=""):
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        input=stdin, capture_output=True, text=True, cwd=folder, env=environment, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-3000:])
    return done


def llava(folder, *arguments, stdin=""):
    return run(folder, "-m", "modeling_llava.cli.main", *arguments, stdin=stdin)


def assert_stock_answers(folder, model, form, base=None, **settings):
    """Stock transformers is asked as published, gives each answer whole, and ends by itself."""
    images = [f"images/{colour}.png" for colour in COLOURS]
    words = json.dumps([str(model), base and str(base), MOST, {"do_sample": False, **settings}, *images])
    said = json.loads(run(folder, "-c", STOCK, words).stdout.splitlines()[-1])
    assert [prompt for prompt, _, _ in said] == [FORMS[form].prompt] * 4
    assert [text for _, text, _ in said] == ANSWERS
    assert max(length for _, _, length in said) < MOST


def workplace(folder, form) -> Path:
    """What somebody has who follows the README: a checkpoint, images, `my.json`, questions."""
    copy(form, folder / MODEL)
    (folder / "images").mkdir()
    rows, questions = [], []
    for (colour, pixel), answer in zip(COLOURS.items(), ANSWERS):
        Image.new("RGB", (40, 30), pixel).save(folder / "images" / f"{colour}.png")
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
    folder = workplace(tmp_path_factory.mktemp("readme"), "llava-hf")
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


def test_the_stock_pipeline_answers_over_the_adapter(trained):
    assert_stock_answers(trained, "runs/my", "llava-hf")


def test_the_stock_pipeline_answers_over_the_merged_model(merged):
    assert_stock_answers(merged, "runs/my-merged", "llava-hf")


def test_evaluation_finds_every_answer(trained):
    data = ["--questions", "questions.jsonl", "--images", "images", "--instruction", ""]
    llava(trained, "eval", "vqa", "runs/my", *data, "--out", "runs/vqa")
    results = json.loads((trained / "runs" / "vqa" / "results.json").read_text())
    assert results["scores"]["exact_match"]["value"] == 100


def test_the_merged_model_is_fit_to_be_published(merged):
    done = llava(merged, "publish", "runs/my-merged", "me/my-llava", "--dry-run")
    assert "It is" in done.stdout  # it has been asked, as its users will


@pytest.mark.parametrize("form", ["gemma"])
def test_an_adapter_whose_base_lacks_the_stop_ends_with_what_training_prints(tmp_path, form):
    """Its base's generation configuration is what an adapter's users get, and that one ends at `<eos>` alone."""
    folder = workplace(tmp_path, form)
    path = folder / MODEL / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 1}))
    said = train(folder, "lora")
    ends = re.search(r"eos_token_id\W+(\[[\d, ]+\])", said)
    assert ends, said[-2000:]
    assert_stock_answers(folder, "runs/my", form, base=MODEL, eos_token_id=json.loads(ends[1]))
    said = llava(folder, "publish", "runs/my", "me/my", "--dry-run", "--base-model", "me/base").stdout
    assert ends[1] in said.replace("\n", " ")
