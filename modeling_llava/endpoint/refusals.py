"""Requests that an endpoint refuses (HTTP 400, 403, 413, 422: too long, filtered): is it the request or the settings?

Sent again, such a request would be refused again. Where the endpoint answers others, its task is settled as rejected. Where
it answers none it may be the settings: then the tasks stay open, and many of them stop the run. The next run asks others
first, so that it comes further however many stand together.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .chat import RequestFault
from .ledger import Ledger
from .task import Task


BEFORE_REPLY, IN_A_ROW = 5, 25
"""So many refusals before a run's first reply, or later without one between them, are too many; those of tasks that an
earlier run has had refused do not count."""


@dataclass(frozen=True)
class Refusal:
    """A refused request.

    Attributes:
        task, request, attempt: What was asked.
        fault: What the endpoint said.
        again: Whether an earlier run has had a request of this task refused.
    """

    task: Task
    request: str
    attempt: int
    fault: RequestFault
    again: bool


class Refusals:
    """What was refused since a run's last reply.

    Args:
        ledger: Of the run.
    """

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self.open: list[Refusal] = []
        self.answered = False

    def add(self, task: Task, request: str, attempt: int, fault: RequestFault) -> None:
        """Takes a refusal that the ledger does not hold yet."""
        self.open.append(Refusal(task, request, attempt, fault, self.ledger.state(task.id).refused))

    def put_last(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """The tasks, with those at the end that an earlier run has had refused."""
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
        """What too many of them mean, for a person."""
        since = " since the last reply" if self.answered else ""
        fault = self.open[-1].fault
        return (
            f"{len(self.open)} requests were refused and none was answered{since}; the last with {fault.kind}: {fault}"
        )

    def reply(self) -> list[Refusal]:
        """Called with a reply to another request: returns what is refused for good."""
        self.answered = True
        settled, self.open = self.open, []
        return settled

    def end(self) -> list[Refusal]:
        """Called when nothing more is asked: returns what is refused for good; the rest stays in `open`.

        In a run without any reply that is what an earlier run had refused too, if the ledger holds replies to others: else
        the last tasks would be asked by every run.
        """
        if self.too_many:
            return []
        settled, kept = [], []
        for one in self.open:
            for_good = self.answered or (one.again and self.ledger.counts.replies)
            (settled if for_good else kept).append(one)
        self.open = kept
        return settled


__all__ = ["BEFORE_REPLY", "IN_A_ROW", "Refusal", "Refusals"]
