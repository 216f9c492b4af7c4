"""Prompts: system message, few-shot examples and question lists, as files that anyone can replace.

A folder of prompts has the form of the original's, one folder per type of data:

```
conversation/         system_message.txt  000_caps.txt  000_conv.txt  001_caps.txt  001_conv.txt
detail_description/   …                   [questions.txt]
complex_reasoning/    …
```

`NNN_caps.txt` is what the model is given, `NNN_conv.txt` what it is to answer. Whether a type's contexts carry boxes
follows from its examples: where these list boxes, the contexts do (in the published prompts conversation has captions
only). `questions.txt` next to the descriptions replaces the list of detailed questions.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path

from ..constants import IMAGE_TOKEN
from ..endpoint.chat import Message
from .contexts import Context


FOLDERS: dict[str, str] = {
    "conversation": "conversation",
    "detail": "detail_description",
    "complex": "complex_reasoning",
}
"""Folder of each type of data, in the order in which types are made."""

HERE = Path(__file__).parent
DEFAULT_PROMPTS = HERE / "default_prompts"
BRIEF_QUESTIONS = HERE / "questions" / "brief.txt"
DETAILED_QUESTIONS = HERE / "questions" / "detailed.txt"

BOX_LINE = re.compile(r"^[^\[\]\n]+: \[[\d.]+, [\d.]+, [\d.]+, [\d.]+\]\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Prompt:
    """How one type of data is asked for.

    Attributes:
        type: `"conversation"`, `"detail"` or `"complex"`.
        system: The system message.
        examples: Pairs of what the model is given and what it answers.
        with_boxes: Whether contexts carry their boxes.
        questions: Questions of which one stands before a description; empty for the other types, whose replies hold
            their questions.
    """

    type: str
    system: str
    examples: tuple[tuple[str, str], ...]
    with_boxes: bool
    questions: tuple[str, ...] = ()

    def query(self, context: Context) -> str:
        """What the model is told of an image: its captions and, after an empty line, its boxes."""
        if self.with_boxes and context.boxes:
            return f"{context.caption_text}\n\n{context.box_text}"
        return context.caption_text

    def messages(self, context: Context) -> list[Message]:
        """The whole conversation up to the model's turn: system, examples as turns, the context."""
        messages = [{"role": "system", "content": self.system}]
        for given, answered in self.examples:
            messages.append({"role": "user", "content": given})
            messages.append({"role": "assistant", "content": answered})
        return [*messages, {"role": "user", "content": self.query(context)}]

    def question(self, context: Context, seed: int) -> str:
        """The question before a description, drawn from the list by the seed and the image."""
        return draw(self.questions, seed, context.id)


def draw(choices: tuple[str, ...], seed: int, name: str) -> str:
    """One of `choices`; the same for the same seed and name on every machine and in every order."""
    return random.Random(f"{seed}:{name}").choice(choices)


def load_prompts(folder: str | Path | None = None, types: tuple[str, ...] = tuple(FOLDERS)) -> dict[str, Prompt]:
    """Reads the prompts of some types.

    Args:
        folder: Folder in the original's form; `None` takes the package's own prompts.
        types: Which types to read, out of `"conversation"`, `"detail"`, `"complex"`.

    Raises:
        ValueError: an unknown type, an example without its counterpart, an empty file.
        OSError: a folder or a system message is absent.
    """
    root = DEFAULT_PROMPTS if folder is None else Path(folder)
    prompts = {}
    for kind in types:
        if kind not in FOLDERS:
            raise ValueError(f"'{kind}' is not a type of data; the types are {', '.join(FOLDERS)}.")
        at = root / FOLDERS[kind]
        if not (at / "system_message.txt").is_file():
            raise OSError(
                f"{at / 'system_message.txt'} is absent: a folder of prompts holds {', '.join(FOLDERS.values())}."
            )
        examples = []
        # Names that begin with a dot are macOS's own.
        for given in sorted(at.glob("[!.]*_caps.txt")):
            answered = given.with_name(given.name.removesuffix("_caps.txt") + "_conv.txt")
            if not answered.is_file():
                raise ValueError(f"{given} has no {answered.name} next to it: an example is a pair of both.")
            examples.append((_text(given), _text(answered)))
        for answered in at.glob("[!.]*_conv.txt"):
            given = answered.with_name(answered.name.removesuffix("_conv.txt") + "_caps.txt")
            if not given.is_file():
                raise ValueError(f"{answered} has no {given.name} next to it: an example is a pair of both.")
        # Without examples nothing says that boxes are unwanted: they are given.
        with_boxes = not examples or any(BOX_LINE.search(given) for given, _ in examples)
        questions: tuple[str, ...] = ()
        if kind == "detail":
            own = at / "questions.txt"
            questions = load_questions(own if own.is_file() else DETAILED_QUESTIONS)
        prompts[kind] = Prompt(kind, _text(at / "system_message.txt"), tuple(examples), with_boxes, questions)
    return prompts


def load_questions(path: str | Path) -> tuple[str, ...]:
    """The questions of a list, one per line; empty lines and lines that begin with `#` are passed over.

    Raises:
        ValueError: the list is empty, not UTF-8, or a question holds `<image>`.
    """
    lines = [line.strip() for line in _read(Path(path)).splitlines()]
    questions = tuple(line for line in lines if line and not line.startswith("#"))
    if not questions:
        raise ValueError(f"{path} has no question; write one per line.")
    for question in questions:
        if IMAGE_TOKEN in question:
            raise ValueError(
                f"{path}: '{question}' holds {IMAGE_TOKEN}. Leave it out: the image's place, before or after the question, "
                "is drawn."
            )
    return questions


def hash_prompts(prompts: dict[str, Prompt]) -> str:
    """Twelve hexadecimal digits that change with any word of the prompts."""
    digest = hashlib.sha256()
    for kind in sorted(prompts):
        prompt = prompts[kind]
        digest.update(repr((kind, prompt.system, prompt.examples, prompt.with_boxes, prompt.questions)).encode())
    return digest.hexdigest()[:12]


def _text(path: Path) -> str:
    text = _read(path).replace("\r\n", "\n").strip()
    if not text:
        raise ValueError(f"{path} is empty.")
    return text


def _read(path: Path) -> str:
    """A text as editors on any system write it."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from None
