"""
Every family of chat templates, trained full, by LoRA and by QLoRA on two turns about several images: stock transformers, where
this package is not installed, ends each answer at the token at which ours does, or with what `needed_by_stock` says.
"""

import json

import pytest
from PIL import Image
from published import FORMS, copy, template
from stock import stock_answers

from modeling_llava.data import encode_conversation
from modeling_llava.inference import LlavaPredictor
from modeling_llava.text.chat_templates import CHAT_TEMPLATES
from modeling_llava.text.stops import answer_stop, needed_by_stock
from modeling_llava.training import train


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KINDS = {"full": "none", "lora": "lora", "qlora": "qlora"}
LIKE_LLAVA_HF = ("llava-hf-2023", "llava-hf-2024", "llava-hf-resaved", "bakllava")
FAMILIES = {name: (name, None) for name in FORMS if name not in LIKE_LLAVA_HF}  # "vicuna" has vicuna_v1
NAMED = [name for name in CHAT_TEMPLATES if name not in ("plain", "vicuna_v1")]
FAMILIES |= {name: ("qwen2.5" if name == "chatml" else "vicuna", name) for name in NAMED}
FAMILIES |= {
    "llava-hf-2023": ("llava-hf", template("llava-hf-first")),
    "llava-hf-2024": ("llava-hf", template("llava-hf-unmarked")),
}
BY_TEXT = {"vicuna_v0", "v0_mmtag"}
"""Families whose answers end with `###`, which stock has to be given."""
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "white": (240, 240, 240)}
QUESTIONS = ("What colour is it?", "Why is that?")
MOST = 40


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    conversations = []
    for colour, other in zip(COLOURS, [*list(COLOURS)[1:], "red"]):
        Image.new("RGB", (28, 28), COLOURS[colour]).save(folder / f"{colour}.png")
        messages = []
        for question, answer in zip(QUESTIONS, (f"It is {colour}, quite.", f"the picture shows {colour}.")):
            messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        images = [{"type": "image", "path": str(folder / f"{name}.png")} for name in (colour, other)]
        messages[0]["content"] = images + messages[0]["content"]
        conversations.append(messages)
    return conversations


@pytest.fixture(scope="module")
def answered(conversations, tmp_path_factory, request):
    """For each family and kind that is tested: what stock needs, our processor, what ours said and was taught, what stock said."""
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    folder = tmp_path_factory.mktemp("stops")
    (folder / "data.json").write_text(json.dumps([{"messages": messages} for messages in conversations]))
    chosen = {item.callspec.params["family"] for item in request.session.items if "answered" in item.fixturenames}
    ours, jobs = {}, []
    for family in FAMILIES.keys() & chosen:
        form, chat_template = FAMILIES[family]
        base = copy(form, folder / family / "base")
        if chat_template is not None and "{" in chat_template:
            (base / "chat_template.json").write_text(json.dumps({"chat_template": chat_template}))
            chat_template = None
        for kind, adapter in KINDS.items():
            run = folder / family / kind
            train({
                "model": str(base), "data": str(folder / "data.json"), "output_dir": str(run), "adapter": adapter,
                "max_steps": 80, "learning_rate": 3e-3, "per_device_train_batch_size": 4, "lora_r": 16,
                "precision": "fp32", "max_length": 1024, "chat_template": chat_template, "save_strategy": "no",
                "preview_samples": 0, "report_to": "none", "disable_tqdm": True, "dataloader_num_workers": 0,
            })  # fmt: skip
            needed = needed_by_stock(run, "full" if kind == "full" else "adapter")
            ours[family, kind] = (needed, *answers_of_ours(run, conversations))
            job = {"folder": run, "base": None if kind == "full" else base, "most": MOST}
            jobs.append({**job, "conversations": conversations, "settings": needed or {}})
    return {key: (*ours[key], said) for key, said in zip(ours, stock_answers(folder, jobs), strict=True)}


def answers_of_ours(run, conversations):
    predictor = LlavaPredictor.from_pretrained(str(run), dtype="float32", load_in_4bit=False)
    texts, taught = [], []
    for messages in conversations:
        predictor.set_image([item["path"] for item in messages[0]["content"] if item["type"] == "image"])
        for question in QUESTIONS:
            texts.append(predictor.ask(question, keep_history=True, max_new_tokens=MOST))
        encoded = encode_conversation(messages, predictor.processor)
        spans = [[]]
        for label in encoded["labels"].tolist():
            spans[-1].append(label) if label != -100 else spans.append([])
        taught += [span for span in spans if span]
    return predictor.processor, texts, taught


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_ends_its_answers_where_ours_does(family, kind, answered, conversations):
    needed, processor, ours, taught, stock = answered[family, kind]
    said = [turn["text"].removesuffix(answer_stop(processor)).strip() for turn in stock]
    assert said == ours
    assert [turn["ids"] for turn in stock] == taught  # the answer and its stop, and nothing after it
    if family in BY_TEXT:
        assert needed == {"stop_strings": ["###"]}
    elif kind == "full":
        assert needed is None
