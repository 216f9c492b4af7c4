"""Makes the tiny world: images on disk with captions and boxes in COCO's form."""

import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from ..data_engine.run import write_json
from .drawing import SCENE_SIZE, draw_image
from .scenes import CATEGORIES, Scene, box_of, draw_scene, write_captions


def draw_scenes(number: int, seed: int, split: str, held_out: bool = False, most_things: int = 3) -> list[Scene]:
    """Random scenes; the same for the same seed and name of the split."""
    rng = random.Random(f"{seed}:{split}")
    return [draw_scene(rng, held_out, most_things) for _ in range(number)]


def write_split(folder: Path, scenes: list[Scene], workers: int = 1, size: int = SCENE_SIZE) -> None:
    """Writes `images/*.jpg`, `captions.json` and `instances.json` (COCO's form) of some scenes; the JSON files last."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    jobs = [(scene, images / f"{index:06d}.jpg", size) for index, scene in enumerate(scenes)]
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_save_image, jobs, chunksize=64))
    entries = [{"id": i, "file_name": path.name, "width": size, "height": size} for i, (_, path, _) in enumerate(jobs)]
    captions = [
        {"id": 3 * i + j, "image_id": i, "caption": caption}
        for i, scene in enumerate(scenes)
        for j, caption in enumerate(write_captions(scene))
    ]
    boxes = []
    for i, thing in ((i, thing) for i, scene in enumerate(scenes) for thing in scene.things):
        box, category = box_of(thing, size, size), CATEGORIES.index(thing.category) + 1
        shape = {"bbox": box, "area": round(box[2] * box[3], 2), "iscrowd": 0}
        boxes.append({"id": len(boxes), "image_id": i, "category_id": category, **shape})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CATEGORIES)]
    write_json(folder / "captions.json", {"images": entries, "annotations": captions})
    write_json(folder / "instances.json", {"images": entries, "annotations": boxes, "categories": categories})


def _save_image(job: tuple[Scene, Path, int]) -> None:
    scene, path, size = job
    draw_image(scene, size).save(path, quality=92)


def scene_texts(seed: int, name: str, most_things: int = 3) -> Iterator[Scene]:
    """Endless random scenes that are described in words and never drawn: what the language model reads."""
    rng = random.Random(f"{seed}:{name}")
    while True:
        yield draw_scene(rng, most_things=most_things)
