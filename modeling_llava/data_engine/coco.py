"""COCO's files, read item by item, and the image of a row."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ..data.json_rows import json_arrays, map_json


LONGEST_ROW = 1 << 20
"""In bytes. A COCO file is one line of hundreds of megabytes."""


def is_coco(path: Path) -> bool:
    """Whether a JSON file is an object of arrays, not rows. Rows: by the file's name, or its first line is a complete object
    with an `image` or with another line after it."""
    data, start = map_json(path)
    if path.suffix.lower() in {".jsonl", ".ndjson"} or data[start : start + 1] != b"{":
        return False
    end = data.find(b"\n", start)
    end = len(data) if end < 0 else end
    if end - start > LONGEST_ROW:
        return True
    try:
        row = json.loads(data[start:end])
    except (ValueError, RecursionError):
        return True
    return "image" not in row and not data[end : end + LONGEST_ROW].strip()


def items_of(path: Path, *names: str) -> Iterator[tuple[str, Any]]:
    """`(name, item)` of each item of a COCO file's arrays, one array after the other; one item at a time is in memory."""
    arrays = json_arrays(path, names)
    return ((name, item) for name in names if name in arrays for item in arrays[name])


def one_line(text: str) -> str:
    """A caption or a category on one line."""
    return writable(" ".join(text.split()))


def writable(text: str) -> str:
    """A text with a `?` for each lone surrogate, which JSON can escape and UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode()


def stem_of(image: str) -> str:
    """An image's path without its suffix: the id of a sample that has none."""
    return str(PurePosixPath(image).with_suffix(""))


def image_and_id(row: Any, where: str, expected: str) -> tuple[str, str]:
    """Image and id of a row. ValueError if it has no image."""
    if not isinstance(row, dict) or not isinstance(row.get("image"), str) or not row["image"].strip():
        raise ValueError(f"{where} has no 'image'. Expected {expected}.")
    image, name = writable(row["image"]), row.get("id")
    return image, stem_of(image) if name is None else writable(str(name))


def corners_of(values: Any) -> list[float]:
    """Four numbers. `null`, as which some writers store NaN, is NaN; a box without numbers is empty."""
    if values in (None, []):
        return [0.0] * 4
    numbers = [math.nan if value is None else float(value) for value in values]
    if len(numbers) != 4:
        raise ValueError(f"'bbox' has {len(numbers)} numbers, not 4")
    return numbers


def is_crowd(item: dict[str, Any]) -> bool:
    """Whether a box is around a crowd: COCO's `iscrowd`, 0 or 1, also as text."""
    return bool(int(item.get("iscrowd") or 0))


def add_by_id(found: dict[Any, Any], item: dict[str, Any], value: Any) -> None:
    """`found[item["id"]] = value`; a ValueError if another item has that id, as in files that were joined."""
    if found.setdefault(item["id"], value) != value:
        raise ValueError(f"its id is also that of {found[item['id']]!r}")


@contextmanager
def coco_item(path: Path, key: str, item: Any) -> Iterator[None]:
    """Raises errors about an item of a COCO file with the file and the item."""
    try:
        if not isinstance(item, dict):
            raise TypeError("it is not an object")
        yield
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: an item of '{key}' is not in COCO's form ({what}): {item}") from None


def coco_name(item: dict[str, Any], key: str) -> str:
    """`item[key]`, if it is a name."""
    if not isinstance(item[key], str) or not item[key].strip():
        raise ValueError(f"'{key}' is not a name")
    return writable(item[key])


def read_coco(path: Path) -> tuple[dict[Any, tuple[str, Any, Any]], dict[Any, str], dict[Any, list]]:
    """`images` by id as `(file name, width, height)`, `categories` by id, and by image id what a context needs of the
    annotations: the caption, or the category and the box, or `()` without either."""
    images: dict[Any, tuple[str, Any, Any]] = {}
    categories: dict[Any, str] = {}
    annotations: dict[Any, list] = {}
    for key, item in items_of(path, "images", "categories", "annotations"):
        with coco_item(path, key, item):
            if key == "images":
                add_by_id(images, item, (coco_name(item, "file_name"), item.get("width"), item.get("height")))
            elif key == "categories":
                add_by_id(categories, item, coco_name(item, "name"))
            else:
                kept = item.get("caption", ())
                if "caption" not in item and "bbox" in item:
                    kept = (item["category_id"], *corners_of(item["bbox"]), is_crowd(item))
                annotations.setdefault(item["image_id"], []).append(kept)
    if not images:
        raise ValueError(f"{path} has no 'images'. Expected COCO captions or instances, or one JSON object per line.")
    return images, categories, annotations


def stray_annotation(path: Path, what: str, image_id: Any, images: dict[Any, Any]) -> ValueError:
    """The error for an annotation without its image; ids are shown as they are written, for 1 is not "1"."""
    return ValueError(
        f"{path}: a {what} belongs to image {image_id!r}, which is not among its {len(images):,} 'images' "
        f"({next(iter(images))!r}, …). Was the list of images cut? Cut the annotations by the same ids."
    )
