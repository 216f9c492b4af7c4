"""
From files, `datasets` objects and Hub names to conversations: random access, or a stream.

Images stay undecoded references here; what a row holds is said in `schema.py`, how a reference is read in `images.py`.
"""

import copy
import glob
import logging
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..io.images import ImageError, inside, is_not_path, where_looked
from .json_rows import JsonRows
from .rows import ArrowRows, DataShard, ListRows, StreamedRows
from .schema import PLACEHOLDER_SAMPLE, BadSampleError, Conversation, DropCounter, from_row, summarize_drops


logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_JSON_SUFFIXES = (".json", ".jsonl")
_TABLES = {".parquet": "parquet", ".tar": "webdataset"}
"""What `datasets` reads."""
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
"""The words of a file's name by which it belongs to a split, as in `datasets`."""


def load_conversations(
    source: Any,
    image_folder: str | os.PathLike | None = None,
    *,
    split: str = "train",
    streaming: bool = False,
    on_bad_sample: str = "raise",
    types: Sequence[str] | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    shuffle_buffer: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> "ConversationDataset | ConversationStream":
    """
    Read conversations (see [`Conversation`]) from anywhere.

    Args:
        source (`str`, `datasets.Dataset`, `list` or `dict`):
            - a LLaVA `.json` or `.jsonl` file (told apart by its content), also with `messages` rows;
            - a `.parquet` file, a WebDataset's `.tar`, a folder or a pattern (`data/*.json`) of files of one of these
              kinds, or a folder written by `Dataset.save_to_disk`;
            - the name of a dataset on the Hub;
            - a `datasets` object (a transform that was set is applied), or a list of rows in memory;
            - a list of any of these strings, or a dict of them by the type of the rows that name none.
        image_folder (`str`, *optional*): Relative image paths are joined to it; paths that leave it are bad samples.
        split (`str`, defaults to `"train"`): Which split of a dataset that has several.
        streaming (`bool`, defaults to `False`): Return a [`ConversationStream`]: constant memory, no length.
        on_bad_sample (`str`, defaults to `"raise"`):
            `"raise"` at the first row that is wrong, or `"drop"` such rows, counted by reason in `.dropped`. Without
            streaming every row is checked here, before training starts; images are not opened.
        types (`Sequence[str]`, *optional*): Keep only samples of these types (the data ablation of LLaVA §5.1).
        config_name, revision (`str`, *optional*): Of a dataset on the Hub.
        shuffle_buffer, seed (`int`, defaults to 0):
            Streaming only: samples held back to draw from at random (0 keeps the order), by seed and epoch.
        rank, world_size (`int`, defaults to 0 and 1):
            Streaming only: this process and the number of processes to share the rows with. Leave them as they are
            where something else shares the rows out, as `LlavaTrainer` and `accelerate` do.

    Raises:
        BadSampleError: A row is wrong and `on_bad_sample="raise"`.
        FileNotFoundError: There is no such file.
        ValueError: The source is of no known kind, is empty, or has no such split.

    Example:

    ```python
    >>> dataset = load_conversations("llava_instruct_150k.json", "coco/train2017")
    >>> dataset[0]["messages"][0]
    {'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What are the colors of the bus in the image?'}]}
    ```
    """
    if on_bad_sample not in ("raise", "drop"):
        raise ValueError(f"on_bad_sample is {on_bad_sample!r}: give 'raise' or 'drop'.")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} but there are {world_size} processes, numbered from 0.")
    parts = open_sources(source, split, streaming, config_name, revision)
    if isinstance(types, str):
        types = [types]
    folder = None if image_folder is None else os.path.abspath(image_folder)
    if streaming:
        return ConversationStream(parts, folder, on_bad_sample, types, shuffle_buffer, seed, rank, world_size)
    return ConversationDataset(parts, folder, on_bad_sample, types)


def open_sources(
    source: Any,
    split: str = "train",
    streaming: bool = False,
    config_name: str | None = None,
    revision: str | None = None,
) -> list[tuple[Any, str | None, str]]:
    """`(rows, type of rows that name none, description)` of each source; see `rows.py` and [`load_conversations`]."""
    return [
        (rows, type_name, what)
        for type_name, item in _named_sources(source)
        for rows, what in _open(item, split, streaming, config_name, revision)
    ]


class RowReader:
    """Turns a raw row into a conversation with its image paths joined to the folder."""

    def __init__(self, folder: str | None):
        self.folder = folder

    def __call__(self, row: Any, index: int, type_name: str | None) -> Conversation:
        if isinstance(row, BadSampleError):
            raise row
        conversation = from_row(row, index, type_name)
        if self.folder is not None:
            try:
                conversation["images"] = [self._resolve_path(image) for image in conversation["images"]]
            except ImageError as error:
                raise BadSampleError.of_image(conversation["id"], error) from None
        return conversation

    def _resolve_path(self, image: Any) -> Any:
        if not isinstance(image, (str, os.PathLike)) or is_not_path(os.fspath(image)):
            return image
        return inside(os.fspath(image), self.folder, follow_symlinks=True)


class ConversationDataset(torch.utils.data.Dataset):
    """
    Conversations by index, read from disk when asked for. Picklable; each worker opens its own files.

    Attributes:
        types (`list[str | None]`): The type of each sample, for weights by type.
        num_images (`np.ndarray` `[num_samples]`, int32): Images of each sample, for grouping by modality.
        dropped (`dict[str, int]`): Dropped rows by reason.
    """

    def __init__(self, parts: list, folder: str | None, on_bad_sample: str, types: Sequence[str] | None):
        self._rows = [rows for rows, _, _ in parts]
        self._type_names = [type_name for _, type_name, _ in parts]
        self._read = RowReader(folder)
        kept, self.types, num_images, dropped = [], [], [], Counter()
        first_error = None
        for part, (rows, type_name, what) in enumerate(parts):
            progress = tqdm(rows.scan(), desc=f"reading {what}", unit=" rows", delay=3, mininterval=1)
            for index, row in enumerate(progress):
                try:
                    conversation = self._read(row, index, type_name)
                except BadSampleError as error:
                    if on_bad_sample == "raise":
                        raise
                    first_error = first_error or error
                    dropped[error.reason] += 1
                    continue
                if types is None or conversation["type"] in types:
                    kept.append((part, index))
                    self.types.append(conversation["type"])
                    num_images.append(len(conversation["images"]))
        self._index = np.array(kept, dtype=np.int64).reshape(-1, 2)  # [num_samples, (part, row)]
        self.num_images = np.array(num_images, dtype=np.int32)
        self.dropped = dict(dropped)
        what = " + ".join(what for _, _, what in parts)
        if dropped:
            logger.warning("%s: %s. The first: %s", what, summarize_drops(dropped), first_error)
        if not kept:
            wanted = "" if types is None else f" of the types {list(types)}"
            why = f" {summarize_drops(dropped)}" if dropped else ""
            raise ValueError(f"{what} holds no usable sample{wanted}.{why}")

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Conversation:
        part, row = self._index[index].tolist()
        return self._read(self._rows[part][row], row, self._type_names[part])

    def select(self, indices: Iterable[int]) -> "ConversationDataset":
        """The samples at `indices`, in that order; rows are shared, not copied."""
        indices = np.fromiter(indices, dtype=np.int64)
        subset = copy.copy(self)
        subset._index = self._index[indices]
        subset.num_images = self.num_images[indices]
        subset.types = [self.types[i] for i in indices.tolist()]
        return subset


class ConversationStream(torch.utils.data.IterableDataset):
    """
    Conversations one after the other, without holding them. The rows are shared among the processes (`rank`,
    `world_size`) and among the workers of a `DataLoader`; in an epoch each row is given to exactly one of them.

    A JSON file is read through by everyone, and each takes one row of every n, counted on from epoch to epoch; a
    `datasets` stream is shared by its shards.

    Attributes:
        dropped (`dict[str, int]`): Rows dropped so far, by reason, in all workers of this process.
    """

    def __init__(self, parts, folder, on_bad_sample, types, shuffle_buffer, seed, rank, world_size):
        self._parts = parts
        self._read = RowReader(folder)
        self._drop = on_bad_sample == "drop"
        self._types = types
        self._shuffle_buffer, self._seed, self._epoch = shuffle_buffer, seed, 0
        self._rank, self._world_size = rank, world_size
        self._keeps_places = False
        self._dropped = DropCounter()

    @property
    def dropped(self) -> dict[str, int]:
        return self._dropped.as_dict()

    def set_epoch(self, epoch: int) -> None:
        """Orders are drawn for each epoch, and rows that do not come out even go to another process or worker."""
        self._epoch = epoch

    def shared_by(self, rank: int, world_size: int, keep_places: bool = False) -> "ConversationStream":
        """
        The same stream, of which process `rank` takes its part. With `keep_places` a row that is dropped leaves
        [`PLACEHOLDER_SAMPLE`] in its place: processes that drop unequally many would otherwise be in different epochs.
        """
        stream = copy.copy(self)
        stream._rank, stream._world_size, stream._keeps_places = rank, world_size, keep_places
        return stream

    def __iter__(self) -> Iterator[Conversation]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        shard = DataShard(self._rank, self._world_size, worker, num_workers)
        samples = self._samples(shard)
        if self._shuffle_buffer > 1:
            # A string seed is hashed with SHA-512, so the draw is the same in every process and Python version.
            samples = _shuffled(samples, self._shuffle_buffer, random.Random(f"{self._seed}-{self._epoch}-{shard}"))
        return samples

    def _samples(self, shard: DataShard) -> Iterator[Conversation]:
        is_shared = shard.count > 1
        before = self._epoch * sum(rows.count() for rows, _, _ in self._parts) if is_shared and self._epoch else 0
        for rows, type_name, what in self._parts:
            part = replace(shard, before=before)
            for index, row in rows.stream(part, self._seed if self._shuffle_buffer else None, self._epoch):
                try:
                    conversation = self._read(row, index, type_name)
                except BadSampleError as error:
                    if not self._drop:
                        raise
                    self._dropped.add(error, what)
                    if self._keeps_places:
                        yield PLACEHOLDER_SAMPLE
                    continue
                if self._types is None or conversation["type"] in self._types:
                    yield conversation
            before += rows.count() if is_shared else 0


def _shuffled(samples: Iterator, size: int, rng: random.Random) -> Iterator:
    """Hold `size` samples back; each new one takes the place of one drawn at random."""
    buffer = []
    for sample in samples:
        if len(buffer) < size:
            buffer.append(sample)
            continue
        i = rng.randrange(size)
        buffer[i], sample = sample, buffer[i]
        yield sample
    rng.shuffle(buffer)
    yield from buffer


def _named_sources(source: Any) -> list[tuple[str | None, Any]]:
    """`(type name, source)` of each part."""
    from datasets import DatasetDict, IterableDatasetDict

    if isinstance(source, Mapping) and not isinstance(source, (DatasetDict, IterableDatasetDict)):
        return list(source.items())
    if isinstance(source, (list, tuple)) and source and all(isinstance(item, (str, os.PathLike)) for item in source):
        return [(None, item) for item in source]
    return [(None, source)]


def _open(source: Any, split: str, streaming: bool, config_name: str | None, revision: str | None) -> list[tuple]:
    """The rows of one source and what it is called; of a folder or a pattern, those of each of its JSON files."""
    import datasets

    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split not in source:
            raise ValueError(f"the dataset has no split {split!r}; it has {', '.join(sorted(source))}.")
        source = source[split]
    what = f"a {type(source).__name__}"
    if isinstance(source, datasets.Dataset):
        is_transformed = source.format["type"] == "custom"
        return [(ListRows(source) if is_transformed else ArrowRows(source), what)]
    if isinstance(source, datasets.IterableDataset):
        if not streaming:
            raise ValueError("an IterableDataset has no random access: pass streaming=True.")
        return [(StreamedRows(source), what)]
    if isinstance(source, (list, tuple)):
        return [(ListRows(source), what)]
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"cannot read conversations from {what}: give a path, Hub name, datasets object or list.")

    def table(builder: str, split: str = split, **kwargs) -> tuple:
        try:
            loaded = datasets.load_dataset(builder, split=split, streaming=streaming, **kwargs)
        except datasets.exceptions.DatasetNotFoundError as error:
            raise FileNotFoundError(f"{builder!r} is neither here nor a dataset on the Hub: {error}") from error
        ((rows, _),) = _open(loaded, split, streaming, None, None)
        return rows, os.fspath(source)

    path, name = Path(source).expanduser(), os.fspath(source)
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _open(datasets.load_from_disk(str(path)), split, streaming, config_name, revision)
        files = sorted(file for file in path.rglob("*") if file.suffix in (*_JSON_SUFFIXES, *_TABLES))
        tables = [file for file in files if file.suffix in _TABLES]
        if tables:
            _require_parquet(tables)
            if left := [file for file in files if file.suffix not in _TABLES]:
                logger.warning(
                    f"{path}: its {tables[0].suffix} files are read, and {len(left)} others, such as {left[0].name}, are not. "
                    f"For those give a pattern: {path / '*.json'}."
                )
            return [table(str(path))]
        files = _of_split(files, split)
        if not files:
            kinds = f"parquet, tar or JSON files of the split {split!r}, nor a dataset written by save_to_disk"
            raise ValueError(f"the folder {name!r} holds neither {kinds}.")
    elif path.is_file():
        files = [path]
    elif path.suffix in (*_JSON_SUFFIXES, *_TABLES) or not _HUB_NAME.fullmatch(name):
        files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            raise FileNotFoundError(f"there is no file or folder {name!r}{where_looked(str(path))}.")
    else:
        return [table(name, name=config_name, revision=revision)]
    opened = []
    for suffix, builder in _TABLES.items():
        own = [file for file in files if file.suffix.lower() == suffix]
        _require_parquet(own)
        if own:
            opened.append(table(builder, "train", data_files=list(map(str, own))))
    return opened + [(JsonRows(file), str(file)) for file in files if file.suffix.lower() not in _TABLES]


def _of_split(files: list[Path], split: str) -> list[Path]:
    """Of files of which any has a split in its name, those of `split`."""
    words = {file: set(re.findall("[a-z]+", file.stem.lower())) for file in files}
    named = {file: {name for name, aliases in _SPLITS.items() if words[file] & aliases} for file in files}
    return [file for file in files if split in named[file]] if any(named.values()) else files


def _require_parquet(files: list[Path]) -> None:
    """Arrow's own error for another or a cut file does not name it."""
    for path in (path for path in files if path.suffix.lower() == ".parquet"):
        with open(path, "rb") as file:
            head = file.read(4)
            file.seek(max(0, path.stat().st_size - 4))
            tail = file.read()
        if head != b"PAR1":
            raise ValueError(f"{path} is not a parquet file: it begins with {head!r}, not with b'PAR1'.")
        if tail != b"PAR1":
            raise ValueError(f"{path} is cut off: it ends with {tail!r}, not with b'PAR1'. Copy or download it again.")
