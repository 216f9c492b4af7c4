"""The whole way on every form that is published: load, labels, a step, save; and stock transformers on what was saved."""

import json

import pytest
import torch
from published import ANSWERS, CONVERSATION, FORMS, QUESTION, build, every_form, template
from tiny_predictor import picture
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration as StockLlava

from modeling_llava.data import encode_conversation
from modeling_llava.training import LlavaTrainingArguments, train
from modeling_llava.training.setup import load_model_and_processor


def settings(form, folder, **changes):
    return {
        "model": str(build(form)), "output_dir": str(folder), "report_to": "none", "disable_tqdm": True,
        "preview_samples": 0, **(form.train or {}), **changes,
    }  # fmt: skip


def answers_taught(encoded, tokenizer):
    """The supervised stretches of a sample, decoded one by one."""
    stretches = [[]]
    for label in encoded["labels"].tolist():
        if label != -100:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return tuple(tokenizer.decode(stretch) for stretch in stretches if stretch)


@pytest.mark.parametrize(
    "name, size", [("llava-hf", 700), ("llava-hf-unmarked", 488), ("llava-hf-first", 533), ("interleave-qwen", 699)]
)
def test_templates_have_the_size_of_the_published_files(name, size):
    assert len(json.dumps({"chat_template": template(name)}, indent=2)) == size


@every_form
def test_labels_are_each_answer_and_its_stop_and_prompts_are_the_published_ones(form, tmp_path):
    _, processor = load_model_and_processor(LlavaTrainingArguments(**settings(form, tmp_path)))
    encoded = encode_conversation(CONVERSATION, processor)
    assert answers_taught(encoded, processor.tokenizer) == form.learnt
    assert (encoded["input_ids"] == processor.image_token_id).sum() == form.image_tokens
    prompt = processor.apply_chat_template(CONVERSATION[:1], add_generation_prompt=True)
    assert form.prompt in (None, prompt)
    asked = [{"role": "user", "content": [{"type": "image", "image": picture(0)}, *CONVERSATION[0]["content"][1:]]}]
    inputs = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)
    (ids,) = inputs["input_ids"]
    assert encoded["input_ids"][: len(ids)].tolist() == ids  # what is asked is what was learnt


@pytest.mark.parametrize("name", ["llava-hf", "llava-hf-2024", "interleave-qwen", "llama3", "gemma"])
def test_what_a_step_of_training_saves_is_answered_alike_by_stock_and_ours(name, tmp_path):
    form = FORMS[name]
    picture(1).save(tmp_path / "0.png")
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWERS[0]}]
    row = {"id": "a", "image": "0.png", "conversations": turns}
    (tmp_path / "data.json").write_text(json.dumps([row]))
    data = {"data": str(tmp_path / "data.json"), "image_folder": str(tmp_path), "max_length": 1024}
    steps = {"max_steps": 1, "learning_rate": 1e-3, "precision": "fp32", "save_strategy": "no"}
    train(settings(form, tmp_path / "run", **data, **steps))
    stock = StockLlava.from_pretrained(tmp_path / "run", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    (stop,) = processor.tokenizer.encode(form.stop, add_special_tokens=False)
    ends = stock.generation_config.eos_token_id
    assert stop in (ends if isinstance(ends, list) else [ends])
    asked = [{"role": "user", "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": QUESTION}]}]
    inputs = processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    greedy = {"max_new_tokens": 6, "do_sample": False}
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "run", dtype=torch.float32).eval()
    assert not isinstance(ours, StockLlava)
    assert torch.equal(ours.generate(**inputs, **greedy), stock.generate(**inputs, **greedy))
