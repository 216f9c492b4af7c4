"""The scripted responder, told of images in captions and boxes only."""

import asyncio
import random

import pytest

from modeling_llava.data_engine.contexts import Box, Context
from modeling_llava.data_engine.prompts import load_prompts
from modeling_llava.data_engine.replies import parse_turns
from modeling_llava.data_engine.validate import ValidationSettings, validate
from modeling_llava.endpoint.chat import RequestFault
from modeling_llava.tiny_world.responder import (
    KNOWLEDGE,
    PROMPTS,
    ScriptedResponder,
    list_questions,
    list_reasoning,
    read_context,
    write_description,
)
from modeling_llava.tiny_world.scenes import CATEGORIES, HELD_OUT, write_captions
from modeling_llava.tiny_world.world import draw_scenes


SETTINGS = ValidationSettings(answer_words={"conversation": (1, 60), "detail": (8, 90), "complex": (6, 60)})


def context_of(scene, name="a"):
    boxes = []
    for thing in sorted(scene.things, key=lambda thing: -thing.side):
        (x, y), half = thing.centre, thing.side / 2
        boxes.append(Box(thing.category, (x - half, y - half, x + half, y + half)))
    return Context(name, f"{name}.jpg", tuple(write_captions(scene)), tuple(boxes))


def text_of(context):
    return f"{context.caption_text}\n\n{context.box_text}"


def test_captions_and_boxes_tell_all_that_the_scene_is():
    for scene in draw_scenes(400, 0, "train"):
        read, things = read_context(text_of(context_of(scene))), sorted(scene.things, key=lambda thing: -thing.side)
        assert read.place == scene.place
        for found, thing in zip(read.things, things, strict=True):
            assert (found.name, found.size, found.row) == (thing.name, thing.size, thing.row)
            assert found.column == thing.column and found.centre == pytest.approx(thing.centre, abs=1e-3)


def test_answers_are_true_of_the_scene():
    for scene in draw_scenes(100, 1, "train"):
        by_category = {thing.category: thing for thing in scene.things}
        by_colour = {thing.colour: thing for thing in scene.things}
        largest = max(scene.things, key=lambda thing: thing.side)
        kinds = set()
        for question in list_questions(read_context(text_of(context_of(scene))), random.Random(0)):
            kinds.add(question.kind)
            words, answer = question.text.rstrip("?").split(), question.answer
            if question.kind == "presence":
                assert answer.startswith("Yes") == (words[-1] in by_category)
            elif question.kind == "count":
                assert {2: "two things", 3: "three things"}[len(scene.things)] in answer
            elif question.kind == "largest":
                assert largest.name in answer
            elif question.kind == "object":
                assert answer.split()[-1] == by_colour[words[-2]].category + "."
            elif question.kind != "place":
                thing = by_category[words[2] if question.kind == "size" else words[-1]]
                told = {"colour": thing.colour, "size": thing.size, "position": f"at the {thing.row} {thing.column}"}
                assert answer == f"The {thing.category} is {told[question.kind]}."
        assert {"place", "presence", "colour", "object", "size", "position"} <= kinds
        assert ("count" in kinds) == (len(scene.things) > 1)


def test_every_category_has_knowledge_and_its_question_does_not_name_it():
    assert set(KNOWLEDGE) == set(CATEGORIES)
    for category, (question, answer) in KNOWLEDGE.items():
        assert category not in question.lower() and "{thing}" in answer


def test_replies_pass_the_data_engines_rules():
    prompts, responder = load_prompts(PROMPTS), ScriptedResponder()
    for number, scene in enumerate(draw_scenes(60, 2, "train")):
        context = context_of(scene, str(number))
        for kind, prompt in prompts.items():
            reply = asyncio.run(responder.complete(prompt.messages(context), max_tokens=512, temperature=0.7))
            turns = validate(reply.text, kind, SETTINGS, reply.finish_reason)
            if kind == "conversation":
                possible = list_questions(read_context(text_of(context)), random.Random(0))
                asked = {question for question, _ in turns}
                assert len(turns) == len(asked) == min(6, len({question.text for question in possible}))
            if kind == "detail":
                assert all(thing.name in turns[0][1] for thing in scene.things)


def test_prompts_carry_boxes_and_their_examples_are_true():
    for kind, prompt in load_prompts(PROMPTS).items():
        assert prompt.with_boxes
        (given, answered), scene = prompt.examples[0], read_context(prompt.examples[0][0])
        if kind == "detail":
            assert answered == write_description(scene)
        else:
            possible = list_questions(scene, random.Random(0)) if kind == "conversation" else list_reasoning(scene)
            true = {(question.text, question.answer) for question in possible}
            assert set(parse_turns(answered)) <= true
        assert not any(f"{colour} {category}" in given + answered for colour, category in HELD_OUT)


def test_the_responder_repeats_itself():
    responder = ScriptedResponder(seed=3)
    messages = load_prompts(PROMPTS)["conversation"].messages(context_of(draw_scenes(1, 3, "train")[0]))
    assert responder.answer(messages) == ScriptedResponder(seed=3).answer(messages)
    told = [*messages, {"role": "assistant", "content": "?"}, {"role": "user", "content": "Please write it again."}]
    assert responder.answer(told) == responder.answer(messages)


@pytest.mark.parametrize(
    "system, text",
    [
        ("Be nice.", "A red ball in a meadow.\n\nball: [0.1, 0.1, 0.2, 0.2]"),
        (None, "Hello."),
        (None, "A ball in a meadow.\n\nball: [0.1, 0.1, 0.2, 0.2]"),
        (None, "A red ball.\n\nball: [0.1, 0.1, 0.2, 0.2]"),
    ],
)
def test_the_responder_refuses_what_it_does_not_understand(system, text):
    system = system or load_prompts(PROMPTS)["detail"].system
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    with pytest.raises(RequestFault):
        asyncio.run(ScriptedResponder().complete(messages))
