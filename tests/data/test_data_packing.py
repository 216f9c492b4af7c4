"""Packing: every sample once, nothing overfull, close to the bound, the same again, and rows that say what they hold."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_llava.data.collator import pack_sequences
from modeling_llava.data.packing import PackedDataset, PackedStream, best_fit_packs


LENGTHS = st.lists(st.integers(1, 50), max_size=120)


def instruct_lengths(number, seed=0):
    """A mix like LLaVA-Instruct's: 576 image positions in 94 of 100 samples, log-normal text."""
    rng = np.random.default_rng(seed)
    text = np.exp(rng.normal(5.2, 0.7, number)).astype(int)
    return np.clip(text + 576 * (rng.random(number) < 0.94), 20, 2048)


@given(LENGTHS, st.integers(50, 90), st.none() | st.integers(0, 5))
def test_every_sample_is_in_exactly_one_pack_and_none_is_overfull(lengths, capacity, seed):
    plan = best_fit_packs(lengths, capacity, seed)
    assert sorted(itertools.chain(*plan)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in pack) <= capacity for pack in plan)
    assert plan.num_samples == len(lengths) and plan.num_tokens == sum(lengths)


def test_the_fullest_sufficient_pack_is_chosen():
    # 7 and 6 open packs with rooms 3 and 4; 4 fits only the second, 3 then the first: both full
    assert list(best_fit_packs([6, 3, 7, 4], 10)) == [[2, 1], [0, 3]]


def test_a_seed_draws_ties_and_order_and_nothing_else():
    lengths = instruct_lengths(2000)
    plans = [best_fit_packs(lengths, 2048, seed) for seed in (1, 1, 2)]
    assert list(plans[0]) == list(plans[1]) != list(plans[2])
    contents = [sorted(sorted(lengths[pack].tolist()) for pack in plan) for plan in plans]
    assert contents[0] == contents[2]


def test_samples_that_cannot_be_packed_are_named():
    with pytest.raises(ValueError, match="Sample number 1 has 11 tokens, but a pack holds 10"):
        best_fit_packs([3, 11], 10)
    with pytest.raises(ValueError, match="Sample number 2 has 0 tokens"):
        best_fit_packs([3, 1, 0], 10)
    with pytest.raises(ValueError, match="sample '2' has 99 tokens, but a pack holds 10"):
        list(stream_of([3, 4, 99], capacity=10))
    assert len(best_fit_packs([], 10)) == 0 and best_fit_packs([], 10).utilization == 0


def test_the_whole_of_llavas_mix_is_packed():
    plan = best_fit_packs(instruct_lengths(665_000), 4096, seed=0)  # about a second; hours if it took time by n²
    assert plan.utilization > 0.95
    assert plan.summary().startswith("665,000 samples in ") and plan.summary().endswith("% filled")


def test_a_packed_dataset_gives_lists_of_samples():
    data = [f"sample {i}" for i in range(7)]
    packed = PackedDataset(data, best_fit_packs([5, 4, 3, 3, 2, 2, 1], 10))
    assert sorted(sample for i in range(len(packed)) for sample in packed[i]) == data
    with pytest.raises(IndexError):
        packed[len(packed)]


def stream_of(lengths, **kwargs):
    samples = [{"id": str(i), "length": int(length)} for i, length in enumerate(lengths)]
    return PackedStream(samples, lambda sample: sample["length"], **kwargs)


@settings(deadline=None)
@given(LENGTHS, st.integers(50, 90), st.integers(1, 20))
def test_a_stream_gives_every_sample_once_and_no_pack_is_overfull(lengths, capacity, look_ahead):
    packs = list(stream_of(lengths, capacity=capacity, look_ahead=look_ahead))
    assert sorted(int(s["id"]) for pack in packs for s in pack) == list(range(len(lengths)))
    assert all(0 < sum(s["length"] for s in pack) <= capacity for pack in packs)


def test_the_look_ahead_is_bounded():
    read = 0

    def endless():
        nonlocal read
        for length in itertools.cycle([7, 3, 9, 2, 6]):
            read += 1
            yield length

    packs = iter(PackedStream(endless(), int, capacity=10, look_ahead=16))
    given_samples = 0
    for _ in range(500):
        given_samples += len(next(packs))
        assert read - given_samples <= 16


def test_no_sample_waits_longer_than_the_look_ahead():
    # nothing can be packed next to the 9s, and the 2s always fit better than another 9
    lengths = [9] + [5, 5] * 300
    for number, pack in enumerate(stream_of(lengths, capacity=10, look_ahead=20)):
        if any(sample["id"] == "0" for sample in pack):
            assert number <= 20
            break


def test_a_stream_is_filled_about_as_well_as_known_lengths():
    lengths = instruct_lengths(20_000)
    packs = list(stream_of(lengths, capacity=2048))
    assert packs == list(stream_of(lengths, capacity=2048))  # the same stream, the same packs
    assert len(packs) <= 1.01 * len(best_fit_packs(lengths, 2048))


def test_a_row_says_where_its_samples_begin():
    ids = [torch.tensor([1, 8, 9]), torch.tensor([1, 7])]
    labels = [torch.tensor([5, 8, 9]), torch.tensor([-100, 7])]
    row = pack_sequences(ids, labels)
    assert row["input_ids"].tolist() == [[1, 8, 9, 1, 7]]
    assert row["labels"].tolist() == [[-100, 8, 9, -100, 7]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert row["cu_seq_lens_q"].tolist() == row["cu_seq_lens_k"].tolist() == [0, 3, 5]
    assert row["cu_seq_lens_q"].dtype == torch.int32
    assert (row["max_length_q"], row["max_length_k"]) == (3, 3) and "attention_mask" not in row
    assert labels[0].tolist() == [5, 8, 9]  # what came in stays as it was
    with pytest.raises(ValueError, match="at least one sample"):
        pack_sequences([], [])
    with pytest.raises(ValueError, match=r"\[3, 2\] tokens came with labels of \[3, 3\]"):
        pack_sequences(ids, [labels[0], labels[0]])
