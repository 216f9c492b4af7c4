import json

import pytest

from modeling_llava.endpoint import (
    Budget,
    Ledger,
    OpenAIModel,
    Prices,
    Reply,
    Task,
    Usage,
    Verdict,
    batch,
    forget_batch,
    read_batch,
    run_tasks,
    write_batch,
)


pytest.importorskip("openai")


def tasks(number=4):
    return [Task(f"t{i}", [{"role": "user", "content": f"thing {i}"}], 50, 0.5) for i in range(number)]


@pytest.fixture
def model():
    return OpenAIModel("m", base_url="http://localhost:1/v1")


def judge(task, reply):
    return Verdict("too_short", "", "Longer, please.") if reply.text == "bad" else Verdict()


def output_line(line, text="good", status=200, error=None):
    body = {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 11, "completion_tokens": 3}}
    body = body if status == 200 else {"error": {"message": "no"}}
    response = None if error else {"status_code": status, "request_id": "x", "body": body}
    return json.dumps({"custom_id": json.loads(line)["custom_id"], "response": response, "error": error})


EXPIRED = {"code": "batch_expired", "message": "expired"}


def written(ledger, model, folder, number=4):
    """The lines of a batch file."""
    return write_batch(tasks(number), model, ledger, folder).files[0].read_text().splitlines()


def test_batch_file_has_openais_form(tmp_path, model):
    with Ledger(tmp_path / "l") as ledger:
        summary = write_batch(tasks(2), model, ledger, tmp_path / "out", run_id="run")
        assert ledger.state("t0").batched and not ledger.state("t0").final
    assert [path.name for path in summary.files] == ["batch-000.jsonl"] and summary.requests == 2
    lines = [json.loads(line) for line in summary.files[0].read_text().splitlines()]
    body = {"model": "m", "messages": tasks()[0].messages, "max_tokens": 50, "temperature": 0.5}
    name = tasks()[0].request_id("run", "m", 1)
    assert lines[0] == {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
    assert len({line["custom_id"] for line in lines}) == 2


def test_results_are_judged_and_what_failed_is_written_into_the_next_batch(tmp_path, model):
    with Ledger(tmp_path / "l") as ledger:
        a, b, c, d = written(ledger, model, tmp_path / "out")
    results, errors = tmp_path / "output.jsonl", tmp_path / "errors.jsonl"
    results.write_text("\n".join([output_line(c, status=500), output_line(a), output_line(b, "bad")]) + "\n")
    errors.write_text(output_line(d, error=EXPIRED) + "\n")
    with Ledger(tmp_path / "l") as ledger:
        read = read_batch(tasks(), [results, errors], ledger, judge=judge)
        assert (read.accepted, read.again, read.rejected, read.waiting) == (1, 1, 0, 0)
        assert ledger.counts.faults == read.faults == {"500": 1, "batch_expired": 1}
        assert ledger.counts.used_in_batch == [22, 6] and ledger.counts.used == [0, 0]
    with Ledger(tmp_path / "l") as ledger:  # read from disk again
        second = write_batch(tasks(), model, ledger, tmp_path / "out")
    assert second.files[0].name == "batch-001.jsonl"
    again = [json.loads(line) for line in second.files[0].read_text().splitlines()]
    assert [line["body"]["messages"][-1]["content"] for line in again] == ["Longer, please.", "thing 2", "thing 3"]


def test_a_budget_bounds_what_is_written_in_dollars_at_half_their_price(tmp_path, model):
    prices = Prices(0, 1000)  # 50 tokens a reply at most: 5 cents live, 2.5 cents in a batch
    with Ledger(tmp_path / "l") as ledger:
        first = write_batch(tasks(), model, ledger, tmp_path / "out", budget=Budget(max_cost=0.08, prices=prices))
        again = write_batch(tasks(), model, ledger, tmp_path / "out", budget=Budget(max_cost=0.08, prices=prices))
    assert first.requests == 3 and "budget" in first.message and again.requests == 0
    with Ledger(tmp_path / "m") as ledger:  # 50 for the reply, 6 for the prompt each
        assert write_batch(tasks(), model, ledger, tmp_path / "out", budget=Budget(max_tokens=200)).requests == 3


def test_of_two_results_with_one_id_the_reply_counts_whatever_the_order_and_once(tmp_path, model):
    for order in (1, -1):
        with Ledger(tmp_path / f"l{order}") as ledger:
            lines = written(ledger, model, tmp_path / f"out{order}")
            (tmp_path / "a").write_text("\n".join(output_line(line) for line in reversed(lines)))
            (tmp_path / "b").write_text("\n".join(output_line(line, error=EXPIRED) for line in lines))
            read = read_batch(tasks(), [tmp_path / "a", tmp_path / "b"][::order], ledger, judge=judge)
            assert (read.accepted, read.faults, read.waiting, read.unknown) == (4, {}, 0, 0)
            again = read_batch(tasks(), [tmp_path / "a"], ledger, judge=judge)
            assert again.accepted == 0 and again.unknown == 4 and ledger.counts.accepted == 4


@pytest.mark.parametrize("odd", [None, "x", 3, [1], {"a": 1}])
@pytest.mark.parametrize("place", ["response", "status_code", "body", "error", "error in body"])
def test_results_of_an_odd_form_are_faults(tmp_path, model, place, odd):
    with Ledger(tmp_path / "l") as ledger:
        result = json.loads(output_line(*written(ledger, model, tmp_path / "out", 1), status=400))
        if place == "error in body":
            result["response"]["body"]["error"] = odd
        elif place == "error":
            result.update(response=None, error=odd)
        else:
            (result if place == "response" else result["response"])[place] = odd
        (tmp_path / "r").write_text(json.dumps(result))
        assert read_batch(tasks(1), [tmp_path / "r"], ledger, judge=judge).faults.total() == 1
        assert not ledger.state("t0").final and ledger.state("t0").batched is None


def test_a_file_that_is_cut_or_of_another_kind_is_named_and_nothing_of_it_is_read(tmp_path, model):
    with Ledger(tmp_path / "l") as ledger:
        lines = written(ledger, model, tmp_path / "out")
        cut = "\n".join(map(output_line, lines))[:-40]
        for text, message in ((lines[0], "1, is not a batch result.*not its input"), (cut, "4, is not JSON")):
            (tmp_path / "r").write_text(text)
            with pytest.raises(ValueError, match=f"r, line {message}"):
                read_batch(tasks(), [tmp_path / "r"], ledger, judge=judge)
        assert ledger.counts.replies == 0
        (tmp_path / "r").write_text("\n".join(map(output_line, lines[:3])))  # a batch that expired half done
        read = read_batch(tasks(), [tmp_path / "r"], ledger, judge=judge)
        assert (read.accepted, read.waiting) == (3, 1)


def test_what_waits_in_a_batch_is_not_asked_live_until_it_is_freed(tmp_path, model):
    class Live:
        name = "m"

        async def complete(self, messages, **options):
            return Reply("good", usage=Usage(1, 1))

    with Ledger(tmp_path / "l") as ledger:
        write_batch(tasks(), model, ledger, tmp_path / "out")
        live = run_tasks(tasks(5), Live(), ledger)
        assert (live.batched, live.accepted) == (4, 1)
        assert write_batch(tasks(), model, ledger, tmp_path / "out").waiting == 4
        assert forget_batch(tasks(), ledger) == 4
        assert run_tasks(tasks(5), Live(), ledger).accepted == 4


def test_files_stay_within_openais_limits(tmp_path, model, monkeypatch):
    monkeypatch.setattr(batch, "MAX_REQUESTS", 3)
    with Ledger(tmp_path / "l") as ledger:
        summary = write_batch(tasks(8), model, ledger, tmp_path / "out")
    assert [len(path.read_text().splitlines()) for path in summary.files] == [3, 3, 2]
    monkeypatch.setattr(batch, "MAX_BYTES", 500)
    with Ledger(tmp_path / "m") as ledger:
        summary = write_batch(tasks(8), model, ledger, tmp_path / "out2")
    assert all(path.stat().st_size <= 500 for path in summary.files) and len(summary.files) > 1


def test_a_process_that_dies_while_writing_leaves_nothing_asked_twice(tmp_path, model, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with Ledger(tmp_path / "l") as ledger:  # killed before the ledger knows
        monkeypatch.setattr(ledger, "append_now", die)
        with pytest.raises(KeyboardInterrupt):
            write_batch(tasks(), model, ledger, tmp_path / "out")
    with Ledger(tmp_path / "l") as ledger:
        assert write_batch(tasks(), model, ledger, tmp_path / "out").requests == 4
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["batch-000.jsonl"]
    with Ledger(tmp_path / "other") as ledger:  # another run in the same folder
        assert write_batch(tasks(), model, ledger, tmp_path / "out", run_id="other").files[0].name == "batch-001.jsonl"
