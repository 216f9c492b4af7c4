"""Runs many tasks against a language model: concurrency, limits, retries, budget and ledger in one place.

* A reply is written to the ledger before it is used, so a received reply is never requested again.
* A request is written to the ledger, and synced, before it is sent. After a `kill -9` the requests in flight (at most
  `concurrency`) are sent again under the same `Idempotency-Key`. An endpoint that ignores this header may bill them twice:
  they are counted (`LedgerCounts.unknown`) and charged to the budget, as are time-outs and cut replies (`maybe_paid`).
* Requests that are refused (too long, filtered): see `Refusals`.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .chat import ChatModel, EndpointFault, FatalFault, Reply, RequestFault, Usage
from .ledger import Ledger
from .limits import Backoff, Budget, TokenBucket
from .task import Refusal, Refusals, Task, Verdict, fault_event, refusal_event, reply_event, resume_attempt


logger = logging.getLogger(__name__)


@dataclass
class RunSettings:
    """How a run sends requests. A limit of `None` is none."""

    concurrency: int = 16  # maximum number of requests in flight
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None  # prompt tokens plus `max_tokens`
    backoff: Backoff = field(default_factory=Backoff)
    seed: int = 0  # of the random part of the back-off

    def __post_init__(self):
        if self.concurrency < 1:
            raise ValueError(f"concurrency is {self.concurrency}; at least one request must be in flight.")
        for limit in (self.requests_per_minute, self.tokens_per_minute):
            if limit is not None:
                TokenBucket(limit)  # raises for a limit that allows no request


@dataclass
class RunSummary:
    """What one call of `run_tasks` did."""

    stopped: str = "done"  # or "interrupt", "budget", "endpoint"
    message: str = ""  # why it stopped
    accepted: int = 0  # tasks settled with an accepted reply
    rejected: int = 0  # tasks settled with a rejected reply or a refused request
    skipped: int = 0  # tasks that were settled before
    batched: int = 0  # tasks that wait in a batch file
    given_up: Counter = field(default_factory=Counter)  # tasks left open, by fault; the next run retries them
    last_error: str = ""  # of the endpoint
    seconds: float = 0.0  # wall time


@dataclass
class _Run:
    """The state of one `run_tasks`, whose arguments it takes."""

    model: ChatModel
    ledger: Ledger
    run_id: str
    judge: Callable[[Task, Reply], Verdict]
    settings: RunSettings
    budget: Budget
    on_settled: Callable[[Task, bool], None] | None
    answered: int = 0
    busy: int = 0  # tasks in progress
    reserved: int = 0  # requests with reserved budget
    not_before: float = 0.0  # no request is sent before
    last_warning: float = 0.0  # of a silent endpoint

    def __post_init__(self):
        self.summary, self.refusals = RunSummary(), Refusals(self.ledger)
        self.stopping, self.released = asyncio.Event(), asyncio.Event()
        self.rng = random.Random(self.settings.seed)
        self.last_success = time.monotonic()
        per_minute, tokens = self.settings.requests_per_minute, self.settings.tokens_per_minute
        self.requests = TokenBucket(per_minute) if per_minute else None
        self.tokens = TokenBucket(tokens, capacity=max(1.0, tokens / 60)) if tokens else None

    def stop(self, why: str, message: str) -> None:
        """Stops sending; requests in flight are finished. The first reason is kept."""
        if not self.stopping.is_set():
            self.summary.stopped, self.summary.message = why, message
            self.stopping.set()
            self.released.set()

    async def run(self, tasks: Iterable[Task]) -> RunSummary:
        """Runs every task as far as possible."""
        self.ledger.charge(self.budget)
        start = time.monotonic()
        iterator = self.refusals.put_last(tasks)
        workers = [asyncio.create_task(self.work(iterator)) for _ in range(self.settings.concurrency)]
        try:
            await asyncio.gather(*workers)
            if self.refusals.too_many:
                self.stop("endpoint", self.refusals.message())
            self.settle_refused(self.refusals.end())
            self.summary.given_up.update(one.fault.kind for one in self.refusals.open)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            if close := getattr(self.model, "close", None):
                await close()
            await self.ledger.synced()
        self.summary.seconds = time.monotonic() - start
        return self.summary

    async def work(self, tasks: Iterator[Task]) -> None:
        """Settles one task after another until there is none, or the run was stopped."""
        for task in tasks:
            if self.stopping.is_set():
                return
            state = self.ledger.state(task.id)
            if state.final:
                self.summary.skipped += 1
            elif state.batched:
                self.summary.batched += 1
            elif not await self.others_are_answered():
                return
            else:
                self.busy += 1
                await self.settle(task)
                self.busy -= 1
                self.released.set()

    async def pause(self, seconds: float) -> bool:
        """Waits; `False` if the run was stopped meanwhile."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)
        return not self.stopping.is_set()

    async def wait_for_limits(self, estimate: Usage) -> bool:
        """Waits for `retry_after` and for the limits; `False` if the run was stopped. A slot that comes up during such a pause is
        dropped and taken again afterwards, so that not all are used at once."""
        while not self.stopping.is_set():
            if (rest := self.not_before - time.monotonic()) > 0:
                await self.pause(rest)
                continue
            wait = self.requests.take() if self.requests else 0.0
            if self.tokens:
                wait = max(wait, self.tokens.take(estimate.total_tokens))
            if wait > 0:
                await self.pause(wait)
            if self.not_before <= time.monotonic():
                break
        return not self.stopping.is_set()

    async def reserve_budget(self, task: Task) -> Usage | None:
        """Reserves what a task may use; `None` if the budget is exhausted or the run was stopped.

        Replies mostly use less than was reserved, so the budget counts as exhausted only when no request is in flight.
        Tokens per prompt are learned from replies: with a budget, each reply allows one more request in flight (1, 2, 4, …),
        so that a low estimate is noticed early.
        """
        while not self.stopping.is_set():
            estimate = self.budget.estimate(task.messages, task.max_tokens)
            if (self.reserved <= self.answered or not self.budget.limited) and self.budget.reserve(estimate):
                self.reserved += 1
                return estimate
            if not self.budget.reserved_tokens:
                self.stop("budget", self.budget.message(estimate))
                break
            self.released.clear()
            await self.released.wait()
        return None

    def release(self, estimate: Usage) -> None:
        self.budget.release(estimate)
        self.reserved -= 1
        self.released.set()

    async def others_are_answered(self) -> bool:
        """After many refusals since the last reply, waits for the requests in flight, since replies take longer than
        refusals. `False` if the run was stopped."""
        while self.refusals.too_many and not self.stopping.is_set():
            if not self.busy:
                self.stop("endpoint", self.refusals.message())
                break
            self.released.clear()
            await self.released.wait()
        return not self.stopping.is_set()

    def settle_refused(self, refusals: list[Refusal]) -> None:
        for one in refusals:
            self.ledger.append(refusal_event(one.task, one.request, one.attempt, one.fault))
            self.settled(one.task, False)

    def settled(self, task: Task, accepted: bool) -> None:
        self.summary.accepted += accepted
        self.summary.rejected += not accepted
        if self.on_settled:
            self.on_settled(task, accepted)

    async def settle(self, task: Task) -> None:
        """Sends requests until the task is settled or left open."""
        task, attempt = resume_attempt(task, self.ledger)
        while True:
            request = task.request_id(self.run_id, self.model.name, attempt)
            answered = await self.ask(task, request, attempt)
            if answered is None:
                return
            reply, estimate = answered
            verdict = self.judge(task, reply)
            # Synced together with the next request.
            self.ledger.append(reply_event(task, request, attempt, reply, verdict))
            used = reply.usage or estimate
            self.budget.spend(used)
            self.release(estimate)
            if reply.usage:
                self.budget.learn(task.messages, reply.usage)
            if self.tokens:
                self.tokens.give_back(estimate.total_tokens - used.total_tokens)
            final = verdict.is_final(attempt)
            if final:
                self.settled(task, verdict.reason is None)
            if final or self.stopping.is_set():
                return
            task, attempt = task.again(reply.text, verdict.retry_prompt), attempt + 1

    async def ask(self, task: Task, request: str, attempt: int) -> tuple[Reply, Usage] | None:
        """One reply and the budget reserved for it; `None` if the task stays open."""
        failed = 0
        while True:
            # The budget first: waiting for it must not delay a slot that the limits already gave.
            estimate = await self.reserve_budget(task)
            if estimate is None:
                return None
            if not await self.wait_for_limits(estimate):
                self.release(estimate)
                return None
            tokens = [estimate.prompt_tokens, estimate.completion_tokens]
            sent = {"event": "sent", "task": task.id, "request": request, "attempt": attempt, "tokens": tokens}
            self.ledger.append(sent)
            await self.ledger.synced()
            try:
                reply = await self.model.complete(
                    task.messages,
                    max_tokens=task.max_tokens,
                    temperature=task.temperature,
                    seed=task.seed,
                    request_id=request,
                )
            except EndpointFault as fault:
                self.summary.last_error = f"{fault.kind}: {fault}"
                event = fault_event(task.id, request, attempt, fault)
                if refused := isinstance(fault, RequestFault):
                    self.refusals.add(task, request, attempt, fault)
                    event["refused"] = True
                self.ledger.append(event)
                if fault.maybe_paid:
                    self.budget.spend(estimate)
                self.release(estimate)
                if refused:
                    return None
                failed += 1
                if not await self.handle_fault(fault, failed):
                    self.summary.given_up[fault.kind] += 1
                    return None
            else:
                self.answered += 1
                self.last_success = time.monotonic()
                self.settle_refused(self.refusals.reply())
                return reply, estimate

    async def handle_fault(self, fault: EndpointFault, failed: int) -> bool:
        """Waits after a fault, or stops the run; `True` if the request is to be sent again."""
        backoff = self.settings.backoff
        if isinstance(fault, FatalFault):
            self.stop("endpoint", f"The endpoint refuses every request ({fault.kind}): {fault}")
            return False
        silent = time.monotonic() - self.last_success
        wait = backoff.seconds(failed, self.rng)
        if fault.retry_after is not None:
            wait = max(fault.retry_after, 0.0)
            self.not_before = max(self.not_before, time.monotonic() + wait)
        what = f"The endpoint has given no reply for {silent:.0f} s ({fault.kind}: {fault})"
        if silent > backoff.patience or wait > backoff.patience:
            asked = f", and asks to wait {wait:.0f} s" if (fault.retry_after or 0) > backoff.patience else ""
            self.stop("endpoint", f"{what}{asked}.")
            return False
        # Rate limits and an unreachable endpoint are retried for as long as the run has patience.
        if fault.kind not in {"429", "connection", "502", "503"} and failed >= backoff.attempts:
            return False
        if silent > backoff.patience / 100 and self.last_warning < self.last_success:
            self.last_warning = time.monotonic()
            logger.warning(
                "%s. Retrying for %.0f s at most; Ctrl-C stops, and what was answered is kept.", what, backoff.patience
            )
        return await self.pause(wait)


def run_tasks(
    tasks: Iterable[Task],
    model: ChatModel,
    ledger: Ledger,
    *,
    run_id: str = "",
    judge: Callable[[Task, Reply], Verdict] = lambda task, reply: Verdict(),
    settings: RunSettings | None = None,
    budget: Budget | None = None,
    on_settled: Callable[[Task, bool], None] | None = None,
    handle_interrupt: bool = False,
) -> RunSummary:
    """Runs every task that is not settled in `ledger`; call it again to resume. Works inside a notebook's event loop too.

    The first Ctrl-C finishes what is in flight, the second one stops at once. Faults of the endpoint do not raise.

    Args:
        tasks: Drawn one by one as workers become free.
        run_id: Part of each request's id, so that two runs with the same prompts differ.
        on_settled: Called with each settled task and whether its reply was accepted.
        handle_interrupt: Return after the first Ctrl-C instead of raising `KeyboardInterrupt`.
    """
    run = _Run(model, ledger, run_id, judge, settings or RunSettings(), budget or Budget(), on_settled)
    interrupt = partial(run.stop, "interrupt", "Interrupted; requests in flight were finished and kept.")
    return _run_in_thread(run.run(tasks), interrupt, handle_interrupt)


def _run_in_thread(main: Coroutine[Any, Any, Any], stop: Callable[[], None], handle_interrupt: bool) -> Any:
    """Runs a coroutine in a thread with an event loop of its own. The first Ctrl-C calls `stop` there, the second cancels."""
    started: Future = Future()

    async def announced() -> Any:
        started.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        return await main

    interrupts = 0
    with ThreadPoolExecutor(1) as executor:
        result = executor.submit(asyncio.run, announced())
        loop, task = started.result()
        while not result.done():
            try:
                wait([result], timeout=0.2)  # on Windows, Ctrl-C is noticed between two waits only
            except KeyboardInterrupt:
                interrupts += 1
                if interrupts == 1:
                    logger.warning("Stopping: requests in flight are finished first. Ctrl-C again stops at once.")
                with suppress(RuntimeError):  # the loop has ended meanwhile
                    loop.call_soon_threadsafe(stop if interrupts == 1 else task.cancel)
    if interrupts > handle_interrupt:
        raise KeyboardInterrupt
    return result.result()
