import asyncio
import random

import pytest
from fault_server import FaultServer

from modeling_llava.endpoint import (
    Backoff,
    Budget,
    EndpointFault,
    FatalFault,
    OpenAIModel,
    PassingFault,
    Prices,
    RequestFault,
    RunSettings,
    TokenBucket,
    Usage,
)
from modeling_llava.endpoint.openai_model import parse_completion, parse_retry_after, translate_status


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("per_minute", [30, 600])
def test_bucket_lets_no_more_than_its_limit_through_in_any_minute(per_minute):
    clock = Clock()
    bucket, times = TokenBucket(per_minute, clock=clock), []
    for _ in range(3 * per_minute):  # each waits as long as it is told
        clock.now += bucket.take()
        times.append(clock.now)
    for i, start in enumerate(times):
        assert sum(start <= t < start + 60 for t in times[i:]) <= per_minute + 1
    assert times[-1] - times[0] == pytest.approx((len(times) - 1) * 60 / per_minute)


def test_bucket_lets_a_request_larger_than_itself_pass_and_pays_it_off_afterwards():
    bucket = TokenBucket(600, capacity=10, clock=Clock())
    assert bucket.take(100) == 0
    assert bucket.take(10) == pytest.approx(10)  # 100 tokens at 10 per second


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: TokenBucket(0),
        lambda: RunSettings(requests_per_minute=float("nan")),
        lambda: RunSettings(concurrency=0),
        lambda: Backoff(patience=0),
        lambda: Prices(-1, 0),
        lambda: Prices(0, float("nan")),
        lambda: Budget(max_tokens=0),
        lambda: Budget(max_cost=float("nan"), prices=Prices(1.0, 1.0)),
        lambda: Budget(max_cost=5.0),  # without prices
    ],
)
def test_limits_that_allow_nothing_or_everything_are_refused(wrong):
    with pytest.raises(ValueError):
        wrong()


def test_budget_reserves_what_requests_in_flight_may_use():
    budget = Budget(max_tokens=1000)
    request = Usage(100, 300)
    assert budget.reserve(request) and budget.reserve(request)
    assert not budget.reserve(request)  # 1200 > 1000 although nothing is spent yet
    budget.release(request)
    budget.spend(Usage(90, 10))
    assert budget.reserve(request)  # 100 spent, 400 reserved, 400 asked for
    budget = Budget(max_cost=0.01, prices=Prices(prompt=1.0, completion=4.0))
    budget.spend(Usage(2000, 1000))
    assert budget.cost == pytest.approx(2000 / 1e6 + 4 * 1000 / 1e6)
    assert budget.reserve(Usage(0, 1000))
    assert not budget.reserve(Usage(1, 0))


def test_budget_learns_how_many_tokens_a_character_takes():
    messages = [{"role": "user", "content": "字" * 1000}]
    budget = Budget()
    assert budget.estimate(messages, 10).prompt_tokens == 304
    budget.learn(messages, Usage(1500, 1))
    assert budget.estimate(messages, 10).prompt_tokens == 1500


def test_backoff_doubles_up_to_its_longest():
    backoff = Backoff(first=1, longest=10)
    for sent, most in ((1, 1), (2, 2), (3, 4), (4, 8), (5, 10), (50, 10)):
        waits = [backoff.seconds(sent, random.Random(seed)) for seed in range(100)]
        assert max(waits) <= most and min(waits) >= most / 2 and len(set(waits)) > 50


def test_retry_after_is_read_in_seconds_and_milliseconds():
    assert parse_retry_after({"retry-after": "2.5"}) == 2.5
    assert parse_retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert parse_retry_after({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}) is None
    assert parse_retry_after({}) is None


def test_statuses_say_what_may_be_done_about_them():
    assert isinstance(translate_status(429, "m", {}, "insufficient_quota"), FatalFault)
    for kind, statuses in ((PassingFault, (429, 408, 529)), (FatalFault, (401, 302)), (RequestFault, (400, 403))):
        assert {type(translate_status(status, "m")) for status in statuses} == {kind}


def test_a_refusal_and_a_reply_in_parts_are_replies():
    parts = [{"type": "thinking", "thinking": []}, "A ", {"type": "text", "text": "cat."}]
    assert parse_completion({"choices": [{"message": {"content": parts}}]}).text == "A cat."
    body = {"choices": [{"finish_reason": "content_filter", "message": {"content": None, "refusal": "I won't."}}]}
    reply = parse_completion(body)
    assert (reply.text, reply.finish_reason, reply.usage) == ("I won't.", "content_filter", None)
    with pytest.raises(PassingFault, match="broken off: busy"):
        parse_completion({"choices": [{"finish_reason": "error", "error": "busy", "message": {"content": "A ca"}}]})


@pytest.mark.parametrize("body", [None, {}, {"choices": []}, {"choices": [{"message": {"content": 3}}]}])
def test_what_is_not_a_completion_is_a_passing_fault(body):
    with pytest.raises(PassingFault) as caught:
        parse_completion(body)
    assert caught.value.kind == "malformed" and caught.value.maybe_paid


@pytest.mark.parametrize(
    "code, type_, kind", [(429, PassingFault, "429"), ("400", RequestFault, "400"), ([], PassingFault, "malformed")]
)
def test_an_error_that_comes_with_status_200_means_what_its_code_says(code, type_, kind):
    with pytest.raises(EndpointFault, match="the reason") as caught:
        parse_completion({"error": {"message": "the reason", "code": code}, "choices": None})
    assert (type(caught.value), caught.value.kind) == (type_, kind)


@pytest.mark.parametrize(
    "status, body, words",
    [
        (422, {"detail": [{"loc": ["body"], "msg": "no such field"}]}, "no such field"),
        (400, {"error": {"message": "too  long"}}, "too long"),
        (400, [{"error": {"message": "in a list"}}], "in a list"),
        (400, "<html><body><h1>Bad request</h1> of a proxy</body></html>", "^Bad request of a proxy$"),
        (403, "", "403"),
    ],
)
def test_the_endpoints_own_words_are_kept_in_whatever_form_they_come(status, body, words):
    async def ask(url):
        model = OpenAIModel("m", base_url=url)
        try:
            await model.complete([{"role": "user", "content": "?"}], max_tokens=1)
        finally:
            await model.close()

    with FaultServer(reply=lambda messages: (status, body)) as server, pytest.raises(RequestFault, match=words):
        asyncio.run(ask(server.url))


@pytest.mark.parametrize(
    "text, left",
    [
        ("<think>\n3 4\n</think>\n\n8 9", "8 9"),
        ("Opened by the template.\n</think>\n8 9", "8 9"),
        ("<think>No end", ""),
        ("<think>a<think>b</think>c</think>8 9", "8 9"),
        ("<Thinking>a</Thinking>8 9\n<think>b</think>\nFine.", "8 9\n\nFine."),
        ("[THINK]3 4[/THINK]8 9", "8 9"),
        ("◁think▷3◁/think▷<seed:think>4</seed:think><|begin_of_thought|>5<|end_of_thought|>8 9", "8 9"),
        ("<|channel|>analysis<|message|>3 4<|end|><|start|>assistant<|channel|>final<|message|>8 9", "8 9"),
        (" I think <b> that. ", " I think <b> that. "),
    ],
)
def test_a_reply_is_what_stands_outside_of_thoughts(text, left):
    body = {"choices": [{"message": {"content": text, "reasoning_content": "1 2"}}]}
    assert parse_completion(body).text == left
    assert parse_completion({"choices": [{"message": {"content": "<think>" * 50_000 + "</think>8 9"}}]}).text == "8 9"


@pytest.mark.parametrize("content", [None, "", "<think>\nLet me see"])
@pytest.mark.parametrize("reason", ["length", "MAX_TOKENS"])
def test_a_reply_that_was_cut_before_its_text_is_refused_as_that_and_was_paid(content, reason):
    body = {"choices": [{"finish_reason": reason, "message": {"content": content, "reasoning_content": "…"}}]}
    with pytest.raises(RequestFault, match="--max-reply-tokens") as caught:
        parse_completion(body)
    assert caught.value.kind == "cut" and caught.value.maybe_paid
