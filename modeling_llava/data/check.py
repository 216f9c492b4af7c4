"""
What is wrong with a data set, before a run of days finds it: every record and every image header, in parallel.

    report = check_data("instruct.json", processor, "images", max_length=2048)
    report.problems      # samples that cannot be trained on as they are
    report.notices       # what is unusual, and may be meant
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import ProcessorMixin

from ..constants import IGNORE_INDEX, IMAGE_TOKEN
from ..text.stops import answer_stop
from .check_report import DataReport, Found, summarize, write_report
from .labels import encode_conversation
from .schema import TOO_LONG, BadSampleError, image_key, load_image, read_image_size, require_image_folder
from .sources import RowReader, open_sources


logger = logging.getLogger(__name__)

CHUNK = 128  # records that are checked, and remembered for a resume, at a time

STOP_IN_TEXT = "text holds the template's stop"
MARKER_IN_TEXT = "text-only sample holds <image>"


def check_data(
    source: Any,
    processor: ProcessorMixin | None = None,
    image_folder: str | os.PathLike | None = None,
    *,
    max_length: int | None = 2048,
    split: str = "train",
    config_name: str | None = None,
    batch_size: int = 128,
    decode: bool = False,
    follow_symlinks: bool = False,
    num_workers: int | None = None,
    out: str | os.PathLike | None = None,
    show_progress: bool = True,
) -> DataReport:
    """
    Check every sample of a source as the collator would meet it.

    An interrupted check resumes when it is started again with the same arguments on the same files: what was found is kept
    in a small file, in `out` or in the system's folder for temporary files, and deleted at the end.

    Args:
        source, split, config_name: As in [`load_conversations`]; not a stream.
        processor ([`LlavaProcessor`], *optional*):
            Its template and tokenizer give the lengths. Without one, records and images are checked but not tokens.
        image_folder, follow_symlinks: As in [`LlavaDataCollator`].
        max_length (`int`, *optional*, defaults to 2048): Maximum tokens of a sample; longer ones are a problem.
        batch_size (`int`, *optional*, defaults to 128): Samples (or packs) of an optimizer step.
        decode (`bool`, *optional*, defaults to `False`): Decode every image, instead of reading its header.
        num_workers (`int`, *optional*): Processes; by default one per core, and none for a few hundred samples.
        out (`str`, *optional*): Folder for `report.json`, `problems.jsonl` (every problem and notice) and `lengths.png`.
        show_progress (`bool`, *optional*, defaults to `True`): Show a progress bar.

    Raises:
        ValueError: A file cannot be read as a whole, such as a JSON list that is cut off.
        FileNotFoundError: The source or the image folder is not there.
    """
    require_image_folder(image_folder)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size} samples: at least 1 is needed.")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length} tokens: at least 1 is needed.")
    parts = open_sources(source, split, False, config_name)
    places = [(part, row) for part, (rows, _, _) in enumerate(parts) for row in range(rows.count())]
    places = np.array(places, dtype=np.int64).reshape(-1, 2)  # [num_records, (part, row)]
    if not len(places):
        raise ValueError(f"{' + '.join(what for _, _, what in parts)} holds no sample.")
    records = _Records(parts, places, processor, image_folder, max_length, decode, follow_symlinks)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    with _Progress(out, records.fingerprint()) as progress:
        start = progress.resumed_at
        if num_workers is None:
            num_workers = 0 if len(records) - start < 500 else os.cpu_count() or 1
        loader = torch.utils.data.DataLoader(
            torch.utils.data.Subset(records, range(start, len(records))),
            batch_size=CHUNK,
            num_workers=num_workers,
            collate_fn=list,
        )
        bar = tqdm(total=len(records), initial=start, unit=" samples", desc="checking", disable=not show_progress)
        with bar:
            for chunk in loader:
                progress.add(chunk)
                bar.update(len(chunk))
        report, findings = summarize(progress.found, max_length, batch_size)
        report.resumed_at = start
        if out is not None:
            write_report(Path(out), report, findings, [record.length for record in progress.found if record.length])
    return report


class _Records(torch.utils.data.Dataset):
    """What is found about each record."""

    def __init__(self, parts, places, processor, image_folder, max_length, decode, follow_symlinks):
        self.rows = [rows for rows, _, _ in parts]
        self.types = [type_name for _, type_name, _ in parts]
        self.places = places
        self.processor = processor
        self.image_folder = image_folder
        self.max_length = max_length
        self.decode = decode
        self.follow_symlinks = follow_symlinks
        self.read = RowReader(None)
        self.checks = [self._images] if processor is None else [self._images, self._tokens]
        self.stop = None if processor is None else _typed_stop(processor)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Found:
        part, number = self.places[index].tolist()
        found = {"id": str(number)}
        try:
            row = self.rows[part][number]
            if isinstance(row, dict) and row.get("id") is not None:
                found["id"] = str(row["id"])
            conversation = self.read(row, number, self.types[part])
        except BadSampleError as error:
            return Found(**found, problems=[(error.reason, str(error))])
        found |= {"type": conversation["type"], "images": len(conversation["images"]), "hash": _hash(conversation)}
        found["notices"] = list(self._unusual(conversation))
        found["problems"] = problems = []
        for check in self.checks:  # all: a fixed image should not bring the next surprise
            try:
                check(conversation, found)
            except BadSampleError as error:
                problems.append((error.reason, str(error)))
        return Found(**found)

    def _unusual(self, conversation: dict) -> Iterator[tuple[str, str]]:
        texts = [item["text"] for m in conversation["messages"] for item in m["content"] if item["type"] == "text"]
        name = f"sample {conversation['id']!r}"
        if self.stop is not None and any(self.stop in text for text in texts):
            yield STOP_IN_TEXT, f"{name} has {self.stop!r} in its text, with which the chat template ends an answer."
        if not conversation["images"] and any(IMAGE_TOKEN in text for text in texts):
            yield MARKER_IN_TEXT, f"{name} has {IMAGE_TOKEN} in its text but no image: it is read as text."

    def _images(self, conversation: dict, found: dict) -> None:
        look = load_image if self.decode else read_image_size
        for reference in conversation["images"]:
            look(reference, self.image_folder, conversation["id"], follow_symlinks=self.follow_symlinks)

    def _tokens(self, conversation: dict, found: dict) -> None:
        encoded = encode_conversation(conversation["messages"], self.processor, sample_id=conversation["id"])
        supervised = encoded["labels"] != IGNORE_INDEX
        is_image = encoded["input_ids"] == self.processor.image_token_id
        length, limit = len(is_image), self.max_length
        found |= {"length": length, "image_tokens": int(is_image.sum()), "supervised": int(supervised.sum())}
        if limit is None or length <= limit:
            return
        lost = int(supervised[limit:].sum())
        cuts_image, cuts_all = bool(is_image[limit:].any()), lost == found["supervised"]
        found["cut"] = (length - limit, lost, cuts_image, cuts_all)
        what = "would cut an image" if cuts_image else f"would lose {lost} of {found['supervised']} supervised tokens"
        what = f"has {length} tokens, max_length is {limit}: cutting its end {what}."
        raise BadSampleError(conversation["id"], TOO_LONG, what)

    def fingerprint(self) -> str:
        """Equal where an interrupted check can resume: same data, same processor, same arguments."""
        parts = [
            "1",  # of the progress file's form
            [rows.identity() for rows in self.rows],
            self.types,
            None if self.image_folder is None else os.path.abspath(self.image_folder),
            [self.max_length, self.decode, self.follow_symlinks],
        ]
        if self.processor is not None:
            tokenizer = self.processor.tokenizer
            parts += [self.processor.to_json_string(), self.processor.chat_template]
            parts += [tokenizer.name_or_path, len(tokenizer), tokenizer.chat_template]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _typed_stop(processor: ProcessorMixin) -> str | None:
    """
    The text that ends an answer in the chat template, if a user could have typed it, such as `###` in `vicuna_v0`. A
    token of its own cannot be typed: `encode_conversation` reads it as text.
    """
    try:
        stop = answer_stop(processor)
    except ValueError as error:
        logger.info("Not looked for: text that holds the stop of an answer. %s", error)
        return None
    return stop if stop and stop not in processor.tokenizer.get_added_vocab() else None


def _hash(conversation: dict) -> str:
    """Of the images and the text, equal for the same conversation under two ids."""
    content = repr([[image_key(image) for image in conversation["images"]], conversation["messages"]])
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=9).hexdigest()


class _Progress:
    """The records found so far, also as JSON lines in a file, one per chunk, with which a killed check resumes."""

    def __init__(self, out: str | os.PathLike | None, fingerprint: str):
        folder = Path(out) if out is not None else Path(tempfile.gettempdir())
        self.path = folder / ("progress.jsonl" if out is not None else f"llava-data-check-{fingerprint[:16]}.jsonl")
        # What follows the last line break was cut.
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        if lines[:1] != [fingerprint.encode()]:
            lines = [fingerprint.encode()]
        self.found = [Found(*record) for line in lines[1:] for record in json.loads(line)]
        self.resumed_at = len(self.found)
        self._file = open(self.path, "wb")
        self._write(*lines)

    def add(self, chunk: list[Found]) -> None:
        self.found += chunk
        self._write(json.dumps(chunk, separators=(",", ":")).encode())

    def _write(self, *lines: bytes) -> None:
        self._file.writelines(line + b"\n" for line in lines)
        self._file.flush()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, error: type | None, *_) -> None:
        self._file.close()
        if error is None:
            self.path.unlink()
