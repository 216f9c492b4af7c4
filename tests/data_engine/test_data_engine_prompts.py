import shutil
from pathlib import Path

import pytest

from modeling_llava.data_engine.contexts import Context, read_contexts
from modeling_llava.data_engine.prompts import (
    BRIEF_QUESTIONS,
    DEFAULT_PROMPTS,
    DETAILED_QUESTIONS,
    FOLDERS,
    hash_prompts,
    load_prompts,
    load_questions,
)
from modeling_llava.data_engine.validate import ValidationSettings, validate


SHARED = Path(__file__).parents[3] / "shared"
BENCH = SHARED / "llava_bench_coco" / "caps_boxes_coco2014_val_80.jsonl"
PUBLISHED = SHARED / "prompts"

# Written by hand from the file of contexts: five captions, then the boxes by area.
EXPECTED = {
    ("000000296284", "detail"): """A donut shop is full of different flavors of donuts.
Fruit flavored donuts lined up in a glass fronted cabinet
A rack with some doughnuts in a glass case.
A display case in a bakery filled with donuts.
An assortment of doughnuts are arranged in a display case.

donut: [0.471, 0.587, 0.639, 0.706]
donut: [0.283, 0.586, 0.429, 0.708]
donut: [0.035, 0.22, 0.196, 0.328]
donut: [0.054, 0.608, 0.221, 0.711]
donut: [0.37, 0.584, 0.504, 0.709]
donut: [0.544, 0.213, 0.679, 0.316]
donut: [0.369, 0.22, 0.492, 0.317]
donut: [0.466, 0.226, 0.585, 0.32]
donut: [0.0, 0.609, 0.097, 0.722]
donut: [0.28, 0.232, 0.393, 0.322]""",
    ("000000052312", "complex"): """The old man literally has a toothbrush mustache.
An old man with a tooth brush head under his nose, mimicking Hitler
A man wearing a toothbrush for a moustache.
A man with the head of a toothbrush under his nose like a mustache
An elderly man wearing the head of a toothbrush as a moustache.

person: [0.0, 0.03, 1.0, 0.99]
toothbrush: [0.345, 0.59, 0.594, 0.679]""",
}


def contexts():
    return {context.id: context for context in read_contexts(BENCH)}


needs_shared = pytest.mark.skipif(
    not BENCH.exists(), reason="the published prompts and contexts are not beside the project"
)


@needs_shared
@pytest.mark.parametrize("name, kind", EXPECTED)
def test_what_the_model_is_told_of_a_real_image_is_as_written_by_hand(name, kind):
    for folder in (None, PUBLISHED):
        prompts = load_prompts(folder)
        assert prompts[kind].query(contexts()[name]) == EXPECTED[name, kind]
        assert prompts["conversation"].query(contexts()[name]) == EXPECTED[name, kind].partition("\n\n")[0]


@needs_shared
def test_whole_prompt_of_a_real_image_is_system_examples_as_turns_and_the_context():
    """The messages of one request with the published prompts, read from their files as a person would."""
    context = contexts()["000000151358"]
    folder = PUBLISHED / "complex_reasoning"
    messages = load_prompts(PUBLISHED)["complex"].messages(context)
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 3, "user"]
    names = ["system_message", "000_caps", "000_conv", "001_caps", "001_conv", "002_caps", "002_conv"]
    for message, name in zip(messages, names):
        assert message["content"] == (folder / f"{name}.txt").read_text().strip()
    assert messages[-1]["content"] == f"{context.caption_text}\n\n{context.box_text}"


@pytest.mark.parametrize("folder", [None, pytest.param(PUBLISHED, marks=needs_shared)])
def test_conversation_is_told_captions_only_and_the_others_boxes_too(folder):
    prompts = load_prompts(folder)
    assert {kind: prompt.with_boxes for kind, prompt in prompts.items()} == {
        "conversation": False,
        "detail": True,
        "complex": True,
    }


@pytest.mark.parametrize("folder", [None, pytest.param(PUBLISHED, marks=needs_shared)])
def test_examples_pass_the_validation_that_replies_must_pass(folder):
    for kind, prompt in load_prompts(folder).items():
        assert len(prompt.examples) >= 2
        for _, answered in prompt.examples:
            assert validate(answered, kind, ValidationSettings())


def test_own_examples_are_written_in_the_form_that_contexts_have():
    for prompt in load_prompts().values():
        for given, _ in prompt.examples:
            captions, _, boxes = given.partition("\n\n")
            assert len(captions.splitlines()) == 5
            areas = []
            for line in boxes.splitlines():
                x1, y1, x2, y2 = map(float, line[line.index("[") + 1 : -1].split(", "))
                assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
                areas.append((x2 - x1) * (y2 - y1))
            assert bool(boxes) == prompt.with_boxes


def test_description_questions_are_drawn_by_seed_and_image():
    prompt = load_prompts()["detail"]
    context = Context("a", "a.jpg", ("x",))
    assert prompt.question(context, 0) == prompt.question(context, 0) in prompt.questions
    assert len({prompt.question(context, seed) for seed in range(200)}) == len(prompt.questions)


def test_question_lists_hold_different_questions():
    for path, least in ((BRIEF_QUESTIONS, 11), (DETAILED_QUESTIONS, 16)):
        questions = load_questions(path)
        assert len(set(questions)) == len(questions) >= least
        assert not any(question.startswith("#") for question in questions)


def test_folder_of_prompts_replaces_texts_and_list_of_questions(tmp_path):
    shutil.copytree(DEFAULT_PROMPTS, tmp_path / "p")
    (tmp_path / "p" / "detail_description" / "questions.txt").write_text("# mine\nTell all.\r\n\n")
    (tmp_path / "p" / "detail_description" / "system_message.txt").write_text("Be brief.\r\n")
    prompt = load_prompts(tmp_path / "p")["detail"]
    assert (prompt.system, prompt.questions) == ("Be brief.", ("Tell all.",))


def test_hash_changes_with_every_text(tmp_path):
    shutil.copytree(DEFAULT_PROMPTS, tmp_path / "p")
    hashes = {hash_prompts(load_prompts(tmp_path / "p"))}
    assert hashes == {hash_prompts(load_prompts())}
    for path in sorted((tmp_path / "p").rglob("*.txt")):
        path.write_text(path.read_text() + "more")
        hashes.add(hash_prompts(load_prompts(tmp_path / "p")))
    assert len(hashes) == 1 + len(list((tmp_path / "p").rglob("*.txt")))


@pytest.mark.parametrize("name", ["000_caps.txt", "001_conv.txt"])
def test_an_example_without_its_counterpart_is_named(tmp_path, name):
    shutil.copytree(DEFAULT_PROMPTS, tmp_path / "p")
    (tmp_path / "p" / "complex_reasoning" / name).unlink()
    with pytest.raises(ValueError, match=f"no {name} next to it"):
        load_prompts(tmp_path / "p")


def test_prompts_are_read_as_windows_and_macos_write_them(tmp_path):
    folder = tmp_path / "prompts" / "conversation"
    folder.mkdir(parents=True)
    (folder / "system_message.txt").write_bytes(b"\xef\xbb\xbfBe brief.\r\n")
    (folder / "000_caps.txt").write_bytes(b"A cat.\r\nA mat.")
    (folder / "000_conv.txt").write_bytes(b"\xef\xbb\xbfQuestion:\r\nWhat is it?")
    for name in ("._000_caps.txt", "._000_conv.txt", ".DS_Store", "notes.md"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07\xff")
    prompt = load_prompts(tmp_path / "prompts", ("conversation",))["conversation"]
    assert (prompt.system, prompt.examples) == ("Be brief.", (("A cat.\nA mat.", "Question:\nWhat is it?"),))
    (folder / "000_conv.txt").write_bytes("Überall".encode("latin-1"))
    with pytest.raises(ValueError, match="000_conv.txt is not UTF-8 text"):
        load_prompts(tmp_path / "prompts", ("conversation",))


def test_a_question_that_marks_an_image_is_named(tmp_path):
    (tmp_path / "questions.txt").write_text("What is it?\nWhat is in <image>?\n")
    with pytest.raises(ValueError, match="'What is in <image>\\?'"):
        load_questions(tmp_path / "questions.txt")


def test_missing_folders_and_empty_files_are_named(tmp_path):
    with pytest.raises(OSError, match="conversation/system_message.txt"):
        load_prompts(tmp_path)
    shutil.copytree(DEFAULT_PROMPTS, tmp_path / "p")
    (tmp_path / "p" / FOLDERS["conversation"] / "000_caps.txt").write_text("\n")
    with pytest.raises(ValueError, match="000_caps.txt is empty"):
        load_prompts(tmp_path / "p")
    (tmp_path / "q.txt").write_text("# none\n")
    with pytest.raises(ValueError, match="has no question"):
        load_questions(tmp_path / "q.txt")
