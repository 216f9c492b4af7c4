"""Sampling by conversation type."""

from collections import Counter

import pytest

from modeling_llava.training.mixture import TypeMixtureSampler, conversation_types


# The paper's numbers, by the hundred: 58K conversations, 23K details, 77K complex questions.
TYPES = ["conversation"] * 580 + ["detail"] * 230 + ["complex"] * 770


def epoch(sampler, number):
    sampler.set_epoch(number)
    return list(sampler)


def test_types_are_drawn_uniformly_whatever_their_number():
    sampler = TypeMixtureSampler(TYPES, {"conversation": 1, "detail": 1, "complex": 1})
    drawn = epoch(sampler, 0)
    assert len(drawn) == len(sampler) == 1580
    counts = Counter(TYPES[i] for i in drawn)
    for kind in ("conversation", "detail", "complex"):
        assert abs(counts[kind] - 1580 / 3) < 4 * (1580 * (1 / 3) * (2 / 3)) ** 0.5  # 4 standard deviations


def test_weights_are_shares_on_any_scale():
    sampler = TypeMixtureSampler(TYPES, {"conversation": 0, "detail": 30, "complex": 10})
    counts = Counter(TYPES[i] for i in epoch(sampler, 0))
    assert len(sampler) == 1000 and counts["conversation"] == 0
    assert abs(counts["detail"] - 750) < 4 * (1000 * 0.75 * 0.25) ** 0.5


def test_nothing_is_drawn_twice_before_everything_was_drawn_once():
    sampler = TypeMixtureSampler(TYPES, {"conversation": 1, "detail": 1, "complex": 1})
    times = Counter(epoch(sampler, 0))
    for kind in ("conversation", "detail", "complex"):
        of_kind = [times[i] for i, t in enumerate(TYPES) if t == kind]
        assert max(of_kind) - min(of_kind) <= 1, kind


def test_draws_depend_on_seed_and_epoch_alone():
    def draws(seed, number):
        return epoch(TypeMixtureSampler(TYPES, {"conversation": 1, "detail": 2, "complex": 3}, seed), number)

    assert draws(0, 1) == draws(0, 1)
    assert draws(0, 1) != draws(0, 2) and draws(0, 1) != draws(1, 1)
    sampler = TypeMixtureSampler(TYPES, {"conversation": 1, "detail": 2, "complex": 3})
    assert [list(sampler), list(sampler)] == [draws(0, 0), draws(0, 1)]  # goes on by itself


def test_a_type_without_a_weight_and_a_weight_without_a_type_are_errors():
    with pytest.raises(ValueError, match=r"no weight for complex \(770 samples\)"):
        TypeMixtureSampler(TYPES, {"conversation": 1, "detail": 1})
    with pytest.raises(ValueError, match="no sample has that type"):
        TypeMixtureSampler(TYPES, {"conversation": 1, "detail": 1, "complex": 1, "reasoning": 1})
    with pytest.raises(ValueError, match=r"no weight for None \(1 samples\)"):
        TypeMixtureSampler([*TYPES, None], {"conversation": 1, "detail": 1, "complex": 1})


def test_types_are_read_off_any_dataset():
    rows = [{"type": "detail"}, {"type": None}, {}]
    assert conversation_types(rows) == ["detail", None, None]
