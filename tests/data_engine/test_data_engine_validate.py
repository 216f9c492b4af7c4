import json
from pathlib import Path

import pytest

from modeling_llava.data_engine.languages import LANGUAGES, looks_like
from modeling_llava.data_engine.replies import REASONS, RETRY_PROMPTS, Rejection, parse_description, parse_turns
from modeling_llava.data_engine.validate import ValidationSettings, count_words, mention_of_source, validate


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
    assert parse_description("Answer:\nThe answer: two dogs.\n\nThey run.\n===\n") == [
        ("", "The answer: two dogs.\n\nThey run.")
    ]


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nThe captions tell of dogs.\n</think>\n\n{}",
        "The captions tell of dogs.\n</think>\n{}",  # opened by the chat template
        "Sure, here's a detailed description:\n\n{}",
        "```\n{}\n```",
        "{}<|eot_id|>",
        "{}\n\nI hope this helps! Let me know if you need more.",
        "## Detailed Description:\n{}",
        "Question:\nWhat does the image show?\n===\nAnswer:\n{}\n===",
    ],
)
def test_what_models_put_around_a_description_is_taken_off(text):
    assert validate(text.format(LONG), "detail", ValidationSettings()) == [("", LONG)]


def test_thoughts_without_an_end_are_no_description():
    assert reason_of("<think>\n" + LONG, "detail") == "no_parse"
    assert reason_of("<think>\n" + LONG, "detail", finish="length") == "cut"


def reason_of(text, kind="conversation", finish="stop", **settings):
    try:
        validate(text, kind, ValidationSettings(**settings), finish)
    except Rejection as rejection:
        return rejection.reason
    return None


REJECTED = [
    ("no_parse", "conversation", "The cat sits on the mat and looks at the dog."),
    ("empty", "conversation", "  \n"),
    ("empty", "detail", "Answer:\n"),
    ("refusal", "conversation", "I'm sorry, but I can't see the image."),
    ("refusal", "conversation", block(("What is it?", "As an AI language model, I cannot view photos."))),
    (
        "refusal",
        "detail",
        "I am unable to view the picture, so a full description of it is not possible for me to give at all.",
    ),
    ("image_marker", "conversation", block(("What is in <image>?", "A cat."))),
    ("image_marker", "conversation", block(("What is it?", "A cat.<|im_end|>\n<|im_start|>user"))),
    ("mentions_source", "conversation", block(("What is it?", "The caption says that it is a cat."))),
    ("mentions_source", "conversation", block(("What do the captions mention?", "A cat on a mat."))),
    ("mentions_source", "detail", LONG + " One bounding box is near the left edge."),
    ("mentions_source", "detail", LONG + " The first dog is at [0.196, 0.702, 0.301, 0.839]."),
    ("mentions_source", "detail", LONG + " The coordinates of the dog show that it is on the left."),
    ("mentions_source", "detail", "According to the descriptions, " + LONG),
    ("mentions_source", "detail", "Based on the provided information, " + LONG),
    (
        "wrong_language",
        "detail",
        "Zwei Hunde laufen am Strand entlang, weil die Ebbe eingesetzt hat und der nasse Sand fest genug ist, um sie zu tragen, und die Sonne scheint dazu.",
    ),
    (
        "wrong_language",
        "detail",
        "两只狗在海滩上奔跑,因为潮水退去,湿沙足够坚实,可以承载它们的速度,远处有一艘小船,天空很晴朗,没有别的人。",
    ),
    ("too_short", "detail", "Two dogs run."),
    ("too_short", "complex", block(("Why do they run?", "Because they like it."))),
    ("too_long", "detail", LONG + " word" * 600),
    ("too_long", "complex", block(("Why do they run?", LONG), ("Where do they go?", LONG))),
    (
        "duplicate_questions",
        "conversation",
        block(("Where is the cat?", "On a mat."), ("Where is the CAT ?", "There.")),
    ),
    ("gives_answer_away", "conversation", block(("What color is the red hydrant?", "The hydrant is red."))),
    ("gives_answer_away", "conversation", block(("Where is the cat on the mat?", "The cat is on the mat."))),
    (
        "gives_answer_away",
        "complex",
        block(
            (
                "Why do the two dogs run along the beach because the tide is low and the wet sand is firm enough to carry them at speed?",
                LONG,
            )
        ),
    ),
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


@pytest.mark.parametrize(
    "kind, text",
    [
        ("conversation", block(("Is the hydrant red?", "Yes, the hydrant is red."))),
        ("conversation", block(("Is it covered by snow or visible?", "It is visible."))),
        ("conversation", block(("How many boxes are there?", "Three cardboard boxes stand in the hall."))),
        ("conversation", block(("What does the man do?", "He coordinates the work of the crew with a radio."))),
        ("conversation", block(("Is it day?", "Based on what I can see in the photo, it is not possible to tell."))),
        (
            "conversation",
            block(("What is a description of the job?", "A waiter brings food, from the menu to the table.")),
        ),
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


SPEAKS_OF_SOURCE = [
    "The captions mention a dog.",
    "According to the caption, the man is riding a bike.",
    "Based on the given description, the dog is asleep.",
    "The bounding box of the dog is at the left.",
    "The dog is located at [0.1, 0.2, 0.5, 0.6].",
    "The coordinates suggest that the dog is left of the cat.",
    "The provided sentences describe two people.",
    "It is described in the captions.",
    "The caption doesn't say who took the photo.",
    "None of the captions mentions a cat.",
    "The descriptions mention two people.",
    "The person stands at (0.32, 0.5).",
    "The dog spans [0, 0.12, 1, 0.9] of the frame.",
    "Its region is [0, 0, 1, 0.5].",
    "Caption 3 says that the man is old.",
    "From the information provided, it is a park.",
    "Based on the information given, the boy is about ten.",
    "In the image description, there is a dog.",
    "The description doesn't state the color of the car.",
    "The x-coordinate of the car is lower.",
    "Coordinates of the car show it's in front.",
    "The object boxes overlap, so the people are close.",
    "The box coordinates put the dog to the left.",
    "It is near the bottom (x1, y1 are high).",
    "According to the object list there are five chairs.",
    "The first two captions call it a bus.",
    "Based on provided information, this is a wedding.",
    "Each caption tells of a red car.",
    "The fifth caption hints at rain.",
    "As per the descriptions, it is winter.",
    "The bounding-boxes are large.",
    "Its x=0.31 puts it on the left.",
    "Judging from the given boxes, the person is close.",
    "The object detection results show a dog.",
    "The detected objects include a cup.",
    "The scene is described as busy.",
    "The list of objects includes a fork.",
    "The annotations show three people.",
    "Captions provide nothing more.",
    "The information provided doesn't tell the color.",
    "The image's captions agree.",
    "There isn't enough information provided to tell.",
    "The color of the car is not mentioned.",
    "Its maker is not explicitly specified.",
    "The name is stated in the given context.",
    "It reaches from x1 0.3 to the middle.",
    "It lies in the range [0.25 0.5].",
    "The man at 0.32, 0.44 is old.",
    "The caption’s words tell of a man; the caption says he is old.",
]
SPEAKS_OF_THE_PICTURE = [
    "A cardboard box sits next to the sofa.",
    "The boxes are stacked on the truck.",
    "Judging by the boxes stacked in the room, the family is moving in.",
    "Based on the boxes in the hall, someone has just moved.",
    "A mail box stands at the corner of the street.",
    "The cat looks out of the box with curious eyes.",
    "The lunch box holds sandwiches, grapes and carrots.",
    "Given the context, it is likely a birthday party.",
    "Given the context of the scene, the man may be a farmer.",
    "In this context, the umbrella protects from the sun.",
    "Given the information on the sign, parking is forbidden here.",
    "The sign provided information about the trail.",
    "The airport has provided information desks for travellers.",
    "Information boards line the path.",
    "The man coordinates his tie with his jacket.",
    "The crew coordinates the landing of the plane.",
    "A coach coordinates with the players from the side line.",
    "The scarf coordinates nicely with her hat.",
    "The poster has a caption that reads 'SALE'.",
    "The caption on the poster reads 'Open day'.",
    "The caption reads 'Happy birthday' in icing.",
    "According to the text on the sign, no dogs are allowed.",
    "The text on the bus reads 'Not in service'.",
    "The score shown is 0.5 to 1, and 1.5 miles are left.",
    "The clock shows 10:25 (0.5 hours before the train).",
    "The sentence on the blackboard is written in chalk.",
    "The sentences written on the wall are graffiti.",
    "The coordinates on the GPS screen change.",
    "The sign in the description box of the museum is old.",
    "The first caption in the comic strip is funny.",
    "The information provided on the board is for hikers.",
    "A white BMW X1 is parked near an object of art.",
    "The prices are 0.5, 0.75 and 1 dollar.",
    "A phone box and a traffic light box stand side by side.",
    "There are three boxes of pizza with different toppings.",
    "The tennis court has a service box marked by white lines.",
    "A batter stands in the batter's box near home plate.",
    "The box in the middle is open; the box to its left is closed.",
    "The room is decorated with great attention to detail.",
    "This data center has many cables.",
    "The screen shows data about the flight.",
    "The price list on the wall is long.",
    "The details of the dress are fine lace.",
    "A boxer stands in a ring; boxing is a sport.",
    "The bookshelf holds text books (3 of them).",
    "From the information available at the stop, the bus comes soon.",
    "The name is not specified on the tag.",
    "The text in the caption below the photo of the newspaper is French.",
]
REFUSES = [
    "I'm sorry, but I can't see the image.",
    "I’m sorry, I can’t help with that.",
    "Sorry, but I can't assist with this.",
    "I cannot see what is in the picture.",
    "I am unable to view images.",
    "I'm not able to provide a description.",
    "As an AI, I have no eyes.",
    "As a large language model I only read text.",
    "As an AI language model, I only read text.",
    "As an AI assistant, I only read text.",
    "As an AI I only read text.",
    "\"I'm sorry, but I can't help with that.\"",
    "I don't have access to the photo.",
    "I do not have direct access to images.",
    "No image was provided.",
    "The image isn't attached, so nothing can be said.",
    "I apologize, but this is not possible.",
    "I'm afraid I can't tell.",
    "I cannot answer that question.",
    "I can not describe the person.",
    "I'm just a language model.",
    "I cannot fulfill this request.",
    "I won't be able to help with that.",
    "It is not possible for me to see it.",
    "Please provide the image.",
    "Could you upload the photo?",
    "Without seeing the image, one can only guess.",
    "I need more information.",
]
DOES_NOT_REFUSE = [
    "The man looks sorry about the broken vase.",
    "The dog may be afraid of the water.",
    "One cannot see the face of the man, as he is turned away.",
    "I can't see any other people near the bench.",
    "The sign says 'Sorry, we are closed'.",
    "A person with a fear of heights might think: I am afraid of heights.",
    "The child cannot reach the shelf, so the adult helps.",
    "The AI logo is printed on the shirt.",
    "The woman is unable to see the road because of the fog.",
    "No photo is on the wall.",
    "People cannot access the beach from here.",
    "The robot is an AI assistant toy.",
    "The sign says 'Please share the road'.",
    "Without seeing the road, the driver goes slowly.",
    "The speech bubble says 'I can't see what you mean'.",
    'The card reads "I am sorry for your loss".',
    "The sign reads: “Sorry, I cannot help”.",
    "The billboard praises a phone with an assistant that serves as an AI companion.",
    "Sorry-looking shoes lie next to the dog.",
]


def test_captions_boxes_and_coordinates_are_found_and_things_in_the_picture_are_not_taken_for_them():
    assert [text for text in SPEAKS_OF_SOURCE if not mention_of_source(text)] == []
    assert [(text, mention_of_source(text)) for text in SPEAKS_OF_THE_PICTURE if mention_of_source(text)] == []


def test_refusals_are_told_from_people_who_are_sorry_or_cannot_see():
    validated = {text: reason_of(block(("What can be told?", text))) for text in REFUSES + DOES_NOT_REFUSE}
    assert [text for text in REFUSES if validated[text] != "refusal"] == []
    assert [text for text in DOES_NOT_REFUSE if validated[text]] == []


@pytest.mark.skipif(not BENCH.exists(), reason="the published answers are not beside the project")
def test_published_answers_of_gpt_4_pass_every_rule():
    rows = [json.loads(line) for line in (BENCH / "coco2014_val_gpt4_qa_30x3.jsonl").read_text().splitlines()]
    kinds = {"conv": "conversation", "detail": "detail", "complex": "complex"}
    for row in rows:
        kind = kinds[row["type"]]
        text = row["output"] if kind == "detail" else block((row["instruction"], row["output"]))
        validate(text, kind, ValidationSettings())
    assert len(rows) == 90


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


@pytest.mark.parametrize("expected", SENTENCES)
def test_languages_are_told_apart(expected):
    for language, sentence in SENTENCES.items():
        assert looks_like(sentence, expected) == (language == expected), (language, expected)


def test_any_language_passes_without_the_flag_and_unknown_ones_are_named():
    assert reason_of(SENTENCES["ru"] * 3, "detail", language=None) is None
    with pytest.raises(ValueError, match=f"these languages can: {LANGUAGES[0]}"):
        looks_like("x", "tlh")


def test_short_texts_and_names_are_not_rejected_for_their_language():
    assert looks_like("Pablo Picasso, Guernica", "en") and looks_like("42", "ru")


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
