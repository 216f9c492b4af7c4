"""The interface of a language model behind an endpoint, and the faults such an endpoint can show.

Everything that asks a language model (the data engine, the judges of the benchmarks) asks a `ChatModel`. The client of
OpenAI-compatible servers is one; a scripted responder for tests and for `llava quickstart` is another.
"""

import re
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


Message = dict[str, str]
"""One message of a conversation: `{"role": "system" | "user" | "assistant", "content": text}`."""


@dataclass(frozen=True)
class Usage:
    """What one reply used, in tokens of the model that gave it, as its endpoint counts them."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Reply:
    """One reply of a language model.

    Attributes:
        text: What the model wrote, without its thoughts; may be empty.
        finish_reason: `"stop"`, `"length"` (cut at `max_tokens`), `"content_filter"`, or the endpoint's own word.
        usage: Tokens used, or `None` where the endpoint does not say.
        model: The name the endpoint gives for the model that answered (dated snapshots differ from what was asked).
        left_out: Parameters that were asked for and not sent, since the endpoint does not take them.
    """

    text: str
    finish_reason: str = "stop"
    usage: Usage | None = None
    model: str = ""
    left_out: tuple[str, ...] = ()


_THOUGHTS = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>|\[(/?)THINK\]", re.IGNORECASE)


def remove_thoughts(text: str) -> str:
    """A text without what a reasoning model writes for itself: `<think>…</think>`, also without its end, and without its
    beginning, which some chat templates write into the prompt."""
    kept, thinking, start = "", False, 0
    for tag in _THOUGHTS.finditer(text):
        if tag[1] or tag[2]:
            kept = kept if thinking else ""
            thinking = False
        elif not thinking:
            kept += text[start : tag.start()]
            thinking = True
        start = tag.end()
    return kept.strip() if thinking else (kept + text[start:]).strip() if start else text


@runtime_checkable
class ChatModel(Protocol):
    """A language model that answers conversations.

    Attributes:
        name: The model's name, as written into cards and ledgers.
    """

    name: str

    async def complete(
        self,
        messages: list[Message],
        *,
        max_tokens: int,
        temperature: float,
        seed: int | None = None,
        request_id: str | None = None,
    ) -> Reply:
        """Asks once: no retry, no waiting for limits (both have one place, `endpoint/runner.py`).

        Args:
            messages: The conversation so far; never changed.
            max_tokens: Longest reply, in tokens.
            temperature: Sampling temperature; 0 is greedy.
            seed: Seed of the sampling, for endpoints that honour one.
            request_id: Name of this request, the same whenever the same request is sent again. Sent as
                `Idempotency-Key`, so that an endpoint that honours it answers, and bills, once.

        Raises:
            EndpointFault: the request failed; its class says what may be done about it.
        """
        ...


class EndpointFault(Exception):
    """A request that got no usable reply.

    Args:
        kind: Short name under which it is counted: `"429"`, `"500"`, `"timeout"`, `"connection"`, `"malformed"`, …
        message: One line for a person.
        retry_after: Seconds the endpoint asks to wait, if it does.
        maybe_paid: Whether the endpoint may have done (and billed) the work before the fault.
    """

    def __init__(self, kind: str, message: str, *, retry_after: float | None = None, maybe_paid: bool = False):
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after
        self.maybe_paid = maybe_paid


class PassingFault(EndpointFault):
    """May pass: a limit, a server error, a cut connection, a broken body. The same request is sent again."""


class RequestFault(EndpointFault):
    """This request is refused (too long, filtered, not understood); others may be answered."""


class FatalFault(EndpointFault):
    """Every request would fail the same way: a wrong key, an unknown model or address. The run stops."""
