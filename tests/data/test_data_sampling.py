"""The order of samples: grouped by length and modality, or mixed by conversation type."""

from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from modeling_llava.data.sampling import GroupedSampler, TypeMixtureSampler


def mix(number=1003, seed=0):
    rng = np.random.default_rng(seed)
    has_image = rng.random(number) < 0.8
    return rng.integers(20, 400, number) + 576 * has_image, has_image


def global_batches(sampler, size):
    order = list(sampler)
    return [order[i : i + size] for i in range(0, len(order), size)]


def test_every_sample_is_given_once_in_global_batches_of_one_modality_but_for_the_rest():
    lengths, has_image = mix()
    sampler = GroupedSampler(lengths, 32, has_image)
    assert sorted(sampler) == list(range(1003)) and len(sampler) == 1003 and not list(GroupedSampler([], 4))
    batches = global_batches(sampler, 32)
    mixed = [i for i, batch in enumerate(batches) if len({bool(has_image[j]) for j in batch}) > 1]
    assert mixed in ([len(batches) - 2], [len(batches) - 2, len(batches) - 1], [len(batches) - 1])
    pure_text = sum(not has_image[batch].any() for batch in batches)
    assert pure_text >= (~has_image).sum() // 32


def test_batches_waste_less_padding_than_random_ones_and_come_in_random_order():
    lengths, has_image = mix(5000)
    sampler = GroupedSampler(lengths, 32, has_image)

    def padding(batches):
        return sum(len(b) * lengths[b].max() - lengths[b].sum() for b in batches) / lengths.sum()

    batches = global_batches(sampler, 32)
    order = np.random.default_rng(0).permutation(5000)
    assert padding(batches) < 0.25 * padding([order[i : i + 32] for i in range(0, 5000, 32)])
    heads = [lengths[batch].max() for batch in batches if has_image[batch].all()]
    assert np.corrcoef(heads[1:], np.arange(len(heads) - 1))[0, 1] == pytest.approx(0, abs=0.3)


def test_the_longest_sample_comes_first_so_that_lack_of_memory_shows_at_once():
    lengths, has_image = mix(960)
    batches = global_batches(GroupedSampler(lengths, 16, has_image), 16)
    full = [i for batch in batches if len({bool(has_image[j]) for j in batch}) == 1 for i in batch]
    assert batches[0][0] in np.flatnonzero(lengths == lengths[full].max())


def test_epochs_differ_and_come_back_with_set_epoch():
    sampler = GroupedSampler(*mix()[:1], 32, seed=3)
    first, second = list(sampler), list(sampler)
    assert first != second
    resumed = GroupedSampler(*mix()[:1], 32, seed=3)
    resumed.set_epoch(1)
    assert list(resumed) == second
    assert list(GroupedSampler(*mix()[:1], 32, seed=4)) != first


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_optimizer_steps_are_the_same_on_any_number_of_processes(world_size):
    lengths, has_image = mix(960)
    expected = [sorted(batch) for batch in global_batches(GroupedSampler(lengths, 32, has_image), 32)]
    per_device = 4

    def shard(rank):
        batches = BatchSampler(GroupedSampler(lengths, 32, has_image), per_device, drop_last=False)
        return list(BatchSamplerShard(batches, world_size, rank))

    shards = [shard(rank) for rank in range(world_size)]
    accumulation = 32 // (per_device * world_size)
    steps = []
    for start in range(0, len(shards[0]), accumulation):
        steps.append(sorted(i for shard in shards for batch in shard[start : start + accumulation] for i in batch))
    assert steps == expected
    work = torch.tensor([[int(lengths[batch].max()) for batch in shard] for shard in shards], dtype=torch.float)
    assert (work.amax(0) / work.amin(0)).median() < 1.1  # nobody waits long for the others


# The paper's numbers, by the hundred: 58K conversations, 23K details, 77K complex questions.
TYPES = ["conversation"] * 580 + ["detail"] * 230 + ["complex"] * 770


def epoch(sampler, number):
    sampler.set_epoch(number)
    return list(sampler)


@pytest.mark.parametrize(
    ("weights", "number"),
    [({"conversation": 1, "detail": 1, "complex": 1}, 1580), ({"conversation": 0, "detail": 30, "complex": 10}, 1000)],
)
def test_types_are_drawn_by_their_weights_on_any_scale_whatever_their_number(weights, number):
    sampler = TypeMixtureSampler(TYPES, weights)
    drawn = epoch(sampler, 0)
    assert len(drawn) == len(sampler) == number
    counts = Counter(TYPES[i] for i in drawn)
    for kind, weight in weights.items():
        share = weight / sum(weights.values())
        assert abs(counts[kind] - number * share) <= 4 * (number * share * (1 - share)) ** 0.5  # 4 standard deviations


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
    assert [list(sampler), list(sampler)] == [draws(0, 0), draws(0, 1)]  # the next epoch follows


def test_a_type_without_a_weight_and_a_weight_without_a_type_are_errors():
    with pytest.raises(ValueError, match=r"no weight for complex \(770 samples\)"):
        TypeMixtureSampler(TYPES, {"conversation": 1, "detail": 1})
    with pytest.raises(ValueError, match="no sample has that type"):
        TypeMixtureSampler(TYPES, {"conversation": 1, "detail": 1, "complex": 1, "reasoning": 1})
    with pytest.raises(ValueError, match=r"no weight for None \(1 samples\)"):
        TypeMixtureSampler([*TYPES, None], {"conversation": 1, "detail": 1, "complex": 1})
    rows = [{"type": "detail"}, {"type": None}, {}]
    with pytest.raises(ValueError, match=r"no weight for None \(2 samples\)"):
        TypeMixtureSampler.from_dataset(rows, {"detail": 1})
