import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_llava.data_engine.samples import OVERLAP, QuestionIndex, count_question_words, question_words


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("What color is the cat?", "what COLOR is the cat", True),
        ("What color is the cat in the image?", "What color is the cat?", True),
        ("What can be seen in this photo?", "What can be seen?", True),
        ("What color is the cat?", "What color is the dog?", False),
        ("What might the man do next on this street?", "What might the man next do on the street?", True),
        ("Where?", "Where in the picture?", True),
    ],
)
def test_questions_are_compared_by_their_words(one, other, same):
    index = QuestionIndex(count_question_words([one, other]))
    assert index.add(one, "first") is None
    assert index.add(other, "second") == ("first" if same else None)


WORDS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=7)


@given(questions=st.lists(WORDS.map(" ".join), max_size=60), repeats=st.integers(1, 3))
def test_index_keeps_what_comparing_each_with_each_keeps(questions, repeats):
    index = QuestionIndex(count_question_words(questions), repeats)
    kept = []
    for question in questions:
        words = question_words(question)
        alike = [name for name, other in kept if len(words & other) >= OVERLAP * len(words | other) - 1e-9]
        expected = alike[0] if len(alike) >= repeats else None
        assert index.add(question, question) == expected
        if expected is None:
            kept.append((question, words))
