"""OpenAI's Batch API, at half the price: requests are written to files, results are read from files.

A task that waits in a batch is not sent live, and a result that is read twice counts once.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..io.files import write_atomic
from .chat import EndpointFault, Reply, RequestFault
from .ledger import Ledger
from .limits import BATCH_PRICE, Budget
from .openai_model import OpenAIModel, error_words, parse_completion, translate_status
from .task import Refusals, Task, Verdict, fault_event, refusal_event, reply_event, resume_attempt


MAX_REQUESTS = 50_000
MAX_BYTES = 190_000_000
"""OpenAI takes 50,000 requests and 200 MB per file."""


@dataclass
class BatchSummary:
    """What `write_batch` or `read_batch` did."""

    files: list[Path] = field(default_factory=list)  # written
    requests: int = 0  # written, or read
    accepted: int = 0
    rejected: int = 0  # finally
    again: int = 0  # rejected replies that are requested once more
    faults: Counter = field(default_factory=Counter)  # results without a reply, by kind; requested again
    refused: int = 0  # tasks settled as rejected because the endpoint refuses their request
    waiting: int = 0  # tasks that still wait in a batch
    unknown: int = 0  # results of no waiting task (read before, or of another run)
    message: str = ""  # why writing stopped early, or the endpoint's last error


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

    A file that a process wrote before it died, and that the ledger does not know, is replaced. Writing stops before the
    first request whose estimate exceeds `budget`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    budget = budget or Budget()
    ledger.charge(budget)
    summary = BatchSummary()
    lines: list[bytes] = []
    events: list[dict[str, Any]] = []

    def write_file() -> None:
        number = len(ledger.batch_files)
        while (path := folder / f"batch-{number:03d}.jsonl").exists() and not path.read_bytes().startswith(lines[0]):
            number += 1
        write_atomic(path, b"".join(lines), sync=True)
        ledger.append_now([{**event, "file": path.name} for event in events])
        summary.files.append(path)
        summary.requests += len(lines)
        lines.clear()
        events.clear()

    size = 0
    for task in tasks:
        state = ledger.state(task.id)
        if state.final or state.batched:
            summary.waiting += bool(state.batched)
            continue
        task, attempt = resume_attempt(task, ledger)
        estimate = budget.estimate(task.messages, task.max_tokens)
        if not budget.reserve(estimate, BATCH_PRICE):
            summary.message = "The budget does not cover the next request; the rest is left for later."
            break
        request = task.request_id(run_id, model.name, attempt)
        body = model.body(task.messages, max_tokens=task.max_tokens, temperature=task.temperature, seed=task.seed)
        line = {"custom_id": request, "method": "POST", "url": "/v1/chat/completions", "body": body}
        encoded = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        if len(lines) >= MAX_REQUESTS or (lines and size + len(encoded) > MAX_BYTES):
            write_file()
            size = 0
        lines.append(encoded)
        size += len(encoded)
        tokens = [estimate.prompt_tokens, estimate.completion_tokens]
        events.append({"event": "batch", "task": task.id, "request": request, "attempt": attempt, "tokens": tokens})
    if lines:
        write_file()
    return summary


def read_batch(
    tasks: Iterable[Task], paths: Iterable[str | Path], ledger: Ledger, *, judge: Callable[[Task, Reply], Verdict]
) -> BatchSummary:
    """Reads the output and error files of batches into the ledger; a `ValueError` names a line that is not a batch result.

    Give both files of a batch together: a request in the error file is refused for good where the output file has replies.
    """
    summary, refusals, where = BatchSummary(), Refusals(ledger), _index(paths)
    known = len(where)
    events: list[dict[str, Any]] = []
    for task in tasks:
        request = ledger.state(task.id).batched
        if request is None:
            continue
        if request not in where:
            summary.waiting += 1
            continue
        path, position = where.pop(request)
        with open(path, "rb") as file:
            file.seek(position)
            result = json.loads(file.readline())
        task, attempt = resume_attempt(task, ledger)
        try:
            reply = _reply(result)
        except EndpointFault as fault:
            event = fault_event(task.id, request, attempt, fault)
            if isinstance(fault, RequestFault):
                refusals.add(task, request, attempt, fault)
                event["refused"] = True
            events.append(event)
            summary.faults[fault.kind] += 1
            summary.message = f"{fault.kind}: {fault}"
        else:
            refusals.answered = True
            verdict = judge(task, reply)
            final = verdict.is_final(attempt)
            events.append(reply_event(task, request, attempt, reply, verdict, batch=True))
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
    fault, events = EndpointFault("batch_forgotten", "freed by hand", maybe_paid=True), []
    for task in tasks:
        state = ledger.state(task.id)
        if state.batched:
            events.append(fault_event(task.id, state.batched, 1 + len(state.replies), fault))
    ledger.append_now(events)
    return len(events)


def _index(paths: Iterable[str | Path]) -> dict[str, tuple[Path, int]]:
    """custom_id → file and position of its result. Of several with one id a reply takes precedence over an error."""
    where: dict[str, tuple[Path, int]] = {}
    answered: set[str] = set()
    for path in map(Path, paths):
        position = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    name, has_reply = _result_id(line, f"{path}, line {number},")
                    if name not in answered:
                        where[name] = (path, position)
                    if has_reply:
                        answered.add(name)
                position += len(line)
    return where


def _result_id(line: bytes, place: str) -> tuple[str, bool]:
    """The custom_id of a result, and whether it has a reply."""
    try:
        result = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON ({error}). Was its download cut short? Nothing was read.") from None
    if not isinstance(result, dict) or "custom_id" not in result or not {"response", "error"} & result.keys():
        raise ValueError(f"{place} is not a batch result. Give the output or error file of a batch, not its input.")
    return str(result["custom_id"]), _status(result.get("response")) == 200


def _reply(result: dict[str, Any]) -> Reply:
    """The reply of a result; an `EndpointFault` if it has none."""
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
    status = response.get("status_code")
    return status if isinstance(status, int) else 500
