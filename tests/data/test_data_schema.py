import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_llava.data.schema import (
    BAD_MARKERS,
    BAD_ROLES,
    BAD_ROW,
    EMPTY_ANSWER,
    UNREAD_IMAGE,
    BadSampleError,
    DropCounter,
    from_llava_row,
    from_messages_row,
    from_row,
    summarize_drops,
)


IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def llava_row(*values, image="a.jpg", **other):
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": "s", "conversations": turns, **({"image": image} if image else {}), **other}


@pytest.mark.parametrize(
    ("value", "content"),
    [  # the table in labels.py
        ("<image>\nWhat is this?", [IMAGE, text("What is this?")]),
        ("What is this?\n<image>", [text("What is this?"), IMAGE]),
        ("<image>\n   What is this?  ", [IMAGE, text("What is this?")]),
        ("<image>", [IMAGE]),
        ("Look at <image> now, please.", [text("Look at "), IMAGE, text(" now, please.")]),
        ("Compare <image> with <image>, please.", [text("Compare "), IMAGE, text(" with "), IMAGE, text(", please.")]),
        ("<image>\n<image>\nCompare.", [IMAGE, IMAGE, text("Compare.")]),
        ("Compare.\n<image> <image>\n", [text("Compare."), IMAGE, IMAGE]),
    ],
)
def test_markers_become_items_as_the_labels_module_says(value, content):
    images = ["a.jpg", "b.jpg"][: content.count(IMAGE)]
    row = llava_row(value, "  A lamp. ", "    And\n\nthat?  ", "A <image> tag.\n", image=images)
    before = pickle.dumps(row)
    conversation = from_llava_row(row)
    contents = [message["content"] for message in conversation["messages"]]
    assert contents == [content, [text("  A lamp. ")], [text("    And\n\nthat?  ")], [text("A <image> tag.\n")]]
    assert [message["role"] for message in conversation["messages"]] == ["user", "assistant"] * 2
    assert conversation["images"] == images
    conversation["images"].append("c.jpg")
    assert pickle.dumps(row) == before


@pytest.mark.parametrize("image", [None, "", [], [None], float("nan")])
@pytest.mark.parametrize("key", ["image", "images", "image_path", "video"])
def test_null_image_is_no_image(key, image):
    row = {**llava_row("Hello", "Hi.", image=None), key: image}
    assert from_llava_row(row)["images"] == []
    row["conversations"][0]["value"] = "<image>\nHello"
    with pytest.raises(BadSampleError, match="has <image> in its text but no image") as caught:
        from_llava_row(row)
    assert caught.value.reason == BAD_MARKERS


MEDIA = {
    "path": "a.jpg",
    "URL": "https://x.org/a.png?width=3",
    "data URL": "data:image/png;base64,iVBO",
    "bytes": b"x",
    "struct": {"bytes": None, "path": "a"},
    "PIL": Image.new("RGB", (2, 2)),
    "list": ["a.jpg", "b.jpg"],
    "video": "a.mp4",
}


@pytest.mark.parametrize("medium", MEDIA)
@pytest.mark.parametrize("place", ["row", "turn"])
@pytest.mark.parametrize("question", ["What?", "<image>\nWhat?", "<video>\nWhat?"])
@pytest.mark.parametrize("form", ["LLaVA", "messages"])
def test_an_image_under_a_key_that_is_not_read_is_named(form, question, place, medium):
    row = llava_row(question, "A lamp.", image=None)
    if form == "messages":
        turns = [{"role": t["from"], "content": t["value"]} for t in row.pop("conversations")]
        row["messages"] = turns
    holder = row if place == "row" else row.get("conversations", row.get("messages"))[0]
    holder["pic"] = MEDIA[medium]
    with pytest.raises(BadSampleError, match="sample 's' .*'pic'.*'image' or 'images'") as caught:
        from_row(row)
    assert caught.value.reason == UNREAD_IMAGE


def test_a_video_next_to_an_image_is_refused_where_the_text_refers_to_it():
    row = llava_row("<image>\nWhat?", "A lamp.", video="clips/1")
    assert from_row(row)["images"] == ["a.jpg"]
    row["conversations"][0]["value"] = "<image>\n<video>\nWhat?"
    with pytest.raises(BadSampleError, match="'video'"):
        from_row(row)


def test_other_columns_of_a_text_only_row_are_not_taken_for_images():
    columns = {"url": "https://x.org/page.html", "file_name": "notes.txt", "picture": "A dog.", "n": 3}
    assert from_row({**llava_row("Hello", "Hi.", image=None), **columns})["images"] == []


def test_id_falls_back_to_the_row_number_and_type_is_kept():
    row = llava_row("<image>", "A lamp.", type="detail")
    assert from_llava_row(row)["type"] == "detail"
    assert from_llava_row(row, type="complex")["type"] == "detail"
    del row["id"], row["type"]
    assert from_llava_row(row, 17)["id"] == "17"
    assert from_llava_row(row, type="complex")["type"] == "complex" and from_llava_row(row)["type"] is None
    assert from_llava_row({**row, "id": 5})["id"] == "5"


def test_items_may_hold_their_images_where_the_row_holds_none():
    places = [{"image": b"abc"}, {"path": "a.jpg", "image": None}, {"url": "https://x.org/a.jpg"}]
    items = [{"type": "image", "text": None, **place} for place in places]
    items += [{"type": "image_url", "image_url": url} for url in ({"url": "data:b", "detail": None}, "data:b")]
    question = {**text("Compare."), "image_url": None}
    messages = [{"role": "user", "content": [*items, question]}, {"role": "assistant", "content": "Fine."}]
    own = from_messages_row({"messages": messages})
    assert own["images"] == [b"abc", "a.jpg", "https://x.org/a.jpg", "data:b", "data:b"]
    assert own["messages"][0]["content"] == [*[IMAGE] * 5, text("Compare.")]
    row = {"messages": messages, "images": list("12345"), "conversations": float("nan")}
    assert from_messages_row(row)["images"] == list("12345")
    for item, place in zip(items, (4, 0, 2, 1, 3)):
        item.update(type="image", index=place)
    assert from_messages_row(row)["images"] == list("51324") and from_messages_row({"messages": messages}) == own
    del items[1]["path"]
    with pytest.raises(BadSampleError, match="marks 5 images in its user turns but comes with 4"):
        from_messages_row({"messages": [{"role": "user", "content": items}, messages[1]]})


@pytest.mark.parametrize("image", [bytearray(b"abc"), memoryview(b"abc"), np.zeros((2, 2, 3))])
def test_one_image_of_any_type_is_one_image(image):
    assert from_llava_row(llava_row("<image>", "A.", image=None, images=image))["images"][0] is image
    with pytest.raises(BadSampleError, match="both 'image' and 'images'"):
        from_llava_row({**llava_row("<image>", "A."), "images": image})
    batch = {**llava_row("<image> <image>", "A."), "image": np.zeros((2, 2, 2, 3))}
    assert len(from_llava_row(batch)["images"]) == 2
    assert from_llava_row({**llava_row("<image>", "A."), "images": []})["images"] == ["a.jpg"]


PLAIN = from_row(llava_row("<image>\nWhat?", "A lamp."))


@pytest.mark.parametrize("image", [{"image": "a.jpg"}, {"0.jpg": "a.jpg"}, {"jpeg": "a.jpg", "png": None}])
def test_a_sample_of_a_webdataset_is_read(image):
    turns = llava_row("<image>\nWhat?", "A lamp.")["conversations"]
    own = {} if "image" in image else {"image": "name in the archive"}
    names = {"json": {"conversations": turns, "id": None, **own, **image}} if "image" in image else image
    row = {"__key__": "s", "__url__": "x.tar", "json": json.dumps({"conversations": turns, **own}), **names}
    assert from_row(row) == PLAIN


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_the_system_prompt_of_a_row_is_its_first_message(key):
    row = llava_row("<image>\nWhat?", "A lamp.")
    system = {"role": "system", "content": [text("Answer in French.")]}
    assert from_row({**row, key: "Answer in French."})["messages"] == [system, *PLAIN["messages"]]
    for none in (None, "", float("nan")):
        assert from_row({**row, key: none}) == PLAIN
    row["conversations"].insert(0, {"from": "system", "value": "Answer in French."})
    assert from_row({**row, key: "Answer in French."})["messages"][1:] == PLAIN["messages"]
    with pytest.raises(BadSampleError, match=f"a system prompt as '{key}'"):
        from_row({**row, key: "Be short."})


def test_weights_of_turns_are_kept_or_refused():
    row = llava_row("Hi?", "WRONG.", "No.", "Right.", image=None)
    for name, no in (("weight", 0), ("weight", 0.0), ("loss", False), ("train", False)):
        row["conversations"][1] = {"from": "gpt", "value": "WRONG.", name: no}
        assert [message.get("weight") for message in from_row(row)["messages"]] == [None, 0, None, None]
    row["conversations"][1] = {"from": "gpt", "value": "Fine.", "weight": 1, "loss": float("nan")}
    assert all("weight" not in message for message in from_row(row)["messages"])
    for turn, weight in ((1, 0.5), (1, "no"), (0, 1)):
        changed = [dict(turn) for turn in row["conversations"]]
        changed[turn]["weight"] = weight
        with pytest.raises(BadSampleError, match="weight"):
            from_row({"conversations": changed})


def messages_row(*contents):
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"id": "s", "messages": messages}


BAD_ROWS = [
    (llava_row("<image>\nHi", " \n"), EMPTY_ANSWER, "empty answer in turn 1"),
    (llava_row("<image>\nHi", ""), EMPTY_ANSWER, "empty answer"),
    (llava_row("<image>\nHi", "A.", "More?"), BAD_ROLES, "user, assistant, user"),
    (llava_row(), BAD_ROLES, "no turn at all"),
    (llava_row("<image> <image>", "A."), BAD_MARKERS, "marks 2 images in its user turns but comes with 1"),
    (llava_row("Hi", "A."), BAD_MARKERS, "marks 0 images in its user turns but comes with 1"),
    (llava_row("Hi", "An <image>."), BAD_MARKERS, "marks 0 images"),
    ({"id": "s", "conversations": [{"from": "tool", "value": "x"}]}, BAD_ROLES, "unknown role 'tool'"),
    ({"id": "s", "conversations": [{"from": ["human"], "value": "x"}]}, BAD_ROLES, "unknown role ['human']"),
    ({"id": "s", "messages": [{"role": {"a": 1}, "content": "x"}]}, BAD_ROLES, "unknown role {'a': 1}"),
    ({**llava_row("<image>", "A."), "image": 5}, BAD_ROW, "has the image 5: give a path"),
    ({**llava_row("<image>", "A."), "image": [[[0, 9, 9]], [[9, 9, 0]]]}, BAD_ROW, "has the image [[0, 9, 9]]: give"),
    ({**llava_row("<image> <image>", "A."), "image": ["a.jpg", None]}, BAD_MARKERS, "comes with 1"),
    ({**llava_row("<image>", "A.", image=None), "image_path": "a", "img": "b"}, BAD_ROW, "'image_path' and 'img'"),
    (llava_row("<image>\nHi \ud83d", "A."), BAD_ROW, "half of a character, in turn 0"),
    ({**llava_row("<image>", "A."), "type": "\ud83d"}, BAD_ROW, "with half of a character"),
    ({"id": "s", "conversations": [{"from": "human"}]}, BAD_ROW, "turn 0"),
    ({"id": "s", "conversations": [{"from": "human", "value": None}]}, BAD_ROW, "turn 0"),
    ({"id": "s", "conversations": "Hi"}, BAD_ROW, "'conversations' that are not a list"),
    ({"id": "s", "text": "Hi"}, BAD_ROW, "neither a LLaVA row"),
    ({**llava_row("<image>", "A."), "images": ["b.jpg"]}, BAD_ROW, "both 'image' and 'images'"),
    (messages_row(3), BAD_ROW, "neither text nor a list"),
    (messages_row([{"type": "video"}]), BAD_ROW, "neither an image nor a text"),
    (messages_row("Q", [IMAGE]), BAD_MARKERS, "images belong to the user"),
    (messages_row([IMAGE], "A."), BAD_MARKERS, "marks 1 image in its user turns but comes with 0"),
    ("text", BAD_ROW, "neither a LLaVA row"),
]


@pytest.mark.parametrize(("row", "reason", "words"), BAD_ROWS)
def test_bad_row_is_one_error_that_names_the_sample(row, reason, words):
    with pytest.raises(BadSampleError) as caught:
        from_row(row)
    assert caught.value.reason == reason and caught.value.sample_id == ("s" if isinstance(row, dict) else "0")
    assert str(caught.value).startswith("sample '") and words in str(caught.value) and "\n" not in str(caught.value)


def fail(examples):
    raise BadSampleError("a", EMPTY_ANSWER, "has none.")


def test_an_error_crosses_process_borders_as_one_line_that_names_the_sample():
    with pytest.raises(BadSampleError) as caught:
        next(iter(torch.utils.data.DataLoader([1], num_workers=1, collate_fn=fail)))
    assert str(caught.value) == "sample 'a' has none." == str(pickle.loads(pickle.dumps(caught.value)))


def test_drop_counter_says_each_reason_once(caplog):
    counter = DropCounter()
    for number in range(12):
        counter.add(BadSampleError(str(number), (EMPTY_ANSWER, BAD_ROLES)[number % 3 == 0], "is bad."), "test")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "sample '0' is bad." in caplog.text and "sample '1' is bad." in caplog.text
    assert summarize_drops(counter.as_dict()) == "12 samples dropped: 8 empty answer, 4 roles out of order"
