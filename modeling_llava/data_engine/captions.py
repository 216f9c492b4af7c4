"""Stage 1 data: captions into the form that pretraining reads, and the concept-balanced choice among them."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..constants import IMAGE_TOKEN
from ..data.json_rows import JsonRows
from ..io.atomic import atomic_path
from .coco import coco_item, coco_name, is_coco, items_of, one_line, stray_annotation, writable
from .concepts import ConceptSettings, Phrases, count_phrases, make_chooser
from .noun_phrases import DEFAULT_MODEL, extract_shards, read_shards
from .plots import plot_concepts
from .prompts import BRIEF_QUESTIONS, DETAILED_QUESTIONS, draw, load_questions
from .run import write_json


STYLES = ("brief", "detailed", "plain")


@dataclass(frozen=True)
class CaptionRow:
    """One row of a file of captions.

    Attributes:
        id: Its name.
        image: Path of the image, relative to the image folder.
        captions: Its captions, one or more.
        row: The row of the file.
    """

    id: str
    image: str
    captions: tuple[str, ...]
    row: dict[str, Any]


def read_captions(path: str | Path) -> Iterator[CaptionRow]:
    """Reads a file of captions, one row at a time.

    Forms: LLaVA's JSON (the first answer is the caption), rows {image, caption} or {image, captions} as a JSON array or
    JSONL, and COCO captions (each annotation a row).

    Raises:
        ValueError: the file or a row is of no known form.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if is_coco(path):
        yield from _coco_rows(path)
        return
    rows = JsonRows(path)
    for index, row in enumerate(rows):
        yield _caption_row(row, rows.where(index))


def _caption_row(row: Any, where: str) -> CaptionRow:
    if not isinstance(row, dict) or not isinstance(row.get("image"), str) or not row["image"].strip():
        raise ValueError(f"{where} has no 'image'. Expected {{image, caption}} or a row of LLaVA's JSON.")
    captions = row.get("captions", row.get("caption", row.get("blip_caption")))
    if captions is None and isinstance(row.get("conversations"), list):
        turns = [turn for turn in row["conversations"] if isinstance(turn, dict)]
        captions = [turn.get("value") for turn in turns if turn.get("from") == "gpt"][:1]
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{where} has no 'caption' (a text), 'captions' (a list of texts) or 'conversations'.")
    cleaned = tuple(text for text in map(one_line, captions) if text)
    image, name = writable(row["image"]), row.get("id")
    name = str(PurePosixPath(image).with_suffix("")) if name is None else writable(str(name))
    return CaptionRow(name, image, cleaned, row)


def _coco_rows(path: Path) -> Iterator[CaptionRow]:
    images = {}
    for key, item in items_of(path, "images"):
        with coco_item(path, key, item):
            images[item["id"]] = coco_name(item, "file_name")
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
    """Raises a `ValueError` where what is written would take the place of what is read."""
    if Path(source).resolve() == Path(target).resolve():
        raise ValueError(f"{target} is both read and written, and its captions would be lost; give another OUT.")


@dataclass
class ExpandSummary:
    """What `expand_captions` wrote.

    Attributes:
        samples: Samples written, one per caption.
        images: Rows read.
        empty: Rows without a caption; they are left out.
        marked: Captions that hold the text `<image>`, which would mark a second image; they are left out.
    """

    samples: int = 0
    images: int = 0
    empty: int = 0
    marked: int = 0


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
            `"plain"`: the image alone stands for the question, as v1.5 pretrains.
        questions: File of questions, one per line, in place of the package's list.
        seed: Of the draws; they hang on the sample's id, not on its place in the file.

    Raises:
        ValueError: an unknown style, a row of no known form, or no caption at all.
    """
    if style not in STYLES:
        raise ValueError(f"style is '{style}'; it is one of {', '.join(STYLES)}.")
    if style == "plain" and questions is not None:
        raise ValueError("style 'plain' asks no question; leave the file of questions out.")
    check_target(source, target)
    choices: tuple[str, ...] = ()
    if style != "plain":
        choices = load_questions(questions or {"brief": BRIEF_QUESTIONS, "detailed": DETAILED_QUESTIONS}[style])
    summary = ExpandSummary()
    with RowWriter(target) as writer:
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
                writer.write({"id": name, "image": row.image, "conversations": turns})
                summary.samples += 1
        if not summary.samples:
            raise ValueError(f"{source} has no caption.")
    return summary


@dataclass
class FilterSummary:
    """What the concept filter did; written as `OUT.report.json`.

    Attributes:
        settings: How captions were chosen, and the model of the noun phrases.
        captions: Captions read.
        chosen: Captions chosen.
        rows: Rows read; a row may hold several captions.
        rows_chosen: Rows of which a caption is chosen.
        without_phrase: Captions without a noun phrase; none of them is chosen.
        phrases: Distinct phrases.
        skipped: Phrases rarer than `least`.
        capped: Phrases that more than `most` captions hold.
        phrases_after: Distinct phrases in the chosen captions.
        commonest: The twenty commonest phrases: `[phrase, before, after]`.
        histogram: How many phrases have a frequency in [1], [2], [3, 5), [5, 10), …: `[from, before, after]`.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    captions: int = 0
    chosen: int = 0
    rows: int = 0
    rows_chosen: int = 0
    without_phrase: int = 0
    phrases: int = 0
    skipped: int = 0
    capped: int = 0
    phrases_after: int = 0
    commonest: list[list[Any]] = field(default_factory=list)
    histogram: list[list[int]] = field(default_factory=list)


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
        settings: How captions are chosen.
        model: spaCy's model.
        phrases: Folder for the noun phrases instead of `OUT.phrases`.
        workers: Processes that extract noun phrases; default: one per core.
        engine: `"local"`, or `"ray"` for Ray Data on the cluster that `RAY_ADDRESS` names, or on this machine. The
            choice is the same.
        progress: Whether to show a bar.

    Raises:
        ValueError: a row is of no known form, or no caption is chosen.
        ImportError: spaCy, its model, or Ray is absent.
    """
    settings = settings or ConceptSettings()
    check_target(source, target)
    target = Path(target)
    folder = Path(phrases) if phrases is not None else target.with_name(target.stem + ".phrases")
    texts = (caption for row in read_captions(source) for caption in row.captions)
    if engine == "ray":
        from .ray_filter import choose_with_ray

        chosen, counts, per_caption = choose_with_ray(texts, folder, settings, model=model, workers=workers)
    elif engine == "local":
        total = sum(len(row.captions) for row in read_captions(source)) if progress else None
        shards = extract_shards(texts, folder, model=model, workers=workers, progress=progress, total=total)

        def per_caption() -> Iterator[Phrases]:
            return read_shards(shards)

        counts = count_phrases(per_caption())
        chooser = make_chooser(per_caption, settings, counts)
        chosen = (chooser.chooses(number, found) for number, found in enumerate(per_caption()))
    else:
        raise ValueError(f"engine is '{engine}'; it is 'local' or 'ray'.")
    summary = FilterSummary(settings={**asdict(settings), "spacy_model": model})
    after: Counter[str] = Counter()
    with RowWriter(target) as writer:
        pairs = zip(per_caption(), chosen, strict=True)
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
                writer.write(row.row)
        assert next(pairs, None) is None, "more captions have noun phrases than the source holds"
        summary.rows_chosen = writer.number
        if not summary.chosen:
            raise ValueError(
                f"No caption of {source} is chosen: no noun phrase occurs in {settings.least} of its {summary.captions:,} "
                "captions. Lower --least for a small set."
            )
    describe_choice(summary, counts, after, settings)
    write_json(target.with_name(target.stem + ".report.json"), asdict(summary))
    plot_concepts(counts.values(), after.values(), settings.least, target.with_name(target.stem + ".concepts.png"))
    return summary


def describe_choice(
    summary: FilterSummary, before: Counter[str], after: Counter[str], settings: ConceptSettings
) -> None:
    """Fills in the figures about phrases."""
    summary.phrases, summary.phrases_after = len(before), len(after)
    summary.skipped = sum(count < settings.least for count in before.values())
    summary.capped = sum(count > settings.most for count in before.values())
    top = sorted(before, key=lambda phrase: (-before[phrase], phrase))[:20]
    summary.commonest = [[phrase, before[phrase], after[phrase]] for phrase in top]
    edges = [1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 100_000, 10**12]
    for low, high in zip(edges, edges[1:]):
        numbers = [sum(low <= count < high for count in counts.values()) for counts in (before, after)]
        if any(numbers):
            summary.histogram.append([low, *numbers])


def _is_writable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class RowWriter:
    """Writes rows as a JSON array, or as JSONL by the file's name; the file appears when it is whole."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.lines = self.path.suffix.lower() in {".jsonl", ".ndjson"}
        self.number = 0

    def __enter__(self) -> "RowWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self.file = open(stack.enter_context(atomic_path(self.path, sync=True)), "w", encoding="utf-8")
            stack.enter_context(self.file)
            self.stack = stack.pop_all()
        if not self.lines:
            self.file.write("[")
        return self

    def write(self, row: dict[str, Any]) -> None:
        """Writes one row."""
        if not self.lines:
            self.file.write(",\n" if self.number else "\n")
        text = json.dumps(row, ensure_ascii=False)
        # Half a surrogate pair cannot be written but as its escape.
        self.file.write(text if _is_writable(text) else json.dumps(row))
        if self.lines:
            self.file.write("\n")
        self.number += 1

    def __exit__(self, *error: Any) -> None:
        if not self.lines:
            self.file.write("\n]\n")
        self.stack.__exit__(*error)
