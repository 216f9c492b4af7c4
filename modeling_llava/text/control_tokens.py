"""
Control tokens written by a chat template, and text typed by a user that only looks like one.

A rendered chat is one string, in which a `</s>` of the template and a `</s>` of the user are the same five characters. They are told
apart by marking the user's before rendering, and kept apart when tokenizing:

    user types      "say </s>"                  mark:      one character of it becomes a private-use one
    template        "USER: say □/s> ASSISTANT:" render:    once; lengths and spans are what they would be unmarked
    control tokens  none here; `</s>` after an answer is the template's, since no user text can match any more
    tokenize        the template's `</s>` become private-use names, the marks are taken back, and a twin of the tokenizer,
                    whose control tokens have those names and the same ids, reads the whole text at once

So the user's `</s>` is ordinary text to the tokenizer, as it is to SentencePiece. In an assistant's message, special tokens that have
no role and that the template does not write, such as a `<seg>` that was added for masks, stay tokens. transformers' own
`sanitize_control_tokens` tokenizes the pieces between such places apart, which changes the ids of the text around, gives no assistant
mask, and misses a token that arises where two texts meet ("<ima" and "ge>"). Most conversations hold nothing to mark.
"""

import functools
import json
import re
import weakref
from typing import Any

import jinja2
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, TokenizersBackend
from transformers.utils.chat_template_utils import render_jinja_template

from ..compat import renamed_tokenizer
from ..constants import IMAGE_TOKEN


_BLOCK = 0x1000  # private-use characters that one conversation may need: marks, then one name per control token
_FIRST, _LAST = 0xF0000, 0x10FFFD  # Unicode's private-use planes
_MAX_MARKS = 0x400
_LOCATIONS = ("role", "type", "image", "image_url", "url", "path", "base64")  # never rendered as a user's text

_CACHE: "weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple, ControlTokens]]" = weakref.WeakKeyDictionary()


class ControlTokens:
    """
    The control tokens of one tokenizer: its special tokens and the image token. Other added tokens are ordinary words. Get one by
    [`ControlTokens.of`], which keeps it for as long as the tokenizer lives and its tokens stay the same.

    Attributes:
        ids (`dict[str, int]`): Ids of the control tokens, by their text.
        image_token (`str`), image_token_id (`int`): The image token.
        prefix (`list[int]`), suffix (`list[int]`): What the tokenizer adds around a text, such as `[bos]`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token: str):
        if not isinstance(tokenizer, TokenizersBackend):
            raise TypeError(
                f"{type(tokenizer).__name__} is not backed by the tokenizers library, which is needed to know where a "
                "token stands in the text. Load it with AutoTokenizer."
            )
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.ids = {
            token.content: i
            for i, token in tokenizer.added_tokens_decoder.items()
            if token.content == image_token or (token.special and not token.content.isspace())
        }
        if image_token not in self.ids:
            raise ValueError(
                f"The tokenizer has no image token {image_token!r}. Add it: "
                "modeling_llava.text.tokenization.add_image_token(tokenizer)."
            )
        literals = sorted(self.ids, key=len, reverse=True)  # at one place the longest matches, as in the tokenizer
        self._literals = literals
        self._any = re.compile("|".join(map(re.escape, literals)))
        self._each = re.compile(f"(?={self._any.pattern})")  # overlapping occurrences too
        self._stop = re.compile(f"\\s*(?:{self._any.pattern})")
        self._initials = tuple({literal[0] for literal in literals})
        self._longest = len(literals[0])
        self._starts = {literal[:end] for literal in literals for end in range(1, len(literal))}
        self._ends = {literal[start:] for literal in literals for start in range(1, len(literal))}
        self._last_of_starts = {start[-1] for start in self._starts}
        self._first_of_ends = {end[0] for end in self._ends}
        self._characters = sorted({character for literal in literals for character in literal})
        if len(self._characters) > _MAX_MARKS or len(literals) > _BLOCK - _MAX_MARKS - 1:
            raise ValueError(f"The tokenizer has {len(literals)} control tokens, more than this can keep apart.")
        self.prefix, self.suffix = _surroundings(tokenizer)
        self._twins: dict[int, PreTrainedTokenizerBase] = {}
        self._with_role = {image_token, *map(str, tokenizer.special_tokens_map.values())}

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, image_token: str = IMAGE_TOKEN) -> "ControlTokens":
        """The control tokens of `tokenizer`, computed once, and again when they have changed."""
        cached = _CACHE.get(tokenizer)
        adds = repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "post_processor", None))
        state = (len(tokenizer), image_token, tuple(tokenizer.all_special_ids), adds)
        if cached is None or cached[0] != state:
            cached = _CACHE[tokenizer] = (state, cls(tokenizer, image_token))
        return cached[1]

    def mark(self, *values: Any, template: str = "") -> tuple[tuple, "Marks | None"]:
        """
        Mark what could be taken for a control token in every string of `values` (messages, tools, …), except the special tokens that
        the chat `template` leaves to an assistant's message. Returns new values and the [`Marks`], or the values themselves and
        `None` if there is nothing to mark.
        """
        own = "|".join(map(re.escape, self.said(template) if template else []))
        said = {"assistant": re.compile(own)} if own else {}
        texts: list[tuple[str, re.Pattern | None]] = []
        _map_texts(values, lambda text, role: texts.append((text, said.get(role))))
        if not any(self._marked_positions(text, own) for text, own in texts):
            return values, None
        taken = {ord(character) >> 12 for text, _ in texts for character in text if ord(character) >= _FIRST}
        block = next((b for b in range(_FIRST >> 12, (_LAST >> 12) + 1) if b not in taken), None)
        if block is None:
            raise ValueError(
                "The conversation has characters of every private-use block; none is left to mark control tokens."
            )
        marks = Marks(self, block << 12)
        values = _map_texts(values, lambda text, role: marks.mark(text, said.get(role)))
        return tuple(values), marks

    def said(self, template: str) -> list[str]:
        """The special tokens that stay tokens in what the assistant says: they have no role, and the template writes none."""
        written = _written_by(template)
        return [literal for literal in self._literals if literal not in self._with_role and literal not in written]

    def find_stop(self, text: str, start: int) -> int | None:
        """Where the control token ends that follows at `start` of a rendered text, perhaps after white space."""
        match = self._stop.match(text, start)
        return None if match is None else match.end()

    def _marked_positions(self, text: str, said: re.Pattern | None = None) -> set[int]:
        """
        Where a character must be marked, so that no control token is in `text`, as it is or stripped, and none arises where it is joined
        to its neighbors: at the first character of every occurrence, of a beginning at the text's end, and of an end or a middle at
        its beginning.
        """
        positions = set()
        if any(initial in text for initial in self._initials):
            positions.update(match.start() for match in self._each.finditer(text))
        for start, end in {(0, len(text)), (len(text) - len(text.lstrip()), len(text.rstrip()))}:
            if start >= end:
                continue
            if text[end - 1] in self._last_of_starts:
                for at in range(max(start, end - self._longest), end):
                    if text[at:end] in self._starts:
                        positions.add(at)
            stops = range(start + 1, min(end, start + self._longest) + 1)
            if text[start] in self._first_of_ends and any(text[start:stop] in self._ends for stop in stops):
                positions.add(start)
            if end - start < self._longest and any(text[start:end] in literal for literal in self._literals):
                positions.add(start)
        if positions and said is not None:
            positions -= {match.start() for match in said.finditer(text)}
        return positions

    def twin(self, tokenizer: PreTrainedTokenizerBase, base: int) -> PreTrainedTokenizerBase:
        """A copy of `tokenizer` whose control tokens have private-use names (from `base` on) and the same ids."""
        if base not in self._twins:
            self._twins[base] = _rename_control_tokens(tokenizer, self.names(base))
        # Settings outside of the backend may have changed since.
        twin = self._twins[base]
        twin.padding_side, twin.truncation_side = tokenizer.padding_side, tokenizer.truncation_side
        return twin

    def names(self, base: int) -> dict[str, str]:
        """Private-use name of each control token: as long as its text, so that spans stay where they are."""
        first = base + _MAX_MARKS
        return {
            literal: chr(first + 1 + i) + chr(first) * (len(literal) - 1) for i, literal in enumerate(self._literals)
        }


class Marks:
    """The private-use characters of one conversation; made by [`ControlTokens.mark`]."""

    def __init__(self, control: ControlTokens, base: int):
        self._control = control
        self._base = base
        self._to_mark = {character: chr(base + i) for i, character in enumerate(control._characters)}
        self._to_plain = {ord(mark): character for character, mark in self._to_mark.items()}
        self._names = control.names(base)

    def mark(self, text: str, said: re.Pattern | None = None) -> str:
        """`text` with its suspicious characters marked, except those of the tokens in `said`."""
        positions = self._control._marked_positions(text, said)
        if not positions:
            return text
        return "".join(self._to_mark[c] if i in positions else c for i, c in enumerate(text))

    def unmark(self, text: str) -> str:
        """`text` as it was typed."""
        return text.translate(self._to_plain)

    def rename(self, text: str) -> str:
        """A rendered text for [`Marks.tokenizer`]: the template's control tokens renamed, the marks taken back."""
        return self.unmark(self._control._any.sub(lambda match: self._names[match[0]], text))

    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """The twin of `tokenizer` that reads a renamed text."""
        return self._control.twin(tokenizer, self._base)


def _map_texts(value: Any, change, role: str | None = None) -> Any:
    """`value` with `change(text, role)` of its texts, where `role` is that of the message that holds the text."""
    if isinstance(value, str):
        return change(value, role)
    if isinstance(value, dict):
        role = value["role"] if isinstance(value.get("role"), str) else role
        return {key: item if key in _LOCATIONS else _map_texts(item, change, role) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_texts(item, change, role) for item in value]
    return value


@functools.lru_cache(maxsize=32)
def _written_by(template: str) -> str:
    """All that a chat template may write: its own text, and what it makes of roles (`'<|' + role + '|>'`)."""
    written = [template]
    for roles in (("user", "assistant"), ("system", "user", "assistant")):
        for content in ("", [{"type": "text", "text": ""}]):
            messages = [{"role": role, "content": content} for role in roles]
            try:
                written += render_jinja_template([messages], chat_template=template)[0]
            except (jinja2.TemplateError, TypeError):  # of another form than this template reads
                pass
    return "\n".join(written)


def _surroundings(tokenizer: TokenizersBackend) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after every text."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a", add_special_tokens=True)
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]


def _rename_control_tokens(tokenizer: TokenizersBackend, names: dict[str, str]) -> TokenizersBackend:
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["truncation"] = description["padding"] = None
    for token in description["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = description["model"]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:  # Unigram: [piece, score] by id
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        # A piece that is a control token must not be put together from text.
        merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [
            [left, right]
            for left, right in merges
            if left not in names and right not in names and left + right not in names
        ]
    return renamed_tokenizer(tokenizer, Tokenizer.from_str(json.dumps(description)), names)
