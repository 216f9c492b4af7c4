"""Ask a language model behind an endpoint many things, and say plainly how many it did not answer."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..endpoint import REFUSED, Budget, ChatModel, Ledger, Reply, RunSettings, Task, Verdict, run_tasks
from .results import hash_json


logger = logging.getLogger(__name__)


@dataclass
class Asked:
    """
    What came of it.

    Attributes:
        replies (`dict[str, str]`): Accepted replies by the task's id.
        rejected (`dict[str, str]`): Replies that were rejected for good, by the task's id.
        refused (`dict[str, str]`): Tasks whose request the endpoint refuses (too long, filtered) and its words; settled.
        models (`list[str]`): The names that the endpoint gave for what answered.
        left_out (`set[str]`): Parameters that the endpoint does not take, of replies that were given without them.
        open (`int`): Tasks without any reply; asked again by the next run.
        message (`str`): Why tasks are open, if they are.
    """

    replies: dict[str, str] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)
    open: int = 0
    message: str = ""

    def require_all(
        self, total: int, what: str, where: Path, *, refused_too: bool = False, partial: bool = False
    ) -> None:
        """
        Args:
            partial (`bool`): Any reply is enough.
            refused_too (`bool`): Refused requests count as missing as well; else they are the caller's to count.

        Raises:
            ConnectionError: tasks are open. What was answered is kept.
            ValueError: requests are refused, which asking again does not change.
        """
        if partial and (self.replies or self.rejected):
            return
        if self.open:
            raise ConnectionError(
                f"{self.open} of {total} {what} have no reply. {self.message} What was answered is kept in {where}: run "
                "the same command again to go on, or add --partial to score without them."
            )
        if self.refused and refused_too:
            task, said = next(iter(self.refused.items()))
            raise ValueError(
                f"{len(self.refused)} of {total} {what} are refused by the endpoint, '{task}' for one ({said}). Add --partial "
                "to score without them."
            )


def ask_all(
    tasks: list[Task],
    model: ChatModel,
    folder: Path,
    name: str,
    *,
    accept: Callable[[Task, Reply], Verdict] | None = None,
    settings: RunSettings | None = None,
    budget: Budget | None = None,
    progress: bool = True,
) -> Asked:
    """
    Asks what the ledger does not hold yet and returns all that it holds.

    In the ledger a task's id ends with a hash of everything asked, and the ledger's name with one of the model's name: other
    prompts or another model never take over replies that were meant for these.

    Args:
        tasks (`list[Task]`), model (`ChatModel`)
        folder (`Path`), name (`str`): The ledger is `folder/name-<hash of the model's name>.jsonl`.
        accept (`Callable[[Task, Reply], Verdict]`, *optional*): Judges a reply; all are accepted by default.
        settings, budget: Of the run.
    """
    from tqdm import tqdm

    asked_ids = {_asked_id(task): task.id for task in tasks}
    tasks = [replace(task, id=_asked_id(task)) for task in tasks]
    with (
        Ledger(folder / f"{name}-{hash_json(model.name)[:8]}.jsonl") as ledger,
        tqdm(total=len(tasks), desc=name, unit="", disable=not progress or None) as bar,
    ):
        bar.update(sum(ledger.state(task.id).final for task in tasks))
        options = {} if accept is None else {"judge": accept}
        summary = run_tasks(
            tasks,
            model,
            ledger,
            run_id=name,
            settings=settings,
            budget=budget,
            on_settled=lambda task, accepted: bar.update(),
            **options,
        )
        asked = Asked(message=summary.message)
        if not asked.message and summary.given_up:
            asked.message = (
                "Faults: " + ", ".join(f"{kind} × {n}" for kind, n in sorted(summary.given_up.items())) + "."
            )
        if summary.said and summary.said.partition(": ")[2] not in asked.message:
            asked.message += f" The endpoint said last: {summary.said}"
        models = set()
        for task in tasks:
            state = ledger.state(task.id)
            if not state.final:
                asked.open += 1
                continue
            event, task_id = ledger.reply_at(state.replies[-1]), asked_ids[task.id]
            if event["reason"] == REFUSED:
                asked.refused[task_id] = event["detail"]
                continue
            models.add(event["model"] or model.name)
            asked.left_out.update(event.get("left_out", ()))
            if event["reason"] is None:
                asked.replies[task_id] = event["text"]
            else:
                asked.rejected[task_id] = event["text"]
        asked.models = sorted(models)
    return asked


def _asked_id(task: Task) -> str:
    content = [task.messages, task.max_tokens, task.temperature, task.seed]
    return f"{task.id}#{hash_json(content)[:12]}"


__all__ = ["Asked", "ask_all"]
