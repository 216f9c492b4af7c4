"""
Rows of a JSON file, read from where they lie: a JSON array, JSON lines, or the arrays of an object such as COCO's.

Opening a file only finds out where each row begins and ends. A row is decoded by `json.loads` when it is asked for, so
that no file is held in memory, and a `DataLoader`'s workers are sent a path and 16 bytes per row.
"""

import codecs
import json
import mmap
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from .rows import DataShard
from .schema import BAD_ROW, BadSampleError


_NO_TEXT = {
    b"\x1f\x8b": "a gzip archive: unpack it first (gunzip)",
    b"PK\x03\x04": "a zip archive: unpack it first (unzip)",
    b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it first (unzstd)",
    b"\xfd7zX": "an xz archive: unpack it first (unxz)",
    b"PAR1": "a parquet file: name it .parquet",
}
"""What a file named as JSON may be instead, by its first bytes."""
_SPAN = np.dtype((np.int64, 2))  # first byte, bytes
_SPACE = re.compile(r"\s*")
_SPACE_BYTES = re.compile(rb"\s*")
_SEPARATOR = re.compile(rb"\s*[\[,]\s*")
_OBJECT_OVER_LINES = re.compile(rb"{[ \t]*\r?\n")
_decode = json.JSONDecoder().raw_decode


class JsonRows:
    """
    Rows by index or in a stream, as the classes of `rows.py`.

    A row of JSON lines that is not JSON is a bad sample. In an array it makes the whole file invalid, which raises.

    Args:
        path (`Path`): A JSON array or JSON lines, told apart by the first character.
        spans (`np.ndarray` `[num_rows, 2]`, *optional*): First byte and number of bytes of each row of an array in it.
    """

    def __init__(self, path: Path, spans: np.ndarray | None = None):
        self.path = path
        self._identity = self.identity()
        self._blank = None  # JSON lines: for each blank line, the row that follows it
        if spans is None:
            data, start = map_json(path)
            if data[start : start + 1] == b"[":
                spans = _array(path, data, start)
            elif _OBJECT_OVER_LINES.match(data, start):
                give = "give a list of conversations, or one conversation per line"
                raise ValueError(f"{path} is one JSON object over several lines: {give}.")
            else:
                self._blank = [0] * data[:start].count(b"\n")
                spans = np.fromiter(_lines(path, start, self._blank), _SPAN)
        self._spans = spans

    def identity(self) -> list:
        info = os.stat(self.path)
        return [os.path.abspath(self.path), info.st_size, info.st_mtime_ns]

    def count(self) -> int:
        return len(self._spans)

    def where(self, index: int) -> str:
        """File and line, or file and row of an array, for messages."""
        if self._blank is None:
            return f"{self.path}, row {index}"
        return f"{self.path}, line {index + 1 + bisect_right(self._blank, index)}"

    def __getitem__(self, index: int) -> Any:
        with open(self.path, "rb", buffering=0) as file:
            row = self._row(file, index)
        if isinstance(row, BadSampleError):
            raise row
        return row

    def __iter__(self) -> Iterator:
        for row in self.scan():
            if isinstance(row, BadSampleError):
                raise row
            yield row

    def scan(self) -> Iterator:
        return (row for _, row in self._read(range(len(self._spans))))

    def stream(self, shard: DataShard, seed: int | None, epoch: int) -> Iterator[tuple[int, Any]]:
        return self._read(shard.indices(len(self._spans)))

    def _read(self, indices: Iterable[int]) -> Iterator[tuple[int, Any]]:
        with open(self.path, "rb") as file:
            for index in indices:
                yield index, self._row(file, index)

    def _row(self, file, index: int) -> Any:
        start, length = self._spans[index].tolist()
        file.seek(start)
        try:
            return json.loads(file.read(length).decode())
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits, or [[[[…
            if self.identity() != self._identity:
                raise ValueError(f"{self.path} was changed while it was in use (row {index}: {error}).") from error
            if self._blank is None:
                raise _invalid(self.path, index, start, error) from None
            return BadSampleError(str(index), BAD_ROW, f"is not JSON ({self.where(index)}): {error}.")


def json_arrays(path: Path, names: Iterable[str]) -> dict[str, Iterable]:
    """
    The items of the arrays of those `names` that the object in a JSON file has, read one by one.

    Raises:
        ValueError: The file is not JSON, is cut off, or has something other than an array under one of the names.
    """
    data, start = map_json(path)
    try:
        members = msgspec.json.decode(memoryview(data)[start:], type=dict[str, msgspec.Raw])
        first = np.frombuffer(data, np.uint8).ctypes.data
        arrays = {}
        for name in (name for name in names if name in members):
            begin = np.frombuffer(members[name], np.uint8).ctypes.data - first
            arrays[name] = JsonRows(path, _found_by_msgspec(members[name], data, begin))
        return arrays
    except (msgspec.DecodeError, RecursionError):
        try:
            whole = json.loads(data[start:])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}. Is the file cut off, or are two joined?") from None
    wrong = [name for name in names if not isinstance(whole.get(name, []), list)]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]!r} is not a list.")
    return {name: whole[name] for name in names if name in whole}


def map_json(path: Path) -> tuple[mmap.mmap, int]:
    """The mapped file, and where the first character of its JSON is, after a byte-order mark and white space."""
    with open(path, "rb") as file:
        head = file.read(4)
        packed = next((kind for begin, kind in _NO_TEXT.items() if head.startswith(begin)), None)
        if packed is not None:
            raise ValueError(f"{path} is not JSON but {packed}.")
        if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{path} is written in UTF-16: save it as UTF-8.")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if head else b""
    start = _SPACE_BYTES.match(data, 3 if head.startswith(codecs.BOM_UTF8) else 0).end()
    if start == len(data):
        raise ValueError(f"{path} is empty.")
    return data, start


def _lines(path: Path, start: int, blank: list[int]) -> Iterator[tuple[int, int]]:
    """The spans of the lines from byte `start` on; blank ones are noted in `blank` instead."""
    with open(path, "rb") as file:
        file.seek(start)
        index = 0
        for line in file:
            if line.isspace():
                blank.append(index)
            else:
                yield start, len(line)
                index += 1
            start += len(line)


def _array(path: Path, data: mmap.mmap, start: int) -> np.ndarray:
    """The spans of the items of the array at `data[start:]`."""
    try:
        return _found_by_msgspec(memoryview(data)[start:], data, start)
    except (msgspec.DecodeError, RecursionError):
        return np.fromiter(_found_by_json(path, str(data, "latin-1"), start), _SPAN)


def _found_by_msgspec(array: Any, data: mmap.mmap, start: int) -> np.ndarray:
    def spans(position: int) -> Iterator[tuple[int, int]]:
        for item in items:
            position = _SEPARATOR.match(data, position).end()
            length = len(memoryview(item))
            yield position, length
            position += length

    items = msgspec.json.decode(array, type=list[msgspec.Raw])
    return np.fromiter(spans(start), _SPAN, len(items))


def _found_by_json(path: Path, text: str, start: int) -> Iterator[tuple[int, int]]:
    """
    What msgspec refuses: NaN, half a surrogate pair, and what is not JSON, which it does not place. In `text`, the file as
    Latin-1, each byte is a character; a row is decoded as UTF-8 when it is read.
    """
    number, following = 0, ","
    while following == ",":
        start = _SPACE.match(text, start + 1).end()
        try:
            _, end = _decode(text, start)
        except (ValueError, RecursionError) as error:
            raise _invalid(path, number, start, getattr(error, "msg", error)) from None
        yield start, end - start
        end = _SPACE.match(text, end).end()
        following = text[end : end + 1]
        if following not in (",", "]"):
            raise _invalid(path, number, start, "expected ',' or ']'")
        start = end
        number += 1
    rest = _SPACE.match(text, end + 1).end()
    if rest < len(text):
        raise ValueError(f"{path} has more text after its end, at byte {rest}: are two files joined?")


def _invalid(path: Path, index: int, start: int, error: Exception | str) -> ValueError:
    if isinstance(error, UnicodeDecodeError):
        found = error.object[error.start : error.start + 1]
        return ValueError(f"{path} is not UTF-8: byte {start + error.start} is {found!r}. Save it as UTF-8.")
    where = f"in row {index}, which starts at byte {start}"
    return ValueError(f"{path} is not valid JSON {where}: {error}. Is the file cut off, or are two joined?")
