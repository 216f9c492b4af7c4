"""A task for a language model, the verdict on a reply, refusals, and their lines in the ledger."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .chat import EndpointFault, Message, Reply, RequestFault, Usage
from .ledger import Ledger


ATTEMPTS = 2
"""A rejected reply is requested once more, with the reason."""

REFUSED = "refused_by_endpoint"
"""Reason of a task that is settled because the endpoint refuses its request while it answers others."""


BEFORE_REPLY, IN_A_ROW = 5, 25
"""How many refusals stop a run: before its first reply, and later without a reply between them. Tasks that an earlier run
had refused do not count."""


@dataclass(frozen=True)
class Task:
    """One conversation to complete."""

    id: str  # unique in the run; the same when the run is resumed
    messages: list[Message]
    max_tokens: int = 1024  # of the reply
    temperature: float | None = 0.7  # `None`: the endpoint's default
    seed: int | None = None

    def again(self, reply: str, retry_prompt: str) -> "Task":
        """The second attempt: the conversation with the rejected reply and what was wrong with it."""
        added = [{"role": "assistant", "content": reply or "(no answer)"}, {"role": "user", "content": retry_prompt}]
        return replace(self, messages=[*self.messages, *added], seed=None if self.seed is None else self.seed + 1)

    def request_id(self, run: str, model: str, attempt: int) -> str:
        """Id of the request: the same for the same request of the same run."""
        content = [run, model, self.id, attempt, self.messages, self.max_tokens, self.temperature, self.seed]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:40]


@dataclass(frozen=True)
class Verdict:
    """Whether a reply is accepted."""

    reason: str | None = None  # short name under which a rejection is counted; `None` accepts
    detail: str = ""  # what exactly was wrong
    retry_prompt: str | None = None  # sent with the second attempt; `None` settles the task with this reply

    def is_final(self, attempt: int) -> bool:
        """Whether it settles the task in this attempt, from 1."""
        return self.reason is None or self.retry_prompt is None or attempt >= ATTEMPTS


def reply_event(task: Task, request: str, attempt: int, reply: Reply, verdict: Verdict, **more: Any) -> dict[str, Any]:
    """The ledger's line for a reply."""
    return {
        "event": "reply",
        "task": task.id,
        "request": request,
        "attempt": attempt,
        "text": reply.text,
        "finish": reply.finish_reason,
        "usage": [reply.usage.prompt_tokens, reply.usage.completion_tokens] if reply.usage else None,
        "model": reply.model,
        "reason": verdict.reason,
        "detail": verdict.detail,
        "retry_prompt": verdict.retry_prompt,
        "final": verdict.is_final(attempt),
        **({"left_out": reply.left_out} if reply.left_out else {}),
        **more,
    }


def fault_event(task_id: str, request: str, attempt: int, fault: EndpointFault, **more: Any) -> dict[str, Any]:
    """The ledger's line for a request without a usable reply."""
    return {
        "event": "fault",
        "task": task_id,
        "request": request,
        "attempt": attempt,
        "kind": fault.kind,
        "message": str(fault)[:500],
        "maybe_paid": fault.maybe_paid,
        **more,
    }


def refusal_event(task: Task, request: str, attempt: int, fault: EndpointFault, **more: Any) -> dict[str, Any]:
    """The ledger's line that settles a task whose request is refused: a rejected reply without a text."""
    reply, verdict = Reply("", usage=Usage(0, 0)), Verdict(REFUSED, f"{fault.kind}: {fault}"[:500])
    return reply_event(task, request, attempt, reply, verdict, refused=True, **more)


def resume_attempt(task: Task, ledger: Ledger) -> tuple[Task, int]:
    """The task after the rejected replies that are in the ledger, and the number of its next attempt."""
    replies = ledger.state(task.id).replies
    for position in replies:
        event = ledger.reply_at(position)
        task = task.again(event["text"], event["retry_prompt"])
    return task, 1 + len(replies)


@dataclass(frozen=True)
class Refusal:
    """A refused request; `again`: a request of this task was refused in an earlier run too."""

    task: Task
    request: str
    attempt: int
    fault: RequestFault
    again: bool


class Refusals:
    """What was refused (HTTP 400, 403, 413, 422) since a run's last reply: is it the request or the settings?

    If the endpoint answers others, the task is settled as rejected. If it answers none, the settings may be at fault: the
    tasks stay open, many of them stop the run, and the next run tries them last.
    """

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self.open: list[Refusal] = []
        self.answered = False

    def add(self, task: Task, request: str, attempt: int, fault: RequestFault) -> None:
        """Adds a refusal that is not in the ledger yet."""
        self.open.append(Refusal(task, request, attempt, fault, self.ledger.state(task.id).refused))

    def put_last(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """The tasks, with those last that were refused in an earlier run."""
        refused = []
        for task in tasks:
            state = self.ledger.state(task.id)
            if state.refused and not state.final:
                refused.append(task)
            else:
                yield task
        yield from refused

    @property
    def too_many(self) -> bool:
        return sum(not one.again for one in self.open) >= (IN_A_ROW if self.answered else BEFORE_REPLY)

    def message(self) -> str:
        number, fault = len(self.open), self.open[-1].fault
        since = " since the last reply" if self.answered else ""
        return f"{number} requests were refused and none was answered{since}; the last with {fault.kind}: {fault}"

    def reply(self) -> list[Refusal]:
        """Called with a reply to another request: returns what is refused finally."""
        self.answered = True
        settled, self.open = self.open, []
        return settled

    def end(self) -> list[Refusal]:
        """Called at the end: returns what is refused finally; the rest stays in `open`. Without any reply in this run, that is
        what an earlier run, which had replies to others, had refused too."""
        if self.too_many:
            return []
        settled, kept = [], []
        for one in self.open:
            is_final = self.answered or (one.again and self.ledger.counts.replies)
            (settled if is_final else kept).append(one)
        self.open = kept
        return settled
