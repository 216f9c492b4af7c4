"""Limits of requests and tokens per minute, back-off, and the budget. No I/O and no waiting of its own."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from .chat import Message, Usage


BATCH_PRICE = 0.5
"""What a request in a batch costs, as a share of a live one's price (OpenAI's Batch API)."""


class TokenBucket:
    """A limit per minute as a bucket that fills steadily: `take` says how long to wait.

    Whoever takes may drive the level below zero and waits until it would be back; the next one waits behind. So the
    order is kept without a lock, and within any minute at most `per_minute + capacity` is let through.

    Args:
        per_minute: What flows in per minute (requests, tokens).
        capacity: What may be taken at once after a pause.
        clock: Seconds, monotonic.
    """

    def __init__(self, per_minute: float, capacity: float = 1.0, clock: Callable[[], float] = time.monotonic):
        if not per_minute > 0:
            raise ValueError(f"A limit of {per_minute:g} per minute lets nothing through; leave it out for no limit.")
        self.rate = per_minute / 60.0
        self.capacity = capacity
        self.clock = clock
        self._level = capacity
        self._at = clock()

    def take(self, amount: float = 1.0) -> float:
        """Takes `amount` and returns the seconds to wait before using it."""
        now = self.clock()
        self._level = min(self.capacity, self._level + (now - self._at) * self.rate)
        self._at = now
        # More than the bucket can ever hold is let through by a full bucket, and paid off afterwards.
        wait = max(0.0, (min(amount, self.capacity) - self._level) / self.rate)
        self._level -= amount
        return wait

    def give_back(self, amount: float) -> None:
        """Returns what was taken and not used (or takes, if negative, what was used on top)."""
        self._level = min(self.capacity, self._level + amount)


@dataclass
class Backoff:
    """How long to wait before a request is sent again, and how often it is.

    Attributes:
        attempts: Most times one request is sent in one run; limits and an unreachable endpoint do not count.
        first: Seconds before the second time; doubled each time.
        longest: Most seconds between two times.
        patience: Seconds without a single success after which the run gives up on the endpoint.
    """

    attempts: int = 6
    first: float = 1.0
    longest: float = 60.0
    patience: float = 600.0

    def __post_init__(self):
        if self.attempts < 1 or self.first < 0 or self.longest < self.first or not self.patience > 0:
            raise ValueError(f"Back-off needs attempts ≥ 1, 0 ≤ first ≤ longest and patience > 0, not {self}.")

    def seconds(self, sent: int, rng: random.Random) -> float:
        """Seconds to wait after a request has been sent `sent` times; half of it is random, so that requests that
        failed together do not come back together."""
        return min(self.longest, self.first * 2.0 ** min(sent - 1, 30)) * rng.uniform(0.5, 1.0)


@dataclass(frozen=True)
class Prices:
    """What a model costs, in dollars per million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def __post_init__(self):
        if not (0 <= self.prompt < math.inf and 0 <= self.completion < math.inf):
            raise ValueError(
                f"Prices are dollars per million tokens, 0 or more; not {self.prompt} and {self.completion}."
            )

    def cost(self, usage: Usage, factor: float = 1.0) -> float:
        """Dollars for `usage`, times `factor` (a batch costs half)."""
        return factor * (usage.prompt_tokens * self.prompt + usage.completion_tokens * self.completion) / 1e6


class Budget:
    """Keeps a run within its tokens and its dollars.

    What a request may use at most is set aside before it is sent and replaced by what it used when the reply is there;
    so many requests at once cannot overdraw together. Tokens of a prompt are known only afterwards: they are estimated
    from its characters by the largest ratio seen so far (`TOKENS_PER_CHARACTER` at least). The budget can be overdrawn by
    no more than the error of that estimate for the requests in flight, by which prompts differ from all those before; a
    run's first request goes alone and is held with `most`, which no tokenizer of bytes or characters passes.

    Args:
        max_tokens: Most tokens, prompts and replies together; `None` for no limit.
        max_cost: Most dollars; `None` for no limit.
        prices: Needed for `max_cost`.
    """

    TOKENS_PER_CHARACTER = 0.3
    TEMPLATE_TOKENS = 32

    def __init__(self, max_tokens: int | None = None, max_cost: float | None = None, prices: Prices | None = None):
        for name, most in (("tokens", max_tokens), ("dollars", max_cost)):
            if most is not None and not most > 0:
                raise ValueError(f"A budget of {most} {name} has no request; leave it out for no limit.")
        if max_cost is not None and (prices is None or prices.prompt + prices.completion <= 0):
            raise ValueError(
                "A budget in dollars needs the model's prices per million tokens: give --price-in and --price-out."
            )
        self.max_tokens, self.max_cost, self.prices = max_tokens, max_cost, prices or Prices()
        self.ratio = self.TOKENS_PER_CHARACTER
        self.tokens = 0
        self.cost = 0.0
        self.held_tokens = 0
        self.held_cost = 0.0

    @property
    def limited(self) -> bool:
        """Whether it has an end."""
        return self.max_tokens is not None or self.max_cost is not None

    def estimate(self, messages: list[Message], max_tokens: int) -> Usage:
        """The most that a request is expected to use, in tokens."""
        characters = sum(len(message["content"]) for message in messages)
        return Usage(round(characters * self.ratio) + 4 * len(messages), max_tokens)

    def most(self, messages: list[Message], max_tokens: int) -> Usage:
        """What a request can use at most, in tokens: a token for each byte, and what a chat template may add."""
        size = sum(len(message["content"].encode("utf-8", "replace")) for message in messages)
        return Usage(size + self.TEMPLATE_TOKENS * len(messages), max_tokens)

    def message(self, needed: Usage, known: bool) -> str:
        """Why a request that needs so much is not sent, for a person; `known`: by `estimate`, not by `most`."""
        parts = []
        if self.max_tokens is not None:
            parts.append(f"{self.tokens:,} of {self.max_tokens:,} tokens are used")
        if self.max_cost is not None:
            parts.append(f"${self.cost:.4f} of ${self.max_cost:.2f} are spent")
        how = "" if known else ", with a token for each byte of the prompt until a reply has shown better"
        return f"The budget does not have the next request (up to {needed.total_tokens:,} tokens{how}): {' and '.join(parts)}."

    def hold(self, estimate: Usage, factor: float = 1.0) -> bool:
        """Sets `estimate` aside, at `factor` times its price; `False`, and nothing set aside, if the budget does not have it."""
        tokens, cost = estimate.total_tokens, self.prices.cost(estimate, factor)
        if self.max_tokens is not None and self.tokens + self.held_tokens + tokens > self.max_tokens:
            return False
        if self.max_cost is not None and self.cost + self.held_cost + cost > self.max_cost:
            return False
        self.held_tokens += tokens
        self.held_cost += cost
        return True

    def release(self, estimate: Usage) -> None:
        """Gives back what `hold` set aside."""
        self.held_tokens -= estimate.total_tokens
        self.held_cost -= self.prices.cost(estimate)

    def spend(self, usage: Usage, factor: float = 1.0) -> None:
        """Books what a reply used."""
        self.tokens += usage.total_tokens
        self.cost += self.prices.cost(usage, factor)

    def learn(self, messages: list[Message], usage: Usage) -> None:
        """Learns from a reply how many tokens a character of a prompt takes at most."""
        characters = sum(len(message["content"]) for message in messages)
        if characters >= 200:  # in shorter ones the tokens of the chat template weigh too much
            self.ratio = max(self.ratio, (usage.prompt_tokens - 4 * len(messages)) / characters)
