"""Intervals and paired differences against arithmetic and known formulas."""

import numpy as np
import pytest

from modeling_llava.evaluation import results
from modeling_llava.evaluation.results import interval, paired_difference, wilson_interval


def test_wilson_interval_by_hand():
    z2 = 1.959963984540054**2
    assert wilson_interval(0, 10) == (0.0, pytest.approx(z2 / (10 + z2)))  # 0.2775
    assert wilson_interval(10, 10) == (pytest.approx(10 / (10 + z2)), 1.0)
    low, high = wilson_interval(50, 100)  # symmetric about one half
    assert low + high == pytest.approx(1.0) and low == pytest.approx(0.4038, abs=1e-4)


def test_bootstrap_interval_is_that_of_the_normal_distribution_for_many_samples():
    scores = np.random.default_rng(0).normal(0.4, 0.2, 4000)
    low, high = interval(scores)
    error = scores.std() / len(scores) ** 0.5
    assert low == pytest.approx(scores.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(scores.mean() + 1.96 * error, abs=0.15 * error)


def test_score_of_few_samples():
    assert interval([0.5]) is None and interval([]) is None
    assert interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    assert interval([1.0, 0.0]) == wilson_interval(1, 2)


def test_paired_difference_sees_what_unpaired_intervals_hide():
    """Hard and easy samples differ by far more than the models do; the second gains one point on every tenth sample."""
    rng = np.random.default_rng(1)
    first = (rng.random(400) < 0.5).astype(float)
    second = first.copy()
    second[np.flatnonzero(first == 0)[:20]] = 1.0
    found = paired_difference([(s, 1) for s in first], [(s, 1) for s in second])
    assert found["difference"] == pytest.approx(5.0) and found["samples"] == 400
    low, high = found["interval"]
    # 20 of 400 gains: standard error √(p (1 − p) / n) = 1.09 points
    assert low == pytest.approx(5 - 1.96 * 1.09, abs=0.4) and high == pytest.approx(5 + 1.96 * 1.09, abs=0.4)
    assert found["p_value"] < 0.01
    assert interval(first)[1] > interval(second)[0]  # apart, they overlap


def test_paired_difference_of_the_same_is_nothing():
    same = [(1.0, 1), (0.0, 1), (1.0, 1)]
    found = paired_difference(same, same)
    assert found["difference"] == 0 and found["interval"] == [0.0, 0.0] and found["p_value"] == 1.0
    swapped = paired_difference([(1.0, 1), (0.0, 1)], [(0.0, 1), (1.0, 1)])
    assert swapped["difference"] == 0 and swapped["p_value"] == 1.0


def test_large_samples_are_drawn_in_chunks(monkeypatch):
    scores = [float(n % 3) for n in range(100)]
    whole = interval(scores)
    monkeypatch.setattr(results, "_CHUNK", 300)
    assert interval(scores) == whole
