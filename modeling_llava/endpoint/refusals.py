"""Requests that an endpoint refuses (HTTP 400, 403, 413, 422): is it the request or the settings?

If the endpoint answers others, the task is settled as rejected. If it answers none, the settings may be at fault: the
tasks stay open, many of them stop the run, and the next run tries them last.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .chat import RequestFault
from .ledger import Ledger
from .task import Task


BEFORE_REPLY, IN_A_ROW = 5, 25
"""How many refusals stop a run: before its first reply, and later without a reply between them. Tasks that an earlier run
had refused do not count."""


@dataclass(frozen=True)
class Refusal:
    """A refused request; `again`: a request of this task was refused in an earlier run too."""

    task: Task
    request: str
    attempt: int
    fault: RequestFault
    again: bool


class Refusals:
    """What was refused since a run's last reply."""

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
        since = " since the last reply" if self.answered else ""
        fault = self.open[-1].fault
        return (
            f"{len(self.open)} requests were refused and none was answered{since}; the last with {fault.kind}: {fault}"
        )

    def reply(self) -> list[Refusal]:
        """Called with a reply to another request: returns what is refused finally."""
        self.answered = True
        settled, self.open = self.open, []
        return settled

    def end(self) -> list[Refusal]:
        """Called at the end: returns what is refused finally; the rest stays in `open`.

        Without any reply in this run, that is what an earlier run, which had replies to others, had refused too.
        """
        if self.too_many:
            return []
        settled, kept = [], []
        for one in self.open:
            is_final = self.answered or (one.again and self.ledger.counts.replies)
            (settled if is_final else kept).append(one)
        self.open = kept
        return settled


__all__ = ["BEFORE_REPLY", "IN_A_ROW", "Refusal", "Refusals"]
