"""The exam: what is asked, what counts as right, and the two proofs that the model looks."""

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from modeling_llava.tiny_world.exam import (
    HELD_OUT_NAMES,
    KINDS,
    ExamItem,
    answer_by_majority,
    blank_image,
    is_right,
    read_turns,
    score,
    set_exam,
    shuffle_images,
)
from modeling_llava.tiny_world.figures import choose_answers, smooth
from modeling_llava.tiny_world.world import draw_scenes, write_split


def item(number, kind="colour", question="What colour is the ball?", answer="The ball is red."):
    return ExamItem(f"{number}:{kind}", Path(f"{number}.jpg"), kind, question, answer)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_split(folder / "unseen", draw_scenes(60, 0, "unseen"))
    write_split(folder / "held_out", draw_scenes(30, 0, "held_out", held_out=True))
    return folder


def test_the_exam_asks_each_kind_once_per_image(world):
    items = set_exam(world / "unseen", seed=0)
    per_image = Counter(item.image for item in items)
    # one thing: neither count nor largest; several small ones: no largest
    assert len(per_image) == 60 and set(per_image.values()) == {len(KINDS) - 2, len(KINDS) - 1, len(KINDS)}
    assert len({item.id for item in items}) == len(items)
    assert items == set_exam(world / "unseen", seed=0)
    presence = [item.answer.startswith("Yes") for item in items if item.kind == "presence"]
    assert 15 < sum(presence) < 45


def test_held_out_questions_are_decided_by_a_held_out_pair(world):
    items = set_exam(world / "held_out", seed=0, held_out=True)
    by_image = {item.image: [one for one in items if one.image == item.image] for item in items}
    assert len(by_image) == 30
    for asked in by_image.values():
        assert {"colour", "object", "position"} <= {one.kind for one in asked}
        words = " ".join(one.question + " " + one.answer for one in asked)
        assert any(name in words for name in HELD_OUT_NAMES)


def test_score_by_hand():
    items = [item(0), item(1), item(2, "place", "Where?", "On a beach."), item(3, "place", "Where?", "In the snow.")]
    shares = score(items, ["The ball is red.", "the  ball is RED", "On a beach.", ""])
    assert shares == {"all": 0.75, "place": 0.5, "colour": 1.0}
    assert not is_right(items[0], "The ball is red and blue.") and not is_right(items[0], "The ball is")


def test_majority_answer_by_hand():
    question = "What colour is the ball?"
    training = [(question, "The ball is blue."), *[(question, "The ball is red.")] * 2]
    items = [item(0), item(1, question="what colour is the ball"), item(2, question="Never asked?")]
    assert answer_by_majority(items, training) == ["The ball is red.", "The ball is red.", ""]


def test_turns_are_read_from_llava_rows_on_either_side_of_the_image():
    rows = [["<image>\nA?", "1"], ["B?\n<image>", "2", "C?", "3"]]
    turns = read_turns([{"conversations": [{"value": text} for text in row]} for row in rows])
    assert turns == [("A?", "1"), ("B?", "2"), ("C?", "3")]


@pytest.mark.parametrize("scenes", [2, 17])
def test_no_question_keeps_its_image_when_they_are_shuffled_or_blank(scenes, tmp_path):
    items = [item(number) for number in range(scenes) for _ in range(3)]
    for seed in range(20):
        shuffled = shuffle_images(items, seed)
        assert all(one.image != image for one, image in zip(items, shuffled))
        assert set(shuffled) == {one.image for one in items}
    Image.new("RGB", (7, 5), "red").save(tmp_path / "a.png")
    blank = blank_image(tmp_path / "a.png")
    assert blank.size == (7, 5) and len(blank.getcolors()) == 1


def test_the_figure_shows_wrong_answers_in_their_proportion_and_a_held_out_pair():
    rows = []
    for number in range(100):
        expected = "It is the blue star." if number == 77 else "x"
        row = {"image": f"{number}.jpg", "kind": KINDS[number % len(KINDS)], "question": "?", "answer": "x"}
        rows.append({**row, "expected": expected, "right": number % 5 != 0})
    chosen = choose_answers(rows, 10)
    assert len(chosen) == 10 and len({row["image"] for row in chosen}) == 10
    assert sum(not row["right"] for row in chosen) == 2
    assert any("blue star" in row["expected"] for row in chosen)
    assert all(row["right"] for row in choose_answers([row for row in rows if row["right"]], 10))
    assert smooth([3.0, 1.0, 2.0, 6.0]) == [3.0, 2.0, 2.0, 3.0]  # of a loss curve, over earlier steps only
