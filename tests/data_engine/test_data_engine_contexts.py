import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_llava.data_engine.contexts import Box, ContextCounts, clean_box, read_contexts
from modeling_llava.data_engine.samples import find_image


SHARED = Path(__file__).parents[3] / "shared"
BENCH = SHARED / "llava_bench_coco" / "caps_boxes_coco2014_val_80.jsonl"


def write(path, value):
    path.write_text("\n".join(map(json.dumps, value)) if path.suffix == ".jsonl" else json.dumps(value))
    return path


def coco(tmp_path, boxes, captions=((1, "a cat"), (1, "two  cats\n on a mat"), (2, "a dog")), **image):
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 200, "height": 100, **image} for i in (1, 2)]
    annotations = [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(captions)]
    instances = [{"id": n, "image_id": 1, "category_id": 7, **box} for n, box in enumerate(boxes)]
    texts = {"info": {"year": 2017}, "images": images, "annotations": annotations}
    boxes = {"images": images, "annotations": instances, "categories": [{"id": 7, "name": "cat"}]}
    return write(tmp_path / "captions.json", texts), write(tmp_path / "instances.json", boxes)


def test_coco_captions_and_instances_become_the_two_symbolic_representations(tmp_path):
    boxes = [{"bbox": [20, 10, 40, 30]}, {"bbox": [0, 0, 200, 50]}, {"bbox": [100, 50, 66.6667, 33.3333]}]
    counts = ContextCounts()
    one, two = read_contexts(*coco(tmp_path, boxes), counts=counts)
    assert (one.id, one.image) == ("1", "1.jpg")
    assert one.caption_text == "a cat\ntwo cats on a mat"
    # Corners by hand: x / 200 and y / 100; areas 0.5, 0.111 and 0.06.
    assert one.box_text == "cat: [0.0, 0.0, 1.0, 0.5]\ncat: [0.5, 0.5, 0.833, 0.833]\ncat: [0.1, 0.1, 0.3, 0.4]"
    assert (two.caption_text, two.box_text) == ("a dog", "")
    assert (counts.contexts, counts.boxes, counts.clipped, dict(counts.dropped)) == (2, 3, 0, {})


@pytest.mark.parametrize(
    "box, reason",
    [
        ({"bbox": [10, 10, 20, 20], "iscrowd": "1"}, "crowd"),
        ({"bbox": [10, 10, 0, 20]}, "empty"),
        ({"bbox": [10, 10, -5, 20]}, "inverted"),
        ({"bbox": [10, 10, 5, -20]}, "inverted"),
        ({"bbox": [10, 10, float("inf"), 20]}, "not_finite"),
        ({"bbox": [300, 10, 5, 20]}, "outside"),
        ({"bbox": [-30, -30, 30, 20]}, "outside"),
        ({"bbox": [10, 10, 0.05, 20]}, "tiny"),
        ({"bbox": None}, "empty"),
        ({"bbox": [None, 10, 5, 20]}, "not_finite"),
        ({"bbox": [], "iscrowd": 1}, "crowd"),
    ],
)
def test_boxes_that_are_not_of_objects_are_left_out_and_counted(tmp_path, box, reason):
    counts = ContextCounts()
    kept = {"bbox": [20, 10, 40, 30], "iscrowd": "0"}
    context = next(read_contexts(*coco(tmp_path, [box, kept]), counts=counts))
    assert context.box_text == "cat: [0.1, 0.1, 0.3, 0.4]"
    assert dict(counts.dropped) == {reason: 1} and counts.boxes == 1
    assert "left out" in counts.summary()


def test_boxes_over_the_edge_are_cut_there_and_counted(tmp_path):
    counts = ContextCounts()
    boxes = [{"bbox": [-20, 10, 60, 30]}, {"bbox": [150, 50, 100, 100]}, {"bbox": [190, 90, 10.01, 10.01]}]
    context = next(read_contexts(*coco(tmp_path, boxes), counts=counts))
    assert context.box_text.splitlines() == [
        "cat: [0.75, 0.5, 1.0, 1.0]",
        "cat: [0.0, 0.1, 0.2, 0.4]",
        "cat: [0.95, 0.9, 1.0, 1.0]",
    ]
    assert counts.clipped == 2  # a hundredth of a pixel does not show


def test_the_largest_boxes_are_kept_and_boxes_of_one_size_keep_the_order_of_the_file(tmp_path):
    # 0.3 - 0.1 is a little less than 0.2: the last bits of an area say nothing of its size.
    corners = [
        [300, 100, 364, 148],
        [0, 0, 64, 48],
        [10, 20, 58, 84],
        [333, 17, 397, 65],
        [0, 0, 70, 70],
        [1, 1, 2, 2],
    ]
    boxes = [{"category": name, "bbox": box} for name, box in zip("dbcaxy", corners)]
    row = {"image": "a.jpg", "caption": "x", "width": 640, "height": 480, "boxes": boxes}
    (context,) = read_contexts(write(tmp_path / "c.jsonl", [row]), max_boxes=5)
    assert [box.category for box in context.boxes] == ["x", "d", "b", "c", "a"]


ONE_BOX = {"annotations": [{"image_id": 1, "category_id": "7", "bbox": [1, 1, 5, 5]}]}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": []}, "has no 'images'"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}], **ONE_BOX}, "image 'a.jpg' has no width and height"),
        (ONE_BOX | {"categories": [{"id": 8, "name": "cat"}]}, "image 'a.jpg' has category '7'.*8"),
        ({"images": [{"id": 1, "file_name": 3}]}, "'file_name' is not a name.*'file_name': 3"),
        ({"annotations": [{"image_id": 1, "caption": "x"}]}, "without a box"),
        ({"categories": [{"id": 7, "name": None}]}, "'name' is not a name"),
        ({"categories": [{"id": 7, "name": name} for name in ("cat", "dog")]}, "its id is also that of 'cat'"),
        ({"annotations": [[1]]}, "'annotations' is not in COCO's form .it is not an object"),
        ({"annotations": None}, "'annotations' is not a list"),
        ({"annotations": [{"image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4, 5]}]}, "'bbox' has 5 numbers, not 4"),
        ({"annotations": [{"image_id": "1", "bbox": None}]}, "'category_id' is missing"),
        ({"annotations": [{"image_id": "1"}]}, "a box belongs to image '1', which is not among its 1 'images' .1, …"),
    ],
)
def test_coco_items_of_another_form_are_named(tmp_path, change, message):
    instances = {"images": [{"id": 1, "file_name": "a.jpg", "width": 9, "height": 9}], "annotations": []}
    instances |= {"categories": [{"id": 7, "name": "cat"}], **change}
    captions = write(tmp_path / "c.jsonl", [{"image": "a.jpg", "captions": ["x"]}])
    with pytest.raises(ValueError, match=f"i.json.*{message}"):
        list(read_contexts(captions, write(tmp_path / "i.json", instances)))


def test_the_same_data_in_every_form_gives_the_same_contexts(tmp_path):
    boxes = [{"bbox": [0, 0, 200, 50]}, {"bbox": [20, 10, 40, 30]}]
    captions, instances = coco(tmp_path, boxes)
    expected = list(read_contexts(captions, instances))
    fractions = [{"category": "cat", "bbox": [0, 0, 1, 0.5]}, {"category": "cat", "bbox": [0.1, 0.1, 0.3, 0.4]}]
    pixels = [{"category": "cat", "bbox": [20, 10, 60, 40]}, {"category": "cat", "bbox": [0, 0, 200, 50]}]
    texts = ["a cat", "two cats on a mat"]
    for first in (
        {"id": "1", "image": "1.jpg", "captions": texts, "instances": fractions},
        {"image": "1.jpg", "captions": texts, "boxes": pixels, "width": 200, "height": 100},
    ):
        rows = [first, {"image": "2.jpg", "caption": "a dog"}]
        assert list(read_contexts(write(tmp_path / "rows.jsonl", rows))) == expected
        assert list(read_contexts(write(tmp_path / "rows.json", rows))) == expected
        (tmp_path / "rows.jsonl").rename(tmp_path / "lines.json")
        assert list(read_contexts(tmp_path / "lines.json")) == expected
        # Captions from one file, boxes from another, matched by the image.
        assert list(read_contexts(captions, write(tmp_path / "boxes.jsonl", [first]))) == expected
        assert list(read_contexts(write(tmp_path / "bare.jsonl", rows), instances)) == expected
    stored = write(tmp_path / "again.jsonl", [context.to_dict() for context in expected])
    assert list(read_contexts(stored)) == expected


def test_images_without_captions_and_empty_captions_are_left_out_and_counted(tmp_path):
    rows = [{"image": f"d/{i}.jpg", "id": None, "captions": texts} for i, texts in enumerate(([" ", "x"], None, [""]))]
    counts = ContextCounts()
    (context,) = read_contexts(write(tmp_path / "c.jsonl", rows), counts=counts)
    assert (context.id, context.captions) == ("d/0", ("x",))
    assert counts.dropped == {"empty_caption": 2, "no_captions": 2}


BOX = {"category": "cat", "bbox": [0.1, 0.1, 0.5, 0.5]}


@pytest.mark.parametrize(
    "more, message",
    [
        ({"captions": {"a": 1}}, "are not captions"),
        ({"captions": [3]}, "are not captions"),
        ({"boxes": BOX}, "not a list"),
        ({"boxes": [{"category": "c"}]}, "is not {'category': name"),
        ({"boxes": [{**BOX, "category": " "}]}, "is not {'category': name"),
        ({"boxes": [{**BOX, "bbox": [1, 2, 3]}]}, "is not {'category': name"),
        ({"width": -200, "height": 100}, "width -200 and height 100 are not the size"),
        ({"width": "wide", "height": 100}, "width 'wide'"),
    ],
)
def test_rows_with_a_broken_field_are_named_by_file_line_and_sample(tmp_path, more, message):
    rows = [{"image": "b.jpg", "captions": ["y"]}, {"image": "a.jpg", "captions": ["x"], "boxes": [BOX], **more}]
    with pytest.raises(ValueError, match=f"line 2, sample 'a': .*{message}"):
        list(read_contexts(write(tmp_path / "c.jsonl", rows)))
    with pytest.raises(ValueError, match="two samples have the id 'b'"):
        list(read_contexts(write(tmp_path / "c.jsonl", [rows[0], {**rows[0], "image": "b.png"}])))
    with pytest.raises(ValueError, match="line 1 has no 'image'"):
        list(read_contexts(write(tmp_path / "c.jsonl", [{"captions": ["x"]}])))


def test_a_box_in_pixels_of_an_image_without_size_is_not_taken_for_one_that_fills_the_image(tmp_path):
    # Clipped to 0..1 it would be the whole image.
    boxes = [{"category": "cat", "bbox": [0, 0, 50, 50]}, {"category": "dog", "bbox": [-0.1, -0.0, 1.2, 0.5]}]
    counts = ContextCounts()
    rows = [{"image": "a.jpg", "captions": ["x"], "boxes": boxes, "width": 100}]
    (context,) = read_contexts(write(tmp_path / "c.jsonl", rows), counts=counts)
    assert context.box_text == "dog: [0.0, 0.0, 1.0, 0.5]"
    assert (counts.boxes, counts.clipped, counts.dropped) == (1, 1, {"no_size": 1})


def test_boxes_in_several_rows_of_one_image_are_put_together(tmp_path):
    captions = write(tmp_path / "c.jsonl", [{"image": "a.jpg", "captions": ["x"]}])
    rows = [{"image": "a.jpg", "boxes": [box]} for box in (BOX, {"category": "dog", "bbox": [0, 0, 1, 1]})]
    (context,) = read_contexts(captions, write(tmp_path / "b.jsonl", rows))
    assert context.box_text == "dog: [0.0, 0.0, 1.0, 1.0]\ncat: [0.1, 0.1, 0.5, 0.5]"


def test_boxes_of_other_images_and_files_in_the_wrong_place_are_named(tmp_path):
    captions = write(tmp_path / "c.jsonl", [{"image": "COCO_train2014_a.jpg", "captions": ["x"]}])
    with pytest.raises(ValueError, match="b.jsonl.*'a.jpg'.*'COCO_train2014_a.jpg'"):
        list(read_contexts(captions, write(tmp_path / "b.jsonl", [{"image": "a.jpg", "boxes": [BOX]}])))
    _, instances = coco(tmp_path, [{"bbox": [10, 10, 20, 20]}])
    with pytest.raises(ValueError, match="has boxes where captions are expected"):
        list(read_contexts(instances))
    with pytest.raises(ValueError, match="a caption belongs to image 9"):
        list(read_contexts(*coco(tmp_path, [], captions=((9, "x"),))))


def test_pixels_given_as_fractions_are_warned_about(tmp_path, caplog):
    rows = [{"image": "a.jpg", "caption": "x", "boxes": [{"category": "c", "bbox": [30, 40, 300, 200]}]}]
    list(read_contexts(write(tmp_path / "c.jsonl", rows)))
    assert "'width' and 'height'" in caplog.text


@given(st.lists(st.floats(-0.5, 1.5, allow_nan=False), min_size=4, max_size=4))
def test_a_box_that_is_kept_lies_inside_and_has_area_in_three_decimals(corners):
    box = clean_box("c", corners, ContextCounts())
    if box is not None:
        x1, y1, x2, y2 = json.loads(str(box).removeprefix("c: "))
        assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 and box.area > 0


@pytest.mark.skipif(not BENCH.exists(), reason="the real COCO contexts are not at ../shared")
def test_llava_bench_contexts_are_read_whole():
    counts = ContextCounts()
    contexts = list(read_contexts(BENCH, counts=counts))
    raw = [json.loads(line) for line in BENCH.read_text().splitlines()]
    assert counts.contexts == len(raw) == 80
    assert counts.boxes == sum(len(row["instances"]) for row in raw) and not counts.dropped and not counts.clipped
    for context, row in zip(contexts, raw):
        assert context.caption_text == "\n".join(" ".join(caption.split()) for caption in row["captions"])
        boxes = [f"{item['category']}: {item['bbox']}" for item in row["instances"]]
        assert sorted(context.box_text.splitlines()) == sorted(boxes)


ROW = '{"image": "a.jpg", "captions": ["x"], "boxes": [{"category": "c", "bbox": [0, 0, %s, 1]}]}\n'


@pytest.mark.parametrize(
    "text",
    [
        *['{"images": [{"id": 1}, {"id"', "[1, 2", "", "hello", '{"a" 1}', "[1 2]", "[" * 100_000, "\xff\xd8\xff"],
        '[{"image": "a.jpg", "captions": ["x"]}][{"image": "b.jpg", "captions": ["y"]}]',
        *[ROW % ("9" * digits) * 2 for digits in (400, 5000)],  # numbers beyond all bounds
    ],
)
@pytest.mark.parametrize("name", ["cut.json", "cut.jsonl"])
def test_broken_json_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text, "latin-1")
    with pytest.raises(ValueError, match=name):
        list(read_contexts(tmp_path / name))


def test_coco_is_read_within_memory_of_what_is_kept(tmp_path):
    """Segmentations make up most of COCO's instances; they are never held together."""
    polygon = {"segmentation": [[float(i) for i in range(1000)]], "bbox": [1, 1, 50, 50]}
    captions, instances = coco(tmp_path, [polygon] * 300)
    size = instances.stat().st_size
    tracemalloc.start()
    boxes = next(read_contexts(captions, instances)).boxes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(boxes) == 300 and isinstance(boxes[0], Box)
    assert size > 2e6 and peak < 0.25 * size


@pytest.mark.parametrize(
    "boxes, words",
    [
        ([], "0 boxes"),
        ([{"segmentation": [[1, 1, 2, 1, 2, 2]]}] * 3, "3 × annotation without a bbox"),
        ([{"bbox": [0.6, 0.7, 0.9, 1.0]}], "1 × box in fractions 0..1"),
    ],
)
def test_a_file_of_boxes_that_gives_none_stops_and_says_why(tmp_path, boxes, words):
    with pytest.raises(ValueError, match=f"has a box in .*instances.json: .*{words}"):
        list(read_contexts(*coco(tmp_path, boxes)))


def test_corners_in_place_of_width_and_height_are_told_by_the_images_edge(tmp_path):
    boxes = [{"bbox": [100, 40, 150, 90]}, {"bbox": [20, 30, 190, 95]}, {"bbox": [10, 10, 40, 30]}]  # of 200 × 100
    with pytest.raises(ValueError, match="2 of 3 boxes .*x, y, width, height"):
        list(read_contexts(*coco(tmp_path, boxes)))
    assert len(list(read_contexts(*coco(tmp_path, [boxes[0], boxes[2]])))) == 2  # one of two is cut at the edge


def test_names_and_captions_with_a_lone_surrogate_can_be_written_and_asked_about(tmp_path):
    """JSON can escape what UTF-8 cannot hold; one such name in 100,000 would stop a run without naming it."""
    (tmp_path / "rows.json").write_text(
        r'{"id": "\ud800", "image": "a\ud800.jpg", "captions": ["\ud83d"], '
        r'"boxes": [{"category": "c\udc00", "bbox": [0,0,1,1]}]}'
    )
    (tmp_path / "coco.json").write_text(
        r'{"images": [{"id": 1, "file_name": "a\ud800.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]}'
    )
    rows = [*read_contexts(tmp_path / "rows.json"), *read_contexts(tmp_path / "coco.json")]
    assert [(row.id, row.image) for row in rows] == [("?", "a?.jpg"), ("a?", "a?.jpg")]
    assert rows[0].captions == ("?",) and rows[0].box_text == "c?: [0.0, 0.0, 1.0, 1.0]"
    json.dumps([row.to_dict() for row in rows], ensure_ascii=False).encode()


def test_images_of_coco_that_differ_in_their_ending_alone_are_two(tmp_path):
    images = [{"id": i, "file_name": name} for i, name in enumerate(("a.jpg", "a.png", "b.jpg"))]
    captions = [{"id": i, "image_id": i, "caption": "x"} for i in range(3)]
    contexts = read_contexts(write(tmp_path / "c.json", {"images": images, "annotations": captions}))
    assert [context.id for context in contexts] == ["a.jpg", "a.png", "b"]


def test_image_names_cannot_leave_the_image_folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "images" / "..\\secret.png").write_bytes(b"x")  # a way out on Windows
    for name in ("../secret.png", "..\\secret.png", "a/../../secret.png", str(tmp_path / "secret.png"), "a\0b", ""):
        assert find_image(tmp_path / "images", name) is None
