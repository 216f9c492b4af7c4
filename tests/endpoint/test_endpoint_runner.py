import asyncio
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
from fault_server import FaultServer

from modeling_llava.endpoint import (
    Backoff,
    Budget,
    FatalFault,
    Ledger,
    OpenAIModel,
    PassingFault,
    Reply,
    RunSettings,
    Task,
    Usage,
    Verdict,
    run_tasks,
)
from modeling_llava.endpoint.limits import TokenBucket
from modeling_llava.endpoint.openai_model import parse_completion


pytest.importorskip("openai")
QUICK = Backoff(first=0.01, longest=0.05, attempts=30, patience=20)


def tasks(number):
    for i in range(number):
        yield Task(f"t{i}", [{"role": "system", "content": "describe"}, {"role": "user", "content": f"thing {i}."}])


class Scripted:
    """A `ChatModel` without a network: replies, or raises what the script says."""

    name = "scripted"

    def __init__(self, script=None, seconds=0.0, released=None):
        self.script, self.seconds, self.released = script or (lambda messages: "fine"), seconds, released
        self.asked = []
        self.in_flight = self.most_in_flight = 0

    async def complete(self, messages, *, max_tokens, temperature, seed=None, request_id=None):
        self.asked.append((request_id, messages))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        while self.released and not self.released.is_set():
            await asyncio.sleep(0.01)
        await asyncio.sleep(self.seconds)
        self.in_flight -= 1
        result = self.script(messages)
        if isinstance(result, Exception):
            raise result
        return result if isinstance(result, Reply) else Reply(result, usage=Usage(10, 5), model="scripted-1")


def test_request_carries_model_messages_length_temperature_and_its_id(tmp_path):
    task = Task("a", [{"role": "user", "content": "hi"}], 77, 0.3, 5)
    with FaultServer() as server, Ledger(tmp_path / "l") as ledger:
        run_tasks([task], OpenAIModel("tiny", base_url=server.url), ledger, run_id="run")
        sampling = {"max_tokens": 77, "temperature": 0.3, "seed": 5}
        assert server.bodies == [{"model": "tiny", "messages": task.messages, **sampling}]
        assert server.headers[0]["idempotency-key"] == task.request_id("run", "tiny", 1)
        assert ledger.counts.models == {"tiny-2026": 1}


def takes_no(body):
    """What an endpoint of a reasoning model says of a request's body; `None` if it answers."""
    if "max_tokens" in body:
        return 400, {"error": {"message": "Use 'max_completion_tokens' instead.", "param": "max_tokens"}}
    for name in ("temperature", "seed"):
        if name in body:
            return 400, {"error": {"message": "Unsupported value.", "param": name}}
    return None


def test_what_a_model_takes_is_learned_once_from_its_refusals_and_ids_stay(tmp_path, caplog):
    with FaultServer() as server, Ledger(tmp_path / "l") as ledger:
        server.reply = lambda messages: takes_no(server.bodies[-1]) or "fine"  # honours ids: one body under each
        model = OpenAIModel("m", base_url=server.url, optional=("temperature", "seed"))
        asked = [replace(task, seed=1) for task in tasks(9)]
        summary = run_tasks(asked, model, ledger, settings=RunSettings(1), run_id="run")
        assert (summary.accepted, len(server.bodies)) == (9, 9 + 3)
        assert set(server.bodies[-1]) == {"model", "messages", "max_completion_tokens"}
        assert (ledger.counts.requests, ledger.counts.faults) == (9, {})
        event = ledger.reply_at(ledger.state(asked[0].id).replies[0])
        assert event["request"] == asked[0].request_id("run", "m", 1) and event["left_out"] == ["seed", "temperature"]
    assert [record.message.count("max_completion_tokens") > 0 for record in caplog.records] == [True, False, False]


def test_a_parameter_that_is_not_optional_is_not_dropped(tmp_path):
    with FaultServer() as server, Ledger(tmp_path / "l") as ledger:
        server.reply = lambda messages: takes_no(server.bodies[-1]) or "fine"
        summary = run_tasks(tasks(1), OpenAIModel("m", base_url=server.url), ledger, settings=RunSettings(1))
        assert (summary.given_up, len(server.bodies)) == ({"400": 1}, 2)
        assert summary.last_error == "400: Unsupported value. (temperature)"


def test_all_faults_are_survived_and_counted(tmp_path):
    faults = {"429": 0.1, "500": 0.1, "cut": 0.1, "drop": 0.05, "malformed": 0.1, "shape": 0.05}
    with FaultServer(latency=0.002, faults=faults) as server, Ledger(tmp_path / "l") as ledger:
        model = OpenAIModel("tiny", base_url=server.url)
        summary = run_tasks(tasks(150), model, ledger, settings=RunSettings(16, backoff=QUICK))
        assert (summary.stopped, summary.accepted) == ("done", 150)
        assert len(server.paid) == 150 and set(server.paid.values()) == {1}
        counted = ledger.counts.faults
        assert counted["429"] == server.injected["429"] and counted["500"] == server.injected["500"]
        assert counted["malformed"] == server.injected["malformed"] + server.injected["shape"]
        assert counted["connection"] == server.injected["cut"] + server.injected["drop"]
        assert ledger.counts.requests == sum(server.asked.values()) == 150 + counted.total()


def http(body):
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


@pytest.mark.parametrize(
    "payload, kind, maybe_paid",
    [
        (None, "connection", False),  # nobody listens
        (b"", "connection", True),  # closed without an answer
        (http("{" * 100)[:-50], "connection", True),  # cut
        (b"SSH-2.0-OpenSSH_9\r\n\r\n", "malformed", True),
        (http("<html>"), "malformed", True),
        (http('{"usage": {"prompt_tokens": ' + "9" * 6000 + "}}"), "malformed", True),
        (http("[" * 100_000), "malformed", True),
    ],
)
def test_what_a_broken_endpoint_sends_is_a_fault_that_says_whether_it_may_have_been_paid(payload, kind, maybe_paid):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def serve():
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(payload)

        if payload is None:
            listening.close()
        else:
            threading.Thread(target=serve, daemon=True).start()
        model = OpenAIModel("m", base_url=f"http://127.0.0.1:{port}/v1", timeout=10)
        with pytest.raises(PassingFault) as caught:
            asyncio.run(model.complete([{"role": "user", "content": "hi"}], max_tokens=5, request_id="r"))
    assert (caught.value.kind, caught.value.maybe_paid) == (kind, maybe_paid)


@pytest.mark.parametrize(
    "text, usage, expected",
    [
        ("fine", {"prompt_tokens": 7, "completion_tokens": 2}, Reply("fine", "stop", Usage(7, 2))),
        ("fine", {"total_tokens": 9}, Reply("fine")),
        ("fine", {"prompt_tokens": float("inf"), "completion_tokens": 2}, Reply("fine")),
        ("fine", {"prompt_tokens": -1}, Reply("fine")),
        ("a \ud83d cat", None, Reply("a ? cat")),  # a lone surrogate cannot be written to a file
    ],
)
def test_a_reply_is_taken_whatever_its_usage_says(text, usage, expected):
    assert parse_completion({"choices": [{"message": {"content": text}}], "usage": usage}) == expected


@pytest.mark.parametrize("url", ["localhost:8000/v1", "http://", "http://[::1/v1", "http://localhost:99999/v1"])
def test_a_malformed_address_is_named_before_anything_is_asked(url):
    with pytest.raises(ValueError, match=re.escape(url)):
        OpenAIModel("m", base_url=url)


def test_a_key_that_no_header_can_carry_is_named_before_anything_is_asked(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="set OPENAI_API_KEY"):
        OpenAIModel("m")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1\nsk-2")
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        OpenAIModel("m")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1\n")  # a line break at the end belongs to the file, not to the key
    OpenAIModel("m")
    with pytest.raises(ValueError, match="timeout"):
        OpenAIModel("m", timeout=0)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match="modeling-llava.engine."):
        OpenAIModel("m")


def test_a_slow_reply_times_out_and_is_asked_for_again_with_the_same_id(tmp_path):
    with FaultServer(faults={"hang": 1.0}) as server, Ledger(tmp_path / "l") as ledger:
        model = OpenAIModel("tiny", base_url=server.url, timeout=0.3)
        threading.Timer(0.7, server.faults.clear).start()
        summary = run_tasks(tasks(2), model, ledger, settings=RunSettings(2, backoff=QUICK))
        assert summary.accepted == 2
        assert ledger.counts.faults["timeout"] == ledger.counts.maybe_paid >= 2
        assert len(server.asked) == 2


def test_endpoint_that_dies_and_comes_back_is_waited_for(tmp_path):
    with FaultServer(latency=0.02) as server, Ledger(tmp_path / "l") as ledger:
        threading.Timer(0.3, server.die).start()
        threading.Timer(1.2, server.open).start()
        model = OpenAIModel("tiny", base_url=server.url)
        backoff = Backoff(first=0.05, longest=0.2, attempts=2, patience=30)
        summary = run_tasks(tasks(200), model, ledger, settings=RunSettings(4, backoff=backoff))
        assert (summary.stopped, summary.accepted) == ("done", 200)
        assert ledger.counts.faults["connection"] > 4  # more often than `attempts`: the requests are not at fault
        assert set(server.paid.values()) == {1}


def test_endpoint_that_stays_dead_stops_the_run_and_the_next_run_resumes(tmp_path, caplog):
    def reply(messages):
        if len(server.paid) == 30:
            server.faults["drop"] = 1.0
        return "fine"

    settings = RunSettings(1, backoff=Backoff(first=0.02, patience=0.5))
    with FaultServer(reply=reply) as server:
        model = OpenAIModel("tiny", base_url=server.url)
        with Ledger(tmp_path / "l") as ledger:
            first = run_tasks(tasks(50), model, ledger, settings=settings)
        assert (first.stopped, first.accepted) == ("endpoint", 30)
        assert "no reply for" in first.message and "asks" not in first.message
        assert sum("no reply for" in message for message in caplog.messages) == 1  # while it waits
        server.faults.clear()
        with Ledger(tmp_path / "l") as ledger:
            second = run_tasks(tasks(50), model, ledger)
        assert (second.stopped, second.skipped, second.accepted) == ("done", 30, 20)


def test_limits_are_kept_after_a_pause_that_the_endpoint_asked_for(tmp_path):
    times = []

    def script(messages):
        times.append(time.monotonic())
        return PassingFault("429", "slow down", retry_after=0.5) if len(times) == 1 else "fine"

    with Ledger(tmp_path / "l") as ledger:
        run_tasks(tasks(17), Scripted(script), ledger, settings=RunSettings(17, 1200, backoff=QUICK))
    # Those that waited during the pause are not sent all at once: 17 more requests, 50 ms apart.
    assert len(times) == 18 and times[-1] - times[0] >= 0.5 + 16 * 0.05 - 0.01


@pytest.mark.parametrize(
    "fault, words",
    [
        (FatalFault("404", "no such model"), "404"),
        (PassingFault("429", "daily limit", retry_after=7200), "asks to wait 7200 s"),  # longer than patience
    ],
)
def test_what_no_retry_can_fix_stops_the_run_at_once(tmp_path, fault, words):
    model = Scripted(lambda messages: fault)
    with Ledger(tmp_path / "l") as ledger:
        summary = run_tasks(tasks(100), model, ledger, settings=RunSettings(1))
    assert summary.stopped == "endpoint" and words in summary.message and len(model.asked) == 1


def test_tokens_per_minute_are_kept_by_what_was_used(tmp_path, monkeypatch):
    waits, take = [], TokenBucket.take
    monkeypatch.setattr(TokenBucket, "take", lambda *amount: waits.append(take(*amount)) or waits[-1])
    model = Scripted()  # uses 15 tokens although 1024 and more were reserved for it
    with Ledger(tmp_path / "l") as ledger:
        run_tasks(tasks(6), model, ledger, settings=RunSettings(1, tokens_per_minute=60_000))
    assert len(waits) == 6 and sum(waits) < 1  # 6 × 1034 tokens at 1000 per second would take five seconds


def test_a_request_that_always_fails_is_given_up_and_asked_again_by_the_next_run(tmp_path):
    model = Scripted(lambda messages: PassingFault("500", "oops") if "3" in messages[-1]["content"] else "fine")
    backoff = Backoff(attempts=3, first=0.001, longest=0.001)
    with Ledger(tmp_path / "l") as ledger:
        summary = run_tasks(tasks(10), model, ledger, settings=RunSettings(2, backoff=backoff))
    assert summary.given_up == {"500": 1} and summary.accepted == 9 and len(model.asked) == 12
    with Ledger(tmp_path / "l") as ledger:
        assert run_tasks(tasks(10), Scripted(), ledger).accepted == 1


def test_concurrency_is_a_bound_and_tasks_are_drawn_as_workers_become_free(tmp_path):
    drawn = Counter()

    def counted():
        for task in tasks(200):
            drawn["tasks"] += 1
            # What is drawn and not settled is what workers hold.
            assert drawn["tasks"] - drawn["settled"] <= 8
            yield task

    model = Scripted(seconds=0.002)
    with Ledger(tmp_path / "l") as ledger:
        run_tasks(counted(), model, ledger, settings=RunSettings(8), on_settled=lambda t, a: drawn.update(settled=1))
    assert model.most_in_flight == 8 and drawn["settled"] == 200


def rejecting(task, reply):
    return Verdict("too_short", "3 words", "Your last reply was too short.") if reply.text == "bad" else Verdict()


def test_a_budget_is_kept_where_prompts_take_far_more_tokens_than_expected(tmp_path):
    def script(messages):
        characters = sum(len(message["content"]) for message in messages)
        return Reply("fine", usage=Usage(2 * characters, 100))  # seven times the first estimate

    long = [Task(f"t{i}", [{"role": "user", "content": "字" * 1000}], max_tokens=100) for i in range(200)]
    with Ledger(tmp_path / "l") as ledger:
        model = Scripted(script, seconds=0.005)
        summary = run_tasks(long, model, ledger, settings=RunSettings(64), budget=Budget(max_tokens=100_000))
        assert summary.stopped == "budget" and 95_000 < sum(ledger.counts.used) <= 100_000
    assert model.most_in_flight > 10  # 1, 2, 4, … at once


def test_a_rejected_reply_is_asked_for_once_more_with_the_reason(tmp_path):
    model = Scripted(lambda messages: "good" if len(messages) == 4 else "bad")
    with Ledger(tmp_path / "l") as ledger:
        summary = run_tasks(tasks(1), model, ledger, judge=rejecting)
        assert (summary.accepted, summary.rejected) == (1, 0)
        told = [(message["role"], message["content"]) for message in model.asked[1][1][2:]]
        assert told == [("assistant", "bad"), ("user", "Your last reply was too short.")]
        assert model.asked[0][0] != model.asked[1][0]
        kept = [ledger.reply_at(position) for position in ledger.state("t0").replies]
        found = [(event["text"], event["reason"], event["final"]) for event in kept]
        assert found == [("bad", "too_short", False), ("good", None, True)]


def test_a_reply_rejected_twice_settles_the_task(tmp_path):
    model = Scripted(lambda messages: "bad")
    for again in (False, True):
        with Ledger(tmp_path / "l") as ledger:
            summary = run_tasks(tasks(3), model, ledger, judge=rejecting)
            assert (summary.rejected, summary.skipped, len(model.asked)) == ((0, 3, 6) if again else (3, 0, 6))
            assert ledger.counts.rejected == {"too_short": 6} and ledger.state("t0").final


def test_a_run_stopped_between_the_two_replies_resumes_with_the_second(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        first = Scripted(lambda messages: "bad" if len(messages) == 2 else FatalFault("401", "gone"))
        run_tasks(tasks(1), first, ledger, judge=rejecting, settings=RunSettings(1))
    second = Scripted(lambda messages: "good")
    with Ledger(tmp_path / "l") as ledger:
        assert run_tasks(tasks(1), second, ledger, judge=rejecting).accepted == 1
    assert second.asked[0][0] == first.asked[1][0]  # the same request, not a new one
    assert [message["content"] for message in second.asked[0][1][2:]] == ["bad", "Your last reply was too short."]


def test_budget_ends_the_run_without_being_overdrawn_and_a_larger_one_resumes_it(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        budget = Budget(max_tokens=3000)
        summary = run_tasks(tasks(500), Scripted(seconds=0.001), ledger, settings=RunSettings(8), budget=budget)
        used = sum(ledger.counts.used)
    assert summary.stopped == "budget" and "3,000" in summary.message
    # 15 tokens a reply; what is reserved for one request (1024 + prompt) is left over, not that for eight.
    assert used <= 3000 < used + 1024 + 20
    with Ledger(tmp_path / "l") as ledger:
        again = run_tasks(tasks(500), Scripted(), ledger, budget=Budget(max_tokens=used + 50))
        assert (again.stopped, again.accepted) == ("budget", 0)
        rest = run_tasks(tasks(500), Scripted(), ledger, budget=Budget(max_tokens=100_000))
    assert rest.stopped == "done" and summary.accepted + rest.accepted == 500


@pytest.mark.parametrize(
    "handle, times, in_notebook", [(True, 1, True), (True, 1, False), (False, 1, False), (True, 2, True)]
)
def test_ctrl_c_finishes_what_is_in_flight_and_leaves_nothing_running(tmp_path, handle, times, in_notebook):
    """A notebook has a running event loop; a run that continued there would cost money after its cell was stopped."""
    pressed = threading.Event()
    model = Scripted(seconds=0.3 if times == 1 else 30, released=pressed)

    def stop_button():
        while model.in_flight < 4:
            time.sleep(0.01)
        for _ in range(times):
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)
        pressed.set()

    def run():
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=stop_button).start()
        try:
            with Ledger(tmp_path / "l") as ledger:
                return run_tasks(tasks(1000), model, ledger, settings=RunSettings(4), handle_interrupt=handle)
        finally:
            signal.signal(signal.SIGINT, before)

    async def notebook():
        return run()

    threads = threading.active_count()
    with nullcontext() if (handle, times) == (True, 1) else pytest.raises(KeyboardInterrupt):
        assert (asyncio.run(notebook()) if in_notebook else run()).stopped == "interrupt"
    assert threading.active_count() == threads and len(model.asked) <= 8
    with Ledger(tmp_path / "l", write=False) as ledger:  # what was in flight was waited for, or is known to be unknown
        assert (ledger.counts.accepted, ledger.counts.unknown) == ((4, 0) if times == 1 else (0, 4))
