"""Stage 1 data: captions into the form that pretraining reads, and the concept-balanced choice among them."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..constants import IMAGE_TOKEN
from ..data.json_rows import JsonRows
from ..io.files import atomic_path
from .coco import add_by_id, coco_item, coco_name, image_and_id, is_coco, items_of, one_line, stray_annotation
from .concepts import ConceptSettings, choose_captions, count_phrases
from .noun_phrases import DEFAULT_MODEL, extract_shards, read_shards
from .plots import plot_concepts
from .prompts import BRIEF_QUESTIONS, DETAILED_QUESTIONS, draw, load_questions
from .run import write_json


STYLES = {"brief": BRIEF_QUESTIONS, "detailed": DETAILED_QUESTIONS, "plain": None}
"""The list of questions of each style."""


@dataclass(frozen=True)
class CaptionRow:
    id: str
    image: str  # path, relative to the image folder
    captions: tuple[str, ...]
    row: dict[str, Any]  # as it is in the file


def read_captions(path: str | Path) -> Iterator[CaptionRow]:
    """Reads a file of captions, one row at a time: LLaVA's JSON (the first answer is the caption), rows {image, caption} or
    {image, captions} as a JSON array or JSONL, or COCO captions (each annotation a row).

    Raises:
        ValueError: the file or a row has another form.
    """
    path = Path(path)
    if is_coco(path):
        yield from _coco_rows(path)
    else:
        rows = JsonRows(path)
        for index, row in enumerate(rows):
            yield _caption_row(row, rows.where(index))


def _caption_row(row: Any, where: str) -> CaptionRow:
    image, name = image_and_id(row, where, "{image, caption} or a row of LLaVA's JSON")
    captions = row.get("captions", row.get("caption", row.get("blip_caption")))
    if captions is None and isinstance(row.get("conversations"), list):
        turns = [turn for turn in row["conversations"] if isinstance(turn, dict)]
        captions = [turn.get("value") for turn in turns if turn.get("from") == "gpt"][:1]
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{where} has no 'caption' (a text), 'captions' (a list of texts) or 'conversations'.")
    return CaptionRow(name, image, tuple(filter(None, map(one_line, captions))), row)


def _coco_rows(path: Path) -> Iterator[CaptionRow]:
    images = {}
    for key, item in items_of(path, "images"):
        with coco_item(path, key, item):
            add_by_id(images, item, coco_name(item, "file_name"))
    if not images:
        raise ValueError(f"{path} has no 'images'. Expected COCO captions, a JSON array, or one JSON object per line.")
    for key, item in items_of(path, "annotations"):
        with coco_item(path, key, item):
            if "caption" not in item:
                continue
            name, image_id, caption = str(item["id"]), item["image_id"], item["caption"]
        if image_id not in images:
            raise stray_annotation(path, "caption", image_id, images)
        yield _caption_row({"id": name, "image": images[image_id], "caption": caption}, f"{path}, caption {name}")


def check_target(source: str | Path, target: str | Path) -> None:
    """Raises a `ValueError` if the file that is written is the one that is read."""
    if Path(source).resolve() == Path(target).resolve():
        raise ValueError(f"{target} is both read and written, and its captions would be lost; give another OUT.")


@dataclass
class ExpandSummary:
    """What `expand_captions` wrote and what it left out."""

    samples: int = 0  # one per caption
    images: int = 0  # rows read
    empty: int = 0  # rows without a caption
    marked: int = 0  # captions with the text `<image>`, which would mark a second image


def expand_captions(
    source: str | Path,
    target: str | Path,
    *,
    style: str = "brief",
    questions: str | Path | None = None,
    seed: int = 0,
) -> ExpandSummary:
    """Makes stage 1 data: caption → (question, caption), in LLaVA's JSON (LLaVA §4.1 and appendix).

    Args:
        source: File of captions (`read_captions`).
        target: JSON, or JSONL by its name.
        style: `"brief"` or `"detailed"`: a question drawn from that list, the image before or after it by chance.
            `"plain"`: the image without a question, as v1.5 pretrains.
        questions: File of questions, one per line, in place of the package's list.
        seed: Seed of the draws, which depend on the sample's id and not on its place in the file.
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got '{style}'.")
    if style == "plain" and questions is not None:
        raise ValueError("style 'plain' asks no question; leave the file of questions out.")
    check_target(source, target)
    choices = () if style == "plain" else load_questions(questions or STYLES[style])
    summary = ExpandSummary()
    with write_rows(target) as write:
        for row in read_captions(source):
            summary.images += 1
            summary.empty += not row.captions
            for number, caption in enumerate(row.captions):
                if IMAGE_TOKEN in caption:
                    summary.marked += 1
                    continue
                name = row.id if len(row.captions) == 1 else f"{row.id}-{number}"
                asked = IMAGE_TOKEN
                if choices:
                    parts = [IMAGE_TOKEN, draw(choices, seed, name)]
                    first = random.Random(f"{seed}:order:{name}").random() < 0.5
                    asked = "\n".join(parts if first else parts[::-1])
                turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": caption}]
                write({"id": name, "image": row.image, "conversations": turns})
                summary.samples += 1
        if not summary.samples:
            raise ValueError(f"{source} has no caption.")
    return summary


@dataclass
class FilterSummary:
    """What the concept filter did; written as `OUT.report.json`."""

    settings: dict[str, Any] = field(default_factory=dict)  # with the model of the noun phrases
    captions: int = 0
    chosen: int = 0
    rows: int = 0  # a row may have several captions
    rows_chosen: int = 0  # rows of which a caption is chosen
    without_phrase: int = 0  # captions without a noun phrase; none of them is chosen
    phrases: int = 0
    skipped: int = 0  # phrases rarer than `least`
    capped: int = 0  # phrases of more than `most` captions
    phrases_after: int = 0  # in the chosen captions
    commonest: list[list[Any]] = field(default_factory=list)  # twenty times [phrase, captions before, captions after]


def filter_captions(
    source: str | Path,
    target: str | Path,
    settings: ConceptSettings | None = None,
    *,
    model: str = DEFAULT_MODEL,
    phrases: str | Path | None = None,
    workers: int | None = None,
    engine: str = "local",
    progress: bool = False,
) -> FilterSummary:
    """Chooses captions by their concepts and writes their rows unchanged, in the source's order.

    Next to the target it writes `OUT.report.json`, `OUT.concepts.png` and `OUT.phrases/`: the noun phrases, which an
    interrupted call, or one with other settings, reuses.

    Args:
        source: File of captions (`read_captions`). A row is chosen if one of its captions is.
        target: JSON, or JSONL by its name.
        phrases: Folder for the noun phrases instead of `OUT.phrases`.
        model, workers, engine, progress: As in `extract_shards`.

    Raises:
        ValueError: no caption is chosen.
        ImportError: spaCy, its model, or Ray is not installed.
    """
    if engine not in ("local", "ray"):
        raise ValueError(f"engine must be 'local' or 'ray', got '{engine}'.")
    settings, target = settings or ConceptSettings(), Path(target)
    check_target(source, target)
    shards = extract_shards(
        (caption for row in read_captions(source) for caption in row.captions),
        phrases or target.with_name(target.stem + ".phrases"),
        model=model,
        workers=workers,
        engine=engine,
        progress=progress,
        total=sum(len(row.captions) for row in read_captions(source)) if progress else None,
    )
    before = count_phrases(read_shards(shards))
    chosen = choose_captions(lambda: read_shards(shards), settings, before)
    summary = FilterSummary(settings={**asdict(settings), "spacy_model": model})
    after: Counter[str] = Counter()
    with write_rows(target) as write:
        pairs = zip(read_shards(shards), chosen, strict=True)
        for row in read_captions(source):
            keep = False
            for found, takes in itertools.islice(pairs, len(row.captions)):
                summary.captions += 1
                summary.without_phrase += not found
                summary.chosen += takes
                keep |= takes
                if takes:
                    after.update(found)
            summary.rows += 1
            if keep:
                summary.rows_chosen += 1
                write(row.row)
        if not summary.chosen:
            raise ValueError(
                f"No caption of {source} is chosen: no noun phrase occurs in {settings.least} of its {summary.captions:,} "
                "captions. Lower --least for a small set."
            )
    summary.phrases, summary.phrases_after = len(before), len(after)
    summary.skipped = sum(count < settings.least for count in before.values())
    summary.capped = sum(count > settings.most for count in before.values())
    summary.commonest = [[phrase, count, after[phrase]] for phrase, count in before.most_common(20)]
    write_json(target.with_name(target.stem + ".report.json"), asdict(summary))
    plot_concepts(before.values(), after.values(), settings.least, target.with_name(target.stem + ".concepts.png"))
    return summary


@contextmanager
def write_rows(path: str | Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes a row into a JSON array or, by the file's name, JSONL. The file appears when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix.lower() in {".jsonl", ".ndjson"}
    separator = "" if lines else "[\n"
    # A lone surrogate, which UTF-8 cannot encode, is written as its escape in JSON.
    with (
        atomic_path(path, sync=True) as partial,
        open(partial, "w", encoding="utf-8", errors="backslashreplace") as file,
    ):

        def write(row: dict[str, Any]) -> None:
            nonlocal separator
            file.write(separator + json.dumps(row, ensure_ascii=False))
            separator = "\n" if lines else ",\n"

        yield write
        file.write("\n" if lines else "\n]\n")
