"""The tiny vision encoder and the tiny language model: what they are taught, and that it is what LLaVA reads."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

from modeling_llava.constants import IGNORE_INDEX
from modeling_llava.tiny_world.language import _dialogue, train_language_model, train_tokenizer, write_dialogue
from modeling_llava.tiny_world.scenes import CATEGORIES, COLOURS, HELD_OUT, PLACES, Scene, Thing
from modeling_llava.tiny_world.vision import (
    FEATURE_LAYER,
    HEADS,
    PatchTeacher,
    patch_labels,
    tiny_vision_config,
    train_vision_tower,
    warmup_and_cosine,
)
from modeling_llava.tiny_world.world import draw_scenes, scene_texts, write_split


@pytest.fixture(scope="module")
def tokenizer():
    rng, scenes = random.Random(0), scene_texts(0, "test")
    dialogues = [write_dialogue(next(scenes), rng) for _ in range(200)]
    return train_tokenizer([message["content"] for messages in dialogues for message in messages])


def labels_of_a_boat(folder, side):
    """Labels of an image with a boat of `side` in its top left corner, by head, `[6, 6]`."""
    thing = Thing("boat", "red", "large", "top", "left", (side / 2, side / 2), side)
    write_split(folder, [Scene("snow", (thing,), 0)])
    paths, labels, place = patch_labels(folder)
    assert place.tolist() == [list(PLACES).index("snow")] and len(paths) == 1
    return {head: found.view(6, 6) for head, found in labels.items()}


def test_patches_learn_what_the_boxes_say(tmp_path):
    # Patches of 1/6, centres at 1/12, 3/12, …: a box of 1/3 covers two by two, whose centres lie at a quarter and three
    # quarters of its side, within its middle (0.15 to 0.85): all four have labels.
    covered = torch.zeros(6, 6, dtype=torch.bool)
    covered[:2, :2] = True
    labels = labels_of_a_boat(tmp_path / "a", 1 / 3)
    for head, answer in (("category", "boat"), ("colour", "red"), ("size", "large"), ("position", "top left")):
        assert torch.equal(labels[head] != 0, covered)
        assert set(labels[head][covered].tolist()) == {HEADS[head].index(answer)}
    # Of a box of four fifths the outermost centres, at 0.104 and 0.94 of its side, are in it and without a label.
    grid = labels_of_a_boat(tmp_path / "b", 0.8)["category"]
    assert (grid[0, :5] == IGNORE_INDEX).all() and (grid[:5, 4] == IGNORE_INDEX).all()
    assert (grid[1:4, 1:4] == HEADS["category"].index("boat")).all() and (grid[5] == 0).all()


def test_the_teacher_reads_the_hidden_state_that_llava_reads():
    teacher = PatchTeacher(tiny_vision_config()).eval()
    pixels = torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        state = teacher.tower(pixels, output_hidden_states=True).hidden_states[FEATURE_LAYER]
        found, place = teacher(pixels)
    assert set(found) == set(HEADS)
    for head, logits in found.items():
        torch.testing.assert_close(logits, teacher.heads[head](state[:, 1:]))
    torch.testing.assert_close(place, teacher.place(state[:, 0]))


def test_the_tower_learns_and_is_saved_with_its_image_processor(tmp_path):
    write_split(tmp_path / "train", draw_scenes(16, 0, "train"))
    losses, options = [], {"steps": 25, "batch_size": 16}
    out = tmp_path / "tower"
    facts = train_vision_tower(tmp_path / "train", out, log=lambda step, loss: losses.append(loss), **options)
    assert losses[-1] < 0.7 * losses[0] and len(losses) == 25
    assert facts["patch_accuracy"]["colour"] > 1 / len(COLOURS)
    assert CLIPVisionModel.from_pretrained(out).config.image_size == 48
    assert (out / "preprocessor_config.json").is_file()


def test_the_tokenizer_writes_the_worlds_words_as_single_tokens(tokenizer):
    for word in (*COLOURS, *CATEGORIES, "left", "largest", "picture"):
        assert len(tokenizer(" " + word, add_special_tokens=False)["input_ids"]) == 1, word
    assert len(tokenizer) <= 512 and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_the_tokenizer_gives_back_any_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not any(token in text for token in tokenizer.all_special_tokens):
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_answers_with_their_eos_alone_are_supervised_and_none_is_of_a_held_out_pair(tokenizer):
    rng, scenes = random.Random(1), scene_texts(1, "language")
    for number in range(500):
        messages = write_dialogue(next(scenes), rng)
        text = " ".join(message["content"] for message in messages)
        assert not any(f"{colour} {category}" in text for colour, category in HELD_OUT)
        if number < 20:
            ids, labels = _dialogue(tokenizer, messages)
            supervised = tokenizer.decode([label for label in labels.tolist() if label != IGNORE_INDEX])
            answers = [message["content"] for message in messages if message["role"] == "assistant"]
            assert supervised == "".join(f"{answer}</s>" for answer in answers)
            assert ids[0] == tokenizer.bos_token_id and len(ids) == len(labels)


def test_the_language_model_learns_and_is_saved_with_its_tokenizer(tmp_path):
    losses = []
    facts = train_language_model(tmp_path, steps=12, batch_size=8, log=lambda step, loss: losses.append(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert facts["tokens"] > 12 * 8 * 10
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_learning_rate_rises_and_falls_to_zero():
    fraction = warmup_and_cosine(100)
    assert [fraction(step) for step in (0, 8, 54, 100)] == pytest.approx([1 / 8, 1.0, 0.5, 0.0], abs=1e-9)
