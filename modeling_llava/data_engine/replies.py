"""Parses a reply as questions and answers, or as a description.

Models put chatter, code fences, markdown and thoughts around an answer. What is recognised is removed; anything else is a
`Rejection`.
"""

import re

from ..endpoint import REFUSED, remove_thoughts


Turn = tuple[str, str]
"""A question and its answer. The question of a description is empty: it is drawn from a list."""

REASONS: dict[str, str] = {
    "no_parse": "not in the form of questions and answers",
    "empty": "empty, or an empty question or answer",
    "filtered": "withheld by the endpoint's content filter",
    "cut": "cut at the maximum length",
    "image_marker": "contains <image> or another special token",
    "mentions_source": "mentions captions, boxes or coordinates",
    "refusal": "refuses to answer",
    "wrong_language": "in another language",
    "too_short": "too short",
    "too_long": "too long",
    "duplicate_questions": "asks the same question twice",
    "gives_answer_away": "a question contains its answer",
}
"""Reasons to reject a reply, in the order in which they are checked."""

LEFT_OUT = {
    **REASONS,
    REFUSED: "no reply: the endpoint refuses the request (too long, filtered) or cuts the reply before its text",
}
"""Reasons why a task ends without data, as cards and reports name them."""

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
"""The prompt of the second attempt; `{detail}` is what was found."""


class Rejection(ValueError):
    """A reply is rejected; `reason` is one of `REASONS`."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{REASONS[reason]}: {detail}" if detail else REASONS[reason])
        self.reason = reason
        self.detail = detail

    @property
    def retry_prompt(self) -> str:
        """The prompt of the second attempt."""
        return RETRY_PROMPTS[self.reason].format(detail=self.detail)


FENCE = re.compile(r"\A```\w*\n(.*?)\n?```\Z", re.DOTALL)
STOPS = re.compile(r"(?:(?:<[|｜][\w▁]+[|｜]>|</s>|<end_of_turn>|<eos>)\s*)+\Z")  # DeepSeek's have other bars
"""EOS tokens that an endpoint with a wrong chat template leaves in the text."""
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
    """A reply without thoughts, a code fence, EOS tokens, "Sure, here is …:" and "I hope this helps!" around it."""
    text = remove_thoughts(INVISIBLE.sub("", text.replace("\r\n", "\n"))).strip()
    if ">" in text:  # the pattern is slow
        text = STOPS.sub("", text).strip()
    text = FENCE.sub(r"\1", OPENING.sub("", text))
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

    Accepted as well: separators that are missing or on the header's line, text on the header's line, and headers that are
    numbered, bold, in a list or without a colon. Not accepted: text before the first question, and questions and answers
    that do not alternate.

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
    if "".join(header for header, _ in parts) != "qa" * (len(parts) // 2):
        raise Rejection("no_parse", "questions and answers do not alternate")
    for header, body in parts:
        if not body:
            raise Rejection("empty", "an empty question" if header == "q" else "an empty answer")
    bodies = [body for _, body in parts]
    return list(zip(bodies[::2], bodies[1::2]))


def _trim_separators(body: str) -> str:
    lines = body.split("\n")
    kept = [i for i, line in enumerate(lines) if line.strip() and not SEPARATOR.fullmatch(line)]
    return "\n".join(lines[kept[0] : kept[-1] + 1]).strip() if kept else ""


def _close_bold(body: str) -> str:
    """Removes the end of `**Question: …**`, whose beginning is part of the header."""
    return body.replace("**", "", 1).strip() if body.count("**") % 2 else body


HEADING = re.compile(
    r"\A\s*(?:#{1,6}\s*)?[*_]{0,2}(?:answer|(?:detailed\s+)?(?:image\s+)?description)[*_]{0,2}\s*:\s*[*_]{0,2}\s*",
    re.IGNORECASE,
)


def parse_description(text: str) -> list[Turn]:
    """A reply that is a description: one turn without a question. A heading such as `Description:`, or a question that the
    model wrote, is removed.

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
