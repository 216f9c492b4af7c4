"""`kill -9` at random moments, again and again; then the run is resumed to its end and everything is counted."""

import json
import multiprocessing
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from fault_server import FaultServer, answer
from killed_run import CONFIG, contexts, live


pytest.importorskip("openai")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="SIGKILL")


def sometimes_too_short(messages):
    """A third of the first replies is rejected, so that second attempts are killed too."""
    query = messages[-1]["content"]
    return "too short" if "thing" in query and sum(map(ord, query)) % 3 == 0 else answer(messages)


@pytest.fixture
def context(monkeypatch):
    """Processes that fork from a server, which imports all that they need once."""
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "endpoint")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_run", "openai", "fault_server"])
    return context


def kill_and_resume(context, out, kills, number, *, honours_keys, seed):
    rng = random.Random(seed)
    with FaultServer(latency=0.05, honours_keys=honours_keys, reply=sometimes_too_short) as server:
        killed = 0
        while killed < kills:
            process = context.Process(target=live, args=(out, server.url, number, 8))
            process.start()
            before = sum(server.asked.values())
            if rng.random() < 0.8:  # most in the middle of things, some while it starts
                deadline = time.monotonic() + 60
                while sum(server.asked.values()) == before and process.is_alive() and time.monotonic() < deadline:
                    time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.4))
            killed += process.is_alive()
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
        assert killed >= min(kills, 3), "the run was over before it could be killed"
        summary = live(out, server.url, number, 8)
    # No context lost, none written twice, no reply asked for again.
    assert summary.run.stopped == "done" and not summary.run.given_up
    rows = json.loads((out / "instruct.json").read_text("utf-8"))
    names = [row["id"] for row in rows]
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text("utf-8").splitlines()]
    lost = {row["id"] for row in rejected if row["attempt"] == 2}
    planned = [f"{context.id}:{kind}" for context in contexts(number) for kind in CONFIG.types]
    assert names == [name for name in planned if name not in lost] and lost < set(planned)  # in the contexts' order
    lines = [
        line for line in (out / "ledger.jsonl").read_bytes().splitlines() if line.startswith(b'{"event": "reply"')
    ]
    replies = Counter(json.loads(line)["request"] for line in lines if line.endswith(b"}"))
    assert set(replies.values()) == {1}
    assert set(replies) == set(server.paid)
    return server, summary, killed


@pytest.mark.parametrize(
    "kills, number", [pytest.param(6, 40, id="6"), pytest.param(50, 700, id="50", marks=pytest.mark.slow)]
)
def test_kill_9_at_random_moments_loses_nothing_and_pays_nothing_twice(tmp_path, context, kills, number):
    server, summary, killed = kill_and_resume(context, tmp_path, kills, number, honours_keys=True, seed=kills)
    assert set(server.paid.values()) == {1}
    # What was asked for more than once is what was in flight at a kill, no more.
    again = sum(times - 1 for times in server.asked.values())
    assert again <= summary.ledger.unknown <= 8 * killed


@pytest.mark.slow
def test_an_endpoint_that_ignores_request_names_is_paid_twice_at_most_for_what_was_in_flight(tmp_path, context):
    server, summary, killed = kill_and_resume(context, tmp_path, 20, 300, honours_keys=False, seed=1)
    twice = sum(times - 1 for times in server.paid.values())
    assert twice <= summary.ledger.unknown <= 8 * killed
    assert summary.ledger.perhaps_used[1] == 1024 * summary.ledger.unknown  # which the budget counts
