"""
ScienceQA with a language-only model (LLaVA §5.2): alone, with two worked examples (82.69 with GPT-4), and together with a
LLaVA, as its complement (90.97) and as the judge where the two differ (92.53).
"""

import random
from pathlib import Path
from typing import Any

from ..endpoint import ChatModel, Task
from .judge import Asked, ask_all
from .results import Scored
from .scienceqa import Problem, answer_text, question_text, score
from .scienceqa_answers import parse_answer


INSTRUCTION = (
    "You answer multiple-choice questions from school science. Think about what the question, its context and its options "
    'say, give your reasons in a few sentences, and end with a line of the form "The answer is X.", X being the letter of '
    "one option."
)

JUDGE_INSTRUCTION = (
    "You decide multiple-choice questions from school science. Two assistants have answered the same question. Assistant 1 "
    "has seen the picture that belongs to the question, if there is one; Assistant 2, like you, has only read the text. "
    "Either of them may be wrong. Weigh their reasons, give yours in a few sentences, and end with a line of the form "
    '"The answer is X.", X being the letter of one option.'
)


def choose_shots(problems: list[Problem], count: int = 2, seed: int = 0) -> list[Problem]:
    """Worked examples: problems with an explanation and without an image, drawn by `seed`."""
    fit = [problem for problem in problems if problem.solution and problem.image is None]
    if len(fit) < count:
        raise ValueError(
            f"{count} worked examples require as many problems with an explanation and no image; {len(fit)} of "
            f"{len(problems)} are such. Take them from the training split."
        )
    return random.Random(seed).sample(fit, count)


def language_tasks(problems: list[Problem], shots: list[Problem], max_tokens: int = 512) -> list[Task]:
    """What the language-only model is asked, one task per problem."""
    examples = [{"role": "system", "content": INSTRUCTION}]
    for shot in shots:
        examples += [
            {"role": "user", "content": question_text(shot)},
            {"role": "assistant", "content": answer_text(shot, "LEA")},
        ]
    asked = [[*examples, {"role": "user", "content": question_text(problem)}] for problem in problems]
    return [Task(problem.id, messages, max_tokens, 0.0) for problem, messages in zip(problems, asked)]


def judge_tasks(
    problems: list[Problem], own: dict[str, str], language: dict[str, str], max_tokens: int = 512
) -> list[Task]:
    """What the judge is asked: the problems for which the two models do not name the same choice."""
    tasks = []
    for problem in problems:
        first, second = own[problem.id], language[problem.id]
        num_choices = len(problem.choices)
        if parse_answer(first, num_choices) == parse_answer(second, num_choices) is not None:
            continue
        content = (
            f"{question_text(problem)}\n\n[Assistant 1]\n{first.strip() or '(no answer)'}\n\n"
            f"[Assistant 2]\n{second.strip() or '(no answer)'}"
        )
        messages = [{"role": "system", "content": JUDGE_INSTRUCTION}, {"role": "user", "content": content}]
        tasks.append(Task(problem.id, messages, max_tokens, 0.0))
    return tasks


def prefer(problem: Problem, reply: str | None, own: str) -> str:
    """A reply of the language model or of the judge; LLaVA's own answer if there is none or it names no choice."""
    return own if reply is None or parse_answer(reply, len(problem.choices)) is None else reply


def score_with_language_model(
    problems: list[Problem],
    own: dict[str, str],
    model: ChatModel,
    folder: Path,
    *,
    shots: list[Problem],
    judge: ChatModel | None = None,
    max_tokens: int = 512,
    partial: bool = False,
    **asking: Any,
) -> dict[str, Scored]:
    """
    Scores of the language-only model alone and of both ensembles: `"language"`, `"complement"`, `"judge"`, over the same problems.
    `own` are LLaVA's answers by the problem's id, `shots` the worked examples; `judge`, by default `model`, decides where the two
    differ; `folder`, `partial` and `asking` are as in [`ask_references`].
    """
    problems = [problem for problem in problems if problem.id in own]

    def ask(tasks: list[Task], who: ChatModel, name: str) -> Asked:
        asked = ask_all(tasks, who, folder, name, **asking)
        asked.require_all(len(tasks), "questions", folder, partial=partial)
        return asked

    language = ask(language_tasks(problems, shots, max_tokens), model, "language-model")
    no_reply = len(problems) - len(language.replies)
    problems = [problem for problem in problems if problem.id in language.replies]
    differing = judge_tasks(problems, own, language.replies, max_tokens)
    verdicts = ask(differing, judge or model, "judge")
    undecided = {task.id for task in differing} - set(verdicts.replies)
    problems = [problem for problem in problems if problem.id not in undecided]

    answers = {
        "language": language.replies,
        "complement": {p.id: prefer(p, language.replies[p.id], own[p.id]) for p in problems},
        "judge": {p.id: prefer(p, verdicts.replies.get(p.id), own[p.id]) for p in problems},
    }
    scored = {name: score(problems, texts) for name, texts in answers.items()}
    for one in scored.values():
        one.more = {"answered_by": sorted(language.models), "no_reply": no_reply + len(undecided)}
    scored["language"].counts["cut_at_max_reply_tokens"] = language.cut
    judged = [problem for problem in problems if problem.id in verdicts.replies]
    unread = [p for p in judged if parse_answer(verdicts.replies[p.id], len(p.choices)) is None]
    scored["judge"].counts |= {"judged": len(judged), "verdict_unparsed": len(unread)}
    scored["judge"].more["answered_by"] = sorted(verdicts.models)
    return scored
