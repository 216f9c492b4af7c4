"""Callbacks: the speed in each log."""

import pytest
import torch
from transformers.trainer_callback import TrainerState

from modeling_llava.training import train
from modeling_llava.training.callbacks import SpeedCallback


SPEED = {"samples_per_second", "supervised_tokens_per_second", "utilization", "memory_gib", "minutes_left"}


def step(callback, state, *batches):
    callback.begin_step()
    for batch in batches:
        callback.count(batch)
    state.global_step += 1
    callback.on_step_end(None, state, None)


@pytest.fixture
def clock(monkeypatch):
    """Each look at the clock comes one second after the last."""
    seconds = iter(range(1000))
    monkeypatch.setattr("modeling_llava.training.callbacks.time.perf_counter", lambda: float(next(seconds)))


def test_rates_are_counted_by_hand(clock):
    state = TrainerState(max_steps=10)
    callback = SpeedCallback()
    callback.on_train_begin(None, state, None)  # second 0
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 7, -100, -100]])  # 3 supervised
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])  # 6 of 8 filled
    padded = {"input_ids": torch.ones(2, 4), "labels": labels, "attention_mask": mask}
    packed = {"input_ids": torch.ones(1, 8), "labels": torch.tensor([[-100, 1, 1, -100, 1, -100, 1, 1]])}
    packed["cu_seq_lens_q"] = torch.tensor([0, 3, 5, 8])  # 3 samples, 5 supervised
    step(callback, state, padded, packed)  # seconds 1 to 2
    step(callback, state, padded)  # seconds 3 to 4
    found = callback.report(state, num_processes=2)  # second 5: 2.5 seconds a step
    assert found.pop("memory_gib") > 0
    assert found == {
        "samples_per_second": 2 * (2 + 3 + 2) / 2,
        "supervised_tokens_per_second": 2 * (3 + 5 + 3) / 2,
        "utilization": round((6 + 8 + 6) / 24, 4),
        "minutes_left": round(2.5 * 8 / 60, 1),
    }
    assert callback.report(state, 2) == {}  # nothing happened since


def test_memory_is_what_the_gpu_holds(monkeypatch):
    """7 of 8 GiB are taken, 5 of them by PyTorch now and 6 at its peak: the other 2 are CUDA's context and paged state."""
    gib = 2**30
    values = {"is_available": True, "mem_get_info": (gib, 8 * gib), "memory_reserved": 5 * gib}
    for name, value in {**values, "max_memory_reserved": 6 * gib, "max_memory_allocated": gib}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    callback = SpeedCallback()
    step(callback, TrainerState(max_steps=2), {"input_ids": torch.ones(1, 4), "labels": torch.ones(1, 4)})
    assert callback.report(TrainerState(max_steps=2), 1)["memory_gib"] == 8


def test_full_packs_count_the_room_that_they_leave(clock):
    callback, state = SpeedCallback(micro_batch_tokens=20), TrainerState(max_steps=2)
    callback.on_train_begin(None, state, None)
    step(callback, state, {"input_ids": torch.ones(1, 15), "labels": torch.ones(1, 15)})
    assert callback.report(state, 1)["utilization"] == 0.75


@pytest.mark.parametrize("packing", ["none", "batch", "full"])
def test_every_log_of_the_loss_says_how_fast_it_goes(settings, packing):
    result = train({**settings, "packing": packing})
    logs = [entry for entry in result.log_history if "loss" in entry]
    assert len(logs) == 2 and all(entry.keys() >= SPEED for entry in logs)
    assert logs[-1]["minutes_left"] == 0
    assert all(0 < entry["utilization"] <= 1 for entry in logs)
    assert packing != "batch" or logs[0]["utilization"] == 1
