"""Reads large JSON files one item at a time: COCO's instances alone are 450 MB and take 3 GB when loaded at once."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


CHUNK_CHARACTERS = 1 << 20


@contextmanager
def _open(path: str | Path) -> Iterator[TextIO]:
    """A file of text; says which one it is that is not."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not JSON in UTF-8: {error.reason} at byte {error.start}.") from None


class _Reader:
    """A window over a JSON file that decodes one value after the other."""

    def __init__(self, path: Path, file: TextIO):
        self.path = path
        self.file = file
        self.decoder = json.JSONDecoder()
        self.buffer, self.position, self.done = "", 0, False
        self.chunk = CHUNK_CHARACTERS

    def read_more(self) -> bool:
        text = self.file.read(self.chunk)
        if not text:
            self.done = True
            return False
        self.buffer, self.position = self.buffer[self.position :] + text, 0
        return True

    def peek(self) -> str:
        """The next character that is not a space; `""` at the end."""
        while True:
            while self.position < len(self.buffer):
                character = self.buffer[self.position]
                if character not in " \t\r\n":
                    return character
                self.position += 1
            if self.done or not self.read_more():
                return ""

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise self.broken(f"expected {character!r}, found {self.peek()!r}")
        self.position += 1

    def value(self) -> Any:
        """Decodes the value at the window's start; reads on while it is cut by the window's end."""
        self.peek()
        self.chunk = CHUNK_CHARACTERS
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.position)
                # A number at the window's end may go on: "12" of "1234", or of "12.5" although a point is in view.
                if self.done or (end < len(self.buffer) and self.buffer[end] not in "0123456789.eE+-"):
                    self.position = end
                    return value
            except json.JSONDecodeError as error:
                if self.done:
                    raise self.broken(error.msg) from None
            except ValueError as error:  # a number of thousands of digits
                raise self.broken(str(error)) from None
            except RecursionError:
                raise self.broken("it is nested too deeply") from None
            self.read_more()
            self.chunk *= 2

    def broken(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is not whole JSON: {what}. Was its download or its writing cut short?")


def iterate_json(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yields `(key, item)` for the items of a JSON file's arrays, in the file's order, holding one item at a time.

    The file is an array, whose items come with the key `""`, or an object such as COCO's, whose arrays' items come
    with the array's name. Values of an object that are no arrays come as they are.

    Raises:
        ValueError: the file is not whole JSON.
        OSError: the file cannot be read.
    """
    with _open(path) as file:
        reader = _Reader(Path(path), file)
        if reader.peek() == "[":
            yield from (("", item) for item in _items(reader))
        elif reader.peek() == "{":
            reader.position += 1
            while reader.peek() != "}":
                key = reader.value()
                if not isinstance(key, str):
                    raise reader.broken(f"{key!r} stands where a name belongs")
                reader.expect(":")
                if reader.peek() == "[":
                    yield from ((key, item) for item in _items(reader))
                else:
                    yield key, reader.value()
                if reader.peek() != "}":
                    reader.expect(",")
            reader.position += 1
        else:
            raise reader.broken("it begins with neither '[' nor '{'")
        if reader.peek():
            raise reader.broken(f"{reader.peek()!r} stands after its end")


def _items(reader: _Reader) -> Iterator[Any]:
    reader.expect("[")
    while reader.peek() != "]":
        yield reader.value()
        if reader.peek() != "]":
            reader.expect(",")
    reader.position += 1


def iterate_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yields `(line number from 1, value)` of a JSONL file; empty lines are passed over.

    Raises:
        ValueError: a line is not JSON; names the file and the line.
    """
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    what = getattr(error, "msg", error)  # without: a number of thousands of digits
                    raise ValueError(f"{path}, line {number}, is not JSON: {what}.") from None
                except RecursionError:
                    raise ValueError(f"{path}, line {number}, is nested too deeply.") from None


def first_character(path: str | Path) -> str:
    """The first character of a file that is not a space: `{` and `[` tell an object from an array."""
    with _open(path) as file:
        while text := file.read(4096):
            if text.strip():
                return text.lstrip()[0]
    return ""


def is_lines(path: str | Path) -> bool:
    """Whether a file is JSONL: by its name, or because its first line is a whole object and a second one follows, or is a
    sample's (a COCO file has `images`, not an `image`)."""
    if Path(path).suffix.lower() in {".jsonl", ".ndjson"}:
        return True
    if first_character(path) != "{":
        return False
    with _open(path) as file:
        line = file.readline(CHUNK_CHARACTERS)  # a COCO file is one line of hundreds of megabytes
        try:
            row = json.loads(line)
            return isinstance(row, dict) and ("image" in row or bool(file.readline(CHUNK_CHARACTERS).strip()))
        except (ValueError, RecursionError):
            return False
