"""ScienceQA with a language-only model: alone by worked examples, as a complement, and as the judge."""

import sys

import pytest
from fault_server import FaultServer
from tiny_science import llava_eval, problems_of

from modeling_llava.endpoint import Backoff, PassingFault, RequestFault, RunSettings
from modeling_llava.evaluation.results import read_results
from modeling_llava.evaluation.scienceqa import question_text
from modeling_llava.evaluation.scienceqa_language import choose_shots, language_tasks, score_with_language_model


def test_language_model_is_asked_with_worked_examples_and_no_picture(science):
    train, test = problems_of(science, "train"), problems_of(science)
    shots = choose_shots(train, 2)
    assert all(shot.image is None and shot.solution for shot in shots) and shots == choose_shots(train, 2)
    task = language_tasks(test, shots)[0]
    assert [message["role"] for message in task.messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert task.messages[2]["content"].endswith(f"The answer is {shots[0].letter}.")
    assert task.messages[-1]["content"] == question_text(test[0]) and task.temperature == 0.0
    with pytest.raises(ValueError, match="5 worked examples .* 3 of 6"):
        choose_shots(train, 5)


def test_ensembles_by_hand(science, tmp_path, scripted):
    """
    Of eight problems LLaVA is right in 1–5. The language model is right in 1, 2 and 6, wrong in 3, 5 and 8 and has no answer to 4
    and 7. The judge agrees with the language model, except on 3, and does not decide 5.
    """
    test = problems_of(science)
    right = {p.id: f"The answer is {p.letter}." for p in test}
    wrong = {p.id: f"The answer is {'AB'[1 - p.answer]}." for p in test}
    own = {p.id: (right if int(p.id) <= 5 else wrong)[p.id] for p in test}
    language = {p.id: (right if p.id in "126" else wrong)[p.id] for p in test} | {"4": "There is no picture.", "7": ""}
    verdict = {p.id: language[p.id] for p in test} | {"3": right["3"], "5": "Hm."}

    def answer(messages):
        (number,) = [n for n in right if f"Which is number {n}?" in messages[-1]["content"]]
        return (verdict if "Assistant 1" in messages[-1]["content"] else language)[number]

    model, shots = scripted(answer), choose_shots(problems_of(science, "train"))
    scored = score_with_language_model(test, own, model, tmp_path / "l", shots=shots)
    right_in = {name: {row["id"] for row in s.rows if row["score"]} for name, s in scored.items()}
    assert right_in["language"] == {"1", "2", "6"}
    assert right_in["complement"] == {"1", "2", "6", "4"}  # where it says nothing, LLaVA answers: 4 right, 7 wrong
    # They differ in 3, 4, 5, 6, 7 (in 8 both say the same): 3 and 6 the judge gets right; 4, 5 and 7 keep LLaVA's.
    assert right_in["judge"] == {"1", "2", "3", "4", "5", "6"}
    assert scored["judge"].counts["judged"] == 5 and scored["judge"].counts["verdict_unparsed"] == 3
    assert scored["language"].counts == {"unparsed": 2, "invalid_letter": 0, "cut_at_max_reply_tokens": 1}
    assert scored["language"].scores["accuracy"]["value"] == 37.5
    assert len(model.asked) == 8 + 5
    shown = [messages[-1]["content"] for messages in model.asked[8:]]
    assert all(own[n] in text and (language[n] or "(no answer)") in text for n, text in zip("34567", sorted(shown)))

    again = score_with_language_model(test, own, model, tmp_path / "l", shots=shots)
    assert len(model.asked) == 13 and again["judge"].scores == scored["judge"].scores  # nothing is paid twice


def test_endpoint_that_is_down_gives_no_score(science, tmp_path, scripted):
    test, shots = problems_of(science), choose_shots(problems_of(science, "train"))
    own = {p.id: "A" for p in test}
    settings = RunSettings(concurrency=1, backoff=Backoff(attempts=1, first=0.0, longest=0.01, patience=0.05))
    replies = iter(["The answer is A."] * 3)
    model = scripted(lambda messages: next(replies, None) or PassingFault("connection", "connection refused"))

    def run(**options):
        return score_with_language_model(test, own, model, tmp_path, shots=shots, settings=settings, **options)

    with pytest.raises(ConnectionError, match="5 of 8 questions have no reply.*the same command resumes"):
        run()
    scored = run(partial=True)
    assert scored["language"].scores["accuracy"]["count"] == 3 and scored["language"].more["no_reply"] == 5
    replies = iter(["The answer is A."] * 100)
    assert run()["language"].scores["accuracy"]["count"] == 8


def test_problems_that_the_endpoint_refuses_are_named_and_left_out_by_partial(science, tmp_path, scripted):
    test, shots = problems_of(science), choose_shots(problems_of(science, "train"))
    own = {p.id: "A" for p in test}

    def answer(messages):
        filtered = "Which is number 3?" in messages[-1]["content"]
        return RequestFault("400", "filtered") if filtered else "The answer is A."

    for _ in range(2):  # it is settled: the same command does not ask again
        model = scripted(answer)
        with pytest.raises(ValueError, match=r"1 of 8 questions .* '3' .*400: filtered.*--partial"):
            score_with_language_model(test, own, model, tmp_path, shots=shots)
    assert model.asked == []
    scored = score_with_language_model(test, own, scripted(answer), tmp_path, shots=shots, partial=True)
    assert scored["language"].scores["accuracy"]["count"] == 7 and scored["language"].more["no_reply"] == 1


def test_command(science, model_folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    files = ["--problems", science / "problems.json", "--splits", science / "pid_splits.json"]
    with FaultServer(reply=lambda messages: "The answer is A.") as server:
        options = [*files, "--images", science / "images", "--language-model", "lm", "--base-url", server.url]
        assert llava_eval("scienceqa", model_folder, science / "out", *options, "--max-new-tokens", 3) == 0
    results, rows = read_results(science / "out" / "language")
    assert (results["model"], results["scores"]["accuracy"]["value"], len(rows)) == ({"name": "lm"}, 50.0, 8)
    said = capsys.readouterr()
    assert "+ lm, complement |" in said.out and "+ lm, judge |" in said.out and "modeling-llava[plots]" in said.err
