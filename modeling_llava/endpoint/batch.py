"""OpenAI's Batch API, at half the price: requests are written to files, results are read from files.

The files are uploaded by hand (or by `openai api`) and come back within a day. A task that waits in a batch is not sent
live, and a result that is read twice counts once.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .chat import EndpointFault, Reply, RequestFault
from .ledger import Ledger
from .limits import BATCH_PRICE, Budget
from .openai_model import OpenAIModel, error_words, parse_completion, translate_status
from .refusals import Refusals
from .task import ATTEMPTS, Task, Verdict, refusal_event, reply_event, resume_attempt


MAX_REQUESTS = 50_000
MAX_BYTES = 190_000_000
"""OpenAI takes 50,000 requests and 200 MB per file."""


@dataclass
class BatchSummary:
    """What `write_batch` or `read_batch` did.

    Attributes:
        files: Files written.
        requests: Requests written.
        accepted: Results accepted.
        rejected: Results rejected finally.
        again: Rejected results that are requested once more.
        faults: Results without a reply (`batch_expired`, `"500"`, …), by kind; requested again.
        refused: Tasks settled as rejected because the endpoint refuses their request.
        waiting: Tasks that still wait in a batch.
        unknown: Results of no waiting task (read before, or of another run).
        message: Why writing stopped early, or the endpoint's last error.
    """

    files: list[Path] = field(default_factory=list)
    requests: int = 0
    accepted: int = 0
    rejected: int = 0
    again: int = 0
    faults: Counter = field(default_factory=Counter)
    refused: int = 0
    waiting: int = 0
    unknown: int = 0
    message: str = ""


def write_batch(
    tasks: Iterable[Task],
    model: OpenAIModel,
    ledger: Ledger,
    folder: str | Path,
    *,
    run_id: str = "",
    budget: Budget | None = None,
) -> BatchSummary:
    """Writes every task that is neither settled nor waiting into batch files `batch-000.jsonl`, ….

    A file gets its name only after the ledger knows its requests; one that a dying process left behind is named, or
    removed if the ledger does not know it, by the next call. Writing stops before the first request that exceeds `budget`;
    prompts count by `Budget.TOKENS_PER_CHARACTER`, so it can be overdrawn by the error of that estimate.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    budget = budget or Budget()
    ledger.charge(budget)
    finish_batch_files(ledger, folder)
    summary = BatchSummary()
    lines: list[bytes] = []
    events: list[dict[str, Any]] = []
    size = 0

    def close_file() -> None:
        nonlocal lines, events, size
        if not lines:
            return
        number = len(ledger.batch_files)
        while (path := folder / f"batch-{number:03d}.jsonl").exists():
            number += 1
        unnamed = path.with_name(path.name + ".part")
        with open(unnamed, "wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        ledger.append_now([{**event, "file": path.name} for event in events])
        os.replace(unnamed, path)
        summary.files.append(path)
        summary.requests += len(lines)
        lines, events, size = [], [], 0

    for task in tasks:
        state = ledger.state(task.id)
        if state.final or state.batched:
            summary.waiting += bool(state.batched)
            continue
        attempt = 1 + len(state.replies)
        task = resume_attempt(task, ledger)
        estimate = budget.estimate(task.messages, task.max_tokens)
        if not budget.reserve(estimate, BATCH_PRICE):
            summary.message = "The budget does not cover the next request; the rest is left for later."
            break
        request = task.request_id(run_id, model.name, attempt)
        body = model.body(task.messages, max_tokens=task.max_tokens, temperature=task.temperature, seed=task.seed)
        line = {"custom_id": request, "method": "POST", "url": "/v1/chat/completions", "body": body}
        encoded = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        if len(lines) >= MAX_REQUESTS or size + len(encoded) > MAX_BYTES:
            close_file()
        lines.append(encoded)
        size += len(encoded)
        tokens = [estimate.prompt_tokens, estimate.completion_tokens]
        events.append({"event": "batch", "task": task.id, "request": request, "attempt": attempt, "tokens": tokens})
    close_file()
    return summary


def finish_batch_files(ledger: Ledger, folder: Path) -> None:
    """Completes the files whose requests are in the ledger, and removes the others."""
    for unnamed in folder.glob("batch-*.jsonl.part"):
        path = unnamed.with_name(unnamed.name.removesuffix(".part"))
        if path.name in ledger.batch_files and not path.exists():
            os.replace(unnamed, path)
        else:
            unnamed.unlink()


def read_batch(
    tasks: Iterable[Task], paths: Iterable[str | Path], ledger: Ledger, *, judge: Callable[[Task, Reply], Verdict]
) -> BatchSummary:
    """Reads the output and error files of batches into the ledger.

    Give both files of a batch together: a request in the error file is refused for good where the output file has replies.

    Raises:
        ValueError: a line is not a batch result.
        OSError: a file cannot be read.
    """
    summary = BatchSummary()
    where = _index(paths)
    known = len(where)
    events: list[dict[str, Any]] = []
    refusals = Refusals(ledger)
    for task in tasks:
        state = ledger.state(task.id)
        if state.batched is None:
            continue
        found = where.pop(state.batched, None)
        if found is None:
            summary.waiting += 1
            continue
        path, position = found
        with open(path, "rb") as file:
            file.seek(position)
            result = json.loads(file.readline())
        attempt = 1 + len(state.replies)
        task = resume_attempt(task, ledger)
        try:
            reply = _reply(result)
        except EndpointFault as fault:
            event = {"event": "fault", "task": task.id, "request": state.batched, "attempt": attempt}
            event |= {"kind": fault.kind, "message": str(fault)[:500], "maybe_paid": fault.maybe_paid}
            if isinstance(fault, RequestFault):
                refusals.add(task, state.batched, attempt, fault)
                event["refused"] = True
            events.append(event)
            summary.faults[fault.kind] += 1
            summary.message = f"{fault.kind}: {fault}"
        else:
            refusals.answered = True
            verdict = judge(task, reply)
            final = verdict.reason is None or verdict.retry_prompt is None or attempt >= ATTEMPTS
            events.append(reply_event(task, state.batched, attempt, reply, verdict, final, batch=True))
            summary.accepted += verdict.reason is None
            summary.rejected += verdict.reason is not None and final
            summary.again += not final
        if len(events) >= 1000:
            ledger.append_now(events)
            events = []
    for one in refusals.reply() if refusals.answered else ():
        events.append(refusal_event(one.task, one.request, one.attempt, one.fault, batch=True))
        summary.faults[one.fault.kind] -= 1
        summary.refused += 1
    summary.faults = +summary.faults
    ledger.append_now(events)
    summary.unknown = len(where)
    summary.requests = known - summary.unknown
    return summary


def forget_batch(tasks: Iterable[Task], ledger: Ledger) -> int:
    """Frees every task that waits in a batch, to be sent again; returns their number."""
    waiting = [(task.id, ledger.state(task.id)) for task in tasks if ledger.state(task.id).batched]
    ledger.append_now(
        [
            {
                "event": "fault",
                "task": task,
                "request": state.batched,
                "attempt": 1 + len(state.replies),
                "kind": "batch_forgotten",
                "message": "freed by hand",
                "maybe_paid": True,
            }
            for task, state in waiting
        ]
    )
    return len(waiting)


def _index(paths: Iterable[str | Path]) -> dict[str, tuple[Path, int]]:
    """custom_id → file and position of its result. Of several under one id a reply takes precedence over an error."""
    where: dict[str, tuple[Path, int]] = {}
    answered: set[str] = set()
    for path in map(Path, paths):
        position = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        result = json.loads(line)
                        name = result["custom_id"]
                        if name not in answered:
                            where[name] = (path, position)
                        if "response" not in result and "error" not in result:
                            raise KeyError("response")
                    except ValueError as error:
                        raise ValueError(
                            f"{path}, line {number}, is not JSON ({error}). Was its download cut short? Nothing was read; "
                            "fetch it again."
                        ) from None
                    except (KeyError, TypeError) as error:
                        raise ValueError(
                            f"{path}, line {number}, is not a batch result ({type(error).__name__}: {error}). Give the "
                            f"output or the error file of a batch, not its input."
                        ) from None
                    if _status(result.get("response")) == 200:
                        answered.add(name)
                position += len(line)
    return where


def _reply(result: dict[str, Any]) -> Reply:
    """The reply of a result.

    Raises:
        EndpointFault: it has none.
    """
    response, error = result.get("response"), result.get("error")
    status = _status(response)
    if status == 200:
        return parse_completion(response.get("body"))
    if status is not None:
        body = response.get("body")
        raise translate_status(status, error_words(body.get("error") or body if isinstance(body, dict) else body))
    error = error if isinstance(error, dict) else {"message": error}
    raise EndpointFault(str(error.get("code") or "batch"), str(error.get("message") or "no response"))


def _status(response: Any) -> int | None:
    """HTTP status of a response; 500 where it does not say, `None` without a response."""
    if not isinstance(response, dict) or not response:
        return None
    try:
        return int(response.get("status_code") or 500)
    except (TypeError, ValueError):
        return 500
