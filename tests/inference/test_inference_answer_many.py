"""Whole benchmarks through `LlavaPredictor.answer_many`: the answers of `generate`, whatever the batch."""

import pytest
from tiny_predictor import QUESTIONS, assistant_turn, generated, picture, user_turn

from modeling_llava.inference import LlavaPredictor, decoding
from modeling_llava.inference.prompts import encode_prompt


def samples_of(specification):
    """(image seeds, question) → samples; a conversation before the question where it is a list."""
    samples = []
    for number, (seeds, question) in enumerate(specification):
        images = [picture(seed) for seed in seeds]
        messages = [user_turn(question, [None] * len(images))]
        messages[0]["content"] = [
            {"type": "image"} if item["type"] == "image" else item for item in messages[0]["content"]
        ]
        samples.append({"id": f"s{number}", "messages": messages, "images": images})
    return samples


def test_benchmark_answers_equal_generate_whatever_the_batch(model, processor, passes, tmp_path):
    specification = [
        ([1], QUESTIONS[0]),
        ([], QUESTIONS[1]),
        ([2], QUESTIONS[1] * 3),
        ([1], QUESTIONS[2]),
        ([3, 4], QUESTIONS[4]),
        ([], QUESTIONS[2]),
        ([1], QUESTIONS[1]),
        ([5], QUESTIONS[4]),
        ([2], QUESTIONS[2]),
        ([3, 4], QUESTIONS[0]),
        ([6], QUESTIONS[3]),
    ]
    for seed in range(1, 7):
        picture(seed).save(tmp_path / f"{seed}.png")
    samples = samples_of(specification)
    for sample, (seeds, _) in zip(samples, specification):
        sample["images"] = [f"{seed}.png" for seed in seeds]
    expected = {
        f"s{number}": generated(model, processor, [user_turn(question, [picture(seed) for seed in seeds])], 9)
        for number, (seeds, question) in enumerate(specification)
    }
    predictor = LlavaPredictor(model, processor)
    for batch_size in (1, 3, 8, 64):
        passes.images.clear()
        answers = list(
            predictor.answer_many(iter(samples), batch_size=batch_size, image_folder=tmp_path, max_new_tokens=9)
        )
        assert {answer.id: answer.text for answer in answers} == expected
        assert len(answers) == len(samples)
    assert passes.images == [6]  # six images in all, each encoded once


def test_a_row_that_ends_makes_room_at_once(model, processor, passes):
    """Another takes its place in the next pass, in which the others get their next token; their answers stay what they are."""
    samples = samples_of([([seed], QUESTIONS[seed]) for seed in range(4)])
    predictor = LlavaPredictor(model, processor)
    free = {answer.id: answer.text for answer in predictor.answer_many(samples, batch_size=4, max_new_tokens=30)}
    early, others = free["s1"], [free[f"s{number}"] for number in (0, 2, 3)]  # s1 is the longest prompt: the first row
    stops = [early[i : i + n] for n in (1, 2, 3, 4) for i in range(len(early) // 2)]
    stop = next(stop for stop in stops if stop.strip() == stop and not any(stop in other for other in others))
    passes.tokens.clear(), passes.rows.clear()
    options = {"batch_size": 3, "max_new_tokens": 30, "stop_strings": (stop,)}
    answers = {answer.id: answer for answer in predictor.answer_many(samples, **options)}
    assert [answers[f"s{number}"].finish_reason for number in range(4)] == ["length", "stop", "length", "length"]
    assert {name: answers[name].text for name in ("s0", "s2", "s3")} == {
        name: free[name] for name in ("s0", "s2", "s3")
    }
    steps = answers["s1"].num_tokens
    shortest = min(len(encode_prompt(sample["messages"], processor)) for sample in samples)
    assert passes.tokens[1 : steps + 1] == [3] * (steps - 1) + [2 + shortest]
    assert passes.rows[: steps + 1] == [3] * (steps + 1)


def test_benchmark_names_the_sample_that_is_bad(model, processor, tmp_path):
    predictor = LlavaPredictor(model, processor)
    good = samples_of([([1], "a")])[0]
    for change, message in (
        ({"images": ["gone.png"]}, "sample 's0' .*gone.png"),
        ({"messages": []}, "sample 's0' has no message"),
        ({"messages": [{"role": "user", "content": "What?"}]}, "sample 's0' has a message whose content is 'What"),
        ({"images": []}, "sample 's0' marks 1 image .* but comes with 0"),
        ({"messages": [*good["messages"], assistant_turn("x")]}, "sample 's0' ends with the assistant"),
    ):
        with pytest.raises(ValueError, match=message):
            list(predictor.answer_many([{**good, **change}], image_folder=tmp_path))
    with pytest.raises(ValueError, match="no messages"):
        list(predictor.answer_many([{"id": 1, "images": []}]))
    with pytest.raises(ValueError, match="batch_size"):
        next(predictor.answer_many([good], batch_size=0))


def test_benchmark_reads_its_samples_as_it_goes(model, processor):
    """A stream without an end is no problem: nothing is collected."""
    predictor = LlavaPredictor(model, processor)
    read = []

    def endless():
        number = 0
        while True:
            read.append(number)
            yield {"id": number, "messages": [user_turn("What?")], "images": []}
            number += 1

    answers = predictor.answer_many(endless(), batch_size=2, max_new_tokens=2)
    first = [next(answers).id for _ in range(40)]
    assert len(set(first)) == 40 and len(read) <= 40 + 2 * 16 + 2


def test_long_prompts_are_computed_in_several_passes(model, processor, passes, monkeypatch):
    samples = samples_of([([seed], QUESTIONS[seed % 5] * (1 + seed % 3)) for seed in range(9)])
    predictor = LlavaPredictor(model, processor)
    expected = {a.id: a.text for a in predictor.answer_many(samples, max_new_tokens=4)}
    passes.tokens.clear()
    monkeypatch.setattr(decoding, "MAX_PREFILL_TOKENS", 200)
    assert {a.id: a.text for a in predictor.answer_many(samples, max_new_tokens=4)} == expected
    longest = max(len(encode_prompt(sample["messages"], processor)) for sample in samples)
    assert max(passes.tokens) <= max(200, longest) + 8  # and a token of each answer
