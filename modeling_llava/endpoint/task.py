"""A task for a language model, the verdict on a reply, and their lines in the ledger.

Live requests (`runner.py`) and batch files (`batch.py`) are two ways to settle the same tasks.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from .chat import EndpointFault, Message, Reply, Usage
from .ledger import Ledger


ATTEMPTS = 2
"""A rejected reply is requested once more, with the reason."""

REFUSED = "refused_by_endpoint"
"""Reason of a task that is settled because the endpoint refuses its request while it answers others."""


@dataclass(frozen=True)
class Task:
    """One conversation to complete.

    Attributes:
        id: Unique in the run; the same when the run is resumed.
        messages: The conversation.
        max_tokens: Maximum length of the reply, in tokens.
        temperature: Sampling temperature; `None` for the endpoint's default.
        seed: Sampling seed.
    """

    id: str
    messages: list[Message]
    max_tokens: int = 1024
    temperature: float | None = 0.7
    seed: int | None = None

    def again(self, reply: str, reason: str) -> "Task":
        """The second attempt: the conversation with the rejected reply and what was wrong with it."""
        added = [{"role": "assistant", "content": reply or "(no answer)"}, {"role": "user", "content": reason}]
        return replace(self, messages=[*self.messages, *added], seed=None if self.seed is None else self.seed + 1)

    def request_id(self, run: str, model: str, attempt: int) -> str:
        """Id of the request: the same for the same request of the same run."""
        content = [run, model, self.id, attempt, self.messages, self.max_tokens, self.temperature, self.seed]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:40]


@dataclass(frozen=True)
class Verdict:
    """Whether a reply is accepted.

    Attributes:
        reason: Short name under which a rejection is counted; `None` accepts.
        detail: What exactly was wrong.
        retry_prompt: What is sent with the second attempt; `None` settles the task with this reply.
    """

    reason: str | None = None
    detail: str = ""
    retry_prompt: str | None = None


def accept_all(task: Task, reply: Reply) -> Verdict:
    """Accepts every reply."""
    return Verdict()


def reply_event(
    task: Task, request: str, attempt: int, reply: Reply, verdict: Verdict, final: bool, **more: Any
) -> dict[str, Any]:
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
        "final": final,
        **({"left_out": reply.left_out} if reply.left_out else {}),
        **more,
    }


def refusal_event(task: Task, request: str, attempt: int, fault: EndpointFault, **more: Any) -> dict[str, Any]:
    """The ledger's line that settles a task whose request is refused: a rejected reply without a text."""
    reply, verdict = Reply("", usage=Usage(0, 0)), Verdict(REFUSED, f"{fault.kind}: {fault}"[:500])
    return reply_event(task, request, attempt, reply, verdict, final=True, refused=True, **more)


def resume_attempt(task: Task, ledger: Ledger) -> Task:
    """The task after the rejected replies that are in the ledger."""
    for position in ledger.state(task.id).replies:
        event = ledger.reply_at(position)
        task = task.again(event["text"], event["retry_prompt"])
    return task
