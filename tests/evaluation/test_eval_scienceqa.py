"""ScienceQA: reading the official files, asking in the published forms, parsing by a stated rule, the paper's table."""

import json

import pytest
from tiny_science import llava_eval, problems_of, science_problem

from modeling_llava.cli.main import main
from modeling_llava.evaluation.results import read_results
from modeling_llava.evaluation.scienceqa import (
    answer_text,
    direct_question,
    question_text,
    read_hub_problems,
    read_problems,
    score,
)
from modeling_llava.evaluation.scienceqa_answers import parse_answer


@pytest.mark.parametrize(
    ("text", "num_choices", "choice"),
    [
        ("LECTURE. EXPLANATION. The answer is (C).", 3, 2),
        ("The answer is B\nBECAUSE: of that", 2, 1),
        ("The answer is A. BECAUSE: … The answer is A.", 3, 0),
        ("B", 2, 1),
        ("B. Ohio", 3, 1),
        ("(C) Ohio", 3, 2),
        ("The answer is A (Ohio).", 3, 0),
        ('The correct answer is "B".', 3, 1),
        ("The answer is B, not C.", 3, 1),
        ("B. Ohio, by the map. The answer is C.", 3, 2),
        ("It attracts.\n\n**Answer: B**", 3, 1),
        ("LECTURE: a\nSOLUTION: b\n###\nANSWER: B.", 3, 1),
        ("Choice B\nbecause it is", 3, 1),
        ("It attracts.\n**Answer**: (B) Ohio", 3, 1),
        ("**The correct answer is:** C", 3, 2),
        ("The answer is B\uff0cfor it attracts", 3, 1),
        ("So it is (B), because it attracts.", 3, 1),
        ("Option B is correct.", 3, 1),
        ("It attracts.\n\n\\boxed{B}", 3, 1),
        ("The answer is $\\boxed{\\text{B. Ohio}}$.", 3, 1),
        ("<think>Is it A? The answer is A.</think>\nOhio. The answer is B.", 3, 1),
        ("The answer is A. No.</think>B", 3, 1),
        ("<answer>\uff08\uff22\uff09</answer><|im_end|>", 3, 1),  # full width
        ("The answer to the question would be ( B ).", 3, 1),
        ("My answer - $B$", 3, 1),
        ("I think B.", 3, 1),
        ('{"answer": "B"}', 3, 1),
        ("B is the answer.", 3, 1),
        # not read
        ("Answer is B or C", 3, None),
        ("It's a magnet.", 3, None),
        ("Options:", 20, None),
        ("Neither A nor B is correct.", 3, None),
        ("\\boxed{A} or B", 3, None),
        ("<think>The answer is A.", 3, None),
        ("The answer is B/C", 3, None),
        ("The answer is A, B and C.", 3, None),
        ("The answer is D'oh", 4, None),
        ("The answer is A.M.", 3, None),
        ("Ohio.\nAnswer: A. one\nAnswer: B. two", 3, None),
        ("Ohio.\nAnswer: A dog", 3, None),
        ("A. one\nB. two\nC. three", 3, None),
        ("A\nB\nC", 3, None),
        ("", 3, None),
        ("The answer is Apple.", 3, None),
        ("The answer is a dog.", 3, None),
        ("The answer is A. No, the answer is B.", 3, None),
        ("E", 4, None),  # there is no such choice
    ],
)
def test_answers_are_parsed_by_the_stated_rule(text, num_choices, choice):
    assert parse_answer(text, num_choices) == choice


def test_long_answers_are_parsed_in_linear_time():
    """A model that keeps repeating itself; patterns that try every way would take minutes here."""
    for text in ("\n" * 100_000, "The answer is " * 20_000, "\n*#" * 40_000):
        assert parse_answer(text, 4) is None
    assert parse_answer("The answer is B" + " " * 100_000, 4) == 1 and parse_answer("A. one\n" * 20_000, 4) == 0


def test_official_files_are_read(science):
    problems = problems_of(science)
    assert [problem.id for problem in problems] == [str(n) for n in range(1, 9)]
    first = problems[0]
    assert first.image == "test/1/image.png" and first.letter == "B" and first.grade == 2
    assert first.choices == ("one", "two", "three") and problems[1].image is None
    (science / "images" / "test").rename(science / "flat")
    flat = read_problems(science / "problems.json", science / "pid_splits.json", "test", science / "flat")
    assert flat[0].image == "1/image.png"


def test_questions_are_put_as_the_model_was_trained(science):
    problem = problems_of(science)[0]
    expected = "Which is number 1?\nContext: There are 1 of them.\nOptions: (A) one (B) two (C) three"
    assert question_text(problem) == expected
    without = problems_of(science)[2]
    assert question_text(without, "CQM").startswith("Context: N/A\nQuestion: Which is number 3?\nOptions: ")
    # upper bounds: the reasons are given away
    reasons = "Counting starts at one.\nIt goes on. Count to 1."
    assert question_text(problem, "QCMLE") == f"{expected}\nBECAUSE: {reasons}"
    assert question_text(problem, "QCLEM") == expected.replace("\nOptions", f"\nBECAUSE: {reasons}\nOptions")
    assert question_text(problems_of(science)[1], "QCML").endswith("(B) two")  # no lecture


def test_direct_questions_are_those_of_llava_1_5(science):
    """As in the prompts of its published answers: no context where there is none, a choice a line."""
    first, _, third = problems_of(science)[:3]
    instruction = "Answer with the option's letter from the given choices directly."
    assert direct_question(first) == (
        f"Context: There are 1 of them.\nWhich is number 1?\nA. one\nB. two\nC. three\n{instruction}"
    )
    assert direct_question(third) == f"Which is number 3?\nA. one\nB. two\nC. three\n{instruction}"


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("A", "The answer is B."),
        ("AL", "The answer is B. BECAUSE: Counting starts at one.\nIt goes on."),
        ("ALE", "The answer is B. BECAUSE: Counting starts at one.\nIt goes on. Count to 1."),
        ("LA", "Counting starts at one.\nIt goes on. The answer is B."),
        ("LEA", "Counting starts at one.\nIt goes on. Count to 1. The answer is B."),
        ("ELA", "Count to 1. Counting starts at one.\nIt goes on. The answer is B."),
        ("LEPA", "LECTURE: Counting starts at one.\nIt goes on.\nSOLUTION: Count to 1.\n###\nANSWER: B."),
    ],
)
def test_training_answers_in_every_published_order(science, order, expected):
    problem, without_lecture = problems_of(science)[:2]
    assert answer_text(problem, order) == expected
    assert parse_answer(answer_text(problem, order), 3) == problem.answer
    no_gap = {"LEA": "Count to 2. The answer is A.", "AL": "The answer is A."}
    assert order not in no_gap or answer_text(without_lecture, order) == no_gap[order]


def test_training_data_loads_as_llava_rows(science):
    from modeling_llava.data import load_conversations

    out = science / "train.json"
    arguments = ["--problems", science / "problems.json", "--splits", science / "pid_splits.json"]
    assert main(["eval", "scienceqa", *map(str, arguments), "--split", "train", "--export-training", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert rows[0]["image"] == "train/9/image.png" and "image" not in rows[1]
    assert rows[0]["conversations"][0]["value"].endswith("\n<image>")
    conversations = list(load_conversations(str(out), str(science / "images")))
    assert len(conversations) == 6
    assert [item["type"] for item in conversations[0]["messages"][0]["content"]] == ["text", "image"]
    assert conversations[0]["messages"][1]["content"][0]["text"].endswith("The answer is B.")


def test_table_by_hand():
    """Four problems: two right, one unparsed, one with a letter beyond its choices."""
    rows = [
        science_problem(1, subject="natural science", grade="grade3", hint="h", image=None, answer=0),
        science_problem(2, subject="natural science", grade="grade8", hint="", image="image.png", answer=1),
        science_problem(3, subject="social science", grade="grade6", hint="", image=None, answer=0),
        science_problem(4, subject="language science", grade="grade12", hint="h", image="image.png", answer=0),
    ]
    texts = ["The answer is A.", "B", "hm", "The answer is E."]
    answers = {f"test-{number}": text for number, text in enumerate(texts)}
    scored = score(read_hub_problems(rows, "test"), answers)
    values = {name.removeprefix("accuracy/"): (one["value"], one["count"]) for name, one in scored.scores.items()}
    halves = dict.fromkeys(("TXT", "IMG", "G1-6", "G7-12"), (50.0, 2))
    wrong = dict.fromkeys(("SOC", "LAN", "NO"), (0.0, 1))
    assert values == {"accuracy": (50.0, 4), "NAT": (100.0, 2), **halves, **wrong}
    assert scored.counts == {"unparsed": 1, "invalid_letter": 1}
    assert [row["status"] for row in scored.rows] == ["read", "read", "unparsed", "invalid_letter"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["one"]}, r"choices = \['one'\]"),
        ({"answer": "B"}, "answer = 'B'"),
        ({"hint": 3}, "hint = 3"),
        ({"grade": "third"}, "grade = 'third'"),
        ({"question": None}, "question = None"),
    ],
)
def test_wrong_fields_name_the_problem(science, change, message):
    problems = json.loads((science / "problems.json").read_text())
    problems["3"].update(change)
    (science / "problems.json").write_text(json.dumps(problems))
    with pytest.raises(ValueError, match=f"problem '3' has {message}"):
        problems_of(science)


def test_wrong_files_are_named(science):
    problems = json.loads((science / "problems.json").read_text())
    del problems["3"]
    (science / "problems.json").write_text(json.dumps(problems))
    with pytest.raises(ValueError, match="1 of 8 problems .* such as '3'"):
        problems_of(science)
    with pytest.raises(ValueError, match="no split 'minitest'; it has test, train"):
        problems_of(science, "minitest")
    with pytest.raises(FileNotFoundError, match="image folder .* does not exist"):
        read_problems(science / "problems.json", science / "pid_splits.json", "train", science / "nowhere")
    with pytest.raises(ValueError, match="is not a problems file"):
        read_problems(science / "pid_splits.json", science / "pid_splits.json", "test")
    for text, message in (("[]", "a splits file"), ("{", "JSON")):
        (science / "pid_splits.json").write_text(text)
        with pytest.raises(ValueError, match=f"pid_splits.json is not {message}"):
            problems_of(science)


def test_missing_images_are_counted_before_anything_is_loaded(science):
    (science / "images/test/3/image.png").unlink()
    (science / "images/test/5/image.png").unlink()
    with pytest.raises(FileNotFoundError, match="2 images are not in .*test/3/image.png"):
        problems_of(science)


def run_cli(science, model_folder, out, *more):
    files = ["--problems", science / "problems.json", "--splits", science / "pid_splits.json"]
    options = [*files, "--images", science / "images", "--max-new-tokens", "6", "--batch-size", "3", *more]
    return llava_eval("scienceqa", model_folder, out, *options)


def test_command_answers_scores_and_says_how(science, model_folder, capsys):
    assert run_cli(science, model_folder, science / "out") == 0
    results, rows = read_results(science / "out")
    assert results["benchmark"] == "scienceqa" and results["complete"]
    assert results["samples"] == {"file": "samples.jsonl", "total": 8, "answered": 8, "scored": 8}
    assert len(rows) == 8 and {row["id"] for row in rows} == {str(n) for n in range(1, 9)}
    assert results["scores"]["accuracy"]["count"] == 8
    assert set(results["data"]["files"]) == {"problems.json", "pid_splits.json"}
    assert results["settings"]["order"] == "QCM" and "anywhere" in results["settings"]["answer_rule"]
    assert results["model"]["fingerprint"] and results["versions"]["transformers"]
    printed = capsys.readouterr().out
    assert "| run | NAT | SOC | LAN | TXT | IMG | NO | G1-6 | G7-12 | accuracy |" in printed
    assert "| *LLaVA-13B + GPT-4, judge (published)* | *91.56* |" in printed and "*92.53* |" in printed
    assert (science / "out/results.png").stat().st_size > 5000


def test_shards_together_give_what_one_process_gives(science, model_folder, capsys):
    assert run_cli(science, model_folder, science / "whole") == 0
    for shard in ("1/3", "3/3"):
        assert run_cli(science, model_folder, science / "parts", "--shard", shard) == 0
        assert not (science / "parts/results.json").exists()
        assert "not scored" in capsys.readouterr().err
    assert run_cli(science, model_folder, science / "parts", "--shard", "1/3", "--partial") == 0
    results, rows = read_results(science / "parts")
    assert not results["complete"] and results["samples"]["scored"] == len(rows) < 8
    assert run_cli(science, model_folder, science / "parts", "--shard", "2/3") == 0
    whole, parts = read_results(science / "whole"), read_results(science / "parts")
    assert whole[1] == parts[1] and whole[0]["scores"] == parts[0]["scores"]
    names = {path.name for path in (science / "parts").glob("answers*.jsonl")}
    assert names == {f"answers.{n}-of-3.jsonl" for n in (1, 2, 3)}
    assert run_cli(science, model_folder, science / "parts", "--shard", "4/3") == 2


def test_limited_run_says_of_how_many_and_another_one_is_refused_its_folder(science, model_folder, capsys):
    assert run_cli(science, model_folder, science / "out", "--limit", "3") == 0
    results, _ = read_results(science / "out")
    assert not results["complete"]
    assert results["samples"]["total"] == 8 and results["samples"]["scored"] == 3
    assert "3 of 8 samples scored" in capsys.readouterr().out
    assert run_cli(science, model_folder, science / "out", "--limit", "2") == 2
    assert "limit was 3, is 2" in capsys.readouterr().err


def test_hub_dataset_in_place_of_the_files(science, model_folder, tmp_path):
    from datasets import Dataset, Features, Image, Sequence, Value

    problems = json.loads((science / "problems.json").read_text())
    rows = [dict(problems[str(n)]) for n in range(1, 9)]
    for number, row in enumerate(rows, 1):
        row["image"] = str(science / f"images/test/{number}/image.png") if row["image"] else None
        row.pop("split")
    texts = {name: Value("string") for name in rows[0] if name not in ("image", "choices", "answer")}
    features = Features({**texts, "image": Image(), "choices": Sequence(Value("string")), "answer": Value("int8")})
    (tmp_path / "hub" / "data").mkdir(parents=True)
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "hub/data/test-00000-of-00001.parquet")
    options = ["--dataset", tmp_path / "hub", "--max-new-tokens", "6"]
    assert llava_eval("scienceqa", model_folder, tmp_path / "hub-out", *options) == 0
    assert run_cli(science, model_folder, tmp_path / "files-out") == 0
    from_hub, from_files = read_results(tmp_path / "hub-out")[1], read_results(tmp_path / "files-out")[1]
    assert [row["answer"] for row in from_hub] == [row["answer"] for row in from_files]
    assert [row["groups"] for row in from_hub] == [row["groups"] for row in from_files]
    export = ["eval", "scienceqa", "--dataset", str(tmp_path / "hub"), "--export-training", str(tmp_path / "t.json")]
    assert main(export) == 2  # no folder for the images
    assert main([*export, "--images", str(tmp_path / "written")]) == 0
    image = json.loads((tmp_path / "t.json").read_text())[0]["image"]
    assert (tmp_path / "written" / image).is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "Give MODEL and --out"),
        ("--export-training t.json", "Give --problems and --splits"),
        ("--export-training t.json --dataset x --problems p", "give one or the other"),
        ("MODEL --out o --images i --problems p --splits s --order QMC", "'QMC' is not known"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message, capsys):
    assert main(["eval", "scienceqa", *options.split()]) == 2
    assert message in capsys.readouterr().err
