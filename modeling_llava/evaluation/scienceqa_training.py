"""
ScienceQA as training data, in the form that LLaVA was trained on (§5.2): question, context and choices → lecture,
explanation, "The answer is X."

An order is written as the ScienceQA paper writes it: what is given, a hyphen, what is learned. Q question, C context, M
choices, A answer, L lecture, E explanation. `QCM-LEA` reasons first, `QCM-ALE` answers first; `QCM-LEPA` is LLaVA's own
form with a heading for each part. Orders with L or E before the hyphen give away the reasons (an upper bound).

Differs from the original: its `AL` learned the explanation and its `AE` the lecture (here letters mean what they say), and
an answer without reasons began with a blank.
"""

from collections.abc import Iterable, Iterator

from .scienceqa import Problem, question_text, reasons_of, single_spaced


INPUT_ORDERS = ("QCM", "CQM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")
OUTPUT_ORDERS = ("A", "AL", "AE", "ALE", "AEL", "LA", "EA", "LEA", "ELA", "LEPA")
DEFAULT_ORDER = "QCM-LEA"


def split_order(order: str) -> tuple[str, str]:
    """
    `"QCM-LEA"` → (`"QCM"`, `"LEA"`).

    Raises:
        ValueError: an order that is not among the published ones.
    """
    given, _, learned = order.partition("-")
    if given not in INPUT_ORDERS or learned not in OUTPUT_ORDERS:
        raise ValueError(
            f"The order {order!r} is not known. Before the hyphen: {', '.join(INPUT_ORDERS)}; after it: "
            f"{', '.join(OUTPUT_ORDERS)}; such as QCM-LEA (reasoning first) or QCM-ALE (answer first)."
        )
    return given, learned


def answer_text(problem: Problem, order: str = "LEA") -> str:
    """
    What is to be learned: "The answer is X." with lecture and explanation before it, or after it behind "BECAUSE:".

        LEPA    LECTURE: …
                SOLUTION: …
                ###
                ANSWER: X.
    """
    reasons = reasons_of(problem)
    if order == "LEPA":
        headings = {"LECTURE": reasons["L"], "SOLUTION": reasons["E"]}
        lines = [f"{heading}: {text}\n" for heading, text in headings.items() if text.strip()]
        return single_spaced(f"{''.join(lines)}###\nANSWER: {problem.letter}.")
    statement = f"The answer is {problem.letter}."
    if order.startswith("A"):
        text = f"{statement} BECAUSE: {' '.join(reasons[letter] for letter in order[1:])}" if order[1:] else statement
        return single_spaced(text).removesuffix("BECAUSE:").strip()
    return single_spaced(" ".join([*(reasons[letter] for letter in order[:-1]), statement]))


def to_llava_rows(problems: Iterable[Problem], order: str = DEFAULT_ORDER) -> Iterator[dict]:
    """
    Rows of LLaVA's JSON, which `llava train` reads; paths of images are relative to the folder of the images.

    The image stands after the question in the row; how it is rendered is the chat template's business (in front).

    Raises:
        ValueError: an unknown order; an image that is not a path (write the Hub dataset's images to files first).
    """
    given, learned = split_order(order)
    for problem in problems:
        row: dict = {"id": problem.id}
        question = question_text(problem, given)
        if problem.image is not None:
            if not isinstance(problem.image, str):
                raise ValueError(f"problem {problem.id!r} has its image embedded; give --images to write it there.")
            row["image"] = problem.image
            question = f"{question}\n<image>"
        row["conversations"] = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": answer_text(problem, learned)},
        ]
        yield row


__all__ = ["DEFAULT_ORDER", "INPUT_ORDERS", "OUTPUT_ORDERS", "answer_text", "split_order", "to_llava_rows"]
