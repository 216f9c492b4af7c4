"""
The judge of LLaVA-Bench (LLaVA §5.1): a language model reads the context, the question and two answers, and gives each a
score from 1 to 10. What does not have one meaning is asked for once more and then counted as failed.
"""

import json
import os
import re
from importlib.resources import files
from typing import Any

from ..endpoint import Reply, Task, Verdict
from .results import hash_json


RULES_FILE = "judge_rules.json"
LOWEST, HIGHEST = 1.0, 10.0
_NUMBER = r"([0-9]{1,2}(?:\.[0-9]+)?)"
_OF_TEN = r"\s*(?:/|(?:out\s+)?of)\s*10(?![0-9])"
_BETWEEN = r"(?:\s*[,;|]\s*|\s+and\s+|\s+)"
_PAIR = re.compile(
    rf"""
    (?:(?:the\s+)?(?:final\s+)?(?:scores?|ratings?)\s*(?::|=|\bare\b|\n)\s*)?
    (?: {_NUMBER}{_BETWEEN}{_NUMBER} | {_NUMBER}{_OF_TEN}{_BETWEEN}{_NUMBER}{_OF_TEN} )
    [^\S\n]*[.;]?[^\S\n]*(?:\Z|\n(?!\s*{_NUMBER}\s*$))      # a line of another number would be a third score
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_LABEL = r"\b(?:assistant|answer|response|score)\s*([12AB])(?:'s\s+score)?\s*(?::|=|\bis\b)\s*"
_LABELLED = re.compile(
    rf"{_LABEL}{_NUMBER}(?:{_OF_TEN})?(?=[^\S\n]*[.,;]?[^\S\n]*(?:$|(?:and\s+)?{_LABEL}))",
    re.IGNORECASE | re.MULTILINE,
)
_MARKUP = re.compile(r"""[*_`#(){}\[\]"]""")

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
"""What the published evaluation tells the judge first."""

TELL = (
    "Your reply cannot be used: its first line must be two numbers from 1 to 10, the score of Assistant 1 and the score of "
    "Assistant 2, separated by a blank, and nothing else. Give the whole review again."
)


def parse_scores(review: str) -> tuple[float, float] | None:
    """
    The two scores of a review, or `None`.

    Two numbers from 1 to 10 at the beginning, with nothing else on their line or lines, or one score for each by its label.
    `"8 9"`, `"**8/10 9/10**"`, `"Assistant 1: 8, Assistant 2: 9"` are scores; `"8"`, `"8 9 7"`, `"8/9"`, `"0 11"` are not.
    """
    review = _MARKUP.sub("", review).strip()
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


def read_rules(path: str | os.PathLike | None = None) -> dict[str, dict[str, str]]:
    """
    What the judge is told, by category: `{category: {"role", "prompt"}}`, the published form. By default ours.

    Raises:
        ValueError: the file is not of that form.
    """
    text = files(__package__).joinpath(RULES_FILE).read_text("utf-8") if path is None else open_text(path)
    try:
        rules = json.loads(text)
        for name, rule in rules.items():
            if not isinstance(rule["role"], str) or not isinstance(rule["prompt"], str):
                raise TypeError(f"rule {name!r} has a role or prompt that is not text")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no rules for the judge; the form is {{category: {{'role': …, 'prompt': …}}}} ({error!r})."
        ) from None
    return rules


def rule_for(rules: dict[str, dict[str, str]], category: str, has_boxes: bool) -> dict[str, str]:
    """The rule of a category: of a context with boxes (COCO), or with a description only (In-the-Wild)."""
    for name in (category if has_boxes else f"llava_bench_{category}", "default"):
        if name in rules:
            return rules[name]
    raise ValueError(f"The rules have none for {category!r} and no 'default'; they have {', '.join(rules)}.")


def review_task(
    task_id: str,
    question: str,
    context: str,
    first: str,
    second: str,
    rule: dict[str, str],
    *,
    temperature: float | None = 0.2,
    seed: int | None = None,
    max_tokens: int = 1024,
) -> Task:
    """
    One review, in the published layout: system message; context, question, the two answers, the rule.

    Args:
        task_id (`str`): Names the review.
        question, context, first, second (`str`): Texts.
        rule (`dict`): From [`rule_for`].
    """
    role = rule["role"]
    content = (
        f"[Context]\n{context}\n\n[Question]\n{question}\n\n"
        f"[{role} 1]\n{first}\n\n[End of {role} 1]\n\n[{role} 2]\n{second}\n\n[End of {role} 2]\n\n"
        f"[System]\n{rule['prompt']}\n\n"
    )
    return Task(
        id=task_id,
        messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}],
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
    )


def accept_review(task: Task, reply: Reply) -> Verdict:
    """A review with scores is accepted; another one is asked for again, once, with what is wrong told to the judge."""
    if parse_scores(reply.text) is not None:
        return Verdict()
    return Verdict("no_scores", f"first line: {reply.text.strip()[:80]!r}", TELL)


def rules_hash(rules: dict[str, Any]) -> str:
    """What results name the judge's prompt by: SHA-256 of the system message and the rules, first 16 digits."""
    return hash_json({"system": SYSTEM, "rules": rules})[:16]


def open_text(path: str | os.PathLike) -> str:
    """The text of a file."""
    with open(path, encoding="utf-8") as file:
        return file.read()


__all__ = ["accept_review", "parse_scores", "read_rules", "review_task", "rule_for", "rules_hash"]
