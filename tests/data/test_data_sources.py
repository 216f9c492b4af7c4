import io
import itertools
import json
import pickle
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Image, List
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from modeling_llava.data import BadSampleError, ConversationDataset, ConversationStream, load_conversations
from modeling_llava.data.rows import ArrowRows
from modeling_llava.data.schema import BAD_ROW, EMPTY_ANSWER, load_image
from modeling_llava.training.run import record_data


def llava_row(number, **other):
    turns = [{"from": "human", "value": f"<image>\nÄ question {number}?"}, {"from": "gpt", "value": f"答え {number}."}]
    return {"id": f"s{number}", "image": f"{number}.jpg", "conversations": turns, **other}


def text_row(number):
    turns = [{"from": "human", "value": f"Hi {number}."}, {"from": "gpt", "value": "Ho."}]
    return {"id": f"t{number}", "conversations": turns}


def hf_row(number, image):
    items = [{"type": "image", "text": None}, {"type": "text", "text": f"Q {number}?"}]
    answer = [{"type": "text", "text": f"A {number}."}]
    messages = [{"role": "user", "content": items}, {"role": "assistant", "content": answer}]
    return {"id": f"s{number}", "messages": messages, "images": [image]}


def write_json(path, rows, **options):
    path.write_text(json.dumps(rows, ensure_ascii=False, **options), "utf-8")
    return path


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def ids(samples):
    return [sample["id"] for sample in samples]


def png(*colour):
    data = io.BytesIO()
    PILImage.new("RGB", (8, 6), colour).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


@pytest.fixture
def hf_dataset():
    rows = [hf_row(i, png(i, 2 * i, 3 * i)) for i in range(12)]
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def assert_hf_samples(dataset):
    assert len(dataset) == 12
    sample = dataset[5]
    assert sample["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "Q 5?"}]
    assert isinstance(sample["images"][0]["bytes"], bytes)  # not decoded
    assert load_image(sample["images"][0]).getpixel((0, 0)) == (5, 10, 15)


def test_lines_are_told_apart_by_content_and_blank_ones_skipped(tmp_path):
    path = write_lines(tmp_path / "a.json", [llava_row(0), llava_row(1)])
    path.write_bytes(b"\n" + path.read_bytes().replace(b"\n", b"\r\n\n"))
    dataset = load_conversations(path)
    assert ids(dataset) == ["s0", "s1"] and dataset[-1]["messages"][1]["content"][0]["text"] == "答え 1."


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1}, {"b": ', "row 1"),
        ('[{"a": 1} {"b": 2}]', "expected ',' or ']'"),
        ('[{"a": 1},', "row 1, which starts at byte 10"),
        ('[{"a": 1}}', "row 0, which starts at byte 1: expected ',' or ']'"),
        ('[{"a": 1}][{"a": 2}]', "more text after its end, at byte 10"),
        ('[{"a": tru}]', "row 0"),
        ("", "is empty"),
        ("[]", "holds no usable sample"),
        ('{\n  "data": []\n}', "one JSON object over several lines"),
        (b'[{"id": "caf\xe9"}]', r"is not UTF-8: byte 12 is b'\xe9'"),
        ("[]".encode("utf-16"), "written in UTF-16"),
        ("[" + "[" * 100_000, "row 0, which starts at byte 1: maximum recursion"),
        ("[1" + "0" * 5000 + "]", "row 0, which starts at byte 1: Exceeds the limit"),
        (b"\x1f\x8b\x08\x00", "is not JSON but a gzip archive"),
        (b"PAR1....PAR1", "is not JSON but a parquet file"),
    ],
)
def test_broken_json_names_the_file_and_the_row(tmp_path, text, words):
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="a.json") as caught:
        load_conversations(tmp_path / "a.json", on_bad_sample="drop")
    assert words in str(caught.value)


def test_broken_line_is_a_bad_row(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [llava_row(0), llava_row(1)])
    path.write_text(path.read_text() + '{"id": \n' + json.dumps(llava_row(3)) + "\n" + '{"a":' * 100_000)
    with pytest.raises(BadSampleError, match="sample '2' is not JSON .*a.jsonl, line 3"):
        load_conversations(path)
    dataset = load_conversations(path, on_bad_sample="drop")
    assert ids(dataset) == ["s0", "s1", "s3"] and dataset.dropped == {BAD_ROW: 2}


def test_missing_ids_are_row_numbers_that_dropping_does_not_shift(tmp_path, caplog):
    rows = [llava_row(i) for i in range(4)]
    for row in rows:
        del row["id"]
    rows[1]["conversations"][1]["value"] = ""
    path = write_json(tmp_path / "a.json", rows)
    with pytest.raises(BadSampleError, match="sample '1' has an empty answer"):
        load_conversations(path)
    dataset = load_conversations(path, on_bad_sample="drop")
    assert ids(dataset) == ["0", "2", "3"] and dataset.dropped == {EMPTY_ANSWER: 1}
    (record,) = caplog.records
    assert "1 sample dropped: 1 empty answer" in record.getMessage() and "sample '1'" in record.getMessage()
    assert ids(load_conversations(path, on_bad_sample="drop", streaming=True)) == ["0", "2", "3"]


def test_changed_file_is_said(tmp_path):
    path = write_json(tmp_path / "a.json", [llava_row(0), llava_row(1)])
    dataset = load_conversations(path)
    write_json(path, [{"id": "x"}])
    with pytest.raises(ValueError, match="was changed while it was in use"):
        dataset[1]


def test_paths_are_joined_to_the_image_folder_and_those_that_leave_it_are_bad_samples(tmp_path):
    rows = [llava_row(0, image="../0.jpg"), llava_row(1, image="/etc/passwd"), llava_row(2)]
    with pytest.raises(BadSampleError, match="sample 's0' has the image '../0.jpg', which leaves"):
        load_conversations(rows, tmp_path)
    (sample,) = load_conversations(rows, tmp_path / "x" / ".." / "pictures", on_bad_sample="drop")
    assert sample["images"] == [str(tmp_path / "pictures" / "2.jpg")]
    assert load_conversations(rows)[2]["images"] == ["2.jpg"]


@pytest.mark.parametrize(
    "image, message",
    [("https://x.org/a.jpg", "a URL: download"), ("data:image/png;base64,iVB", "base64"), ("", "which is not one")],
)
def test_what_is_not_a_path_is_not_joined_to_the_image_folder(image, message, tmp_path):
    sample = load_conversations([llava_row(0, image=[image])], tmp_path)[0]
    with pytest.raises(BadSampleError, match=f"sample 's0' has .*{message}"):
        load_image(sample["images"][0], tmp_path, sample["id"])


def test_datasets_objects_in_memory_and_on_disk(hf_dataset, tmp_path):
    both = DatasetDict({"train": hf_dataset, "test": hf_dataset.select([7, 3, 5])})
    hf_dataset.save_to_disk(tmp_path / "one")
    both.save_to_disk(tmp_path / "dict")
    for source in (hf_dataset, both, tmp_path / "one", str(tmp_path / "dict")):
        assert_hf_samples(load_conversations(source))
    test = load_conversations(both, split="test")
    assert ids(test) == ["s7", "s3", "s5"] and test.num_images.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="no split 'validation'; it has test, train"):
        load_conversations(both, split="validation")


@pytest.fixture
def parquet_folder(hf_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "parquet"
    folder.mkdir()
    for number in range(3):
        hf_dataset.shard(3, number, contiguous=True).to_parquet(folder / f"part-{number}.parquet")
    return folder


def test_parquet_folder_and_file(parquet_folder):
    assert_hf_samples(load_conversations(parquet_folder))
    assert ids(load_conversations(parquet_folder / "part-1.parquet")) == ["s4", "s5", "s6", "s7"]


@pytest.mark.parametrize("form", ["struct", "binary", "items"])
def test_images_in_parquet_are_found_without_reading_them(form, tmp_path):
    image = png(9, 9, 9)["bytes"] if form == "binary" else png(9, 9, 9)
    rows = [hf_row(number, image) for number in range(3)]
    rows[1]["images"] = [None]
    if form == "items":  # as apply_chat_template takes them
        for row in rows:
            row["messages"][0]["content"][0]["image"] = row.pop("images")[0]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.PARQUET")
    dataset = load_conversations(tmp_path / "a.PARQUET", on_bad_sample="drop")
    assert ids(dataset) == ["s0", "s2"] and sum(dataset.dropped.values()) == 1  # at once, not when it is asked for
    assert load_image(dataset[1]["images"][0]).getpixel((0, 0)) == (9, 9, 9)
    if form != "items":
        scanned = next(iter(ArrowRows(Dataset.from_list(rows)).scan()))
        assert scanned["images"] == [{"bytes": None, "path": None}]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"id": 1}', "begins with b'{\"id'"), (b"PAR1" + b"x" * 9, "is cut off: it ends with b'xxxx'")],
)
def test_a_file_that_is_not_a_whole_parquet_is_named(content, message, tmp_path):
    (tmp_path / "b.parquet").write_bytes(content)
    for source in (tmp_path, tmp_path / "b.parquet"):
        with pytest.raises(ValueError, match=f"b.parquet .*{message}"):
            load_conversations(source)


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets has no Json feature before 5")
def test_contents_that_are_texts_or_lists_are_told_apart(tmp_path):
    items = [{"type": "text", "text": '"Q", null?'}]
    rows = [
        {"messages": [{"role": "user", "content": 'Say "no".'}, {"role": "assistant", "content": "42"}]},
        {"messages": [{"role": "user", "content": items}, {"role": "assistant", "content": '["no"'}]},
    ]
    table = Dataset.from_list(rows, on_mixed_types="use_json")
    table.to_parquet(tmp_path / "a.parquet")
    for source in (table, tmp_path / "a.parquet"):
        texts = [[m["content"][0]["text"] for m in sample["messages"]] for sample in load_conversations(source)]
        assert texts == [['Say "no".', "42"], ['"Q", null?', '["no"']]
    column = Dataset.from_list([{"id": "[1]"}] * 5 + [{"id": "not ["}]).cast_column("id", datasets.Json())
    assert [row["id"] for row in ArrowRows(column).scan()] == [[1]] * 5 + ["not ["]  # `datasets` tries five


def test_sources_by_type(tmp_path):
    rows = {"detail": [llava_row(0), llava_row(1)], "complex": [llava_row(1), llava_row(2)]}
    paths = {name: write_json(tmp_path / f"{name}.json", rows[name]) for name in rows}
    dataset = load_conversations(paths)
    assert dataset.types == ["detail", "detail", "complex", "complex"] == [sample["type"] for sample in dataset]
    assert ids(dataset) == ["s0", "s1", "s1", "s2"]
    assert ids(load_conversations(paths, types=["complex"])) == ["s1", "s2"]
    assert len(load_conversations(list(map(str, paths.values())))) == 4
    assert ids(load_conversations([llava_row(0, type="detail"), llava_row(1)], types="detail")) == ["s0"]
    with pytest.raises(ValueError, match="holds no usable sample of the types .'conversation'"):
        load_conversations(paths, types=["conversation"])
    assert ids(load_conversations(paths, types=["complex"], streaming=True)) == ["s1", "s2"]


def test_rows_in_memory_and_select():
    dataset = load_conversations([llava_row(i, type="abc"[i % 3]) for i in range(6)])
    subset = dataset.select([4, 0, 5])
    assert ids(subset) == ["s4", "s0", "s5"] and subset.types == ["b", "a", "c"] and len(subset.num_images) == 3
    assert len(dataset) == 6 and ids(subset.select(np.array([2]))) == ["s5"]
    with pytest.raises(IndexError):
        subset[3]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_do_not_share_a_file_position(tmp_path, start):
    dataset = load_conversations(write_json(tmp_path / "a.json", [llava_row(i) for i in range(300)]))
    dataset[0]  # reads the file before the fork
    assert ids(pickle.loads(pickle.dumps(dataset))) == ids(dataset)
    loader = DataLoader(dataset, batch_size=3, num_workers=2, collate_fn=ids, multiprocessing_context=start)
    assert list(itertools.chain(*loader)) == [f"s{i}" for i in range(300)]


@pytest.mark.parametrize(
    "name", ["missing.json", "missing.parquet", "/no/where", "a/b/c", "no-such-user/no-such-dataset"]
)
def test_missing_file(name):
    with pytest.raises(OSError, match="no-such" if "such" in name else "there is no file or folder"):
        load_conversations(name)


def test_a_name_that_is_not_on_the_hub_is_named(monkeypatch):
    def not_found(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("gone")

    monkeypatch.setattr(datasets, "load_dataset", not_found)
    with pytest.raises(FileNotFoundError, match="'owner/name' is neither here nor a dataset on the Hub: gone"):
        load_conversations("owner/name")


def test_other_wrong_sources(tmp_path):
    with pytest.raises(ValueError, match="holds neither .* nor a dataset"):
        load_conversations(tmp_path)
    with pytest.raises(TypeError, match="cannot read conversations from a int"):
        load_conversations(3)
    with pytest.raises(ValueError, match="on_bad_sample is 'skip'"):
        load_conversations([llava_row(0)], on_bad_sample="skip")
    with pytest.raises(ValueError, match="rank is 2 but there are 2"):
        load_conversations([llava_row(0)], streaming=True, rank=2, world_size=2)


def test_a_set_transform_is_applied(hf_dataset):
    def numbered(batch):
        return {**batch, "id": [f"{name} seen" for name in batch["id"]]}

    dataset = hf_dataset.with_transform(numbered)
    assert ids(load_conversations(dataset)) == ids(load_conversations(dataset, streaming=True)) == ids(dataset)
    assert ids(dataset)[3] == "s3 seen"


def test_folders_and_patterns_of_json(tmp_path):
    (tmp_path / "data" / "more").mkdir(parents=True)
    write_json(tmp_path / "data" / "a.json", [text_row(0)])
    write_lines(tmp_path / "data" / "more" / "b.jsonl", [text_row(1), text_row(2)])
    for source in (tmp_path / "data", f"{tmp_path}/data/**/*.json*"):
        for streaming in (False, True):
            assert ids(load_conversations(source, streaming=streaming)) == ["t0", "t1", "t2"]
    with pytest.raises(FileNotFoundError, match="no file"):
        load_conversations(f"{tmp_path}/*.json")
    (one, pattern) = record_data([str(tmp_path / "data"), f"{tmp_path}/data/**/*.json*"])["sources"]
    write_json(tmp_path / "data" / "my-train.json", [text_row(3)])
    for before in (one, pattern):  # the run's record knows the data again
        (now,) = record_data(before["name"])["sources"]
        assert before["sha256"] is not None and now["sha256"] != before["sha256"]
    write_json(tmp_path / "data" / "test.json", [text_row(4)])
    assert ids(load_conversations(tmp_path / "data")) == ["t3"]
    assert ids(load_conversations(tmp_path / "data", split="test")) == ["t4"]
    with pytest.raises(FileNotFoundError, match="There is .*test.json' instead"):
        load_conversations(tmp_path / "Data" / "Test.json")


def test_a_folder_of_parquet_and_json_says_what_is_left_out(parquet_folder, caplog):
    assert not load_conversations(parquet_folder).dropped and not caplog.records
    write_json(parquet_folder / "more.json", [text_row(0)])
    assert_hf_samples(load_conversations(parquet_folder))
    assert "more.json" in caplog.text and "*.json" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_a_webdataset_is_read_through_datasets(tmp_path, streaming):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(2):
            turns = json.dumps({"conversations": llava_row(number)["conversations"]}).encode()
            for suffix, content in (("png", png(number, 9, 9)["bytes"]), ("json", turns)):
                member = tarfile.TarInfo(f"s{number}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    samples = list(load_conversations(tmp_path / "0.tar", streaming=streaming))
    assert ids(samples) == ["s0", "s1"]
    assert [load_image(sample["images"][0]).getpixel((0, 0)) for sample in samples] == [(0, 9, 9), (1, 9, 9)]


@pytest.mark.parametrize("kind", ["json", "jsonl", "rows", "dataset", "parquet", "iterable"])
def test_stream_gives_what_random_access_gives_whole_and_in_shares(kind, tmp_path, hf_dataset, parquet_folder):
    rows = [llava_row(i) for i in range(12)]
    source = {
        "json": write_json(tmp_path / "a.json", rows),
        "jsonl": write_lines(tmp_path / "a.jsonl", rows),
        "rows": rows,
        "dataset": hf_dataset,
        "parquet": parquet_folder,
        "iterable": hf_dataset.to_iterable_dataset(num_shards=3).with_format("arrow"),
    }[kind]
    shares = [ids(load_conversations(source, streaming=True, rank=rank, world_size=3)) for rank in range(3)]
    assert all(shares) and sorted(itertools.chain(*shares)) == sorted(f"s{i}" for i in range(12))
    stream = load_conversations(source, streaming=True)
    assert isinstance(stream, ConversationStream)
    expected = [hf_dataset[i]["id"] for i in range(12)]
    assert ids(stream) == expected == ids(stream)  # twice: it can be read again
    if kind != "iterable":
        dataset = load_conversations(source)
        assert isinstance(dataset, ConversationDataset)
        assert list(stream) == [dataset[i] for i in range(len(dataset))]
    else:
        assert isinstance(next(iter(stream))["images"][0]["bytes"], bytes)
        with pytest.raises(ValueError, match="pass streaming=True"):
            load_conversations(source)


def test_shuffle_depends_on_seed_and_epoch_alone(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [llava_row(i) for i in range(40)])

    def order(seed, epoch):
        stream = load_conversations(path, streaming=True, shuffle_buffer=16, seed=seed)
        stream.set_epoch(epoch)
        return ids(stream)

    assert order(0, 0) == order(0, 0) != [f"s{i}" for i in range(40)]
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_stream_counts_drops_in_workers(tmp_path):
    rows = [llava_row(i) for i in range(10)]
    for row in rows[::2]:
        row["conversations"][1]["value"] = " "
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(BadSampleError, match="sample 's0'"):
        list(load_conversations(path, streaming=True))
    stream = load_conversations(path, streaming=True, on_bad_sample="drop")
    assert sum(len(batch) for batch in DataLoader(stream, num_workers=2, collate_fn=ids)) == 5
    assert stream.dropped == {EMPTY_ANSWER: 5}


def test_rows_without_id_get_different_names_in_different_shards(hf_dataset):
    stream = load_conversations(hf_dataset.remove_columns("id").to_iterable_dataset(num_shards=4), streaming=True)
    assert len(set(itertools.chain(*DataLoader(stream, num_workers=2, collate_fn=ids)))) == 12
