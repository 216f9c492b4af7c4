"""Requests that the endpoint refuses each time (HTTP 400): the request's fault, or that of the settings."""

import asyncio

import pytest
from test_endpoint_batch import output_line

from modeling_llava.endpoint import (
    Ledger,
    OpenAIModel,
    PassingFault,
    Reply,
    RequestFault,
    RunSettings,
    Task,
    Usage,
    Verdict,
    read_batch,
    run_tasks,
    write_batch,
)


def tasks(numbers):
    return [Task(f"t{i}", [{"role": "user", "content": f"{i}"}], 20) for i in numbers]


class Refusing:
    """Refuses the tasks of `numbers`, at once; answers others after `seconds`."""

    name = "m"

    def __init__(self, numbers, seconds=0.0):
        self.numbers, self.seconds, self.asked = set(numbers), seconds, []

    async def complete(self, messages, **options):
        number = int(messages[0]["content"])
        self.asked.append(number)
        if number in self.numbers:
            raise RequestFault("400", f"{number} is filtered")
        await asyncio.sleep(self.seconds)
        return Reply("fine", usage=Usage(10, 5), model="m-1")


def run(tmp_path, numbers, model, **options):
    with Ledger(tmp_path / "l") as ledger:
        return run_tasks(tasks(numbers), model, ledger, settings=RunSettings(options.pop("at_once", 4)), **options)


@pytest.mark.parametrize("at_once", [1, 4, 64])
@pytest.mark.parametrize("refused", [[0, 1, 2, 3], [6, 7, 8, 9], [0, 2, 4, 6, 8]])
def test_what_is_refused_while_others_are_answered_is_settled_wherever_it_is(tmp_path, refused, at_once):
    settled = []
    model = Refusing(refused, seconds=0.001)
    done = run(tmp_path, range(10), model, at_once=at_once, on_settled=lambda task, good: settled.append(good))
    assert (done.stopped, done.accepted, done.rejected) == ("done", 10 - len(refused), len(refused))
    assert not done.given_up and settled.count(False) == len(refused) and len(model.asked) == 10
    again = Refusing(refused)
    assert run(tmp_path, range(10), again).skipped == 10 and again.asked == []
    with Ledger(tmp_path / "l", write=False) as ledger:
        counts = ledger.counts
        assert (counts.replies, counts.accepted) == (10 - len(refused), 10 - len(refused))
        assert counts.rejected == {"refused_by_endpoint": len(refused)} and counts.faults == {"400": len(refused)}
        assert counts.used == [10 * counts.replies, 5 * counts.replies] and counts.perhaps_used == [0, 0]
        event = ledger.reply_at(ledger.state(f"t{refused[0]}").replies[-1])
    assert (event["detail"], event["final"], event["text"]) == (f"400: {refused[0]} is filtered", True, "")


def test_settings_that_every_request_is_refused_for_stop_the_run_and_settle_nothing(tmp_path):
    for at_once in (2, 64, 64):
        model = Refusing(range(1000))
        done = run(tmp_path, range(1000), model, at_once=at_once)
        assert done.stopped == "endpoint" and "is filtered" in done.message and "none was answered" in done.message
        assert len(model.asked) <= 5 + at_once and done.given_up == {"400": len(model.asked)}
    assert run(tmp_path, range(1000), Refusing([])).accepted == 1000


def test_an_endpoint_that_begins_to_refuse_everything_stops_the_run_and_settles_nothing_of_that(tmp_path):
    done = run(tmp_path, range(500), Refusing(range(100, 500)), at_once=4)
    assert (done.stopped, done.accepted, done.rejected) == ("endpoint", 100, 0)
    assert 25 <= done.given_up["400"] <= 29 and "since the last reply" in done.message
    done = run(tmp_path, range(500), Refusing([]))
    assert (done.stopped, done.accepted) == ("done", 400)


def test_the_last_few_are_settled_when_two_runs_have_had_them_refused(tmp_path):
    run(tmp_path, range(10), Refusing([]))
    done = run(tmp_path, range(13), Refusing([10, 11, 12]))
    assert (done.rejected, done.given_up) == (0, {"400": 3})  # nothing was answered: it may be a setting
    done = run(tmp_path, range(14), Refusing([10, 11, 12, 13]))
    assert (done.rejected, done.given_up) == (3, {"400": 1})
    model = Refusing([0])
    assert run(tmp_path / "alone", [0], model).given_up == run(tmp_path / "alone", [0], model).given_up == {"400": 1}


@pytest.mark.parametrize("refused", [range(40), range(30, 70), range(99)])
def test_some_runs_settle_however_many_are_refused_in_a_row(tmp_path, refused):
    for _ in range(15):
        done = run(tmp_path, range(100), Refusing(refused), at_once=4)
        if done.stopped == "done" and not done.given_up:
            break
    assert done.stopped == "done" and not done.given_up
    with Ledger(tmp_path / "l", write=False) as ledger:
        rejected = {number for number in range(100) if not ledger.state(f"t{number}").accepted}
        assert rejected == set(refused) and ledger.counts.rejected.total() == len(refused)


def test_a_second_attempt_that_is_refused_keeps_the_first_reply(tmp_path):
    class TooLong(Refusing):
        async def complete(self, messages, **options):
            if len(messages) > 1:
                raise RequestFault("400", "too long")
            return await super().complete(messages, **options)

    def judge(task, reply):
        return Verdict("bad", "", "Again.") if task.id == "t1" else Verdict()

    done = run(tmp_path, range(3), TooLong([]), judge=judge, at_once=1)
    assert (done.accepted, done.rejected, done.given_up) == (2, 1, {})
    with Ledger(tmp_path / "l", write=False) as ledger:
        events = [ledger.reply_at(position) for position in ledger.state("t1").replies]
    assert [(event["text"], event["reason"]) for event in events] == [("fine", "bad"), ("", "refused_by_endpoint")]


def test_others_that_wait_for_a_limit_are_not_taken_for_refused(tmp_path):
    class Busy(Refusing):
        async def complete(self, messages, **options):
            if messages[0]["content"] == "9" and self.asked.count(9) < 3:
                self.asked.append(9)
                raise PassingFault("429", "slow down", retry_after=0.05)
            return await super().complete(messages, **options)

    done = run(tmp_path, range(12), Busy(range(9)), at_once=10)
    assert (done.stopped, done.accepted, done.rejected) == ("done", 3, 9)


def test_what_a_batch_refuses_is_settled_where_it_answers_others(tmp_path):
    pytest.importorskip("openai")
    model, judge, refused = OpenAIModel("m", base_url="http://localhost:1/v1"), lambda *_: Verdict(), range(30)
    with Ledger(tmp_path / "l") as ledger:
        for numbers in (range(40), range(40), refused):
            lines = write_batch(tasks(range(40)), model, ledger, tmp_path / "out").files[0].read_text().splitlines()
            results = [output_line(text, status=400 if n in numbers else 200) for n, text in enumerate(lines)]
            (tmp_path / "r").write_text("\n".join(results))
            read = read_batch(tasks(range(40)), [tmp_path / "r"], ledger, judge=judge)
            if numbers != refused:  # all of it refused: a setting, whenever it happens
                assert (read.refused, read.faults) == (0, {"400": 40})
        assert (read.accepted, read.refused, read.faults) == (10, 30, {})
        assert write_batch(tasks(range(40)), model, ledger, tmp_path / "out").requests == 0
        assert ledger.counts.rejected == {"refused_by_endpoint": 30} and ledger.counts.replies == 10
