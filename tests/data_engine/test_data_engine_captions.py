import json
import random
import sys
from itertools import product

import pytest

from modeling_llava.data_engine import noun_phrases
from modeling_llava.data_engine.captions import expand_captions, filter_captions, read_captions, write_rows
from modeling_llava.data_engine.concepts import ConceptSettings, choose_captions
from modeling_llava.data_engine.noun_phrases import extract_phrases, extract_shards, load_spacy, read_shards
from modeling_llava.data_engine.prompts import BRIEF_QUESTIONS, DETAILED_QUESTIONS, load_questions


CAPTIONS = ["a red bus on a street", "two  dogs\n play", "A bowl of fruit."]
ROWS = [{"image": f"{i}.jpg", "caption": caption} for i, caption in enumerate(CAPTIONS)]


def write(path, value):
    path.write_text("\n".join(map(json.dumps, value)) if path.suffix == ".jsonl" else json.dumps(value))
    return path


def test_captions_are_read_from_every_form(tmp_path):
    expected = [(str(i), f"{i}.jpg", (" ".join(caption.split()),)) for i, caption in enumerate(CAPTIONS)]
    asked = {"from": "human", "value": "<image>\nWhat?"}
    turns = [[asked, {"from": "gpt", "value": caption}] for caption in CAPTIONS]
    llava = [{"id": str(i), "image": f"{i}.jpg", "conversations": both} for i, both in enumerate(turns)]
    coco = {
        "images": [{"id": i + 10, "file_name": f"{i}.jpg"} for i in range(3)],
        "annotations": [{"id": i, "image_id": i + 10, "caption": caption} for i, caption in enumerate(CAPTIONS)],
    }
    for name, value in {"a.json": ROWS, "b.jsonl": ROWS, "c.json": llava, "d.json": coco}.items():
        rows = list(read_captions(write(tmp_path / name, value)))
        assert [(row.id, row.image, row.captions) for row in rows] == expected, name


def test_expand_asks_a_brief_question_drawn_by_the_seed(tmp_path):
    rows = [{"id": f"x{i}", "image": f"{i}.jpg", "caption": f"thing {i}"} for i in range(400)]
    source, target = write(tmp_path / "in.json", rows), tmp_path / "out.json"
    summary = expand_captions(source, target)
    assert (summary.samples, summary.images, summary.empty) == (400, 400, 0)
    out = json.loads(target.read_text())
    asked, first = set(), 0
    for row, given in zip(out, rows):
        assert (row["id"], row["image"]) == (given["id"], given["image"])
        human, gpt = row["conversations"]
        assert (human["from"], gpt) == ("human", {"from": "gpt", "value": given["caption"]})
        parts = human["value"].split("\n")
        first += parts[0] == "<image>"
        asked |= {*parts}
    assert asked == {"<image>", *load_questions(BRIEF_QUESTIONS)} and 150 < first < 250
    again, other = tmp_path / "again.json", tmp_path / "other.json"
    expand_captions(source, again)
    expand_captions(source, other, seed=1)
    assert again.read_bytes() == target.read_bytes() != other.read_bytes()
    # A row keeps its question when others come or go.
    expand_captions(write(tmp_path / "few.json", rows[100:200]), again)
    assert json.loads(again.read_text()) == out[100:200]


def test_expand_detailed_plain_and_own_questions(tmp_path):
    source = write(tmp_path / "in.json", ROWS)
    target = tmp_path / "out.jsonl"
    expand_captions(source, target, style="plain")
    plain = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["conversations"][0]["value"] for row in plain] == ["<image>"] * 3
    expand_captions(source, target, style="detailed")
    for line in target.read_text().splitlines():
        asked = json.loads(line)["conversations"][0]["value"].replace("<image>", "").strip()
        assert asked in load_questions(DETAILED_QUESTIONS)
    (tmp_path / "q.txt").write_text("# mine\nWhat?\n")
    expand_captions(source, target, questions=tmp_path / "q.txt")
    assert "What?" in target.read_text()


@pytest.mark.parametrize(
    "document, message",
    [
        ({"images": []}, "has no 'images'"),
        ({"images": [{"id": 1}]}, "'images' is not in COCO's form .'file_name' is missing"),
        ({"annotations": [{"image_id": 1, "caption": "x"}]}, "'annotations' is not in COCO's form .'id' is missing"),
        ({"annotations": [{"id": 1, "image_id": "1", "caption": "x"}]}, "image '1', which is not among its 1"),
        ({"annotations": [{"id": 5, "image_id": 1, "caption": None}]}, "caption 5 has no 'caption'"),
    ],
)
def test_coco_captions_of_another_form_are_named(tmp_path, document, message):
    source = tmp_path / "coco.json"
    source.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [], **document}))
    with pytest.raises(ValueError, match=f"coco.json.*{message}"):
        expand_captions(source, tmp_path / "out.json")


def test_each_caption_of_an_image_is_a_sample_unless_it_has_an_image_token(tmp_path):
    captions = ["a \ud83d cat", "an <image> of a cat", "two"]  # a lone surrogate
    rows = [{"image": "a.jpg", "captions": captions}, {"image": "b.jpg", "captions": []}]
    summary = expand_captions(write(tmp_path / "in.json", rows), tmp_path / "out.json", style="plain")
    assert (summary.samples, summary.images, summary.empty, summary.marked) == (2, 2, 1, 1)
    out = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert [(row["id"], row["conversations"][1]["value"]) for row in out] == [("a-0", "a ? cat"), ("a-2", "two")]
    with write_rows(tmp_path / "rows.jsonl") as write_row:  # the filter's rows stay as they are
        write_row(rows[0])
    assert json.loads((tmp_path / "rows.jsonl").read_text("utf-8")) == rows[0]


@pytest.mark.parametrize(
    "rows, options, message",
    [
        (ROWS, {"style": "long"}, "brief, detailed, plain, got 'long'"),
        (ROWS, {"style": "plain", "questions": "x"}, "asks no question"),
        ([{"image": "a.jpg"}], {}, "row 0 has no 'caption'"),
        ([{"caption": "x", "image": ""}], {}, "row 0 has no 'image'"),
        ([{"image": "a.jpg", "conversations": ["x"]}], {}, "has no caption"),
        ([{"image": "a.jpg", "caption": " "}], {}, "has no caption"),
    ],
)
def test_what_cannot_be_expanded_is_named_and_leaves_no_file(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        expand_captions(write(tmp_path / "in.json", rows), tmp_path / "out.json", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.json"]


# ── noun phrases and the filter: spaCy with its small English model ──────────────────────────────────────────────────


@pytest.fixture(scope="module")
def spacy_model():
    try:
        load_spacy()
    except ImportError as error:
        pytest.skip(str(error))


def test_noun_phrases_are_compared_without_articles_pronouns_and_case(spacy_model):
    found = list(extract_phrases(["A red car and the Dog sit next to his red car.", "It runs.", ""]))
    assert found == [("dog", "red car"), (), ()]


def test_absent_model_and_absent_spacy_say_how_to_install_them(spacy_model, monkeypatch):
    with pytest.raises(ImportError, match="python -m spacy download xx_absent_sm"):
        load_spacy("xx_absent_sm")
    monkeypatch.setitem(sys.modules, "spacy", None)
    load_spacy.cache_clear()
    with pytest.raises(ImportError, match=r"modeling-llava\[engine\]"):
        load_spacy("en_core_web_sm")


def test_absent_ray_names_the_extra(spacy_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"modeling-llava\[ray\]"):
        extract_shards(SENTENCES, tmp_path, engine="ray")


SENTENCES = [
    f"a {color} {thing} on the {place}"
    for color, thing, place in product(("red", "blue"), ("bus", "dog"), ("road", "hill"))
]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_extraction_resumes_and_repeats_nothing(spacy_model, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(noun_phrases, "SHARD_CAPTIONS", 3)
    shards = extract_shards(SENTENCES, tmp_path / "p", workers=workers)
    assert len(shards) == 3
    expected = list(extract_phrases(SENTENCES))
    assert list(read_shards(shards)) == expected
    time = shards[0].stat().st_mtime_ns
    shards[2].unlink()
    shards[1].write_text("torn")
    assert extract_shards(SENTENCES, tmp_path / "p", workers=1) == shards and list(read_shards(shards)) == expected
    # Other captions: only their shard is written again; shards that are too many are removed.
    again = extract_shards([*SENTENCES[:4], "a green tree"], tmp_path / "p", workers=1)
    assert len(again) == 2 == len(list((tmp_path / "p").iterdir()))
    assert list(read_shards(again)) == [*expected[:4], ("green tree",)]
    assert shards[0].stat().st_mtime_ns == time


def test_filter_writes_the_chosen_rows_as_they_are_with_report_and_plot(spacy_model, tmp_path):
    captions = ["a red bus"] * 12 + ["a small dog"] * 3 + ["a lonely whale"] * 2 + ["It runs."]
    rows = [{"image": f"{i}.jpg", "caption": caption, "note": i} for i, caption in enumerate(captions)]
    source, target = write(tmp_path / "in.json", rows), tmp_path / "out.json"
    settings = ConceptSettings(least=3, most=5)
    summary = filter_captions(source, target, settings, workers=1)
    phrases = [("red bus",)] * 12 + [("small dog",)] * 3 + [("lonely whale",)] * 2 + [()]
    expected = [row for row, takes in zip(rows, choose_captions(lambda: phrases, settings)) if takes]
    assert json.loads(target.read_text()) == expected and len(expected) == 8
    assert (summary.captions, summary.chosen, summary.without_phrase) == (18, 8, 1)
    assert (summary.phrases, summary.skipped, summary.capped, summary.phrases_after) == (3, 1, 1, 2)
    assert summary.commonest[0] == ["red bus", 12, 5]
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["chosen"] == 8 and report["settings"]["spacy_model"] == "en_core_web_sm"
    assert (tmp_path / "out.concepts.png").read_bytes().startswith(b"\x89PNG")
    before = target.read_bytes()
    filter_captions(source, target, settings, workers=1)
    assert target.read_bytes() == before


def test_filter_chooses_a_row_by_any_of_its_captions(spacy_model, tmp_path):
    rows = [{"image": f"{i}.jpg", "captions": ["a red bus", f"a unique{i} thing"]} for i in range(3)]
    rows.append({"image": "x.jpg", "captions": ["a whale"]})
    rows.append({"image": "y.jpg", "captions": []})
    summary = filter_captions(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", workers=1)
    assert (summary.captions, summary.chosen, summary.rows, summary.rows_chosen) == (7, 3, 5, 3)
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == rows[:3]


def test_filter_of_a_set_too_small_says_what_to_change(spacy_model, tmp_path):
    with pytest.raises(ValueError, match="'local' or 'ray'"):
        filter_captions(write(tmp_path / "in.json", ROWS), tmp_path / "out.json", engine="spark")
    with pytest.raises(ValueError, match="Lower --least"):
        filter_captions(write(tmp_path / "in.json", ROWS), tmp_path / "out.json", workers=1)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.slow
def test_ray_chooses_the_same_rows_bit_for_bit(spacy_model, tmp_path, monkeypatch):
    """On a local Ray cluster of two workers, in many blocks, with phrases above the cap and with a target."""
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(noun_phrases, "SHARD_CAPTIONS", 100)
    rng = random.Random(0)
    things = [f"{a} {b}" for a in ("red", "blue", "old") for b in ("bus", "dog", "tree", "house", "boat", "chair")]
    weights = [1 / (i + 1) for i in range(len(things))]
    captions = ["a {} next to a {}".format(*rng.choices(things, weights, k=2)) for _ in range(700)]
    rows = [{"image": f"{i}.jpg", "caption": caption} for i, caption in enumerate(captions)]
    source = write(tmp_path / "in.json", rows)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        for settings in (ConceptSettings(3, 20), ConceptSettings(3, 20, seed=2, target=60)):
            local, cluster = tmp_path / "local.json", tmp_path / "ray.json"
            one = filter_captions(source, local, settings, phrases=tmp_path / "local", workers=1)
            two = filter_captions(source, cluster, settings, phrases=tmp_path / "ray", workers=2, engine="ray")
            assert local.read_bytes() == cluster.read_bytes()
            assert one == two and one.capped > 3 and 0 < one.chosen < 700
    finally:
        ray.shutdown()


@pytest.mark.parametrize("make", [expand_captions, filter_captions])
def test_a_file_of_captions_is_not_written_over_itself(tmp_path, make):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"image": "a.jpg", "caption": "a cat"}\n')
    with pytest.raises(ValueError, match="both read and written"):
        make(path, tmp_path / "." / "captions.jsonl")
    assert path.read_text() == '{"image": "a.jpg", "caption": "a cat"}\n'
