"""Limits of requests and tokens per minute, back-off, and the budget. Nothing here waits or does I/O."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from .chat import Message, Usage


BATCH_PRICE = 0.5
"""Price of a request in OpenAI's Batch API, relative to a live one."""


class TokenBucket:
    """A limit per minute (requests or tokens): `take` says how long to wait.

    The level may fall below zero, and each caller waits until it would be back: the order is kept without a lock, and at
    most `per_minute + capacity` pass within any minute.
    """

    def __init__(self, per_minute: float, capacity: float = 1.0, clock: Callable[[], float] = time.monotonic):
        if not per_minute > 0:
            raise ValueError(f"A limit of {per_minute:g} per minute allows no request; leave it out for no limit.")
        self.rate = per_minute / 60.0
        self.capacity = capacity
        self.clock = clock
        self._level = capacity
        self._at = clock()

    def take(self, amount: float = 1.0) -> float:
        """Takes `amount`; returns the seconds to wait before using it."""
        now = self.clock()
        self._level = min(self.capacity, self._level + (now - self._at) * self.rate)
        self._at = now
        # An amount beyond the capacity passes when the bucket is full, and is paid off afterwards.
        wait = max(0.0, (min(amount, self.capacity) - self._level) / self.rate)
        self._level -= amount
        return wait

    def give_back(self, amount: float) -> None:
        """Returns what was taken and not used; negative: takes what was used in addition."""
        self._level = min(self.capacity, self._level + amount)


@dataclass
class Backoff:
    """When and how often a request is retried. Times are in seconds."""

    attempts: int = 6  # sends of a request per run; rate limits and an unreachable endpoint do not count
    first: float = 1.0  # before the first retry; doubled each time
    longest: float = 60.0  # between two attempts
    patience: float = 600.0  # without a reply, then the run stops

    def __post_init__(self):
        if not self.patience > 0:
            raise ValueError(f"A patience of {self.patience:g} s allows no reply; it must be above 0.")

    def seconds(self, sent: int, rng: random.Random) -> float:
        """Seconds to wait after `sent` sends; half of it is random, so that failed requests do not return together."""
        return min(self.longest, self.first * 2.0 ** min(sent - 1, 30)) * rng.uniform(0.5, 1.0)


@dataclass(frozen=True)
class Prices:
    """What a model costs, in dollars per million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def __post_init__(self):
        if not (0 <= self.prompt < math.inf and 0 <= self.completion < math.inf):
            raise ValueError(f"Prices must be 0 or more dollars, got {self.prompt} and {self.completion}.")

    def cost(self, usage: Usage, factor: float = 1.0) -> float:
        """Dollars for `usage`, times `factor` (a batch costs half)."""
        return factor * (usage.prompt_tokens * self.prompt + usage.completion_tokens * self.completion) / 1e6


class Budget:
    """Keeps a run within its tokens (prompts and replies together) and dollars (which require `prices`).

    Before a request is sent, its estimate is reserved; the reply replaces it by what was used. Prompt tokens are estimated
    from characters by the largest ratio seen so far (at least `TOKENS_PER_CHARACTER`); the budget can be overdrawn by the
    error of this estimate for the requests in flight.
    """

    TOKENS_PER_CHARACTER = 0.3

    def __init__(self, max_tokens: int | None = None, max_cost: float | None = None, prices: Prices | None = None):
        for name, most in (("tokens", max_tokens), ("dollars", max_cost)):
            if most is not None and not most > 0:
                raise ValueError(f"A budget of {most} {name} allows no request; leave it out for no limit.")
        if max_cost is not None and (prices is None or prices.prompt + prices.completion <= 0):
            raise ValueError("A budget in dollars requires prices: give --price-in and --price-out.")
        self.max_tokens, self.max_cost, self.prices = max_tokens, max_cost, prices or Prices()
        self.limited = max_tokens is not None or max_cost is not None
        self.ratio = self.TOKENS_PER_CHARACTER
        self.tokens = 0
        self.cost = 0.0
        self.reserved_tokens = 0
        self.reserved_cost = 0.0

    def estimate(self, messages: list[Message], max_tokens: int) -> Usage:
        """Expected upper limit of the tokens of a request."""
        characters = sum(len(message["content"]) for message in messages)
        return Usage(round(characters * self.ratio) + 4 * len(messages), max_tokens)

    def message(self, needed: Usage) -> str:
        """Why a request is not sent."""
        used = f"{self.tokens:,} tokens" + (f" of {self.max_tokens:,}" if self.max_tokens is not None else "")
        used += f" and ${self.cost:.4f} of ${self.max_cost:.2f}" if self.max_cost is not None else ""
        return f"The budget does not cover the next request (up to {needed.total_tokens:,} tokens): {used} are used."

    def reserve(self, estimate: Usage, factor: float = 1.0) -> bool:
        """Reserves `estimate`, at `factor` times its price; `False`, with nothing reserved, if that exceeds the budget."""
        tokens, cost = estimate.total_tokens, self.prices.cost(estimate, factor)
        if self.max_tokens is not None and self.tokens + self.reserved_tokens + tokens > self.max_tokens:
            return False
        if self.max_cost is not None and self.cost + self.reserved_cost + cost > self.max_cost:
            return False
        self.reserved_tokens += tokens
        self.reserved_cost += cost
        return True

    def release(self, estimate: Usage) -> None:
        """Undoes `reserve`."""
        self.reserved_tokens -= estimate.total_tokens
        self.reserved_cost -= self.prices.cost(estimate)

    def spend(self, usage: Usage, factor: float = 1.0) -> None:
        """Charges what a reply used."""
        self.tokens += usage.total_tokens
        self.cost += self.prices.cost(usage, factor)

    def learn(self, messages: list[Message], usage: Usage) -> None:
        """Learns the tokens per character of prompts from a reply."""
        characters = sum(len(message["content"]) for message in messages)
        if characters >= 200:  # in shorter prompts the chat template dominates
            self.ratio = max(self.ratio, (usage.prompt_tokens - 4 * len(messages)) / characters)
