"""Which choice an answer to a ScienceQA problem names."""

import re
import unicodedata

from ..endpoint import remove_thoughts


ANSWER_RULE = (
    '"The answer is X" or "\\boxed{X}" anywhere, or a line "Answer: X" or "Answer: X. …"; several such statements must name the '
    'same letter, and none may name two ("B or C"). Else "it is X", "I choose X", "X is correct" by the same conditions. Else an '
    'answer, or its first line, that is a letter; else lines that begin with "X." or "(X)", all with the same letter. Thoughts '
    "(<think>) do not count. Everything else is counted as unparsed, a letter beyond the choices as invalid; both are wrong."
)

_MARKUP = re.compile(r"<\|\w+\|>|</?\w+>|(?<=\() | (?=\))|[$\u200b\ufeff]")
_LETTER = r"[\"'`*([\u201c]*([A-Z])"
_STATED = re.compile(
    rf"""
    \b(?:answer(?:\sto\sth(?:e|is)\squestion)?|(?:the|my)\s+(?:(?:correct|right|best|final)\s+)?(?:option|choice))
    \s+(?:is|(?:would|should|must)\sbe)\s?:?\*{{0,2}}\s?(?:(?:option|choice|letter)\s+)?{_LETTER}
    (?: [])*`\u201d]                    # (B)  **B**
      | [.,;:!?"'\u2026\u3002\uff0c](?!\w\.|(?<=')\w)    # B.  but not A.M., nor D'oh
      | \s*$
      | (?<![AI])(?=\s)                 # "The answer is a dog" names no choice
      | (?=\s(?:[(\u2013\u2014-]|because\b|since\b))    # A (Ohio)
    )
    | ^[ #*{{\"]{{0,9}}(?:(?:the|my)\s)?(?:(?:correct|final)\s)?(?:answer|option|choice)[*\"]{{0,2}}\s?[:=-]\*{{0,2}}\s?
      {_LETTER}(?:[])*`\"}}.\s]*$|[.:)]\*{{0,2}}\s)
    """,
    re.I | re.M | re.X,
)
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\w*\{|\\math\w*\{)?\s*\(?([A-Z])(?:[.):][^{}]*)?\s*\}", re.I)
_CHOSEN = re.compile(
    rf"""
    (?: \b(?i:it(?:'s|\u2019s|\sis)|i(?:['\u2019](?:d|ll)|\swould|\swill)?\s(?:choose|pick|select|say|think|go\swith))\s(?i:(?:option|choice|answer)\s)?
      | \b(?i:(?:option|choice)\s)?(?={_LETTER}[])*\"'`]*\s(?i:is\s(?:the\s)?(?:correct|right|best|answer)\b)) )
    {_LETTER}(?:[])*`\"]|[.,;:!?](?!\w)|\s*$|(?=\s(?:\(|because\b|since\b|is\s(?:the\s)?(?:correct|right|best|answer)\b)))
    """,
    re.M | re.X,
)
_SEVERAL = re.compile(
    r"""
    [)*."'}$]*\s?(?:/|&|,?\s?\b(?:n?or|and)\b|,)\s?(?:option\s)?\(?
    (?:[A-HJ-Zb-hj-z]\b(?!['.]?\w)(?!\s(?:is|was|are|has|does)\b) | I\b(?=[).,;]|$))
    """,
    re.X,
)
_AFTER_ANOTHER = re.compile(r"\b[A-Z][)*]*,?\s?(?:/|&|n?or\b|and\b)\s?[(*]*\Z")
_WHOLE = re.compile(rf"(?:(?:answer|option|choice)\b\s?:?\*{{0,2}}\s?)?{_LETTER}[])*\"'`.:!\u201d]{{0,3}}", re.I)
_BEGINNING = re.compile(
    r"^\s*(?:(?:answer|option|choice)\b\s*:?\s*)?\**(?:\(([A-Z])\)|([A-Z])[.:)])\**(?=\s)", re.I | re.M
)
_IN_PARENTHESES = re.compile(r"\(([A-Z])\)")


def find_letter(text: str) -> str | None:
    """The letter, A to Z, that an answer names by [`ANSWER_RULE`], even if there is no such choice."""
    # Without runs of spaces every pattern takes linear time.
    text = re.sub(r"[^\S\n]+", " ", unicodedata.normalize("NFKC", remove_thoughts(text)))
    text = _MARKUP.sub("", re.sub(r"(?: ?\n)+ ?", "\n", text)).strip()
    statements = [*_STATED.finditer(text), *_BOXED.finditer(text)] or list(_CHOSEN.finditer(text))
    for found in statements:
        start, end = found.span(found.lastindex)
        if _SEVERAL.match(text, end) or _AFTER_ANOTHER.search(text, max(0, start - 12), start):
            return None
    if statements:
        return _only(found[found.lastindex] for found in statements)
    first, *others = text.split("\n")
    if _WHOLE.fullmatch(first):
        return _only(found[1] for line in (first, *others) if (found := _WHOLE.fullmatch(line)))
    if not _BEGINNING.match(text):
        return None
    return _only([*(one or other for one, other in _BEGINNING.findall(text)), *_IN_PARENTHESES.findall(text)])


def parse_answer(text: str, num_choices: int) -> int | None:
    """
    The index of the choice that an answer names by [`ANSWER_RULE`]; `None` if it names none, several, or one that does not exist.

    Differs from the original, which took "The answer is Apple" for A and "The answer is B or C" for B, and drew a choice at
    random where it read none.
    """
    letter = find_letter(text)
    choice = num_choices if letter is None else ord(letter) - ord("A")
    return choice if choice < num_choices else None


def _only(letters) -> str | None:
    letters = {letter.upper() for letter in letters}
    return letters.pop() if len(letters) == 1 else None
