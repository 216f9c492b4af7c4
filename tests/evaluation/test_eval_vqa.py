"""VQA's soft accuracy and exact match, by hand."""

import json
import re

import pytest
from tiny_predictor import picture
from tiny_science import llava_eval

from modeling_llava.evaluation.results import read_results
from modeling_llava.evaluation.vqa import (
    INSTRUCTION,
    instruction_for,
    make_benchmark,
    normalise,
    read_questions,
    score,
    soft_accuracy,
)


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("Yes.", "yes"),
        ("The  Cat", "cat"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("It\u2019s", "it's"),
        ("were", "were"),
        ("t-shirt", "t shirt"),
        ("A", ""),
        (" \nred/blue\t", "red blue"),
        # a mark next to a space anywhere, or a number like 1,000: dropped everywhere
        ("t-shirt - blue", "tshirt blue"),
        ("1,000-2", "10002"),
        ("hed've im", "he'd've im"),
        ("a.m. .5", "am .5"),
    ],
)
def test_answers_are_compared_in_one_form(answer, form):
    assert normalise(answer) == form


def test_soft_accuracy_by_hand():
    people = ["red"] * 3 + ["blue"] * 6 + ["Green."]
    # red: each of the three who said it sees two others (2/3), each of the seven others sees three (1)
    assert soft_accuracy("Red", people) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert soft_accuracy("blue", people) == 1.0
    # green: the one who said it sees none, each of the nine others sees one (1/3)
    assert soft_accuracy("the green", people) == pytest.approx(9 / 3 / 10)
    assert soft_accuracy("black", people) == 0.0
    assert soft_accuracy("cat", ["cat"]) == 1.0 and soft_accuracy("dog", ["cat"]) == 0.0


def test_scores_by_category():
    questions = [
        {"id": "1", "image": "a", "text": "?", "answers": ["yes"] * 10, "category": "yes/no"},
        {"id": "2", "image": "a", "text": "?", "answers": ["3"] * 2 + ["4"] * 8, "category": "number"},
        {"id": "3", "image": "a", "text": "?", "answers": ["3"] * 10, "category": "number"},
    ]
    scored = score(questions, {"1": "no", "2": "three", "3": "3."})
    values = {name: score["value"] for name, score in scored.scores.items()}
    # 2: two said it (1/3 for themselves), eight others see two (2/3)
    assert values["accuracy/number"] == pytest.approx(100 * ((2 / 3 + 8 * 2 / 3) / 10 + 1) / 2)
    assert values["accuracy/yes/no"] == 0 and values["exact_match/number"] == 100
    assert values["exact_match"] == pytest.approx(200 / 3)


def test_official_files(tmp_path):
    questions = {"questions": [{"question_id": 7, "image_id": 42, "question": "What?"}]}
    annotation = {"question_id": 7, "answers": [{"answer": "cat"}] * 10, "answer_type": "other"}
    (tmp_path / "q.json").write_text(json.dumps(questions))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [annotation]}))
    (read,) = read_questions(tmp_path / "q.json", tmp_path / "a.json")
    image = "COCO_val2014_000000000042.jpg"
    assert read == {"id": "7", "image": image, "text": "What?", "answers": ["cat"] * 10, "category": "other"}
    (tmp_path / "q.json").write_text(json.dumps(questions).replace("42", '"42"'))  # as text
    assert read_questions(tmp_path / "q.json", tmp_path / "a.json") == [read]
    with pytest.raises(ValueError, match="has the image_id '42', which does not fit --image-name '{id}.jpg'"):
        read_questions(tmp_path / "q.json", tmp_path / "a.json", "{id}.jpg")
    for wrong, message in (
        ({"annotations": []}, "question 1 has the question_id 7, which .*a.json does not have"),
        ({"annotations": None}, "a.json is not an official file"),
        ({str(n): {"question": "?"} for n in range(1000)}, "official file of VQAv2, GQA.*JSONL"),
        ({"annotations": [{**annotation, "answers": [{"a": 1}]}]}, "annotation 1 has no 'answers'"),
        ({"annotations": [{**annotation, "question_id": [7]}]}, r"annotation 1 has the question_id \[7\]"),
    ):
        (tmp_path / "a.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            read_questions(tmp_path / "q.json", tmp_path / "a.json")


@pytest.mark.parametrize(
    "content, expected",
    [
        (  # GQA
            {"20": {"question": "Is it red?", "imageId": "n7", "answer": "no", "types": {"detailed": "x"}}},
            {"id": "20", "image": "n7.jpg", "text": "Is it red?", "answers": ["no"], "category": None},
        ),
        (  # TextVQA
            {"data": [{"question": "Who?", "image_id": "0f", "question_id": 3, "answers": ["nokia"] * 10}]},
            {"id": "3", "image": "0f.jpg", "text": "Who?", "answers": ["nokia"] * 10, "category": None},
        ),
        (  # VizWiz
            [{"image": "v.jpg", "question": "What?", "answers": [{"answer": "tea"}] * 10, "answer_type": "other"}],
            {"id": "v.jpg", "image": "v.jpg", "text": "What?", "answers": ["tea"] * 10, "category": "other"},
        ),
    ],
)
def test_official_files_of_other_data_sets_are_read(tmp_path, content, expected):
    for indent in (None, 2):
        (tmp_path / "q.json").write_text(json.dumps(content, indent=indent))
        assert read_questions(tmp_path / "q.json") == [expected]
    rows = [{"question_id": expected["id"], "image": "own.jpg", "text": "Own?"}] * 2  # as LLaVA's own files
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = read_questions(tmp_path / "q.jsonl", tmp_path / "q.json")
    assert read == [{**expected, "image": "own.jpg", "text": "Own?"}] * 2


def test_llava_questions_of_textvqa_find_their_answers_by_image_and_question(tmp_path):
    """In eval.zip's `llava_textvqa_val_v051_ocr.jsonl` the image's id is the question's, twice where it has two questions."""
    official = [
        {"question": question, "image_id": "0f", "question_id": number, "answers": [answer] * 10}
        for number, question, answer in ((34602, "what is it?", "phone"), (34603, "which brand?", "nokia"))
    ]
    (tmp_path / "val.json").write_text(json.dumps({"data": official}))
    text = f"Which brand?\nReference OCR token: NOKIA, 7\n{INSTRUCTION}"
    rows = [{"question_id": "0f", "image": "0f.jpg", "text": each} for each in (text, f"What is it?\n{INSTRUCTION}")]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = read_questions(tmp_path / "q.jsonl", tmp_path / "val.json")
    assert [(row["id"], row["answers"][0]) for row in read] == [("34603", "nokia"), ("34602", "phone")]
    assert make_benchmark(read, "").samples[0]["messages"][0]["content"][1]["text"] == text
    (tmp_path / "q.jsonl").write_text(json.dumps({**rows[0], "text": "Which colour?"}))
    with pytest.raises(ValueError, match="line 1 has the question_id 0f, which .*val.json does not have"):
        read_questions(tmp_path / "q.jsonl", tmp_path / "val.json")


def test_questions_that_may_be_unanswerable_are_asked_as_llava_asks_them():
    """The text of eval.zip's `vizwiz/llava_test.jsonl`."""
    row = {"id": "1", "image": "v.jpg", "text": "What is this?", "answers": ["tea"] * 10, "category": "other"}
    vizwiz = [row, {**row, "id": "2", "answers": ["unanswerable"] * 10, "category": "unanswerable"}]
    asked = make_benchmark(vizwiz, "", instruction=instruction_for(vizwiz)).samples[0]["messages"][0]["content"][1]
    assert asked["text"] == (
        "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase."
    )
    assert instruction_for([row]) == INSTRUCTION


@pytest.mark.parametrize("after", ["", f" {INSTRUCTION.lower().rstrip('.')} ", f"\n\n{INSTRUCTION}\n"])
def test_a_question_has_the_instruction_once(after):
    question = {"id": "1", "image": "a", "text": f"What?{after}", "answers": ["x"], "category": None}
    (sample,) = make_benchmark([question], "").samples
    assert sample["messages"][0]["content"][1]["text"] == f"What?\n{INSTRUCTION}"


def test_files_of_windows_editors_are_read(tmp_path):
    """With a byte order mark and CR LF."""
    row = {"question_id": 1, "image": "a.png", "question": "What?", "answer": "cat"}
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r\n\r\n")
    assert read_questions(tmp_path / "q.jsonl")[0]["answers"] == ["cat"]
    for wrong in ('{"question": "café"}'.encode("latin-1"), b"3"):
        (tmp_path / "q.jsonl").write_bytes(wrong)
        with pytest.raises(ValueError, match="q.jsonl, line 1"):
            read_questions(tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": ["a.png", "b.png"]}, "image = ['a.png', 'b.png'], which is empty or not text"),
        ({"answers": []}, "no 'answers'"),
        ({"question_id": None}, "the question_id None, neither number nor text"),
        ({"category": 3}, "category = 3, which is empty or not text"),
    ],
)
def test_wrong_rows_are_named(tmp_path, change, message):
    row = {"question_id": 1, "image": "a.png", "question": "What?", "answers": ["cat"], **change}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=re.escape(f"q.jsonl, line 1 has {message}")):
        read_questions(tmp_path / "q.jsonl")


def test_command(tmp_path, model_folder, capsys):
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.png").symlink_to(tmp_path / "a.png")  # leads out of the image folder
    rows = [{"question_id": n, "image": "a.png", "question": f"Is it {n}?", "answer": "cat"} for n in range(3)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(*more):
        options = ["--questions", tmp_path / "q.jsonl", "--images", tmp_path / "links", "--max-new-tokens", "4"]
        return llava_eval("vqa", model_folder, tmp_path / "out", *options, "--instruction", "", *more)

    assert run() == 2
    assert "symlinks" in capsys.readouterr().err
    assert run("--follow-symlinks") == 0
    results, rows = read_results(tmp_path / "out")
    assert results["settings"]["instruction"] is None and len(rows) == 3 and results["complete"]
    for wrong in ("--max-new-tokens 0", "--batch-size 0", "--limit 0", "--temperature 0", "--top-p 0.5"):
        assert run("--follow-symlinks", *wrong.split()) == 2
