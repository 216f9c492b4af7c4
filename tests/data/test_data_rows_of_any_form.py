"""Rows of any form, container by key by role by image by None, train as the plain row does, or are refused by name."""

import base64
import io
import itertools
import json
import random

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from PIL import Image

from modeling_llava.data import BadSampleError, LlavaDataCollator, load_conversations


QUESTION, ANSWER = '"What", null?', "[42]"  # texts that look like JSON
PIXELS = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))
PNG = io.BytesIO()
PIXELS.save(PNG, "PNG")
URL = f"data:image/png;base64,{base64.b64encode(PNG.getvalue()).decode()}"

IMAGES = {"path": "0.png", "data URL": URL, "bytes": PNG.getvalue(), "dict": {"bytes": PNG.getvalue(), "path": None}}
KEYS = ("image", "images", "image_path", "image_file", "img", "file_name", "picture", "photo")
PLACES = (*KEYS, "item image", "item path", "item image_url", "turn pic")
TURNS = tuple(itertools.product(("conversations", "messages"), (("from", "value"), ("role", "content"))))
ROLES = (("human", "gpt"), ("User", "Assistant"), ("user", "model"), ("user", "bot"))
CONTENTS = ("text", "items", "items with None", "JSON")


def row_of(turns, roles, content, place, image):
    key, names = turns
    in_item = place.startswith("item ")
    if in_item or content != "text":
        item = {"type": "image"}
        if in_item:
            name = place.removeprefix("item ")
            item = {"type": name, name: {"url": URL}} if name == "image_url" else {"type": "image", name: image}
        items = [item, {"type": "text", "text": QUESTION}]
        answer = [{"type": "text", "text": ANSWER}]
        if content == "items with None":
            filled = dict.fromkeys(("type", "text", "image", "path", "url", "image_url"))
            items, answer = ([{**filled, **part} for part in parts] for parts in (items, answer))
    else:
        items, answer = f"<image>\n{QUESTION}", ANSWER
    messages = [dict(zip(names, turn)) for turn in zip(roles, (items, answer))]
    row = {"id": "a", "other": None, key: json.dumps(messages) if content == "JSON" and not in_item else messages}
    if place == "turn pic":
        messages[0]["pic"] = "0.png"
        row[key] = messages
    elif not in_item:
        row[place] = [image] if place == "images" else image
    return row


def arrays(value):
    """Lists of dicts as NumPy arrays of objects, as pandas holds them."""
    if isinstance(value, dict):
        return {key: arrays(item) for key, item in value.items()}
    if isinstance(value, list):
        array = np.empty(len(value), dtype=object)
        array[:] = [arrays(item) for item in value]
        return array
    return value


def written(rows, folder, container):
    if container == "list":
        return rows
    if container == "numpy":
        return [arrays(row) for row in rows]
    if container == "map":
        numbers = Dataset.from_dict({"row": list(range(len(rows)))})
        return DatasetDict(train=numbers.map(lambda item: rows[item["row"]], remove_columns="row"))
    if container == "generator":
        return Dataset.from_generator(lambda: iter(rows))
    if container in ("json", "jsonl"):
        text = json.dumps(rows) if container == "json" else "\n".join(map(json.dumps, rows))
        (folder / f"rows.{container}").write_text(text)
        return folder / "rows.*"
    dataset = Dataset.from_list(rows)
    if container == "pandas":
        return dataset.to_pandas().to_dict("records")
    if container == "disk":
        dataset.save_to_disk(folder / "saved")
        return load_from_disk(folder / "saved")
    if "parquet" in container:
        dataset.to_parquet(folder / "rows.parquet")
        return folder / "rows.parquet"
    return dataset.to_iterable_dataset() if container == "stream" else dataset


NO_BYTES = ("json", "jsonl", "map", "generator")  # neither JSON nor the Json feature holds any
CONTAINERS = ("list", "numpy", "json", "jsonl", "map", "generator", "dataset", "pandas", "disk", "parquet", "stream", "parquet stream")  # fmt: skip
CASES = list(itertools.product(TURNS, ROLES, CONTENTS, PLACES, IMAGES))


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_row_of_any_form_trains_as_the_plain_one_or_is_refused_by_name(container, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    PIXELS.save(tmp_path / "0.png")
    collator = LlavaDataCollator(processor, max_length=None, image_folder=tmp_path)
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]
    plain = collator(list(load_conversations([{"id": "a", "image": "0.png", "conversations": turns}])))
    cases = [case for case in CASES if container not in NO_BYTES or case[-1] in ("path", "data URL")]
    trained = 0
    for number, (turns, roles, content, place, image) in enumerate(random.Random(container).sample(cases, 30)):
        row = row_of(turns, roles, content, place, IMAGES[image])
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            source = written([row], folder, container)
            batch = collator(list(load_conversations(source, streaming="stream" in container)))
        except BadSampleError as error:
            assert place == "turn pic" and "'pic'" in str(error), (row, error)
            continue
        assert place != "turn pic"
        assert batch.keys() == plain.keys(), row
        assert all(torch.equal(batch[key], plain[key]) for key in plain), row
        trained += 1
    assert trained > 20
