"""POPE: yes and no by a stated rule, scores by hand."""

import json

import pytest
from tiny_predictor import picture
from tiny_science import llava_eval

from modeling_llava.evaluation.pope import parse_yes_no, read_questions, score
from modeling_llava.evaluation.results import read_results


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes. But no cat.", "yes"),
        ("No", "no"),
        ("There isn\u2019t one", "no"),
        ("I do not see one", "no"),
        ("Note the dog", None),
        ("maybe\nyes", None),
        ("'Yes'.", "yes"),
        ("The answer is 'no'", "no"),
    ],
)
def test_yes_and_no_are_parsed_by_the_stated_rule(text, said):
    assert parse_yes_no(text) == said


def questions_of(labels, category="random"):
    return [
        {"id": f"{category}/{n}", "image": "a.png", "text": f"Is there a {n}?", "label": label, "category": category}
        for n, label in enumerate(labels)
    ]


def test_scores_by_hand_by_category_and_of_extremes():
    """6 questions: 2 true yes, 1 missed, 1 false yes, 1 true no, 1 unparsed where no is right."""
    questions = questions_of(["yes", "yes", "yes", "no", "no", "no"])
    texts = ["Yes", "yes it is", "No", "Yes", "no", "A cat"]
    scored = score(questions, {q["id"]: text for q, text in zip(questions, texts)})
    values = [scored.scores[name]["value"] for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")]
    assert values == pytest.approx([50, 200 / 3, 200 / 3, 200 / 3, 50]) and scored.counts == {"unparsed": 1}
    questions = questions_of(["yes", "no"]) + questions_of(["yes", "no"], "adversarial")
    answers = {q["id"]: "no" if q["category"] == "random" else "yes" for q in questions}
    scores = score(questions, answers).scores
    assert scores["precision/random"]["value"] is None  # nothing was said yes
    assert scores["recall/random"]["value"] == scores["f1/random"]["value"] == scores["yes_ratio/random"]["value"] == 0
    assert scores["recall/adversarial"]["value"] == 100 and scores["precision/adversarial"]["value"] == 50
    assert scores["f1/adversarial"]["value"] == pytest.approx(200 / 3)
    assert scores["accuracy"]["value"] == 50 and scores["accuracy"]["count"] == 4


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_are_read_and_their_names_give_the_category(tmp_path):
    row = {"question_id": 1, "image": "a.png", "text": "Is there a cat?", "label": "Yes"}
    files = [write(tmp_path / f"coco_pope_{name}.json", [row]) for name in ("random", "popular", "adversarial")]
    questions = read_questions(files)
    assert [question["id"] for question in questions] == ["random/1", "popular/1", "adversarial/1"]
    assert questions[0]["label"] == "yes"
    assert read_questions([write(tmp_path / "mine.jsonl", [{**row, "category": "own"}])])[0]["category"] == "own"
    for change, message in (
        ({"label": "maybe"}, "label 'maybe'"),
        ({"text": None}, "has text = None, which is empty or not text"),
        ({}, "category"),
    ):
        with pytest.raises(ValueError, match=f"mine.jsonl, line 1 .*{message}"):
            read_questions([write(tmp_path / "mine.jsonl", [{**row, **change}])])


def test_command(tmp_path, model_folder):
    picture(1).save(tmp_path / "a.png")
    rows = [
        {"question_id": n, "image": "a.png", "text": f"Is there a {n}?", "label": ["yes", "no"][n % 2]}
        for n in range(4)
    ]
    files = [write(tmp_path / f"pope_{name}.json", rows) for name in ("random", "popular")]
    options = ["--questions", *files, "--images", tmp_path, "--max-new-tokens", "4"]
    assert llava_eval("pope", model_folder, tmp_path / "out", *options) == 0
    results, rows = read_results(tmp_path / "out")
    assert results["complete"] and len(rows) == 8 and results["scores"]["accuracy/popular"]["count"] == 4
    assert results["settings"]["instruction"].startswith("Answer the question using a single word")
