"""Which choice an answer names: one stated rule for all models of ScienceQA."""

import re


ANSWER_RULE = (
    '"The answer is X" anywhere, or a line "Answer: X" or "Answer: X. …"; several such statements must name the same letter, '
    'and none may name two ("B or C"). Else an answer, or its first line, that is a letter; else lines that begin with "X." or "(X)", all with '
    "the same letter. Everything else is counted as unparsed, a letter beyond the choices as invalid; both are wrong."
)

_LETTER = r"[\"'`*([\u201c]*([A-Z])"
_STATED = re.compile(
    rf"""
    \b(?:the|my)\s+(?:(?:correct|right|best|final)\s+)?(?:answer|option|choice)\s+is\s?:?\*{{0,2}}\s?(?:(?:option|choice)\s+)?{_LETTER}
    (?: [])*`\u201d]                    # (B)  **B**
      | [.,;:!?"'\u2026\u3002\uff0c](?!\w\.|(?<=')\w)    # B.  but not A.M., nor D'oh
      | \s*$
      | (?<![AI])(?=\s)                 # "The answer is a dog" names no choice
      | (?=\s(?:[(\u2013\u2014-]|because\b|since\b))    # A (Ohio)
    )
    | ^[ #*]{{0,9}}(?:the\s)?(?:(?:correct|final)\s)?answer\*{{0,2}}\s?:\*{{0,2}}\s?{_LETTER}(?:[])*`.\s]*$|[.:)]\*{{0,2}}\s)
    """,
    re.I | re.M | re.X,
)
_SEVERAL = re.compile(
    r"""
    [)*."']*\s?(?:/|&|,?\s?\b(?:or|and)\b|,)\s?(?:option\s)?\(?
    (?:[A-HJ-Zb-hj-z]\b(?!['.]?\w)(?!\s(?:is|was|are|has|does)\b) | I\b(?=[).,;]|$))
    """,
    re.X,
)
_WHOLE = re.compile(rf"(?:(?:answer|option)\s?:?\*{{0,2}}\s?)?{_LETTER}[])*\"'`.:\u201d]{{0,3}}", re.I)
_BEGINNING = re.compile(r"^\s*(?:(?:answer|option)\s*:?\s*)?\**(?:\(([A-Z])\)|([A-Z])[.:)])\**(?=\s)", re.I | re.M)
_IN_PARENTHESES = re.compile(r"\(([A-Z])\)")


def find_letter(text: str) -> str | None:
    """The letter that an answer names by [`ANSWER_RULE`], A to Z, whether or not there is such a choice."""
    # Without runs of blanks no pattern takes more than linear time.
    text = re.sub(r"(?: ?\n)+ ?", "\n", re.sub(r"[^\S\n]+", " ", text)).strip()
    statements = list(_STATED.finditer(text))
    if any(_SEVERAL.match(text, _end_of_letter(found)) for found in statements):
        return None
    if statements:
        return _only(found[1] or found[2] for found in statements)
    first, *others = text.split("\n")
    if _WHOLE.fullmatch(first):
        return _only(found[1] for line in (first, *others) if (found := _WHOLE.fullmatch(line)))
    if not _BEGINNING.match(text):
        return None
    return _only([*(one or other for one, other in _BEGINNING.findall(text)), *_IN_PARENTHESES.findall(text)])


def _end_of_letter(found: re.Match) -> int:
    return found.end(1) if found[1] else found.end(2)


def _only(letters) -> str | None:
    letters = {letter.upper() for letter in letters}
    return letters.pop() if len(letters) == 1 else None


__all__ = ["ANSWER_RULE", "find_letter"]
