"""The judge: scores parsed strictly, asked for once more, never filled in."""

import json
from collections import Counter
from pathlib import Path

import pytest

from modeling_llava.endpoint import Backoff, PassingFault, RunSettings
from modeling_llava.evaluation.judge import Asked, parse_scores, read_rules, review_task, rule_for, rules_hash
from modeling_llava.evaluation.llava_bench import JudgeSettings, Question, Reviews, judge_answers, score


@pytest.mark.parametrize(
    ("review", "scores"),
    [
        ("\n\n 8,9 \nText", (8.0, 9.0)),
        ("8/10 9/10\nFine.", (8.0, 9.0)),
        ("8 out of 10, 9 out of 10", (8.0, 9.0)),
        ("**Assistant 2:** 9/10\nIt is long.\n\n**Assistant 1:** 8/10\nIt is short.", (8.0, 9.0)),
        ("Assistant 1: 8, Assistant 2: 9.", (8.0, 9.0)),
        ('```json\n{"assistant_1": 8, "assistant_2": 9}\n```', (8.0, 9.0)),
        ("## Scores\n8 and 9", (8.0, 9.0)),
        ("8 9\n1. The first", (8.0, 9.0)),
        ("```json\n[(8, 9)]\n```", (8.0, 9.0)),
        ("8\n9", (8.0, 9.0)),
        ("Here are the scores:\n\n<score>\uff18 \uff19</score>", (8.0, 9.0)),  # full width
        ("Assistant 1 score - 8, and the score of Assistant 2 is 9.", (8.0, 9.0)),
        ("", None),
        ("8 9 7", None),
        ("Rating scale: 1, 10", None),
        ("8\n9\n7", None),
        ("8 11", None),
        ("Both are good.\n8 9", None),
        ("8/9", None),
        ("8,5\n9,5", None),
        ("8 or 9", None),
        ("8/10 9", None),
        ("Assistant 1: 8\nFine.", None),
        ("Assistant 1: 8\nAssistant 1: 9", None),
        ("Assistant 1: 8 or 9\nAssistant 2: 7", None),
        ("Assistant 1: 8 objects\nAssistant 2: 9", None),
        ("\u0668 \u0669", None),  # Arabic digits
        ("8 9 - both fine", None),
    ],
)
def test_score_pairs_of_one_meaning_are_read(review, scores):
    assert parse_scores(review) == scores


def test_own_rules_cover_every_category_and_ask_for_what_is_parsed():
    rules = read_rules()
    for category in ("conv", "detail", "complex"):
        for has_boxes in (True, False):
            rule = rule_for(rules, category, has_boxes)
            assert "first line" in rule["prompt"] and "1 to 10" in rule["prompt"]
            assert ("left, top, right, bottom" in rule["prompt"]) == has_boxes
    assert rule_for(rules, "another", True) == rules["default"]
    assert rules_hash(rules) == rules_hash(dict(reversed(rules.items()))) != rules_hash({"default": rules["default"]})


def test_rules_of_another_form_are_refused(tmp_path):
    for text in ("[]", "{", '{"conv": "rate"}', '{"conv": {"role": 1, "prompt": "x"}}'):
        (tmp_path / "rules.json").write_text(text)
        with pytest.raises(ValueError, match="rules.json is not"):
            read_rules(tmp_path / "rules.json")
    with pytest.raises(ValueError, match="none for 'conv'"):
        rule_for({"math": {"role": "A", "prompt": "p"}}, "conv", True)


def test_review_has_context_question_answers_and_rule_in_the_published_layout():
    task = review_task("q", "What?", "A cat.", "First.", "Second.", {"role": "Assistant", "prompt": "Rate."})
    assert [message["role"] for message in task.messages] == ["system", "user"]
    assert "helpful and precise assistant for checking" in task.messages[0]["content"]
    assert task.messages[1]["content"] == (
        "[Context]\nA cat.\n\n[Question]\nWhat?\n\n[Assistant 1]\nFirst.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nSecond.\n\n[End of Assistant 2]\n\n[System]\nRate.\n\n"
    )


QUESTIONS = [
    Question("0", "a.jpg", "conv", "Question zero?", "A cat.", True, "reference zero"),
    Question("1", "a.jpg", "detail", "Question one?", "A cat.", True, "reference one"),
    Question("2", "b.jpg", "conv", "Question two?", "A dog.", True, "reference two"),
    Question("3", "b.jpg", "complex", "Question three?", "A dog.", True, "reference three"),
]
ANSWERS = {question.id: f"own {question.reference}" for question in QUESTIONS}
FAST = RunSettings(concurrency=2, backoff=Backoff(attempts=2, first=0.0, longest=0.01, patience=0.05))


def number_of(messages):
    return next(q.id for q in QUESTIONS if q.text in messages[1]["content"])


def judged(model, tmp_path, partial=False, **how):
    how = JudgeSettings(read_rules(), **how)
    reviews = judge_answers(QUESTIONS, ANSWERS, model, tmp_path, how, settings=FAST, partial=partial)
    return score(QUESTIONS, ANSWERS, reviews, model, how)


def test_relative_scores_by_hand(scripted, tmp_path):
    pairs = {"0": "8 4", "1": "10 5", "2": "4 5", "3": "5 5"}
    scored = judged(scripted(lambda messages: f"{pairs[number_of(messages)]}\nSo be it."), tmp_path)
    values = {name: score["value"] for name, score in scored.scores.items()}
    assert values["relative/conv"] == pytest.approx(100 * 9 / 12)
    assert values["relative/detail"] == 50.0 and values["relative/complex"] == 100.0
    assert values["relative"] == pytest.approx(100 * 19 / 27)
    assert [(row["score"], row["out_of"]) for row in scored.rows] == [(4, 8), (5, 10), (5, 4), (5, 5)]
    judge = scored.more["judge"]
    assert judge["name"] == "scripted" and judge["answered_by"] == ["scripted-2026-01-01"]
    assert judge["prompt_hash"] == rules_hash(read_rules()) and len(judge["date"]) == 10
    low, high = scored.scores["relative"]["interval"]
    assert 50 <= low < 100 * 19 / 27 < high <= 125


def test_what_cannot_be_parsed_is_asked_once_more_and_never_filled_in(scripted, tmp_path):
    def answer(messages):
        if number_of(messages) == "1":
            return "I like both."
        return "Assistant 2 wins." if number_of(messages) == "2" and len(messages) == 2 else "8 6"

    model = scripted(answer)
    scored = judged(model, tmp_path)
    assert len(model.asked) == 4 + 2  # two were asked again
    told = next(messages for messages in model.asked if len(messages) == 4 and number_of(messages) == "2")
    assert told[2]["content"] == "Assistant 2 wins." and "two numbers" in told[3]["content"]
    assert scored.rows[1]["score"] is None and scored.rows[1]["out_of"] is None
    assert scored.scores["relative/detail"] == {"value": None, "interval": None, "count": 0}
    assert (scored.scores["relative"]["count"], scored.scores["relative"]["value"]) == (3, 75.0)
    assert list(scored.counts.values()) == [4, 3, 1, 0, 1]  # reviews, with, without scores, without reply; questions
    assert scored.rows[1]["reviews"][0]["text"] == "I like both."
    judged(model, tmp_path)
    assert len(model.asked) == 6  # all settled


def test_both_orders_swap_the_answers_and_average(scripted, tmp_path):
    """A judge that gives the first answer one point more."""

    def answer(messages):  # own: 5 and 6; reference: 8 and 7
        return "8 5" if messages[1]["content"].split("[Assistant 2]\n")[1].startswith("own") else "6 7"

    scored = judged(scripted(answer), tmp_path, both_orders=True)
    assert [(row["score"], row["out_of"]) for row in scored.rows] == [(5.5, 7.5)] * 4
    assert scored.scores["relative"]["value"] == pytest.approx(100 * 5.5 / 7.5)
    assert [review["order"] for review in scored.rows[0]["reviews"]] == ["reference first", "reference second"]
    assert scored.counts["reviews"] == 8


def test_repeats_give_mean_and_spread(scripted, tmp_path):
    """Each question is judged twice; the second time every own answer gets two points less."""
    seen = Counter()

    def answer(messages):
        seen[number_of(messages)] += 1
        return "10 8" if seen[number_of(messages)] == 1 else "10 6"

    scored = judged(scripted(answer), tmp_path, repeats=2)
    overall = scored.scores["relative"]
    assert overall["repeats"] == [80.0, 60.0] and overall["repeat_mean"] == 70.0
    assert overall["repeat_std"] == pytest.approx(200**0.5)  # √((10² + 10²) / 1)
    assert overall["value"] == 70.0 and overall["interval"] == [70.0, 70.0]
    with pytest.raises(ValueError, match="repeats"):
        JudgeSettings({}, repeats=0)


def test_judge_that_is_down_gives_no_score_and_is_resumed(scripted, tmp_path):
    replies = iter(["8 6", "8 4"])
    model = scripted(lambda messages: next(replies, None) or PassingFault("connection", "connection refused"))
    with pytest.raises(ConnectionError, match="2 of 4 reviews have no reply.*connection refused"):
        judged(model, tmp_path)
    scored = judged(model, tmp_path, partial=True)
    assert scored.counts["reviews_without_reply"] == 2 and scored.scores["relative"]["count"] == 2
    replies = iter(["8 6"] * 9)
    before = len(model.asked)
    assert judged(model, tmp_path).counts["reviews_with_scores"] == 4
    assert len(model.asked) == before + 2


def test_reviews_are_not_reused_for_another_judge_or_other_answers(scripted, tmp_path):
    first, second = scripted(lambda messages: "8 6"), scripted(lambda messages: "8 2", name="another")
    judged(first, tmp_path)
    assert judged(second, tmp_path).scores["relative"]["value"] == 25.0 and len(second.asked) == 4
    changed = {**ANSWERS, "2": "a better answer"}
    judge_answers(QUESTIONS, changed, first, tmp_path, JudgeSettings(read_rules()), settings=FAST)
    assert len(first.asked) == 5


def test_published_reviews_give_the_published_score(scripted):
    """LLaVA-1.5 13B on LLaVA-Bench (In-the-Wild): 72.5 in the original's model zoo, the mean of three runs of the judge."""
    path = Path(__file__).parents[1] / "golden" / "llava_bench_wild_reviews.json"
    published = json.loads(path.read_text("utf-8"))
    categories = published["categories"].split()
    questions = [Question(str(n), "", category, "", "", False, "") for n, category in enumerate(categories)]
    reviews = Reviews(Asked())
    for repeat, lines in enumerate(published["first_lines"]):
        for n, line in enumerate(lines.split("; ")):
            key = f"{n}/{repeat}/reference first"
            reviews.texts[key] = f"{line}\nBoth assistants …"
            reviews.pairs[key] = parse_scores(reviews.texts[key])
    assert len(reviews.pairs) == 180 and None not in reviews.pairs.values()
    how = JudgeSettings(read_rules(), repeats=3)
    scores = score(questions, {q.id: "" for q in questions}, reviews, scripted(lambda messages: ""), how).scores
    # As its summarize_gpt_review.py prints them; it rounds the means to three digits before it divides.
    for name, printed in {
        "relative": [72.8, 72.7, 72.1],
        "relative/conv": [74.7, 74.7, 72.5],
        "relative/detail": [52.6, 51.1, 51.1],
        "relative/complex": [82.8, 83.7, 83.5],
    }.items():
        assert scores[name]["repeats"] == pytest.approx(printed, abs=0.06)
    assert round(scores["relative"]["repeat_mean"], 1) == round(scores["relative"]["value"], 1) == 72.5
    assert scores["relative"]["repeat_std"] == pytest.approx(0.413, abs=1e-3)
