"""
Asks a language model behind an endpoint, and the judge of LLaVA-Bench (LLaVA §5.1): it reads the context, the question and two
answers, and gives each a score from 1 to 10. A review that cannot be parsed is asked for once more and then counted as failed.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..endpoint import REFUSED, Budget, ChatModel, Ledger, Reply, RunSettings, Task, Verdict, run_tasks
from .results import hash_json, read_json


LOWEST, HIGHEST = 1.0, 10.0
_NUMBER = r"([0-9]{1,2}(?:\.[0-9]+)?)"
_OF_TEN = r"\s*(?:/|(?:out\s+)?of)\s*10(?![0-9])"
_BETWEEN = r"(?:\s*[,;|&]\s*|\s+and\s+|\s+)"
_PAIR = re.compile(
    rf"""
    (?:[^\n0-9:]{{0,60}}\b(?:scores?|ratings?)(?:\s+(?:for|of)\b[^\n0-9:]{{0,60}})?\s*(?::|=|\bare\b|\n)\s*)?
    (?: {_NUMBER}{_BETWEEN}{_NUMBER} | {_NUMBER}{_OF_TEN}{_BETWEEN}{_NUMBER}{_OF_TEN} )
    [^\S\n]*[.;]?[^\S\n]*(?:\Z|\n(?!\s*{_NUMBER}(?:,[0-9])?\s*$))  # a line of another number would be a third score
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_LABEL = (
    r"(?:\b(?:the\s+)?(?:score|rating)\s+(?:of|for)\s+)?\b(?:assistant|answer|response|score|rating)\s*([12AB])(?:'s)?\s*"
    r"(?:score|rating)?(?:\s*(?::|=|\b(?:is|gets|scored)\b)\s*|\s+[-\u2013\u2014]\s+)"
)
_LABELLED = re.compile(
    rf"{_LABEL}{_NUMBER}(?:{_OF_TEN})?(?=[^\S\n]*[.,;]?[^\S\n]*(?:$|(?:and\s+)?{_LABEL}))",
    re.IGNORECASE | re.MULTILINE,
)
_MARKUP = re.compile(r"""</?\w+>|^```\w*|^\||\|$|\\boxed|[*_`#(){}\[\]"]""", re.MULTILINE)

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
"""What the published evaluation tells the judge first."""

RETRY_PROMPT = (
    "Your reply cannot be used: its first line must be two numbers from 1 to 10, the score of Assistant 1 and the score of "
    "Assistant 2, separated by a space, and nothing else. Give the whole review again."
)


def parse_scores(review: str) -> tuple[float, float] | None:
    """
    The two scores of a review, or `None`: two numbers from 1 to 10 at the beginning, with nothing else on their lines, or one
    labelled score for each answer. `"8 9"`, `"**8/10 9/10**"`, `"Assistant 1: 8, Assistant 2: 9"` are scores; `"8"`, `"8 9 7"`,
    `"8/9"`, `"0 11"` are not.
    """
    review = _MARKUP.sub("", unicodedata.normalize("NFKC", review)).strip()
    if match := _PAIR.match(review):
        first, second = (float(match[n] or match[n + 2]) for n in (1, 2))
    else:
        found = [(label.upper(), float(number)) for label, number, _ in _LABELLED.findall(review)]
        if [label for label, _ in sorted(found)] not in (["1", "2"], ["A", "B"]):
            return None
        (_, first), (_, second) = sorted(found)
    if not (LOWEST <= first <= HIGHEST and LOWEST <= second <= HIGHEST):
        return None
    return first, second


def read_rules(path: str | Path | None = None) -> dict[str, dict[str, str]]:
    """What the judge is told, by category: `{category: {"role", "prompt"}}`, the published form. By default ours."""
    path = path or Path(__file__).with_name("judge_rules.json")
    rules = read_json(path)
    for rule in rules.values() if isinstance(rules, dict) else [None]:
        if not isinstance(rule, dict) or not all(isinstance(rule.get(key), str) for key in ("role", "prompt")):
            raise ValueError(f"{path} is not a file of rules for the judge, {{category: {{'role': …, 'prompt': …}}}}.")
    return rules


def rule_for(rules: dict[str, dict[str, str]], category: str, has_boxes: bool) -> dict[str, str]:
    """The rule of a category: of a context with boxes (COCO), or with a description only (In-the-Wild)."""
    for name in (category if has_boxes else f"llava_bench_{category}", "default"):
        if name in rules:
            return rules[name]
    raise ValueError(f"The rules have none for {category!r} and no 'default'; they have {', '.join(rules)}.")


def review_task(
    task_id: str, question: str, context: str, first: str, second: str, rule: dict[str, str], **sampling: Any
) -> Task:
    """One review in the published layout; `sampling` are `max_tokens`, `temperature` and `seed` of the [`Task`]."""
    role = rule["role"]
    content = (
        f"[Context]\n{context}\n\n[Question]\n{question}\n\n"
        f"[{role} 1]\n{first}\n\n[End of {role} 1]\n\n[{role} 2]\n{second}\n\n[End of {role} 2]\n\n"
        f"[System]\n{rule['prompt']}\n\n"
    )
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    return Task(task_id, messages, **sampling)


def accept_review(task: Task, reply: Reply) -> Verdict:
    """Accepts a review with scores; another one is asked for once more, with what was wrong."""
    if parse_scores(reply.text) is not None:
        return Verdict()
    return Verdict("no_scores", f"first line: {reply.text.strip()[:80]!r}", RETRY_PROMPT)


def accept_text(task: Task, reply: Reply) -> Verdict:
    """Accepts a reply that has a text; an empty one is asked for once more."""
    return Verdict() if reply.text.strip() else Verdict("empty", "", "Your reply was empty. Answer the question.")


def rules_hash(rules: dict[str, dict[str, str]]) -> str:
    """The first 16 digits of the SHA-256 of system message and rules, which names the judge's prompt in results."""
    return hash_json({"system": SYSTEM, "rules": rules})[:16]


@dataclass
class Asked:
    """What a language model replied, by the task's id."""

    replies: dict[str, str] = field(default_factory=dict)  # accepted
    rejected: dict[str, str] = field(default_factory=dict)  # for good
    refused: dict[str, str] = field(default_factory=dict)  # by the endpoint, with its reason; not asked again
    models: set[str] = field(default_factory=set)  # that replied, as the endpoint names them
    left_out: set[str] = field(default_factory=set)  # parameters that the endpoint does not take
    cut: int = 0  # replies that end at their maximum length
    open: int = 0  # tasks without any reply; the next run asks them again
    message: str = ""  # why tasks are open

    def require_all(self, total: int, what: str, folder: Path, *, refused: bool = True, partial: bool = False) -> None:
        """
        A `ConnectionError` if tasks are open, a `ValueError` if requests are refused (except without `refused`), since asking
        again does not change that. With `partial`, any reply is enough.
        """
        if partial and (self.replies or self.rejected):
            return
        if self.open:
            raise ConnectionError(
                f"{self.open} of {total} {what} have no reply. {self.message} Replies are kept in {folder}: the same "
                "command resumes, or add --partial to score without them."
            )
        if self.refused and refused:
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
    accept: Callable[[Task, Reply], Verdict] = lambda task, reply: Verdict(),
    settings: RunSettings | None = None,
    budget: Budget | None = None,
) -> Asked:
    """
    Asks what is not in the ledger `folder/name-<hash of the model's name>.jsonl` yet and returns all that is. There a task's id
    ends with a hash of the request: replies are never reused for other prompts or another model.
    """
    from tqdm import tqdm

    asked_tasks = []
    for task in tasks:
        content = [task.messages, task.max_tokens, task.temperature, task.seed]
        asked_tasks.append(replace(task, id=f"{task.id}#{hash_json(content)[:12]}"))
    with (
        Ledger(folder / f"{name}-{hash_json(model.name)[:8]}.jsonl") as ledger,
        tqdm(total=len(tasks), desc=name, unit="", disable=None) as bar,
    ):
        bar.update(sum(ledger.state(task.id).final for task in asked_tasks))
        options = {"run_id": name, "judge": accept, "settings": settings, "budget": budget}
        summary = run_tasks(asked_tasks, model, ledger, on_settled=lambda *_: bar.update(), **options)
        asked = Asked(message=summary.message)
        if not asked.message and summary.given_up:
            faults = ", ".join(f"{kind} × {n}" for kind, n in sorted(summary.given_up.items()))
            asked.message = f"Faults: {faults}."
        if summary.last_error and summary.last_error.partition(": ")[2] not in asked.message:
            asked.message += f" Last error of the endpoint: {summary.last_error}"
        for task, asked_task in zip(tasks, asked_tasks):
            state = ledger.state(asked_task.id)
            if not state.final:
                asked.open += 1
                continue
            event = ledger.reply_at(state.replies[-1])
            if event["reason"] == REFUSED:
                asked.refused[task.id] = event["detail"]
                continue
            asked.models.add(event["model"] or model.name)
            asked.cut += event["finish"] == "length"
            asked.left_out.update(event.get("left_out", ()))
            (asked.replies if event["reason"] is None else asked.rejected)[task.id] = event["text"]
    return asked
