import asyncio
import json

import pytest

from modeling_llava.endpoint import BATCH_PRICE, Budget, Ledger, Prices


def sent(task, request="r", attempt=1, tokens=(10, 20)):
    return {"event": "sent", "task": task, "request": request, "attempt": attempt, "tokens": list(tokens)}


def reply(task, request="r", attempt=1, reason=None, final=True, usage=(5, 6), **more):
    event = {"event": "reply", "task": task, "request": request, "attempt": attempt, "text": f"text of {task}"}
    return {**event, "usage": list(usage) if usage else None, "model": "m", "reason": reason, "final": final, **more}


def test_state_after_reopening_equals_state_while_writing(tmp_path):
    path = tmp_path / "l.jsonl"
    fault = {"event": "fault", "task": "b", "request": "3", "attempt": 1, "kind": "500"}
    with Ledger(path) as live:
        live.append_now([sent("a", "1"), reply("a", "1", reason="empty", final=False)])
        live.append_now([sent("a", "2", 2), reply("a", "2", 2), sent("b", "3"), fault])
    with Ledger(path) as again:
        assert again.counts == live.counts
        assert again.tasks == live.tasks
        state = again.state("a")
        assert state.final and state.accepted and len(state.replies) == 2
        assert again.reply_at(state.replies[0])["reason"] == "empty"
        assert again.reply_at(state.replies[1])["request"] == "2"
        assert not again.state("b").final and again.counts.faults == {"500": 1}


@pytest.mark.parametrize("cut", [1, 10])
def test_an_incomplete_last_line_is_counted_and_not_continued(tmp_path, cut):
    path = tmp_path / "l.jsonl"
    with Ledger(path) as ledger:
        ledger.append_now([sent("a", "1"), reply("a", "1"), sent("b", "2"), reply("b", "2")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Ledger(path) as ledger:
        # A line that lacks only its end of line is complete.
        torn = cut > 1
        assert ledger.counts.torn == torn
        assert ledger.state("a").final
        assert ledger.state("b").final == (not torn)
        assert ledger.counts.unknown == torn  # b was sent, its reply is lost
        ledger.append_now([sent("b", "2"), reply("b", "2")])
        assert ledger.reply_at(ledger.state("b").replies[-1])["text"] == "text of b"
    with Ledger(path) as ledger:
        assert ledger.counts.torn == torn and ledger.state("b").final
        assert ledger.counts.replies == (2 if torn else 3)


def test_requests_in_flight_at_a_kill_are_counted_once_each(tmp_path):
    path = tmp_path / "l.jsonl"
    with Ledger(path) as ledger:
        ledger.append_now([sent("a", "1"), sent("b", "2")])
    for _ in range(2):
        with Ledger(path) as ledger:
            assert ledger.counts.unknown == 2
            assert ledger.counts.perhaps_used == [20, 40]
    with Ledger(path) as ledger:
        ledger.append_now([sent("a", "1"), reply("a", "1")])
    with Ledger(path) as ledger:
        assert ledger.counts.unknown == 2 and ledger.counts.used == [5, 6]


def test_two_processes_cannot_write_one_ledger(tmp_path):
    for _ in range(2):
        with Ledger(tmp_path / "l.jsonl"), Ledger(tmp_path / "l.jsonl", write=False):
            with pytest.raises(OSError, match="another run"):
                Ledger(tmp_path / "l.jsonl")


def test_lines_of_many_tasks_are_whole_and_synced_together(tmp_path, monkeypatch):
    path = tmp_path / "l.jsonl"
    synced = []
    monkeypatch.setattr("os.fsync", lambda file: synced.append(path.read_bytes().count(b"\n")))

    async def one(ledger, i):
        ledger.append(sent(f"t{i}", str(i)), reply(f"t{i}", str(i)))
        # In the operating system's hands at once: a kill of the process no longer loses it.
        written = path.read_bytes().count(b"\n")
        assert f'"text": "text of t{i}"' in path.read_text()
        await ledger.synced()
        assert synced[-1] >= written

    async def all_of_them():
        with Ledger(path) as ledger:
            await asyncio.gather(*(one(ledger, i) for i in range(200)))
            for i in range(200):
                assert ledger.reply_at(ledger.state(f"t{i}").replies[0])["text"] == f"text of t{i}"

    asyncio.run(all_of_them())
    assert len(path.read_text().splitlines()) == 400
    assert len(synced) <= 2  # 200 concurrent tasks wait for one sync


def test_a_disk_that_refuses_reaches_every_waiting_task(tmp_path, monkeypatch):
    async def one(ledger, i):
        ledger.append(sent(str(i)))
        await ledger.synced()

    def refuse(file):
        raise OSError(5, "Input/output error")

    async def fails():
        with Ledger(tmp_path / "l.jsonl") as ledger:
            results = await asyncio.gather(*(one(ledger, i) for i in range(5)), return_exceptions=True)
            assert [type(result) for result in results] == [OSError] * 5

    monkeypatch.setattr("os.fsync", refuse)
    asyncio.run(fails())


def test_charge_books_replies_unknown_requests_and_batches_at_their_prices(tmp_path):
    with Ledger(tmp_path / "l.jsonl") as ledger:
        ledger.append_now([sent("a", "1"), reply("a", "1", usage=(100, 10))])
        ledger.append_now([{**sent("b", "2", tokens=(1000, 0)), "event": "batch", "file": "f"}])
        ledger.append_now([{**sent("c", "3", tokens=(0, 0)), "event": "batch", "file": "f"}])
        ledger.append_now([reply("c", "3", usage=(500, 0), batch=True)])
        ledger.append_now([sent("d", "4", tokens=(7, 3))])
        ledger.append_now([sent("e", "5", tokens=(70, 30)), reply("e", "5", usage=None)])  # counts as estimated
    with Ledger(tmp_path / "l.jsonl") as ledger:
        budget = Budget(prices=Prices(1.0, 1.0))
        ledger.charge(budget)
        assert budget.tokens == 110 + 1000 + 500 + 10 + 100
        assert budget.cost == pytest.approx((110 + BATCH_PRICE * 1500 + 10 + 100) / 1e6)


@pytest.mark.parametrize(
    "line",
    [
        {"event": "sent"},
        {"event": "sent", "task": ["a"], "request": "r", "tokens": [1, 2]},
        {"event": "reply", "task": "a", "request": "r", "reason": None, "final": True, "usage": [1]},
    ],
)
def test_a_line_that_was_edited_is_named(tmp_path, line):
    good = {"event": "sent", "task": "a", "request": "r", "attempt": 1, "tokens": [1, 2]}
    (tmp_path / "l").write_text("".join(json.dumps(event) + "\n" for event in (good, line, good)))
    for _ in range(2):  # the lock is released
        with pytest.raises(ValueError, match="l, line 2, is not an event of a run"):
            Ledger(tmp_path / "l")


def test_lines_of_another_version_and_broken_ones_are_skipped(tmp_path):
    lines = [b'{"event": "future", "x": 1}', b"[" * 100_000, b"9" * 5000, b"\0" * 4096, b"\xff", b"{}", b"null"]
    (tmp_path / "l").write_bytes(b"\n".join(lines) + b"\n")
    with Ledger(tmp_path / "l") as ledger:
        assert ledger.counts.torn == 6 and not ledger.tasks
