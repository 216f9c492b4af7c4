"""Reads what a model wrote as questions and answers, or as a description.

Models wrap what they were asked for into chatter, code fences, markdown and thoughts. What is recognised is removed; the rest is a
`Rejection`.
"""

import re

from ..endpoint import REFUSED, remove_thoughts


Turn = tuple[str, str]
"""A question and its answer. In a description the question is empty: it is drawn from a list."""

REASONS: dict[str, str] = {
    "no_parse": "not in the form of questions and answers",
    "empty": "empty, or an empty question or answer",
    "filtered": "withheld by the endpoint's content filter",
    "cut": "cut at the longest reply",
    "image_marker": "holds <image> or another marker of a model",
    "mentions_source": "speaks of captions, boxes or coordinates",
    "refusal": "refuses to answer",
    "wrong_language": "in another language",
    "too_short": "too short",
    "too_long": "too long",
    "duplicate_questions": "asks the same question twice",
    "gives_answer_away": "a question holds its own answer",
}
"""Reasons to reject a reply, in the order in which they are looked for; `Rejection` is one of these."""

LEFT_OUT = {
    **REASONS,
    REFUSED: "no reply: the endpoint refuses the request (too long, filtered) or cuts the reply before its text",
}
"""Reasons why a task is settled without data, as cards and reports name them."""

RETRY_PROMPTS: dict[str, str] = {
    "no_parse": "Your last reply was not in the required form. Write 'Question:' on a line of its own, then the question, "
    "then '===', then 'Answer:' and the answer, exactly as in the examples, and nothing else.",
    "empty": "Your last reply was empty or had an empty question or answer. Please write it again, complete.",
    "filtered": "Your last reply was withheld. Please write another one that stays with what the image shows.",
    "cut": "Your last reply was cut off because it was too long. Please write a shorter one that comes to an end.",
    "image_marker": "Your last reply held the text {detail}, which has a meaning of its own. Please write it again without.",
    "mentions_source": "Your last reply spoke of captions, descriptions, boxes or coordinates ({detail}). Please write it "
    "again as someone who looks at the image itself, in ordinary words.",
    "refusal": "Your last reply refused to answer ({detail}). You do know what the image shows: it was told to you in "
    "words. Please write the reply as if you were looking at it.",
    "wrong_language": "Your last reply was not in the language of the examples. Please write it again in that language.",
    "too_short": "Your last reply was too short ({detail}). Please write it again with more detail.",
    "too_long": "Your last reply was too long ({detail}). Please write a shorter one.",
    "duplicate_questions": "Your last reply asked the same question twice ({detail}). Please write it again with "
    "different questions.",
    "gives_answer_away": "In your last reply a question already held its answer ({detail}). Please write it again with "
    "questions that do not.",
}
"""What the model is sent for a second attempt; `{detail}` is what was found."""


class Rejection(ValueError):
    """A reply is not good enough."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{REASONS[reason]}: {detail}" if detail else REASONS[reason])
        self.reason = reason
        self.detail = detail

    @property
    def retry_prompt(self) -> str:
        """What the model is sent for a second attempt."""
        return RETRY_PROMPTS[self.reason].format(detail=self.detail)


FENCE = re.compile(r"\A```\w*\n(.*?)\n?```\Z", re.DOTALL)
STOPS = re.compile(r"(?:(?:<\|\w+\|>|</s>|<end_of_turn>|<eos>)\s*)+\Z")
"""Stop tokens that an endpoint with a wrong chat template hands through."""
OPENING = re.compile(
    r"""\A(?:(?:sure|certainly|of\ course|absolutely|okay)\b[^\n:]*
        | (?:here(?:['’]s|\ is|\ are)|below\ (?:is|are))\b[^\n:]*
          \b(?:descriptions?|questions?|answers?|conversations?|dialog(?:ue)?s?|pairs?|reply|response)\b[^\n:]*
        ):[*_\ \t]*\n\s*""",
    re.IGNORECASE | re.VERBOSE,
)
CLOSING = re.compile(
    r"\n[ \t]*(?:I hope (?:this|that) helps|(?:Please )?let me know if|(?:Please )?feel free to|Would you like me to)\b[^\n]*\Z",
    re.IGNORECASE,
)
INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u2060\ufeff]")


def unwrap(text: str) -> str:
    """A reply without what is around it: thoughts, a code fence, stop tokens, "Sure, here is …:", "I hope this helps!"."""
    text = remove_thoughts(INVISIBLE.sub("", text.replace("\r\n", "\n"))).strip()
    if ">" in text:  # looked for first: the pattern would be searched for in every reply
        text = STOPS.sub("", text).strip()
    text = OPENING.sub("", text)
    if text.startswith("```"):
        text = FENCE.sub(r"\1", text)
    return CLOSING.sub("", text).strip()


HEADER = re.compile(
    r"""^[ \t]*(?:\#{1,6}[ \t]*)?(?:\d+[.)][ \t]*|[-*•][ \t]+(?=[*_]{0,2}(?:question|answer)))?[*_]{0,2}
    (?: (question|answer|q|a)[ \t]{0,4}\d*[*_]{0,2}[ \t]{0,4}[:：][ \t]*[*_]{0,2}[ \t]*
      | (question|answer)[ \t]{0,4}\d*[*_]{0,2}[ \t]*$ )""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
SEPARATOR = re.compile(r"^[ \t]*(?:={2,}|-{3,}|\*{3,})[ \t]*$", re.MULTILINE)
# Small models repeat one character to the end: no pattern may try each beginning of a run with each of its ends.
SEPARATOR_IN_LINE = re.compile(r"(?<!=)={3,}(?!=)\s*(?=[*_]{0,2}(?:question|answer)\b|\Z)", re.IGNORECASE)


def parse_turns(text: str) -> list[Turn]:
    """Questions and answers of a reply in the form `Question:` … `===` `Answer:` … `===`.

    Forgiving where nothing is lost: separators may be absent or on the header's line, the text may begin there too, headers
    may be numbered, bold, in a list or without a colon. Text before the first question, an answer before any question, or
    two of a kind in a row are not.

    Raises:
        Rejection: `"no_parse"`, or `"empty"` where a question or an answer has no text.
    """
    text = SEPARATOR_IN_LINE.sub("\n===\n", unwrap(text))
    headers = list(HEADER.finditer(text))
    if not headers:
        raise Rejection("no_parse", "no 'Question:'")
    if SEPARATOR.sub("", text[: headers[0].start()]).strip():
        raise Rejection("no_parse", "text before the first 'Question:'")
    parts: list[tuple[str, str]] = []
    for header, following in zip(headers, [*headers[1:], None]):
        body = text[header.end() : following.start() if following else len(text)]
        parts.append(((header[1] or header[2])[0].lower(), _close_bold(_trim_separators(body))))
    turns = []
    for i in range(0, len(parts), 2):
        if parts[i][0] != "q" or i + 1 == len(parts) or parts[i + 1][0] != "a":
            raise Rejection("no_parse", "questions and answers do not alternate")
        question, answer = parts[i][1], parts[i + 1][1]
        if not question or not answer:
            raise Rejection("empty", "an empty question" if not question else "an empty answer")
        turns.append((question, answer))
    return turns


def _trim_separators(body: str) -> str:
    lines = body.strip().split("\n")
    while lines and (not lines[-1].strip() or SEPARATOR.fullmatch(lines[-1])):
        lines.pop()
    while lines and (not lines[0].strip() or SEPARATOR.fullmatch(lines[0])):
        lines.pop(0)
    return "\n".join(lines).strip()


def _close_bold(body: str) -> str:
    """Takes off the end of `**Question: …**`, whose beginning went with the header."""
    return body.replace("**", "", 1).strip() if body.count("**") % 2 else body


HEADING = re.compile(
    r"\A\s*(?:#{1,6}\s*)?[*_]{0,2}(?:answer|(?:detailed\s+)?(?:image\s+)?description)[*_]{0,2}\s*:\s*[*_]{0,2}\s*",
    re.IGNORECASE,
)


def parse_description(text: str) -> list[Turn]:
    """A reply that is a description: one turn without a question. A heading such as `Description:` is taken off, and the
    question where the model wrote one.

    Raises:
        Rejection: `"empty"`, or `"no_parse"` where it begins with a question that has no answer.
    """
    text = unwrap(text)
    first = HEADER.match(text)
    if first and (first[1] or first[2]).lower() == "question":
        return [("", answer) for _, answer in parse_turns(text)]
    text = _trim_separators(HEADING.sub("", text))
    if not text:
        raise Rejection("empty")
    return [("", text)]
