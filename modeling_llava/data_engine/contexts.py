"""Contexts: what a language-only model is given in place of an image (LLaVA §3).

Two symbolic representations stand for an image: its captions, one per line, and its boxes, one per line as
`category: [x1, y1, x2, y2]`, the corners as fractions of the image's width and height, rounded to three decimals,
largest box first:

```
A red fire hydrant is deep in the snow.
This city has had a very hard winter with snow.

fire hydrant: [0.326, 0.612, 0.426, 0.72]
```
"""

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.json_rows import JsonRows
from .coco import corners_of, image_and_id, is_coco, is_crowd, one_line, read_coco, stem_of, stray_annotation


logger = logging.getLogger(__name__)

DECIMALS = 3
LARGEST_FRACTION = 2.0
"""Corners beyond it are pixels; where pixels are expected, a box within it is in fractions."""
FAR_OVER = 1.05
"""A box that ends beyond it, in widths or heights of the image, is not in COCO's form."""


@dataclass(frozen=True)
class Box:
    """One object of an image."""

    category: str
    corners: tuple[float, float, float, float]  # left, top, right, bottom, fractions 0..1 of width and height

    @property
    def area(self) -> float:
        """Fraction of the image that the box covers, 0..1."""
        x1, y1, x2, y2 = self.corners
        return (x2 - x1) * (y2 - y1)

    def __str__(self) -> str:
        return f"{self.category}: [{', '.join(repr(round(value, DECIMALS)) for value in self.corners)}]"


@dataclass(frozen=True)
class Context:
    """What a language-only model is given for an image."""

    id: str  # unique in its file
    image: str  # path, relative to the image folder
    captions: tuple[str, ...]
    boxes: tuple[Box, ...] = ()  # largest first

    @property
    def caption_text(self) -> str:
        """The captions, one per line."""
        return "\n".join(self.captions)

    @property
    def box_text(self) -> str:
        """The boxes, one per line, as `category: [x1, y1, x2, y2]`; empty without boxes."""
        return "\n".join(str(box) for box in self.boxes)

    def to_dict(self) -> dict[str, Any]:
        """The context in the plain JSONL form that `read_contexts` reads."""
        boxes = [{"category": box.category, "bbox": list(box.corners)} for box in self.boxes]
        return {"id": self.id, "image": self.image, "captions": list(self.captions), "boxes": boxes}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "Context":
        """The context of a row that `to_dict` made; nothing is cleaned a second time."""
        boxes = tuple(Box(box["category"], tuple(box["bbox"])) for box in row["boxes"])
        return cls(row["id"], row["image"], tuple(row["captions"]), boxes)


@dataclass
class ContextCounts:
    """What was read and what was left out."""

    contexts: int = 0
    boxes: int = 0  # kept ones
    clipped: int = 0  # boxes that reached over the image's edge and were cut there
    dropped: Counter = field(default_factory=Counter)  # boxes, captions and images, by reason (`REASONS`)

    def summary(self) -> str:
        """One line for a person."""
        parts = [f"{self.contexts:,} contexts with {self.boxes:,} boxes"]
        if self.clipped:
            parts.append(f"{self.clipped:,} boxes cut at the image's edge")
        parts += [f"{number:,} × {REASONS[reason]}" for reason, number in sorted(self.dropped.items())]
        return "; ".join(parts)


NOT_LOST = {"crowd", "empty_caption", "no_captions"}
REASONS = {
    "crowd": "box around a crowd left out",
    "not_finite": "box with NaN or infinity left out",
    "inverted": "box with its corners swapped left out",
    "empty": "box without area left out",
    "tiny": "box thinner than a thousandth of the image left out",
    "outside": "box outside the image left out",
    "no_box": "annotation without a bbox left out",
    "fraction": "box in fractions 0..1 where pixels are expected left out",
    "no_size": "box in pixels of an image without width and height left out",
    "empty_caption": "empty caption left out",
    "no_captions": "image without captions left out",
}


def clean_box(
    category: str,
    corners: Iterable[float],
    counts: ContextCounts,
    size: tuple[float, float] = (1.0, 1.0),
    crowd: bool = False,
) -> Box | None:
    """A `Box` from corners in an image of `size` (width, height); `None`, and counted by reason, if it is left out."""
    width, height = size
    x1, y1, x2, y2 = corners = [float(value) for value in corners]
    exact = (x1 / width, y1 / height, x2 / width, y2 / height)
    left, top, right, bottom = inside = [min(max(value, 0.0), 1.0) for value in exact]
    reason = None
    if crowd:
        reason = "crowd"
    elif not all(map(math.isfinite, corners)):
        reason = "not_finite"
    elif x2 < x1 or y2 < y1:
        reason = "inverted"
    elif x2 == x1 or y2 == y1:
        reason = "empty"
    elif LARGEST_FRACTION < min(width, height) and max(map(abs, corners)) <= LARGEST_FRACTION:
        reason = "fraction"
    elif left == right or top == bottom:
        reason = "outside"
    elif round(left, DECIMALS) == round(right, DECIMALS) or round(top, DECIMALS) == round(bottom, DECIMALS):
        reason = "tiny"
    if reason is not None:
        counts.dropped[reason] += 1
        return None
    # COCO's own rounding reaches over the edge by hundredths of a pixel; only what shows in three decimals is counted.
    counts.clipped += max(abs(a - b) for a, b in zip(exact, inside)) > 0.5 * 10**-DECIMALS
    counts.boxes += 1
    return Box(one_line(category), tuple(value + 0.0 for value in inside))  # no -0.0


def _largest_first(boxes: Iterable[Box]) -> tuple[Box, ...]:
    # Stable: ties keep the file's order. Boxes of one size in two places differ in the last bits of their areas.
    return tuple(sorted(boxes, key=lambda box: -round(box.area, 12)))


def _clean_captions(captions: Any, where: str, counts: ContextCounts) -> tuple[str, ...]:
    captions = [captions] if isinstance(captions, str) else captions or ()
    if not isinstance(captions, (list, tuple)) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{where}: {captions!r} are not captions, which are a list of texts.")
    cleaned = [one_line(caption) for caption in captions]
    if empty := cleaned.count(""):
        counts.dropped["empty_caption"] += empty
    return tuple(filter(None, cleaned))


def _size(width: Any, height: Any, where: str) -> tuple[float, float] | None:
    """Width and height in pixels; `None` where one is not given."""
    if not width or not height:
        return None
    try:
        size = float(width), float(height)
    except (TypeError, ValueError, OverflowError):
        size = (math.nan, math.nan)
    if not all(math.isfinite(value) and value > 0 for value in size):
        raise ValueError(f"{where}: width {width!r} and height {height!r} are not the size of an image in pixels.")
    return size


def context_from_row(row: dict[str, Any], counts: ContextCounts, where: str = "row") -> Context:
    """A context from a row; a `ValueError` names a field that is missing or malformed.

    A row has `image`, `captions` (a list; or `caption`, a text) and `boxes` or `instances`, a list of `{"category": name,
    "bbox": [x1, y1, x2, y2]}`. With `width` and `height` (pixels) the corners are pixels; without, fractions of the image.
    `id` is optional; `iscrowd` of a box is honoured.
    """
    image, name = image_and_id(row, where, "one object {image, captions, boxes} per line")
    where = f"{where}, sample '{name}'"
    size = _size(row.get("width"), row.get("height"), where)
    items = row.get("boxes", row.get("instances")) or ()
    form = "{'category': name, 'bbox': [x1, y1, x2, y2]}"
    if not isinstance(items, (list, tuple)):
        raise ValueError(f"{where}: 'boxes' is {items!r}, not a list of {form}.")
    boxes = []
    for item in items:
        try:
            category, corners, crowd = item["category"], corners_of(item["bbox"]), is_crowd(item)
            if not category.strip():
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            raise ValueError(f"{where}: box {item!r} is not {form}.") from None
        if size is None and math.isfinite(sum(corners)) and max(map(abs, corners)) > LARGEST_FRACTION and not crowd:
            counts.dropped["no_size"] += 1
        else:
            boxes.append(clean_box(category, corners, counts, size or (1.0, 1.0), crowd))
    captions = _clean_captions(row.get("captions", row.get("caption")), where, counts)
    return Context(name, image, captions, _largest_first(filter(None, boxes)))


def _coco_boxes(path: Path, counts: ContextCounts) -> dict[str, tuple[Box, ...]]:
    images, categories, annotations = read_coco(path)
    boxes, ends, far_over = {}, 0, 0
    for image_id, found in annotations.items():
        if image_id not in images:
            raise stray_annotation(path, "box", image_id, images)
        name, width, height = images[image_id]
        where = f"{path}: image '{name}'"
        size = _size(width, height, where)
        if size is None:
            raise ValueError(f"{where} has no width and height, by which its boxes are normalised.")
        cleaned = []
        for item in found:
            if not isinstance(item, tuple):
                raise ValueError(f"{where} has an annotation without a box [x, y, width, height].")
            if not item:
                counts.dropped["no_box"] += 1
                continue
            category, x, y, w, h, crowd = item
            if category not in categories:
                known = next(iter(categories), None)
                raise ValueError(f"{where} has category {category!r}, which is not in 'categories' ({known!r}, …).")
            ends += 1
            far_over += x + w > FAR_OVER * size[0] or y + h > FAR_OVER * size[1]
            cleaned.append(clean_box(categories[category], (x, y, x + w, y + h), counts, size, crowd))
        boxes[name] = _largest_first([*boxes.get(name, ()), *filter(None, cleaned)])  # some files name one image twice
    if far_over > ends / 2:
        raise ValueError(
            f"{path}: {far_over:,} of {ends:,} boxes reach far over the image's edge. COCO's bbox is [x, y, width, height] in "
            "pixels: are these [x1, y1, x2, y2], or of images of another size?"
        )
    return boxes


def _row_boxes(path: Path, counts: ContextCounts) -> dict[str, tuple[Box, ...]]:
    boxes: dict[str, tuple[Box, ...]] = {}
    for context in _row_contexts(path, counts):
        boxes[context.image] = _largest_first(boxes.get(context.image, ()) + context.boxes)
    return boxes


def read_contexts(
    captions: str | Path,
    boxes: str | Path | None = None,
    *,
    max_boxes: int | None = None,
    counts: ContextCounts | None = None,
) -> Iterator[Context]:
    """Reads contexts, one at a time, in the order of the captions' file.

    Args:
        captions: COCO captions (`captions_train2017.json`), or rows {image, captions, boxes} as JSONL or a JSON array
            (LLaVA-Bench's `caps_boxes_coco2014_val_80.jsonl`).
        boxes: COCO instances (`instances_train2017.json`) or rows as above, matched to the captions by the image's
            file name; `None` takes the boxes from the rows of `captions`.
        max_boxes: Maximum boxes per context, the largest; `None` keeps all.
        counts: Counts what was read and left out.

    Raises:
        ValueError: a file has another form, two samples have the same id, or no image has a box of `boxes`.
    """
    counts = ContextCounts() if counts is None else counts
    captions = Path(captions)
    boxes_by_image = None
    if boxes is not None and Path(boxes) != captions:
        boxes_by_image = (_coco_boxes if is_coco(Path(boxes)) else _row_boxes)(Path(boxes), counts)
    seen: set[str] = set()
    matched = found = 0
    for context in _coco_contexts(captions, counts) if is_coco(captions) else _row_contexts(captions, counts):
        if boxes_by_image is not None:
            matched += context.image in boxes_by_image
            context = dataclasses.replace(context, boxes=boxes_by_image.get(context.image, ()))
            found += len(context.boxes)
        if not context.captions:
            counts.dropped["no_captions"] += 1
            continue
        if context.id in seen:
            raise ValueError(f"{captions}: two samples have the id '{context.id}'. Give each row an 'id' of its own.")
        seen.add(context.id)
        counts.contexts += 1
        yield dataclasses.replace(context, boxes=context.boxes[:max_boxes])
    if boxes_by_image is not None and counts.contexts and not found:
        names = f"it names '{next(iter(boxes_by_image), '')}', the captions '{context.image}'"
        why = names if boxes_by_image and not matched else counts.summary()
        raise ValueError(
            f"No image of {captions} has a box in {boxes}: {why}. Both files name images by the same file names; to ask "
            "by captions alone, leave the boxes out."
        )
    lost = sum(number for reason, number in counts.dropped.items() if reason not in NOT_LOST)
    if lost > counts.boxes:
        logger.warning(
            "%s of %s boxes are unusable. Rows without 'width' and 'height' give corners as fractions 0..1, rows with "
            "them in pixels; COCO files give [x, y, width, height] in pixels.",
            f"{lost:,}",
            f"{lost + counts.boxes:,}",
        )


def _coco_contexts(path: Path, counts: ContextCounts) -> Iterator[Context]:
    images, _, annotations = read_coco(path)
    for image_id in annotations.keys() - images.keys():
        raise stray_annotation(path, "caption", image_id, images)
    stems = Counter(stem_of(name) for name in {name for name, _, _ in images.values()})
    for image_id, (name, _, _) in images.items():
        found = annotations.get(image_id, ())
        if any(isinstance(item, tuple) for item in found):
            raise ValueError(
                f"{path}: image '{name}' has boxes where captions are expected. Give instances by --boxes."
            )
        captions = _clean_captions(found, f"{path}, image '{name}'", counts)
        yield Context(stem_of(name) if stems[stem_of(name)] == 1 else name, name, captions)  # 1.jpg and 1.png are two


def _row_contexts(path: Path, counts: ContextCounts) -> Iterator[Context]:
    rows = JsonRows(path)
    for index, row in enumerate(rows):
        yield context_from_row(row, counts, rows.where(index))
