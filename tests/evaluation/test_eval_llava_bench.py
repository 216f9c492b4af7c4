"""LLaVA-Bench: its files, the whole command against a local endpoint, and the page."""

import json
import re
from collections import Counter

import pytest
from fault_server import FaultServer
from tiny_predictor import picture
from tiny_science import llava_eval

from modeling_llava.endpoint import RequestFault
from modeling_llava.evaluation.judge import read_rules
from modeling_llava.evaluation.llava_bench import JudgeSettings, ask_references, judge_answers, read_questions, score
from modeling_llava.evaluation.results import read_results


CATEGORIES = ("conv", "detail", "complex")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def bench(tmp_path):
    """Two images with three questions each, in the COCO form."""
    (tmp_path / "images").mkdir()
    for number in range(2):
        picture(number).save(tmp_path / f"images/{number}.png")
    rows = [{"question_id": n, "image": f"{n // 3}.png", "text": f"Question {n}?"} for n in range(6)]
    questions = [{**row, "category": CATEGORIES[n % 3]} for n, row in enumerate(rows)]
    boxes = [{"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}]
    contexts = [{"image": f"{n}.png", "captions": [f"Picture {n}.", "A cat."], "instances": boxes} for n in range(2)]
    write_lines(tmp_path / "questions.jsonl", questions)
    write_lines(tmp_path / "contexts.jsonl", contexts)
    write_lines(tmp_path / "references.jsonl", [{"question_id": n, "text": f"Reference {n}."} for n in range(6)])
    return tmp_path


def files_of(bench, references="references.jsonl"):
    return bench / "questions.jsonl", bench / "contexts.jsonl", references and bench / references


def test_questions_contexts_and_references_are_joined(bench):
    questions = read_questions(*files_of(bench))
    assert len(questions) == 6 and questions[4].category == "detail" and questions[4].reference == "Reference 4."
    assert questions[3].context == "Picture 1.\nA cat.\n\ncat: [0.1, 0.2, 0.3, 0.4]" and questions[3].has_boxes


def test_published_files_are_read(shared):
    folder = shared / "llava_bench_coco"
    questions = read_questions(
        folder / "qa90_questions.jsonl", folder / "caps_boxes_coco2014_val_80.jsonl", folder / "qa90_gpt4_answer.jsonl"
    )
    assert len(questions) == 90 and len({question.image for question in questions}) == 30
    assert Counter(question.category for question in questions) == dict.fromkeys(CATEGORIES, 30)
    assert all(question.has_boxes and question.reference for question in questions)


def test_images_are_found_as_coco_names_them(bench):
    (bench / "images/1.png").rename(bench / "images/COCO_val2014_1.png")
    images = [question.image for question in read_questions(*files_of(bench), bench / "images")]
    assert set(images) == {"0.png", "COCO_val2014_1.png"}


def test_in_the_wild_contexts_have_a_description(bench):
    for caption, context in (("A man.", "A man."), (["A man.", "He irons."], "A man.\nHe irons.")):
        write_lines(bench / "contexts.jsonl", [{"image": f"{n}.png", "caption": caption} for n in range(2)])
        question = read_questions(*files_of(bench))[0]
        assert question.context == context and not question.has_boxes


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("questions", {"category": None}, "line 7 has category = None"),
        ("questions", {"question_id": None}, "line 7 has the question_id None"),
        ("questions", {"question_id": 0}, "question_id 0 of an earlier"),
        ("questions", {"image": "9.png"}, "'9.png', for which .*contexts"),
        ("questions", {}, "question_id 9, for which .*ref"),
        ("contexts", {}, "line 3 has neither 'caption'"),
        ("contexts", {"captions": ["a"], "instances": [{"box": 1}]}, "line 3 has instances"),
        ("references", {"text": ""}, "line 7 has text = '', which is empty"),
        ("references", {"question_id": 0}, "line 7 has another answer to question_id 0"),
    ],
)
def test_wrong_rows_are_named(bench, file, change, message):
    row = {"question_id": 9, "image": "0.png", "text": "x", "category": "c", **change}
    with open(bench / f"{file}.jsonl", "a") as lines:
        lines.write(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"{file}.jsonl, .*{message}"):
        read_questions(*files_of(bench))


def test_reference_answers_are_asked_for_with_the_context(bench, scripted, tmp_path):
    model = scripted(lambda messages: f"I see it: {messages[1]['content'][-11:]}")
    questions = ask_references(read_questions(*files_of(bench, None)), model, tmp_path / "judge")
    assert questions[2].reference == "I see it: Question 2?"
    assert model.asked[0][1]["content"].startswith("Picture 0.\nA cat.\n\ncat: [0.1, 0.2, 0.3, 0.4]\n\nQuestion")


def refuse(messages):
    return RequestFault("400", "filtered") if "Question 2" in str(messages) else "8 6"


def test_a_question_without_a_reference_is_named_and_with_partial_without_a_score(bench, scripted, tmp_path):
    questions = read_questions(*files_of(bench, None))
    silent = ask_references(questions, scripted(lambda messages: " ", "silent"), tmp_path / "judge")
    assert {question.reference for question in silent} == {None}
    model = scripted(refuse)
    with pytest.raises(ValueError, match="1 of 6 questions are refused by the endpoint, '2' for one .400: filtered"):
        ask_references(questions, model, tmp_path / "judge")
    asked = ask_references(questions, model, tmp_path / "judge", partial=True)
    assert [question.reference for question in asked] == ["8 6"] * 2 + [None] + ["8 6"] * 3 and len(model.asked) == 6
    how, answers = JudgeSettings(read_rules()), {question.id: "An answer." for question in asked}
    reviews = judge_answers(asked, answers, model, tmp_path / "judge", how, partial=True)
    counts = score(asked, answers, reviews, model, how).counts
    assert (counts["questions_without_score"], counts["reviews_without_reply"], counts["reviews"]) == (1, 1, 6)


def test_a_review_that_the_judge_refuses_is_counted_as_without_reply_and_never_asked_again(bench, scripted, tmp_path):
    model, questions = scripted(refuse), read_questions(*files_of(bench))
    how, answers = JudgeSettings(read_rules()), {question.id: "An answer." for question in questions}
    for _ in range(2):
        reviews = judge_answers(questions, answers, model, tmp_path / "judge", how)
        scored = score(questions, answers, reviews, model, how)
        # reviews, with, without scores, without reply; questions
        assert list(scored.counts.values()) == [6, 5, 0, 1, 1]
        assert scored.scores["relative"]["value"] == pytest.approx(75)
    assert len(model.asked) == 6


def run_cli(bench, model_folder, out, url, *more, references=True):
    questions, contexts, reference_file = files_of(bench)
    files = ["--questions", questions, "--contexts", contexts, "--images", bench / "images"]
    files += ["--references", reference_file] if references else []
    options = ["--judge", "local-judge", "--base-url", url, "--max-new-tokens", "8", "--patience", "2"]
    return llava_eval("llava-bench", model_folder, out, *files, *options, *more)


def review(messages):
    number = int(re.search(r"Question (\d)", messages[1]["content"])[1])
    return ("8 6", "10 5", "no scores here")[number % 3] + "\nBecause."


def test_command_against_a_local_endpoint(bench, model_folder, capsys):
    with FaultServer(reply=review, faults={"500": 0.2}, seed=3) as server:
        assert run_cli(bench, model_folder, bench / "out", server.url) == 0
        assert max(server.paid.values()) == 1
        asked = sum(server.asked.values())
        assert run_cli(bench, model_folder, bench / "out", server.url) == 0
        assert sum(server.asked.values()) == asked  # nothing is asked twice
    results, rows = read_results(bench / "out")
    assert results["benchmark"] == "llava-bench-coco"
    scores = {name: score["value"] for name, score in results["scores"].items()}
    assert [scores[f"relative/{name}"] for name in CATEGORIES] == [75.0, 50.0, None]
    assert scores["relative"] == pytest.approx(100 * 22 / 36)
    assert results["counts"]["questions_without_score"] == 2 and not results["complete"]
    assert results["samples"] == {"file": "samples.jsonl", "total": 6, "answered": 6, "scored": 4}
    assert results["judge"]["name"] == "local-judge"
    captured = capsys.readouterr()
    assert "4 of 6 samples scored" in captured.out and "*83.10*" in captured.out
    assert "2 questions have no score" in captured.err

    page = (bench / "out/index.html").read_text()
    assert page.count("<article") == 6 and page.count("data:image/jpeg;base64,") == 6
    assert "4 of 6 samples scored" in page and page.count(": no score<") == 4 and "83.10" in page
    assert all(row["answer"] in page or "&" in page for row in rows) and "Reference 5." in page
    assert "http" not in re.sub(r"data:image[^\"]*", "", page)  # nothing is loaded from other hosts
    assert (bench / "out/results.png").stat().st_size > 5000


def test_judge_that_thinks_and_takes_no_temperature(bench, model_folder):
    def reply(messages):
        for name, words in (("max_tokens", "Use max_completion_tokens."), ("temperature", "Unsupported value.")):
            if name in server.bodies[-1]:
                return 400, {"error": {"message": words, "param": name}}
        is_review = "[Assistant 1]" in messages[1]["content"]
        return "<think>3</think>\n**8/10 9/10**\n<script>alert(1)</script>" if is_review else "Made.</think>A dog."

    with FaultServer(reply=reply) as server:
        assert run_cli(bench, model_folder, bench / "out", server.url, references=False) == 2
        more = ["--reference-model", "r", "--concurrency", "1", "--both-orders"]
        assert run_cli(bench, model_folder, bench / "out", server.url, *more, references=False) == 0
    results, rows = read_results(bench / "out")
    assert results["complete"] and results["judge"]["temperature"] is None
    page = (bench / "out/index.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert" in page
    assert {row["reference"] for row in rows} == {"A dog."} and {row["score"] for row in rows} == {8.5}


def test_judge_that_is_down_or_refuses_leaves_answers_and_says_so(bench, model_folder, capsys):
    with FaultServer(reply=lambda messages: (400, {"error": {"message": "No such deployment."}})) as server:
        assert run_cli(bench, model_folder, bench / "out", server.url, "--partial") == 2
    assert "No such deployment." in capsys.readouterr().err
    assert run_cli(bench, model_folder, bench / "out", server.url) == 2
    error = capsys.readouterr().err
    assert "6 of 6 reviews have no reply" in error and "the same command resumes" in error
    assert not (bench / "out/results.json").exists()
    assert len((bench / "out/answers.jsonl").read_text().splitlines()) == 6
    with FaultServer(reply=review) as server:
        assert run_cli(bench, model_folder, bench / "out", server.url) == 0
