"""Streamed training data: each row once in an epoch, for every number of processes and workers, packed or not."""

import itertools
import json
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from modeling_llava.data.collator import LlavaDataCollator
from modeling_llava.data.packing import PackedStream
from modeling_llava.data.sources import load_conversations
from modeling_llava.training import LlavaTrainingArguments, train
from modeling_llava.training.batches import EndlessStream, ShardedStream


def rows(number, first=0):
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A picture."}]
    return [{"id": str(i), "messages": messages, "images": []} for i in range(first, first + number)]


class Marked(torch.utils.data.IterableDataset):
    """Rows of a stream with their epoch: `(epoch, id)`."""

    def __init__(self, stream):
        self.stream = stream

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.stream.set_epoch(epoch)

    def __iter__(self):
        return ((self.epoch, row["id"]) for row in self.stream)


def source_of(kind, number, tmp_path):
    from datasets import Dataset

    if kind == "list":
        return rows(number)
    if kind == "shards":
        return Dataset.from_list(rows(number)).to_iterable_dataset(num_shards=min(3, number))
    paths = [tmp_path / "a.json", tmp_path / "b.jsonl"]
    paths[0].write_text(json.dumps(rows(number // 2)))
    paths[1].write_text("\n".join(json.dumps(row) for row in rows(number - number // 2, number // 2)))
    return [str(path) for path in paths]


def shares(source, world_size, num_workers, look_ahead, shuffle_buffer):
    """What each process gets, one pack, or one row as a pack of its own, after the other."""
    for rank in range(world_size):
        stream = Marked(
            load_conversations(source, streaming=True, shuffle_buffer=shuffle_buffer).shared_by(rank, world_size)
        )
        if look_ahead:
            stream = PackedStream(stream, length_of, capacity=10, look_ahead=look_ahead)
        loader = DataLoader(EndlessStream(stream, world_size), batch_size=1, num_workers=num_workers, collate_fn=list)
        yield iter(loader)


def length_of(marked):
    return 2 + int(marked[1]) * 3 % 5


SHARED_OUT = [
    ("list", 11, 1, 0), ("list", 7, 3, 0), ("list", 2, 4, 0), ("files", 11, 2, 0), ("files", 9, 1, 2),
    ("files", 7, 2, 2), ("list", 2, 1, 3), ("shards", 7, 2, 0), ("shards", 5, 1, 4),
]  # fmt: skip
FORMS = [(None, 0), (256, 4), (None, 4), (3, 0)]  # look-ahead of packs, shuffle buffer
CASES = [(*case, *form) for case in SHARED_OUT for form in FORMS[: 2 if case[3] else 4]]  # starting workers takes time


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind, number, world_size, num_workers, look_ahead, shuffle_buffer", CASES)
def test_each_row_is_given_once_in_an_epoch(
    kind, number, world_size, num_workers, look_ahead, shuffle_buffer, tmp_path
):
    source = source_of(kind, number, tmp_path)
    given = Counter()
    for share in shares(source, world_size, num_workers, look_ahead, shuffle_buffer):
        for batch in itertools.islice(share, 6 * number):
            given.update(batch[0] if look_ahead else batch)
    for epoch in range(4):  # all shares are beyond these
        assert {i: given[epoch, i] for i in map(str, range(number))} == dict.fromkeys(map(str, range(number)), 1)
    assert max(given.values()) == 1


@pytest.mark.parametrize("number, world_size", [(11, 2), (9, 8), (3, 4), (8, 4)])
def test_no_process_falls_behind_in_the_epochs(number, world_size, tmp_path):
    source = source_of("files", number, tmp_path)
    all_shares = list(shares(source, world_size, 0, None, 0))
    given = Counter()
    for step in range(1, 40):
        for share in all_shares:
            given.update(row for _, row in next(share))
        times = [given[str(i)] for i in range(number)]
        assert max(times) - min(times) <= 1 and sum(times) == step * world_size


@pytest.mark.parametrize("is_bad", [lambda i: i % 2, lambda i: i > 2], ids=["every other row", "all but three"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_rows_that_are_dropped_leave_no_process_ahead(is_bad, world_size):
    source = rows(12)
    for i, row in enumerate(source):
        row["messages"] = row["messages"][: 1 if is_bad(i) else 2]
    stream = load_conversations(source, streaming=True, on_bad_sample="drop")
    all_shares = [
        iter(EndlessStream(stream.shared_by(rank, world_size, keep_places=True), world_size))
        for rank in range(world_size)
    ]
    given = Counter()
    for _ in range(60):
        given.update(next(share)["id"] for share in all_shares)
    usable = [given[str(i)] for i in range(12) if not is_bad(i)]
    assert max(usable) - min(usable) <= 1 and given["nothing"] + sum(usable) == 60 * world_size


def test_rows_that_recur_at_intervals_are_spread_over_the_processes():
    """Every third row fills a pack alone: dealt out in turn, one process of three would have seven packs to the others' one."""
    source, packs = rows(300), [Counter(), Counter(), Counter()]
    for rank, counts in enumerate(packs):
        stream = Marked(load_conversations(source, streaming=True).shared_by(rank, 3))
        endless = EndlessStream(PackedStream(stream, lambda row: 10 if int(row[1]) % 3 == 0 else 1, 10), 3)
        counts.update(epoch for pack in itertools.islice(endless, 400) for epoch, _ in pack[:1])
    assert max(len(counts) for counts in packs) - min(len(counts) for counts in packs) <= 2  # of about ten epochs


def test_an_empty_stream_is_said():
    stream = load_conversations(rows(4), streaming=True, types=["complex"])
    with pytest.raises(ValueError, match="holds no usable sample"):
        next(iter(EndlessStream(stream.shared_by(1, 2), 2)))
    none_fits = PackedStream(load_conversations(rows(4), streaming=True), lambda row: 0, capacity=10)
    with pytest.raises(ValueError, match="all were dropped"):
        next(iter(EndlessStream(none_fits)))


def test_what_is_to_be_done_at_the_end_of_an_epoch_is_warned_of(settings, caplog):
    LlavaTrainingArguments(**settings, streaming=True)
    assert not caplog.records
    LlavaTrainingArguments(**settings, streaming=True, save_strategy="epoch")
    assert "Set save_strategy=steps and save_steps" in caplog.text and "eval_strategy" not in caplog.text


@pytest.mark.parametrize("packing, workers", [("none", 0), ("full", 0), ("batch", 2)])
def test_a_stream_resumes_where_it_stopped_beyond_its_first_epoch(packing, workers, settings, tmp_path, monkeypatch):
    common = {
        **settings, "streaming": True, "shuffle_buffer": 5, "packing": packing, "max_steps": 9, "save_steps": 8,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,  # an epoch is three steps, or fewer
        "dataloader_num_workers": workers,
    }  # fmt: skip

    def train_in(folder, **changes):
        result = train({**common, "output_dir": str(tmp_path / folder), **changes})
        return [entry["loss"] for entry in result.log_history if "loss" in entry]

    whole = train_in("whole")
    made = []
    encode_all = LlavaDataCollator.encode_all
    monkeypatch.setattr(LlavaDataCollator, "encode_all", lambda *args: made.append(1) or encode_all(*args))
    assert train_in("again", resume=str(tmp_path / "whole" / "checkpoint-8")) == whole
    assert len(made) == (0 if workers else 3)  # those of one step, and one ahead: nothing is opened to be thrown away


@pytest.mark.parametrize("number, world_size", [(7, 3), (2, 4), (8, 2)])
def test_a_stream_that_is_evaluated_comes_out_even_on_all_processes(number, world_size):
    stream = load_conversations(rows(number), streaming=True)
    found = [[row["id"] for row in ShardedStream(stream, rank, world_size)] for rank in range(world_size)]
    assert {len(share) for share in found} == {-(-number // world_size)}
    in_turn = [share[i] for i in range(len(found[0])) for share in found]
    assert in_turn == [str(i) for i in range(number)] + ["nothing"] * (-number % world_size)


class OwnStream(torch.utils.data.IterableDataset):
    """Conversations from anywhere: a stream that is none of ours, and comes to an end."""

    def __init__(self, source, folder):
        self.source, self.folder = source, folder

    def __iter__(self):
        return iter(load_conversations(self.source, self.folder))


@pytest.mark.parametrize("packing", ["batch", "full"])
def test_any_stream_is_trained_on_and_evaluated(packing, settings, make_trainer):
    source, folder = settings["data"], settings["image_folder"]
    own, known = OwnStream(source, folder), load_conversations(source, folder)
    trainer = make_trainer(own, eval_dataset=own, packing=packing, max_steps=8, per_device_train_batch_size=8)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate(known)["eval_loss"], rel=1e-6)
    trainer.train()  # beyond the stream's end
    assert trainer.state.global_step == 8 and "loss" in trainer.state.log_history[-2]


def test_a_sample_of_a_packed_stream_that_is_too_long_is_dropped_and_counted_or_an_error(make_trainer):
    short = rows(8)
    long = {**rows(1, 9)[0], "messages": [{"role": "user", "content": "What? " * 300}, short[0]["messages"][1]]}
    for overflow in ("drop", "error"):
        stream = load_conversations([*short[:4], long, *short[4:]], streaming=True)
        trainer = make_trainer(stream, packing="full", overflow=overflow)
        if overflow == "error":
            with pytest.raises(ValueError, match="'9' has .* tokens, max_length is 256"):
                trainer.train()
        else:
            trainer.train()
            assert trainer.data_collator.dropped["too long"] >= 1
