import shutil
from pathlib import Path

import pytest

from modeling_llava.data_engine.contexts import read_contexts
from modeling_llava.data_engine.prompts import (
    BRIEF_QUESTIONS,
    DEFAULT_PROMPTS,
    DETAILED_QUESTIONS,
    draw,
    hash_prompts,
    load_prompts,
    load_questions,
)
from modeling_llava.data_engine.validate import ValidationSettings, validate


SHARED = Path(__file__).parents[3] / "shared"
BENCH = SHARED / "llava_bench_coco" / "caps_boxes_coco2014_val_80.jsonl"
PUBLISHED = SHARED / "prompts"

# Written by hand from the file of contexts: five captions, then the boxes by area.
CAPTIONS = """The old man literally has a toothbrush mustache.
An old man with a tooth brush head under his nose, mimicking Hitler
A man wearing a toothbrush for a moustache.
A man with the head of a toothbrush under his nose like a mustache
An elderly man wearing the head of a toothbrush as a moustache."""
BOXES = "person: [0.0, 0.03, 1.0, 0.99]\ntoothbrush: [0.345, 0.59, 0.594, 0.679]"

needs_shared = pytest.mark.skipif(not BENCH.exists(), reason="the published prompts and contexts are not at ../shared")


@pytest.fixture
def folder(tmp_path):
    """A copy of the package's prompts."""
    return Path(shutil.copytree(DEFAULT_PROMPTS, tmp_path / "p"))


@needs_shared
def test_whole_prompt_of_a_real_image_is_system_examples_as_turns_and_the_context():
    (context,) = (context for context in read_contexts(BENCH) if context.id == "000000052312")
    for published in (None, PUBLISHED):
        prompts = load_prompts(published)
        assert prompts["conversation"].query(context) == CAPTIONS
        assert prompts["detail"].query(context) == prompts["complex"].query(context) == f"{CAPTIONS}\n\n{BOXES}"
    messages = prompts["complex"].messages(context)
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 3, "user"]
    names = ["system_message", "000_caps", "000_conv", "001_caps", "001_conv", "002_caps", "002_conv"]
    for message, name in zip(messages, names):
        assert message["content"] == (PUBLISHED / "complex_reasoning" / f"{name}.txt").read_text().strip()
    assert messages[-1]["content"] == f"{CAPTIONS}\n\n{BOXES}"


@pytest.mark.parametrize("published", [None, pytest.param(PUBLISHED, marks=needs_shared)])
def test_examples_pass_the_validation_and_boxes_are_given_to_all_but_conversation(published):
    for kind, prompt in load_prompts(published).items():
        assert len(prompt.examples) >= 2 and prompt.with_boxes == (kind != "conversation")
        for _, answered in prompt.examples:
            assert validate(answered, kind, ValidationSettings())


def test_own_examples_are_written_in_the_form_that_contexts_have():
    for prompt in load_prompts().values():
        for given, _ in prompt.examples:
            captions, _, boxes = given.partition("\n\n")
            assert len(captions.splitlines()) == 5 and bool(boxes) == prompt.with_boxes
            for line in boxes.splitlines():
                x1, y1, x2, y2 = map(float, line[line.index("[") + 1 : -1].split(", "))
                assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1


def test_questions_are_drawn_by_seed_and_name():
    for path, least in ((BRIEF_QUESTIONS, 11), (DETAILED_QUESTIONS, 16)):
        questions = load_questions(path)
        assert len(set(questions)) == len(questions) >= least
        assert not any(question.startswith("#") for question in questions)
        assert draw(questions, 0, "a") == draw(questions, 0, "a")
        assert {draw(questions, seed, "a") for seed in range(200)} == set(questions)


def test_folder_of_prompts_replaces_texts_and_list_of_questions(folder):
    (folder / "detail_description" / "questions.txt").write_text("# mine\nTell all.\r\n\n")
    (folder / "detail_description" / "system_message.txt").write_text("Be brief.\r\n")
    prompt = load_prompts(folder)["detail"]
    assert (prompt.system, prompt.questions) == ("Be brief.", ("Tell all.",))


def test_hash_changes_with_every_text(folder):
    hashes = {hash_prompts(load_prompts(folder))}
    assert hashes == {hash_prompts(load_prompts())}
    paths = sorted(folder.rglob("*.txt"))
    for path in paths:
        path.write_text(path.read_text() + "more")
        hashes.add(hash_prompts(load_prompts(folder)))
    assert len(hashes) == 1 + len(paths)


def test_prompts_are_read_as_windows_and_macos_write_them(tmp_path):
    folder = tmp_path / "conversation"
    folder.mkdir()
    (folder / "system_message.txt").write_bytes(b"\xef\xbb\xbfBe brief.\r\n")
    (folder / "000_caps.txt").write_bytes(b"A cat.\r\nA mat.")
    (folder / "000_conv.txt").write_bytes(b"\xef\xbb\xbfQuestion:\r\nWhat is it?")
    for name in ("._000_caps.txt", "._000_conv.txt", ".DS_Store", "notes.md"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07\xff")
    prompt = load_prompts(tmp_path, ("conversation",))["conversation"]
    assert (prompt.system, prompt.examples) == ("Be brief.", (("A cat.\nA mat.", "Question:\nWhat is it?"),))
    (folder / "000_conv.txt").write_bytes("Überall".encode("latin-1"))
    with pytest.raises(ValueError, match="000_conv.txt is not UTF-8 text"):
        load_prompts(tmp_path, ("conversation",))


def test_missing_and_empty_files_are_named(tmp_path, folder):
    with pytest.raises(OSError, match="conversation/system_message.txt"):
        load_prompts(tmp_path)
    (folder / "conversation" / "000_caps.txt").write_text("\n")
    with pytest.raises(ValueError, match="000_caps.txt is empty"):
        load_prompts(folder)
    for name, other in (("000_caps", "000_conv"), ("001_conv", "001_caps")):
        (folder / "complex_reasoning" / f"{name}.txt").unlink()
        with pytest.raises(ValueError, match=f"{other}.txt has no {name}.txt next to it"):
            load_prompts(folder, ("complex",))
        shutil.copytree(DEFAULT_PROMPTS, folder, dirs_exist_ok=True)


@pytest.mark.parametrize(
    "text, message", [("# none\n", "has no question"), ("What is in <image>?\n", "'What is in <image>\\?'")]
)
def test_lists_without_a_question_or_with_an_image_in_it_are_named(tmp_path, text, message):
    (tmp_path / "questions.txt").write_text(text)
    with pytest.raises(ValueError, match=f"questions.txt.*{message}"):
        load_questions(tmp_path / "questions.txt")
