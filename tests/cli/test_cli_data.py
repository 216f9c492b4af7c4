import json
import os
import re

import pytest
from PIL import Image

from modeling_llava import LlavaProcessor
from modeling_llava.cli.main import main


@pytest.fixture(scope="module")
def model(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    parts = (golden / "llava_v15_tiny_lora" / name for name in ("vision_tower", "language_model"))
    LlavaProcessor.from_vision_language_pretrained(*parts).save_pretrained(folder)
    return str(folder)


def row(number, answer="A red square.", image="0.png"):
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?" if image else "Hi."},
        {"from": "gpt", "value": answer},
        {"from": "human", "value": "Which  colour?"},
        {"from": "gpt", "value": "Red."},
    ]
    return {"id": f"s{number}", "conversations": turns, **({"image": image} if image else {})}


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (60, 40), (200, 10, 10)).save(tmp_path / "images" / "0.png")
    (tmp_path / "good.json").write_text(json.dumps([row(0), row(1, "A square, red."), row(2, image=None)]))
    (tmp_path / "bad.json").write_text(json.dumps([row(0), row(1, ""), row(2, image="9.png"), row(3, "Long. " * 200)]))
    return tmp_path


def flat(text):
    return re.sub(r"\s+", " ", text)


def test_check_says_what_is_there_and_exits_with_0(data, model, capsys):
    code = main(["data", "check", str(data / "good.json"), "--images", str(data / "images"), "--processor", model])
    output = flat(capsys.readouterr().out)
    assert code == 0 and "3, of which 3 have no problem" in output and "no problem" in output
    assert "1 steps of 128 samples, or 1 steps of 128 packs of 2,048 tokens" in output


def test_check_names_every_problem_and_exits_with_1(data, model, capsys):
    arguments = ["--images", str(data / "images"), "--processor", model, "--max-length", "300", "--workers", "0"]
    code = main(["data", "check", str(data / "bad.json"), *arguments, "--out", str(data / "out")])
    output = flat(capsys.readouterr().out)
    assert code == 1
    for words in ("1 × empty answer", "1 × missing image", "1 × too long", "sample 's2' has the image '9.png'"):
        assert words in output, output
    assert (data / "out" / "lengths.png").exists()
    assert len((data / "out" / "problems.jsonl").read_text().splitlines()) == 3
    assert main(["data", "check", str(data / "bad.json"), *arguments, "--json"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)  # nothing else is printed
    assert report["ok"] is False and sum(report["problems"].values()) == 3 and captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "missing.json"], "there is no file or folder 'missing.json'"),
        (["preview", "missing.json", "--processor", "/no/model"], "'/no/model' is neither a folder nor the name"),
        (["check", "missing.json", "--processor", os.path.dirname(__file__)], "holds no processor: it has neither"),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys):
    assert main(["data", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("llava data: error: ") and words in error and "Traceback" not in error


def test_preview_shows_the_rendered_text_to_the_letter(data, model, capsys):
    code = main(["data", "preview", str(data / "good.json"), "--images", str(data / "images"), "--processor", model])
    output = capsys.readouterr().out
    assert code == 0 and output.count("sample 's") == 3
    assert "questions. USER: <image> × 9\nWhat is it? ASSISTANT: A red square.</s>USER: Which  colour? ASS" in output
    assert "questions. USER: Hi. ASSISTANT:" in output and "0 images" in output


def test_preview_colours_exactly_what_is_supervised(model, golden):
    from modeling_llava.data import encode_conversation, from_llava_row
    from modeling_llava.data.labels import render_sample

    processor = LlavaProcessor.from_pretrained(model)
    for sample in json.loads((golden / "masks_tiny.json").read_text())["versions"]["v1"]:
        image = "x.png" if sample["has_image"] else None
        messages = from_llava_row({"conversations": sample["conversations"], "image": image})["messages"]
        encoded = encode_conversation(messages, processor)
        text = render_sample(processor, encoded["input_ids"].tolist(), encoded["labels"].tolist())
        green = "".join(text.plain[span.start : span.end] for span in text.spans if span.style == "bold green")
        answers = [turn["value"] for turn in sample["conversations"][1::2]]
        assert green == "".join(f" {answer}</s>" for answer in answers), sample["id"]


def test_preview_by_id_with_another_template_and_saved_images(data, model, capsys):
    arguments = ["--images", str(data / "images"), "--processor", model, "--id", "s1", "--chat-template", "vicuna_v0"]
    main(["data", "preview", str(data / "good.json"), *arguments, "--save-images", str(data / "seen")])
    output = capsys.readouterr().out
    assert "### Human: <image> × 9\nWhat is it?\n### Assistant: A square, red.\n###" in output and "'s0'" not in output
    seen = Image.open(data / "seen" / "s1-0.png")
    assert seen.size == (42, 42) and seen.getpixel((21, 21)) == (200, 10, 10)
    assert seen.getpixel((0, 0)) == (122, 116, 104)  # the mean colour that pads it to a square


def test_preview_names_a_bad_sample_and_continues(data, model, capsys):
    code = main(["data", "preview", str(data / "bad.json"), "--images", str(data / "images"), "--processor", model])
    output = flat(capsys.readouterr().out)
    assert code == 1 and "sample 's2' has the image '9.png'" in output and "sample 's3'" in output
    assert "1 sample dropped: 1 empty answer" in output


def test_preview_of_an_unknown_id_or_start(data, model, capsys):
    arguments = ["data", "preview", str(data / "good.json"), "--processor", model]
    assert main([*arguments, "--id", "s9"]) == 2 and main([*arguments, "--start", "9"]) == 2
    error = capsys.readouterr().err
    assert "no usable sample with the id s9" in error and "--start is 9 but there are 3 samples" in error
    for option in ("-n", "--start", "--max-length"):
        assert main([*arguments, option, "-1"]) == 2
        assert f"{option} must be at least " in capsys.readouterr().err
