"""The one JSON reader: both of its ways to find rows agree with `json.loads`, and it carries no file along."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_llava.data import json_rows
from modeling_llava.data.json_rows import JsonRows, json_arrays


TEXT = st.text() | st.text('"\\\\[]{},:é😀\n')
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=10,
)


@pytest.mark.parametrize("what_msgspec_refuses", [[], [float("inf")], ["\ud800"]])
@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(VALUES),
    others=st.dictionaries(TEXT, VALUES),
    indent=st.sampled_from([None, 1]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf \n"]),
)
def test_rows_equal_what_json_reads(tmp_path_factory, what_msgspec_refuses, rows, others, indent, mark):
    path = tmp_path_factory.getbasetemp() / "document.json"
    rows = [*what_msgspec_refuses, *rows]
    path.write_bytes(mark + json.dumps(rows, indent=indent).encode() + b"\n")
    found = JsonRows(path)
    assert list(found) == rows == [found[i] for i in range(found.count())]

    document = {**others, '"rows": []': rows}
    path.write_bytes(mark + json.dumps(document, indent=indent).encode() + b"\n")
    expected = {name: value for name, value in document.items() if isinstance(value, list)}
    assert {name: list(found) for name, found in json_arrays(path, expected).items()} == expected


def test_rows_are_found_by_msgspec(tmp_path, monkeypatch):
    monkeypatch.delattr(json_rows, "_found_by_json")  # which is many times slower
    path = tmp_path / "a.json"
    for document in ([{"a": ["é", 1]}, {}, []], {"a": [1, {}], "b": None}):
        path.write_text(json.dumps(document, ensure_ascii=False, indent=2), "utf-8")
        found = JsonRows(path) if isinstance(document, list) else json_arrays(path, ["a"])["a"]
        assert list(found) == (document if isinstance(document, list) else document["a"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1}', "'a' is not a list"),
        ('{"b": NaN, "a" 1}', "line 1 column 16"),
        ('{"a": [1, NaN 2]}', "line 1 column 15"),
        ('{"a": [1, NaN]', "Is the file cut off"),
        ('{"a": [1]} {}', "Extra data"),
    ],
)
def test_broken_objects_of_arrays_are_named(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.json") as caught:
        json_arrays(tmp_path / "a.json", ["a"])
    assert words in str(caught.value)


def test_rows_of_lines_are_named_by_their_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n \n1\n2\n\n3")
    rows = JsonRows(path)
    assert list(rows) == [1, 2, 3]
    assert [rows.where(i) for i in range(3)] == [f"{path}, line {line}" for line in (3, 4, 6)]


def test_what_is_sent_to_a_worker_grows_by_16_bytes_per_row(tmp_path):
    sizes = []
    for number in (1000, 2000):
        path = tmp_path / "a.json"
        path.write_text(json.dumps([{"text": "x" * 100}] * number))
        rows = JsonRows(path)
        assert next(iter(rows)) == rows[number - 1]
        sizes.append(len(pickle.dumps(rows)))
    assert sizes[1] - sizes[0] == 16 * 1000
