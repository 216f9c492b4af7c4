import copy
import json

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from modeling_llava.data import check as check_module
from modeling_llava.data.check import check_data
from modeling_llava.data.collator import LlavaDataCollator
from modeling_llava.data.packing import best_fit_packs
from modeling_llava.data.sources import load_conversations
from modeling_llava.processing_llava import load_chat_template


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(check_module.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        values = np.random.default_rng(number).integers(0, 256, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(values).save(images / f"{number}.jpg")
    data = (images / "3.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(data[: len(data) // 2])
    # Damage that the header does not show: the end marker is there, the data before it is not.
    Image.open(images / "0.jpg").save(images / "hole.png")
    data = bytearray((images / "hole.png").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (images / "hole.png").write_bytes(data)
    return tmp_path


def row(sample_id, *values, image="0.jpg", **other):
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": sample_id, "conversations": turns, **({"image": image} if image else {}), **other}


def good_rows(number=6):
    return [row(f"g{i}", f"<image>\nQ {i}?", f"Answer {i}. " * (i + 1), image=f"{i % 3}.jpg") for i in range(number)]


def write(folder, rows, name="data.json"):
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def check(folder, rows, processor=None, **options):
    path = write(folder, rows) if isinstance(rows, list) else rows
    return check_data(path, processor, folder / "images", show_progress=False, **options)


def test_good_data_has_no_problem_and_right_numbers(folder, processor):
    report = check(folder, good_rows(), processor, batch_size=4, max_length=300)
    dataset = load_conversations(folder / "data.json")
    collator = LlavaDataCollator(processor, image_folder=folder / "images")
    batch = collator([dataset[i] for i in range(6)])
    lengths = batch["attention_mask"].sum(1).tolist()
    assert report.ok and report.problems == report.notices == {} and (report.samples, report.usable) == (6, 6)
    assert (report.images, report.text_only) == (6, 0) and report.types == {"without type": 6}
    assert report.tokens == sum(lengths) and report.image_tokens == 6 * 9
    assert report.supervised_tokens == (batch["labels"] != -100).sum()
    assert report.length_longest == max(lengths) and report.length_median == np.median(lengths)
    assert report.length_mean == np.mean(lengths)
    plan = best_fit_packs(lengths, 300)
    assert report.steps == 2 and report.packed_steps == -(-len(plan) // 4)
    assert report.pack_utilization == sum(lengths) / (300 * len(plan))


BAD = {
    "empty answer": row("e", "<image>\nQ?", " "),
    "roles out of order": row("r", "<image>\nQ?", "A.", "Again?"),
    "image markers do not match images": row("m", "Q?", "A."),
    "image or video that is not read": row("v", "<video>\nQ?", "A.", image=None, video="0.mp4"),
    "missing image": row("x", "<image>\nQ?", "A.", image="9.jpg"),
    "corrupt image": row("c", "<image>\nQ?", "A.", image="cut.jpg"),
    "image outside the image folder": row("o", "<image>\nQ?", "A.", image="../data.json"),
    "unreadable row": {"id": "u", "text": "?"},
}


def test_every_kind_of_problem_is_counted_and_named(folder, processor):
    report = check(folder, [*good_rows(2), *BAD.values()], processor)
    assert not report.ok and report.problems == dict.fromkeys(BAD, 1)
    assert (report.samples, report.usable, report.steps) == (10, 2, 1)
    for reason, bad in BAD.items():
        (message,) = report.examples[reason]
        assert message.startswith(f"sample {bad['id']!r} ")

    without = check(folder, folder / "data.json")
    assert without.problems == report.problems and without.tokens == without.length_longest == 0
    both = check(folder, [row("b", "<image>\nQ?", "A. " * 100, image="9.jpg")], processor, max_length=80)
    assert both.problems == {"missing image": 1, "too long": 1} and both.usable == 0


def test_header_and_full_decode(folder, processor):
    rows = [row("h", "<image>\nQ?", "A.", image="hole.png")]
    assert check(folder, rows, processor).ok
    assert check(folder, rows, processor, decode=True).problems == {"corrupt image": 1}


def test_what_a_cut_would_cost(folder, processor):
    long = row("long", "<image>\nQ?", "One two three. " * 30)
    late = row("late", "Q?", "One two three. " * 30, "<image>", "A.")
    lost = row("lost", "<image>\nWhy? " + "And why not? " * 60, "A.")
    report = check(folder, [long, late, lost, *good_rows(1)], processor, max_length=120)
    lengths = {
        name: len(LlavaDataCollator(processor).encode(sample)["input_ids"])
        for name, sample in zip(("long", "late", "lost"), load_conversations(folder / "data.json"))
    }
    cut = report.too_long
    assert report.problems == {"too long": 3}
    assert cut["samples"] == 3 and cut["tokens"] == sum(lengths.values()) - 3 * 120
    assert cut["images_cut"] == 1 and cut["answers_lost"] == 1
    collator = LlavaDataCollator(processor, 120, "truncate_text", image_folder=folder / "images", on_bad_sample="drop")
    dataset = load_conversations(folder / "data.json")
    kept = (collator([dataset[0]])["labels"] != -100).sum()
    whole = (LlavaDataCollator(processor, image_folder=folder / "images")([dataset[0]])["labels"] != -100).sum()
    assert f"would lose {whole - kept} of {whole} supervised tokens" in report.examples["too long"][0]
    for sample in (dataset[1], dataset[2]):
        assert (collator([sample])["labels"] == -100).all()
    assert sum(collator.dropped.values()) == 2


def test_duplicates_are_notices(folder, processor):
    rows = good_rows(2)
    rows += [{**rows[0], "id": "twin"}, {**good_rows(4)[3], "id": "g1"}]
    report = check(folder, rows, processor)
    assert report.ok and report.notices == {"duplicate id": 1, "duplicate conversation": 1}
    assert report.examples["duplicate conversation"] == ["sample 'twin' has the same images and text as 'g0'."]
    assert report.examples["duplicate id"] == ["sample 'g1' has the same id as an earlier one."]


def test_stops_and_markers_that_are_text_are_notices(folder, processor):
    question = [{"type": "text", "text": "What is <image>?"}]
    v0 = copy.copy(processor)
    v0.chat_template = load_chat_template("vicuna_v0")
    rows = [
        row("hashes", "<image>\nQ?", "### Title"),
        {"id": "marker", "messages": [{"role": "user", "content": question}, {"role": "model", "content": "A tag."}]},
        *good_rows(1),
    ]
    kinds = {"text holds the template's stop": 1, "text-only sample holds <image>": 1}
    assert check(folder, rows, v0).notices == kinds
    v0.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"  # whose stop cannot be found
    assert check(folder, [row("a", "Q?", "A.", image=None)], v0).problems == {"nothing supervised": 1}
    assert check(folder, rows, processor).notices == {"text-only sample holds <image>": 1}


def test_several_sources_and_types(folder, processor):
    first, second = write(folder, good_rows(2), "a.json"), write(folder, good_rows(3)[2:], "b.jsonl")
    report = check(folder, {"detail": first, "complex": second}, processor)
    assert report.types == {"detail": 2, "complex": 1}


def test_broken_lines_and_datasets(folder, processor):
    lines = [json.dumps(good) for good in good_rows(2)]
    (folder / "a.jsonl").write_text("\n".join([lines[0], '{"id": ', lines[1]]))
    report = check(folder, folder / "a.jsonl", processor)
    assert report.problems == {"unreadable row": 1} and report.usable == 2
    assert check_data(Dataset.from_list(good_rows()), processor, folder / "images", show_progress=False).ok


class Stopped(Exception):
    pass


def stopped_check(folder, path, processor, **options):
    """A check that is stopped behind its third chunk of ten records."""
    add = check_module._Progress.add

    def limited(self, chunk):
        if len(self.found) >= 30:
            raise Stopped
        add(self, chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_module, "CHUNK", 10)
        patch.setattr(check_module._Progress, "add", limited)
        with pytest.raises(Stopped):
            check(folder, path, processor, **options)


@pytest.mark.parametrize("out", [None, "out"])
def test_a_stopped_check_resumes(folder, processor, out):
    path = write(folder, [*good_rows(45), *BAD.values()])
    out = None if out is None else folder / out
    whole = check(folder, path, processor, num_workers=2)
    stopped_check(folder, path, processor, out=out)
    (progress,) = folder.rglob("*.jsonl")
    with open(progress, "ab") as file:
        file.write(b'[["g31", null, 1, ')  # killed while it wrote
    report = check(folder, path, processor, out=out)
    assert report.resumed_at == 30 and not progress.exists()
    assert {**report.to_dict(), "resumed_at": 0, "files": []} == whole.to_dict()
    stopped_check(folder, path, processor, out=out)
    assert check(folder, path, processor, out=out, max_length=50).resumed_at == 0  # another check
    stopped_check(folder, path, processor, out=out)
    write(folder, good_rows(46))
    assert check(folder, path, processor, out=out).resumed_at == 0


def test_files_that_are_written(folder, processor):
    out = folder / "new" / "out"
    report = check(folder, [*good_rows(2), *BAD.values(), row("g0", "Hi.", "Ho.", image=None)], processor, out=out)
    assert report.files == [str(out / name) for name in ("report.json", "problems.jsonl", "lengths.png")]
    assert sorted(path.name for path in out.iterdir()) == ["lengths.png", "problems.jsonl", "report.json"]
    assert json.loads((out / "report.json").read_text()) == report.to_dict()
    findings = [json.loads(line) for line in (out / "problems.jsonl").read_text().splitlines()]
    assert [f["id"] for f in findings if f["kind"] == "problem"] == [bad["id"] for bad in BAD.values()]
    assert [(f["id"], f["reason"]) for f in findings if f["kind"] == "notice"] == [("g0", "duplicate id")]
    assert Image.open(out / "lengths.png").size[0] > 600


def test_wrong_arguments(folder, processor):
    with pytest.raises(FileNotFoundError, match="image folder"):
        check_data(write(folder, good_rows()), processor, folder / "no")
    with pytest.raises(ValueError, match="holds no sample"):
        check(folder, write(folder, []), processor)
    with pytest.raises(ValueError, match="batch_size is 0"):
        check(folder, good_rows(), processor, batch_size=0)
    with pytest.raises(ValueError, match="max_length is -1"):
        check(folder, good_rows(), processor, max_length=-1)
