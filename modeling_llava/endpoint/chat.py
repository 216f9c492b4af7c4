"""The interface of a language model, which the data engine and the judges call, and the faults of an endpoint."""

import re
from dataclasses import dataclass
from typing import Protocol


Message = dict[str, str]
"""One message of a conversation: `{"role": "system" | "user" | "assistant", "content": text}`."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one request, as its endpoint counts them."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Reply:
    """One reply of a language model."""

    text: str  # without the model's thoughts; may be empty
    finish_reason: str = "stop"  # or "length" (cut at `max_tokens`), "content_filter", the endpoint's own word
    usage: Usage | None = None  # `None` where the endpoint does not say
    model: str = ""  # as the endpoint names it, such as a dated snapshot
    left_out: tuple[str, ...] = ()  # parameters that were not sent because the endpoint does not support them


_THOUGHTS = re.compile(
    r"""<(?P<end>/)?(?:\w+:)?(?:think|thinking|thoughts?|reasoning)> | \[(?P<END>/)?THINK\] | ◁(?P<close>/)?think▷
    | <\|(?:begin|(?P<last>end))_of_thought\|> | <\|channel\|>(?:analysis|(?P<final>final))<\|message\|>""",
    re.IGNORECASE | re.VERBOSE,
)
"""Where the thoughts of a reasoning model begin and, by a group, where they end; gpt-oss ends them with its final channel."""


def remove_thoughts(text: str) -> str:
    """A text without the thoughts of a reasoning model: `<think>…</think>`, also where either end is missing (some chat
    templates write the first into the prompt)."""
    kept, thinking, start = "", False, 0
    for tag in _THOUGHTS.finditer(text):
        if tag.lastgroup:
            kept = kept if thinking else ""
            thinking = False
        elif not thinking:
            kept += text[start : tag.start()]
            thinking = True
        start = tag.end()
    return kept.strip() if thinking else (kept + text[start:]).strip() if start else text


class ChatModel(Protocol):
    """A language model that answers conversations; its `name` is written into cards and ledgers."""

    name: str

    async def complete(
        self,
        messages: list[Message],
        *,
        max_tokens: int,
        temperature: float | None,
        seed: int | None = None,
        request_id: str | None = None,
    ) -> Reply:
        """Sends one request of at most `max_tokens` tokens of reply; the `request_id` is the same whenever it is sent again.

        Raises:
            EndpointFault: the request failed; its class says what to do.
        """


class EndpointFault(Exception):
    """A request without a usable reply."""

    def __init__(self, kind: str, message: str, *, retry_after: float | None = None, maybe_paid: bool = False):
        super().__init__(message)
        self.kind = kind  # under which it is counted: "429", "500", "timeout", "connection", "malformed", …
        self.retry_after = retry_after  # seconds that the endpoint asks to wait
        self.maybe_paid = maybe_paid  # the endpoint may have billed the request


class PassingFault(EndpointFault):
    """A rate limit, server error, cut connection or broken body: the same request is sent again."""


class RequestFault(EndpointFault):
    """This request is refused (too long, filtered); others may be answered."""


class FatalFault(EndpointFault):
    """Every request would fail (wrong key, unknown model or address): the run stops."""
