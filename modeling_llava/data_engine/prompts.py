"""Prompts: system message, few-shot examples and question lists, as files that anyone can replace.

A folder of prompts has the form of the original's, one folder per type of data:

```
conversation/         system_message.txt  000_caps.txt  000_conv.txt  001_caps.txt  001_conv.txt
detail_description/   …                   [questions.txt]
complex_reasoning/    …
```

`NNN_caps.txt` is what the model is given, `NNN_conv.txt` what it answers. The contexts of a type carry boxes if its examples
do (in the published prompts conversation has captions only) or if it has no examples. `questions.txt` next to the
descriptions replaces the list of detailed questions.
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
    """The prompt of one type of data."""

    type: str
    system: str
    examples: tuple[tuple[str, str], ...]  # what the model is given, and what it answers
    with_boxes: bool  # whether contexts carry their boxes
    questions: tuple[str, ...] = ()  # one is put before a description; replies of other types contain their questions

    def query(self, context: Context) -> str:
        """What stands for an image: its captions and, after an empty line, its boxes."""
        if self.with_boxes and context.boxes:
            return f"{context.caption_text}\n\n{context.box_text}"
        return context.caption_text

    def messages(self, context: Context) -> list[Message]:
        """The conversation up to the model's turn: system message, examples as turns, the context."""
        messages = [{"role": "system", "content": self.system}]
        for given, answered in self.examples:
            messages.append({"role": "user", "content": given})
            messages.append({"role": "assistant", "content": answered})
        return [*messages, {"role": "user", "content": self.query(context)}]


def draw(choices: tuple[str, ...], seed: int, name: str) -> str:
    """One of `choices`; the same for the same seed and name on every machine and in every order."""
    return random.Random(f"{seed}:{name}").choice(choices)


def load_prompts(folder: str | Path | None = None, types: tuple[str, ...] = tuple(FOLDERS)) -> dict[str, Prompt]:
    """Reads the prompts of some types (keys of `FOLDERS`) from a folder in the original's form, by default the package's.

    Raises:
        ValueError: an example without its counterpart, or an empty file.
        OSError: a system message is missing.
    """
    root = DEFAULT_PROMPTS if folder is None else Path(folder)
    prompts = {}
    for kind in types:
        at = root / FOLDERS[kind]
        if not (at / "system_message.txt").is_file():
            raise OSError(
                f"{at / 'system_message.txt'} does not exist: a folder of prompts has {', '.join(FOLDERS.values())}."
            )
        # Names that begin with a dot are macOS's own.
        names = {path.name[: -len("_caps.txt")] for part in ("caps", "conv") for path in at.glob(f"[!.]*_{part}.txt")}
        examples = []
        for name in sorted(names):
            given, answered = at / f"{name}_caps.txt", at / f"{name}_conv.txt"
            for one, other in ((given, answered), (answered, given)):
                if not other.is_file():
                    raise ValueError(f"{one} has no {other.name} next to it: an example is a pair of both.")
            examples.append((_text(given), _text(answered)))
        with_boxes = not examples or any(BOX_LINE.search(given) for given, _ in examples)
        questions: tuple[str, ...] = ()
        if kind == "detail":
            own = at / "questions.txt"
            questions = load_questions(own if own.is_file() else DETAILED_QUESTIONS)
        prompts[kind] = Prompt(kind, _text(at / "system_message.txt"), tuple(examples), with_boxes, questions)
    return prompts


def load_questions(path: str | Path) -> tuple[str, ...]:
    """The questions of a file, one per line; empty lines and lines that begin with `#` are skipped.

    Raises:
        ValueError: there is no question, or one contains `<image>`.
    """
    lines = [line.strip() for line in _read(Path(path)).splitlines()]
    questions = tuple(line for line in lines if line and not line.startswith("#"))
    if not questions:
        raise ValueError(f"{path} has no question; write one per line.")
    for question in questions:
        if IMAGE_TOKEN in question:
            raise ValueError(
                f"{path}: '{question}' contains {IMAGE_TOKEN}. Leave it out: whether the image comes before or after the "
                "question is drawn."
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
