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

from .rows import Share
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
_SPACE = re.compile(rb"\s*")
_SEPARATOR = re.compile(rb"\s*[\[,]\s*")
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_NESTED = rb'[^"\[\]{}]++|' + _STRING
for _ in range(16):  # levels
    _NESTED = rb'[^"\[\]{}]++|' + _STRING + rb"|[\[{](?:" + _NESTED + rb")*+[\]}]"
_ITEM = re.compile(rb'\s*((?:[^",\[\]{}]++|' + _STRING + rb"|[\[{](?:" + _NESTED + rb")*+[\]}])*+)", re.DOTALL)
_OBJECT_OVER_LINES = re.compile(rb"{[ \t]*\r?\n")
_NAME = re.compile(rb"\s*(" + _STRING + rb")\s*:\s*", re.DOTALL)


class JsonRows:
    """
    Rows by index or in a stream, as the classes of `rows.py`.

    A row of JSON lines that is not JSON is a bad sample. In an array it makes the whole file invalid, which raises.

    Args:
        path (`Path`): A JSON array or JSON lines, told apart by the first character.
        spans (`np.ndarray` `[num_rows, 2]`, *optional*): First byte and number of bytes of each row of an array in the file.
    """

    def __init__(self, path: Path, spans: np.ndarray | None = None):
        self.path = path
        self._identity = self.identity()
        self._blank = None  # JSON lines: for each blank line, the row that follows it
        if spans is None:
            data, start = map_json(path)
            if data[start : start + 1] == b"[":
                spans = _array(path, data, start, len(data))
            elif _OBJECT_OVER_LINES.match(data, start):
                raise ValueError(
                    f"{path} is one JSON object over several lines: give a list of conversations, or one conversation per "
                    "line."
                )
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

    def stream(self, share: Share, seed: int | None, epoch: int) -> Iterator[tuple[int, Any]]:
        return self._read(share.indices(len(self._spans)))

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


def json_arrays(path: Path, names: Iterable[str]) -> dict[str, JsonRows]:
    """
    The arrays of those `names` that the object in a JSON file has.

    Raises:
        ValueError: The file is not JSON, is cut off, or has something other than an array under one of the names.
    """
    data, start = map_json(path)
    try:
        members = msgspec.json.decode(memoryview(data)[start:], type=dict[str, msgspec.Raw])
        first = np.frombuffer(data, np.uint8).ctypes.data
        parts = {name: np.frombuffer(member, np.uint8) for name, member in members.items()}
        spans = {name: (part.ctypes.data - first, part.size) for name, part in parts.items()}
    except (msgspec.DecodeError, RecursionError):
        spans = {}
        for begin, length in _split(path, data, start, len(data)):
            name = _NAME.match(data, begin, begin + length)
            if name is None:
                raise ValueError(f"{path} is not valid JSON at byte {begin}: expected a name and ':'.") from None
            spans[json.loads(name[1])] = name.end(), begin + length - name.end()
    return {
        name: JsonRows(path, _array(path, data, spans[name][0], sum(spans[name]), name))
        for name in names
        if name in spans
    }


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
    start = _SPACE.match(data, 3 if head.startswith(codecs.BOM_UTF8) else 0).end()
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


def _array(path: Path, data: mmap.mmap, start: int, end: int, name: str | None = None) -> np.ndarray:
    """The spans of the items of the array at `data[start:end]`."""
    if data[start : start + 1] != b"[":
        raise ValueError(f"{path}: {name!r} is not a list.")
    try:
        items = msgspec.json.decode(memoryview(data)[start:end], type=list[msgspec.Raw])
        return np.fromiter(_found(items, data, start), _SPAN, len(items))
    except (msgspec.DecodeError, RecursionError):  # NaN, half a surrogate pair, or not JSON
        return np.fromiter(_checked(path, data, _split(path, data, start, end)), _SPAN)


def _found(items: list[msgspec.Raw], data: mmap.mmap, position: int) -> Iterator[tuple[int, int]]:
    for item in items:
        position = _SEPARATOR.match(data, position).end()
        length = len(memoryview(item))
        yield position, length
        position += length


def _split(path: Path, data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int]]:
    """
    The spans between the commas of the array or object at `data[start:end]`, by its brackets and strings alone: for what
    msgspec refuses, without saying which row it is in.
    """
    closing, number, following = b"]" if data[start : start + 1] == b"[" else b"}", 0, b","
    while following == b",":
        begin, start = _ITEM.match(data, start + 1, end).span(1)
        following = data[start : min(start + 1, end)]
        if following not in (b",", closing):  # what follows is not closed
            if begin < end:
                yield begin, end - begin
            raise ValueError(f"{path} ends in item {number}, before its list or object is closed: is it cut off?")
        yield begin, start - begin
        number += 1
    begin = _SPACE.match(data, start + 1, end).end()
    if begin < end:
        raise ValueError(f"{path} has more text after its end, at byte {begin}: are two files joined?")


def _checked(path: Path, data: mmap.mmap, spans: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The same spans; names the first one that is not JSON."""
    for index, (start, length) in enumerate(spans):
        try:
            json.loads(str(memoryview(data)[start : start + length], "utf-8"))
        except (ValueError, RecursionError) as error:
            raise _invalid(path, index, start, error) from None
        yield start, length


def _invalid(path: Path, index: int, start: int, error: Exception) -> ValueError:
    if isinstance(error, UnicodeDecodeError):
        found = error.object[error.start : error.start + 1]
        return ValueError(f"{path} is not UTF-8: byte {start + error.start} is {found!r}. Save it as UTF-8.")
    reason = getattr(error, "msg", error)
    reason = "expected ',' or ']'" if reason == "Extra data" else reason
    return ValueError(
        f"{path} is not valid JSON in row {index}, which starts at byte {start}: {reason}. Is the file cut off, or are two "
        "files joined?"
    )
