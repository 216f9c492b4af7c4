"""The ledger: one line per event of a run, written before anything depends on it. It is a run's only state.

```
{"event": "sent",  "task": "000000123:complex", "request": "9f…", "attempt": 1, "tokens": [612, 1024]}
{"event": "reply", "task": …, "request": …, "attempt": 1, "text": …, "usage": [598, 187], "reason": null, "final": true}
{"event": "fault", "task": …, "request": …, "attempt": 1, "kind": "429", "message": …, "maybe_paid": false}
{"event": "batch", "task": …, "request": …, "attempt": 1, "tokens": [612, 1024], "file": …}
```

`reason` is why a reply was rejected (`null`: accepted), `final` whether the task ends with it. A task whose request is
refused ends with a reply line without a text, marked `"refused": true`, which counts as rejected and not as a reply. An
incomplete line, left by a process that died while it wrote, is counted and skipped.
"""

import asyncio
import json
import os
import time
from collections import Counter
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..io.files import locked_file
from .chat import Usage
from .limits import BATCH_PRICE, Budget


@dataclass(slots=True)
class TaskState:
    """The state of one task."""

    replies: tuple[int, ...] = ()  # byte positions of its reply lines
    final: bool = False  # it is settled
    accepted: bool = False  # its last reply was accepted
    batched: str | None = None  # id of its request in a batch file
    refused: bool = False  # a request was refused (`RequestFault`)


@dataclass
class LedgerCounts:
    """Sums over a ledger. Tokens are `[prompt, completion]`."""

    requests: int = 0  # sent, including retries
    replies: int = 0
    accepted: int = 0
    rejected: Counter = field(default_factory=Counter)  # replies and refused tasks, by reason
    faults: Counter = field(default_factory=Counter)  # requests without a usable reply, by kind
    maybe_paid: int = 0  # faults that the endpoint may have billed (time-outs, cut or broken replies)
    unknown: int = 0  # requests that were in flight when a process died
    torn: int = 0  # lines cut by a dying process
    missing_usage: int = 0  # replies without a usage; the estimate counts for them
    used: list[int] = field(default_factory=lambda: [0, 0])  # tokens of live replies
    used_in_batch: list[int] = field(default_factory=lambda: [0, 0])
    perhaps_used: list[int] = field(default_factory=lambda: [0, 0])  # estimated, maybe billed without a reply
    models: Counter = field(default_factory=Counter)  # as the endpoint names them


class Ledger(AbstractContextManager):
    """An append-only JSONL file and its state. One process at a time can write it; `write=False` reads it without a lock.

    `append` hands lines to the operating system, so that they survive a kill of the process; `synced` waits until they are
    on disk.

    Raises:
        OSError: another process writes the ledger.
        ValueError: a complete line is not an event of a ledger.
    """

    def __init__(self, path: str | Path, *, write: bool = True):
        self.path = Path(path)
        self.tasks: dict[str, TaskState] = {}
        self.counts = LedgerCounts()
        self.batch_files: set[str] = set()
        self._open_requests: dict[str, list[int]] = {}  # request id → estimated tokens
        self._batched_tokens: dict[str, list[int]] = {}
        self._file: BinaryIO | None = None
        self._reading: BinaryIO | None = None
        self._end = 0
        self._syncing: asyncio.Future | None = None  # the sync to come, for which tasks wait
        with ExitStack() as files:
            if write:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if not files.enter_context(locked_file(self.path.with_name(self.path.name + ".lock"))):
                    raise OSError(
                        f"{path} is in use by another run. Wait for it: two runs in one folder would pay twice."
                    )
                self._file = files.enter_context(open(self.path, "ab"))
            if self.path.exists():
                self._load()
                self._reading = files.enter_context(open(self.path, "rb"))
            self._files = files.pop_all()

    def __exit__(self, *exc: object) -> None:
        self._files.close()

    def state(self, task: str) -> TaskState:
        """The state of a task; an empty one if it has no event."""
        return self.tasks.get(task) or TaskState()

    def reply_at(self, position: int) -> dict[str, Any]:
        """The event of a reply line at a position out of `TaskState.replies`."""
        self._reading.seek(position)
        return json.loads(self._reading.readline())

    def _load(self) -> None:
        with open(self.path, "rb") as file:
            position, line = 0, b""
            for number, line in enumerate(file, 1):
                try:
                    event = json.loads(line)
                except (ValueError, RecursionError):
                    event = None
                if not isinstance(event, dict) or "event" not in event:
                    self.counts.torn += 1
                else:
                    try:
                        self._follow(event, position)
                    except (KeyError, TypeError, IndexError) as error:
                        raise ValueError(
                            f"{self.path}, line {number}, is not an event of a run ({error!r}). Was the file edited? Remove "
                            "the line to resume; its request is sent again."
                        ) from None
                position += len(line)
            self._end = position
        self.counts.unknown += len(self._open_requests)
        for tokens in self._open_requests.values():
            _add(self.counts.perhaps_used, tokens)
        self._open_requests.clear()
        if line and not line.endswith(b"\n") and self._file is not None:
            self._write(b"\n")

    def _follow(self, event: dict[str, Any], position: int) -> None:
        """Updates the state with one event."""
        kind, counts = event["event"], self.counts
        if kind not in {"sent", "reply", "fault", "batch"}:
            return
        state = self.tasks.setdefault(event["task"], TaskState())
        request = event["request"]
        if kind == "sent":
            if request in self._open_requests:  # sent again after a process died
                counts.unknown += 1
                _add(counts.perhaps_used, self._open_requests[request])
            self._open_requests[request] = event["tokens"]
            counts.requests += 1
        elif kind == "batch":
            state.batched = request
            self._batched_tokens[request] = event["tokens"]
            self.batch_files.add(event["file"])
            counts.requests += 1
        else:
            batched = self._batched_tokens.pop(request, None)
            estimate = self._open_requests.pop(request, None) or batched or [0, 0]
            state.batched = None
            if kind == "reply":
                self._follow_reply(event, state, estimate, position)
                return
            state.refused |= bool(event.get("refused"))
            counts.faults[event["kind"]] += 1
            if event.get("maybe_paid"):
                counts.maybe_paid += 1
                _add(counts.perhaps_used, estimate)

    def _follow_reply(self, event: dict[str, Any], state: TaskState, estimate: list[int], position: int) -> None:
        counts = self.counts
        state.replies += (position,)
        state.final, state.accepted = event["final"], event["reason"] is None
        if state.accepted:
            counts.accepted += 1
        else:
            counts.rejected[event["reason"]] += 1
        if not event.get("refused"):
            counts.replies += 1
            counts.missing_usage += event["usage"] is None
            _add(counts.used_in_batch if event.get("batch") else counts.used, event["usage"] or estimate)
            counts.models[event.get("model") or ""] += 1

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        self._end += len(data)

    def append(self, *events: dict[str, Any]) -> None:
        """Writes events and updates the state."""
        now = round(time.time(), 3)
        lines = [json.dumps({**event, "time": now}, ensure_ascii=False).encode() + b"\n" for event in events]
        position = self._end
        self._write(b"".join(lines))
        for event, line in zip(events, lines):
            self._follow(event, position)
            position += len(line)

    def append_now(self, events: list[dict[str, Any]]) -> None:
        """Writes and syncs events from outside an event loop."""
        self.append(*events)
        os.fsync(self._file.fileno())

    async def synced(self) -> None:
        """Returns when everything written before the call is on disk. Concurrent calls wait for one sync, which runs in the
        event loop: it takes less time than handing it to a thread."""
        if self._syncing is None:
            loop = asyncio.get_running_loop()
            self._syncing = loop.create_future()
            loop.call_soon(self._sync, self._syncing)
        await asyncio.shield(self._syncing)  # others wait for it too

    def _sync(self, waiting: asyncio.Future) -> None:
        self._syncing = None
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            waiting.set_exception(error)
        else:
            waiting.set_result(None)

    def charge(self, budget: Budget) -> None:
        """Charges replies, requests that may have been billed without one, and batches under way."""
        budget.spend(Usage(*self.counts.used))
        budget.spend(Usage(*self.counts.perhaps_used))
        budget.spend(Usage(*self.counts.used_in_batch), factor=BATCH_PRICE)
        for tokens in self._batched_tokens.values():
            budget.spend(Usage(*tokens), factor=BATCH_PRICE)


def _add(total: list[int], tokens: Any) -> None:
    total[0] += tokens[0]
    total[1] += tokens[1]
