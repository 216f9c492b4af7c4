"""
Raw rows of one source, by index or in a stream.

Every class here and in `json_rows.py` has `rows[index]`, `scan()` (every row once, without touching image bytes) and
`stream(shard, seed, epoch)`. The last two give a row that cannot be read as a [`BadSampleError`]; the first raises it.
`count()` is the number of rows, and `identity()` is equal as long as the data is the same.
"""

import inspect
import json
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..compat import dataset_fingerprint


_JSON = "arrow.json"


@dataclass(frozen=True)
class DataShard:
    """
    The part of the rows that one worker of one process takes. All rows of all sources and epochs are dealt out in rounds: a
    round gives each shard one row. So no shard lags, whether epochs come out even or not; and since each round begins
    at another shard, none gets all the long, the bad, or the text-only rows of data in which they recur at intervals.
    """

    rank: int
    world_size: int
    worker: int
    num_workers: int
    before: int = 0
    """Rows that were dealt out already; the next one has the index 0."""

    @property
    def count(self) -> int:
        return self.world_size * self.num_workers

    def indices(self, num_rows: int) -> Iterator[int]:
        """Those of the next `num_rows` rows that are in the shard."""
        number, count = self.rank * self.num_workers + self.worker, self.count
        for round_ in range(self.before // count, -(-(self.before + num_rows) // count)):
            begins_at = zlib.crc32(b"%d" % round_) % count
            index = round_ * count + (number - begins_at) % count - self.before
            if 0 <= index < num_rows:
                yield index

    def __str__(self) -> str:
        return f"{self.rank * self.num_workers + self.worker}/{self.count}"


class ListRows:
    """Rows in memory."""

    def __init__(self, rows: Sequence):
        self.rows = rows

    def identity(self) -> str:
        return uuid.uuid4().hex  # what is in memory cannot be known again

    def count(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]

    def scan(self) -> Iterator:
        return iter(self.rows)

    def stream(self, shard: DataShard, seed: int | None, epoch: int) -> Iterator[tuple[int, Any]]:
        for index in shard.indices(len(self.rows)):
            yield index, self[index]


class ArrowRows(ListRows):
    """A `datasets.Dataset`, read as Arrow: its images stay what they are in the file, bytes or a path."""

    def __init__(self, dataset):
        super().__init__(dataset.with_format("arrow"))
        self._json_columns = _json_columns(dataset.features)

    def identity(self) -> str:
        return dataset_fingerprint(self.rows)

    def __getitem__(self, index: int) -> dict:
        return _decode_json(self.rows[index].to_pylist()[0], self._json_columns)

    def scan(self) -> Iterator[dict]:
        """All rows, with a placeholder for each image, so that no image bytes are touched."""
        for table in self.rows.iter(batch_size=1000):
            columns = [_without_bytes(table.column(name)) for name in table.column_names]
            for values in zip(*columns):
                yield _decode_json(dict(zip(table.column_names, values)), self._json_columns)


class StreamedRows:
    """A `datasets.IterableDataset`, sharded by `datasets`."""

    def __init__(self, dataset):
        dataset = dataset.with_format(None)  # rows, not tables
        self.dataset = dataset.decode(False) if dataset.features else dataset
        self._json_columns = _json_columns(dataset.features)

    def count(self) -> int:
        return 0  # not known, and not needed: `datasets` shards them

    def stream(self, shard: DataShard, seed: int | None, epoch: int) -> Iterator[tuple[int | str, dict]]:
        from datasets.distributed import split_dataset_by_node

        dataset = self.dataset
        if seed is not None:
            # Only the order of the shards is drawn here; the rows go through the buffer of the ConversationStream.
            options = {"buffer_size": 1, "max_buffer_input_shards": 1}  # the second since datasets 5
            known = inspect.signature(dataset.shuffle).parameters
            dataset = dataset.shuffle(seed=seed, **{name: options[name] for name in options if name in known})
            dataset.set_epoch(epoch)
        if shard.world_size > 1:
            # Parts that are not equally long go round from epoch to epoch, so that no process lags.
            shard = replace(shard, rank=(shard.rank + epoch) % shard.world_size)
            dataset = split_dataset_by_node(dataset, shard.rank, shard.world_size)
        # Inside a worker `datasets` takes the worker's shards. Rows that have no id are then numbered by shard.
        prefix = f"{shard}:" if shard.count > 1 else ""
        for index, row in enumerate(dataset):
            yield f"{prefix}{index}", _decode_json(row, self._json_columns)


def _json_columns(features) -> dict:
    """Arrow type of each column that holds a `Json` feature, whose values are JSON texts as long as they are not decoded."""
    types = {} if features is None else {field.name: field.type for field in features.arrow_schema}
    return {name: arrow_type for name, arrow_type in types.items() if _JSON in str(arrow_type)}


def _decode_json(row: dict, columns: dict) -> dict:
    return {**row, **{name: _json_value(row[name], arrow_type) for name, arrow_type in columns.items()}}


def _json_value(value: Any, arrow_type) -> Any:
    if value is None:
        return None
    if getattr(arrow_type, "extension_name", None) == _JSON:
        if not isinstance(value, str):  # a stream whose features were given may hold it decoded
            return value
        try:
            decoded = json.loads(value)
        except ValueError:  # `datasets` looks at the first five only
            return value
        return value if isinstance(decoded, (bool, int, float)) else decoded  # a text such as 42 is not quoted there
    if pa.types.is_struct(arrow_type):
        return {name: _json_value(item, arrow_type.field(name).type) for name, item in value.items()}
    if _is_list(arrow_type):
        return [_json_value(item, arrow_type.value_type) for item in value]
    return value


def _holds_bytes(arrow_type) -> bool:
    is_image = pa.types.is_struct(arrow_type) and arrow_type.get_field_index("bytes") >= 0
    return is_image or pa.types.is_binary(arrow_type) or pa.types.is_large_binary(arrow_type)


def _without_bytes(column) -> list:
    """The values of a column, with a placeholder for each image; `None` stays `None`."""
    if _holds_bytes(column.type):
        return [{"bytes": None, "path": None} if valid else None for valid in column.is_valid().to_pylist()]
    if _is_list(column.type) and _holds_bytes(column.type.value_type):
        images = iter(_without_bytes(pc.list_flatten(column)))
        return [[next(images) for _ in range(length or 0)] for length in pc.list_value_length(column).to_pylist()]
    return column.to_pylist()


def _is_list(arrow_type) -> bool:
    return isinstance(arrow_type, pa.ListType | pa.LargeListType | pa.FixedSizeListType)
