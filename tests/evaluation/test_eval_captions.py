"""CIDEr and BLEU, against arithmetic by hand."""

import json
import math
import sys

import pytest
from tiny_predictor import picture
from tiny_science import llava_eval

from modeling_llava.evaluation.captions import read_captions, score, words_of
from modeling_llava.evaluation.results import read_results


pytest.importorskip("sacrebleu")
pytest.importorskip("pycocoevalcap")


def images_of(*captions):
    return [{"id": f"{n}.png", "image": f"{n}.png", "captions": list(texts)} for n, texts in enumerate(captions)]


def test_perfect_captions():
    assert words_of("A man's T-shirt, (red)!  ") == "a man's t-shirt red"  # without punctuation
    images = images_of(["a red cat sits here"], ["two blue birds fly away"])
    scored = score(images, {"0.png": "A red cat sits here.", "1.png": "Two blue birds fly away!"})
    # Every n-gram is in one of two images, so all weigh log 2; the cosine of a vector with itself is 1; CIDEr-D is 10.
    assert [row["score"] for row in scored.rows] == pytest.approx([10.0, 10.0])
    assert scored.scores["cider"]["value"] == pytest.approx(1000.0)


def test_cider_by_hand():
    """
    Image 0: "red cat" against "red dog"; image 1 is there for the frequencies. One-grams: red and dog are in the
    references of one image of two (weight log 2); cat in none: log 2 − log max(1, 0) = log 2. So both vectors are
    (1, 1) · log 2 · ½, they share "red": cosine ½. Two-grams have nothing in common; there are no three- and four-grams.
    CIDEr-D: 10 · (½ + 0 + 0 + 0) / 4 at equal lengths.
    """
    images = images_of(["red dog"], ["blue bird sings"])
    scored = score(images, {"0.png": "red cat", "1.png": "something else"})
    assert scored.rows[0]["score"] == pytest.approx(10 * 0.5 / 4)
    assert scored.rows[1]["score"] == 0.0
    # CIDEr is not a fraction of right answers, so its interval at 0 is not Wilson's.
    assert score(images, {"0.png": "one", "1.png": "other"}).scores["cider"]["interval"] == [0.0, 0.0]
    # One word longer: the same cosine, over √3 words, times exp(−1 / (2 · 6²)).
    scored = score(images, {"0.png": "red big cat", "1.png": "something else"})
    cosine = 1 / (math.sqrt(3) * math.sqrt(2)) * math.exp(-1 / 72)
    assert scored.rows[0]["score"] == pytest.approx(10 * cosine / 4)


def test_bleu_by_hand():
    """One-grams 5 of 5, two-grams 3 of 4, three-grams 2 of 3, four-grams 1 of 2; no brevity penalty: their geometric mean."""
    images = images_of(["the cat sat on mats", "the cat sat on a mat"], ["x y z u v"])
    scored = score(images[:1], {"0.png": "the cat sat on mat"})
    assert scored.scores["bleu4"]["value"] == pytest.approx(100 * (5 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert scored.scores["cider"]["value"] is None  # says nothing of a single image
    both = score(images, {"0.png": "the cat sat on mat", "1.png": "x y z u v"})  # with two references, and with one
    assert both.scores["bleu4"]["value"] == pytest.approx(100 * (10 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25)
    nothing = score(images, {})  # --partial before the first answer
    assert [metric["value"] for metric in nothing.scores.values()] == [None, None] and nothing.rows == []


def test_annotations_of_coco_are_read_and_captions_without_a_word_named(tmp_path):
    texts = ("A cat.", "One cat.")
    coco = {
        "images": [{"id": 5, "file_name": "a.jpg"}, {"id": 6, "file_name": "b.jpg"}],
        "annotations": [{"id": n, "image_id": 5, "caption": text} for n, text in enumerate(texts)],
    }
    (tmp_path / "c.json").write_text(json.dumps(coco))
    assert read_captions(tmp_path / "c.json") == [{"id": "a.jpg", "image": "a.jpg", "captions": list(texts)}]
    for text in ("", "…"):
        (tmp_path / "c.jsonl").write_text(json.dumps({"image": "a.jpg", "captions": [text]}))
        with pytest.raises(ValueError, match="'a.jpg' has a caption without a word"):
            read_captions(tmp_path / "c.jsonl")


def test_command(tmp_path, model_folder, monkeypatch, capsys):
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    lines = [json.dumps({"image": f"{n}.png", "captions": [f"number {n}", "a thing"]}) for n in range(3)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    options = ["--annotations", tmp_path / "c.jsonl", "--images", tmp_path, "--max-new-tokens", "5"]
    with monkeypatch.context() as absent:  # which is said before anything is answered
        absent.setitem(sys.modules, "sacrebleu", None)
        assert llava_eval("captions", model_folder, tmp_path / "out", *options) != 0
    assert "pip install 'modeling-llava[eval]'" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert llava_eval("captions", model_folder, tmp_path / "out", *options) == 0
    results, rows = read_results(tmp_path / "out")
    assert results["primary_score"] == "cider" and results["scores"]["bleu4"]["count"] == 3 == len(rows)
