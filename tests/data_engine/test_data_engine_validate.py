import json
from pathlib import Path

import pytest

from modeling_llava.data_engine.replies import REASONS, RETRY_PROMPTS, Rejection, parse_description, parse_turns
from modeling_llava.data_engine.validate import (
    LANGUAGES,
    ValidationSettings,
    count_words,
    looks_like,
    mention_of_source,
    validate,
)


BENCH = Path(__file__).parents[3] / "shared" / "llava_bench_coco"
LONG = (
    "The two dogs run along the beach because the tide is low and the wet sand is firm enough to carry them at speed."
)


def block(*turns):
    return "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{answer}" for question, answer in turns)


@pytest.mark.parametrize(
    "text",
    [
        "Question:\nWhat is it?\n===\nAnswer:\nA cat.\n===\nQuestion:\nWhere?\n===\nAnswer:\nOn a mat.\n\nIt sleeps.",
        "Question: What is it?\nAnswer: A cat.\n\nQuestion: Where?\nAnswer: On a mat.\n\nIt sleeps.",
        "**Question 1:** What is it?\n===\n**Answer 1:** A cat.\n===\n**Question 2:** Where?\n===\n**Answer 2:** On a mat.\n\nIt sleeps.",
        "===\r\nQuestion:\r\nWhat is it?\r\n===\r\nAnswer:\r\nA cat.\r\n===\r\nQuestion:\r\nWhere?\r\n===\r\nAnswer:\r\nOn a mat.\r\n\r\nIt sleeps.\r\n===\r\n",
        "### Question:\nWhat is it?\n---\n### Answer:\nA cat.\n---\n### Question:\nWhere?\n---\n### Answer:\nOn a mat.\n\nIt sleeps.",
        "Q: What is it?\nA: A cat.\nQ: Where?\nA: On a mat.\n\nIt sleeps.",
        "Question: What is it? === Answer: A cat. ===\nQuestion: Where?\n=== Answer: On a mat.\n\nIt sleeps. ===",
        "- **Question: What is it?**\n- Answer: A cat.\n- **Question: Where?**\n- Answer: On a mat.\n\nIt sleeps.",
        "### Question 1\nWhat is it?\n### Answer 1\nA cat.\n\n**Question 2**\nWhere?\n**Answer 2**\nOn a mat.\n\nIt sleeps.",
        "<think>\nThe captions tell of a cat.\nQuestion: what?\n</think>\n\nQ: What is it?\nA: A cat.\nQ: Where?\nA: On a mat.\n\nIt sleeps.",
        "Here are two questions and answers about the image:\n```text\nQ: What is it?\nA: A cat.\nQ: Where?\nA: On a mat.\n\nIt sleeps.\n```",
        "\ufeffQ: What is it?\nA: A cat.\nQ: Where?\nA: On a mat.\n\nIt sleeps.\x00</s><|im_end|>\n",
    ],
)
def test_questions_and_answers_are_read_in_every_form_that_models_write(text):
    assert parse_turns(text) == [("What is it?", "A cat."), ("Where?", "On a mat.\n\nIt sleeps.")]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("A cat sits on a mat.", "no_parse"),
        ("Sure! Here it is.\nQuestion:\nWhat?\n===\nAnswer:\nA cat.", "no_parse"),
        ("Answer:\nA cat.\n===\nQuestion:\nWhat?", "no_parse"),
        ("Question:\nWhat?\n===\nQuestion:\nWhere?\n===\nAnswer:\nThere.", "no_parse"),
        ("Question:\nWhat?\n===\nAnswer:\nA cat.\n===\nQuestion:\nWhere?", "no_parse"),
        ("Question:\n\n===\nAnswer:\nA cat.", "empty"),
        ("Question:\nWhat?\n===\nAnswer:\n===\n", "empty"),
    ],
)
def test_replies_out_of_form_say_what_is_wrong(text, reason):
    with pytest.raises(Rejection) as caught:
        parse_turns(text)
    assert caught.value.reason == reason


def test_description_loses_only_its_heading():
    described = parse_description("Answer:\nThe answer: two dogs.\n\nThey run.\n===\n")
    assert described == [("", "The answer: two dogs.\n\nThey run.")]


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nThe captions tell of dogs.\n</think>\n\n{}",
        "The captions tell of dogs.\n</think>\n{}",  # opened by the chat template
        "Sure, here's a detailed description:\n\n{}",
        "```\n{}\n```",
        "{}<|eot_id|><｜end▁of▁sentence｜>",
        "{}\n\nI hope this helps! Let me know if you need more.",
        "## Detailed Description:\n{}",
        "Question:\nWhat does the image show?\n===\nAnswer:\n{}\n===",
    ],
)
def test_what_models_put_around_a_description_is_taken_off(text):
    assert validate(text.format(LONG), "detail", ValidationSettings()) == [("", LONG)]


def reason_of(text, kind="conversation", finish="stop", **settings):
    try:
        validate(text, kind, ValidationSettings(**settings), finish)
    except Rejection as rejection:
        return rejection.reason
    return None


SENTENCES = {
    "en": "The man on the left is holding an umbrella while the woman next to him looks at the street.",
    "de": "Der Mann auf der linken Seite hält einen Schirm, während die Frau neben ihm auf die Straße blickt.",
    "fr": "L'homme à gauche tient un parapluie pendant que la femme à côté de lui regarde la rue.",
    "es": "El hombre de la izquierda sostiene un paraguas mientras la mujer que está a su lado mira la calle.",
    "it": "L'uomo a sinistra tiene un ombrello mentre la donna accanto a lui guarda la strada che è nella città.",
    "pt": "O homem à esquerda segura um guarda-chuva enquanto a mulher ao lado dele olha para a rua.",
    "nl": "De man links houdt een paraplu vast terwijl de vrouw naast hem naar de straat kijkt.",
    "ru": "Мужчина слева держит зонт, а женщина рядом с ним смотрит на улицу.",
    "ja": "左側の男性は傘を持っていて、隣の女性は通りを見ています。",
    "zh": "左边的男人拿着一把雨伞,他旁边的女人看着街道,远处还有一辆汽车。",
    "ko": "왼쪽에 있는 남자는 우산을 들고 있고 옆에 있는 여자는 거리를 보고 있습니다.",
    "ar": "الرجل على اليسار يحمل مظلة بينما تنظر المرأة بجانبه إلى الشارع.",
    "hi": "बाईं ओर का आदमी छाता पकड़े हुए है और उसके बगल वाली महिला सड़क देख रही है।",
}


REJECTED = [
    ("no_parse", "conversation", "The cat sits on the mat and looks at the dog."),
    ("empty", "conversation", "  \n"),
    ("empty", "detail", "Answer:\n"),
    ("refusal", "conversation", "I'm sorry, but I can't see the image."),
    ("refusal", "conversation", block(("What is it?", "As an AI language model, I cannot view photos."))),
    ("refusal", "detail", "I am unable to view the picture. " + LONG),
    ("image_marker", "conversation", block(("What is in <image>?", "A cat."))),
    ("image_marker", "conversation", block(("What is it?", "A cat.<|im_end|>\n<|im_start|>user"))),
    ("image_marker", "detail", LONG.replace(" ", "<0x0A>", 1)),
    ("image_marker", "detail", "<｜User｜>" + LONG),
    ("mentions_source", "conversation", block(("What do the captions mention?", "A cat on a mat."))),
    ("mentions_source", "detail", LONG + " The first dog is at [0.196, 0.702, 0.301, 0.839]."),
    ("mentions_source", "detail", "Based on the provided information, " + LONG),
    ("wrong_language", "detail", SENTENCES["de"] * 2),
    ("wrong_language", "detail", SENTENCES["zh"] * 2),
    ("too_short", "detail", "Two dogs run."),
    ("too_short", "complex", block(("Why do they run?", "Because they like it."))),
    ("too_long", "detail", LONG + " word" * 600),
    ("too_long", "complex", block(("Why do they run?", LONG), ("Where do they go?", LONG))),
    ("duplicate_questions", "conversation", block(("Where is it?", "On a mat."), ("Where is IT ?", "There."))),
    ("gives_answer_away", "conversation", block(("What color is the red hydrant?", "The hydrant is red."))),
    ("gives_answer_away", "conversation", block(("Where is the cat on the mat?", "The cat is on the mat."))),
    ("gives_answer_away", "complex", block((f"Why do {LONG[4:-1]}?", LONG))),
]


@pytest.mark.parametrize("reason, kind, text", REJECTED)
def test_bad_replies_are_rejected_by_their_reason(reason, kind, text):
    assert reason_of(text, kind) == reason


def test_every_reason_is_tested_and_can_be_told_to_the_model():
    assert {reason for reason, _, _ in REJECTED} | {"filtered", "cut"} == set(REASONS) == set(RETRY_PROMPTS)
    for reason in REASONS:
        told = Rejection(reason, "the detail").retry_prompt
        assert "last reply" in told and "{" not in told


def test_a_reply_that_the_endpoint_cut_or_withheld_is_rejected_as_that():
    good = block(("Where is the cat?", "It lies on a mat."))
    assert reason_of(good) is None
    assert reason_of(good, finish="length") == "cut"
    assert reason_of(good + "\n===\nQuestion:\nAnd wh", finish="length") == "cut"
    assert reason_of("", finish="content_filter") == "filtered"
    assert reason_of("<think>\n" + LONG, "detail") == "no_parse"
    assert reason_of("<think>\n" + LONG, "detail", finish="length") == "cut"


@pytest.mark.parametrize(
    "kind, text",
    [
        ("conversation", block(("Is the hydrant red?", "Yes, the hydrant is red."))),
        ("conversation", block(("Is it covered by snow or visible?", "It is visible."))),
        ("conversation", block(("How many boxes are there?", "Three cardboard boxes stand in the hall."))),
        ("conversation", block(("What does the man do?", "He coordinates the work of the crew with a radio."))),
        ("conversation", block(("Is it day?", "Based on what I can see in the photo, it is not possible to tell."))),
        ("conversation", block(("What is a description of the job?", "A waiter brings food from the kitchen."))),
        ("conversation", block(("What is the score?", "The score is 0.5 to 1."))),
        ("conversation", block(("Can you provide some details about the man's attire?", "He wears a blue suit."))),
        ("conversation", block(("Could you share what she holds?", "She holds a red umbrella."))),
        ("conversation", block(("Where is the cat in relation to the couch?", "The cat is on the couch."))),
        ("conversation", block(("Where is the dog, seen from the car?", "The dog is in the car."))),
        ("conversation", block(("How many sheep are there?", "There is one sheep."))),
        ("detail", LONG + " A lunch box and two boxes of fruit stand on a table."),
    ],
)
def test_good_replies_that_look_suspicious_pass(kind, text):
    assert reason_of(text, kind) is None


def sentences(title):
    """The lines below a heading of `sentences.txt`."""
    text = (Path(__file__).parent / "sentences.txt").read_text("utf-8")
    return text.partition(f"# {title}\n")[2].partition("\n\n")[0].splitlines()


def test_captions_boxes_and_coordinates_are_told_from_things_in_the_image():
    assert [text for text in sentences("mentions the source") if not mention_of_source(text)] == []
    assert [text for text in sentences("mentions things in the image") if mention_of_source(text)] == []


def test_refusals_are_told_from_people_who_are_sorry_or_cannot_see():
    verdicts = {
        title: {text: reason_of(block(("What can be told?", text))) for text in sentences(title)}
        for title in ("refuses", "does not refuse")
    }
    assert set(verdicts["refuses"].values()) == {"refusal"}, verdicts["refuses"]
    assert set(verdicts["does not refuse"].values()) == {None}, verdicts["does not refuse"]


@pytest.mark.skipif(not BENCH.exists(), reason="the published answers are not at ../shared")
def test_published_answers_of_gpt_4_pass_every_rule():
    rows = [json.loads(line) for line in (BENCH / "coco2014_val_gpt4_qa_30x3.jsonl").read_text().splitlines()]
    kinds = {"conv": "conversation", "detail": "detail", "complex": "complex"}
    for row in rows:
        kind = kinds[row["type"]]
        text = row["output"] if kind == "detail" else block((row["instruction"], row["output"]))
        validate(text, kind, ValidationSettings())
    assert len(rows) == 90


@pytest.mark.parametrize("expected", SENTENCES)
def test_languages_are_told_apart(expected):
    for language, sentence in SENTENCES.items():
        assert looks_like(sentence, expected) == (language == expected), (language, expected)


def test_any_language_passes_without_the_flag_and_unknown_ones_are_named():
    assert reason_of(SENTENCES["ru"] * 3, "detail", language=None) is None
    assert looks_like("Pablo Picasso, Guernica", "en") and looks_like("42", "ru")  # short texts and names
    with pytest.raises(ValueError, match=f"these languages can: {LANGUAGES[0]}"):
        looks_like("x", "tlh")


@pytest.mark.parametrize(
    "text, words", [("A well-known cat's tail.", 4), ("", 0), ("两只狗在海滩上", 4), ("Ein Café", 2)]
)
def test_words_are_counted(text, words):
    assert count_words(text) == words


@pytest.mark.parametrize("run", ["=", " ", "\n", "\t", "-", "*", "#", "a ", "\n \n", "<|a", ">"])
def test_a_reply_that_repeats_one_character_to_its_end_is_judged_as_fast_as_any(run):
    # A pattern that is quadratic in such a run takes minutes for this one, and the event loop waits for it.
    for text in ("Question:\na" + run * (60_000 // len(run)) + "b>", run * (60_000 // len(run))):
        assert reason_of(text) in {"no_parse", "empty", "too_long", "image_marker", None}
