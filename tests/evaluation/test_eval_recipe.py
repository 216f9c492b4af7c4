"""`sample_answers` and `benchmarks` in a recipe; training is the same with and without them."""

import base64
import html
import io
import json
import re

import pytest
import yaml
from PIL import Image

from modeling_llava import LlavaForConditionalGeneration, LlavaProcessor
from modeling_llava.cli.eval import slice_of
from modeling_llava.cli.main import main
from modeling_llava.evaluation.callback import spread
from modeling_llava.inference import LlavaPredictor
from modeling_llava.training.batches import FilledDataset


@pytest.fixture
def recipe(tmp_path, golden):
    tower, language = (str(golden / "llava_v15_tiny_lora" / name) for name in ("vision_tower", "language_model"))
    LlavaForConditionalGeneration.from_vision_language_pretrained(tower, language).save_pretrained(tmp_path / "model")
    LlavaProcessor.from_vision_language_pretrained(tower, language).save_pretrained(tmp_path / "model")
    rows = []
    for i in range(10):
        Image.new("RGB", (40, 30), (20 * i, 90, 160)).save(tmp_path / f"{i}.png")
        turns = [f"<image>\nIs <b>{i}</b> blue?", f"Answer {i}.", "Sure?", "Yes."]
        speakers = ("human", "gpt", "human", "gpt")
        turns = [{"from": speaker, "value": text} for speaker, text in zip(speakers, turns)]
        rows.append({"id": f"s{i}", "image": f"{i}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    settings = {
        "model": str(tmp_path / "model"), "data": str(tmp_path / "data.json"), "image_folder": str(tmp_path),
        "eval_size": 4, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "logging_steps": 1,
        "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True, "lora_dropout": 0.3,
        "adapter": "lora", "lora_r": 4,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "recipe.yaml"


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry.get("loss", entry.get("eval_loss")) for entry in history if {"loss", "eval_loss"} & entry.keys()]


def test_a_page_of_answers_is_written_at_each_evaluation_and_training_is_the_same(recipe, tmp_path):
    assert main(["train", str(recipe), f"output_dir={tmp_path / 'with'}", "sample_answers=3"]) == 0
    assert main(["train", str(recipe), f"output_dir={tmp_path / 'without'}"]) == 0
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    pages = sorted(path.name for path in (tmp_path / "with" / "sample_answers").iterdir())
    assert pages == ["step-1.html", "step-2.html"]
    assert not (tmp_path / "without" / "sample_answers").exists()

    page = (tmp_path / "with" / "sample_answers" / "step-2.html").read_text()
    cards = re.findall(r'<article id="s(\d)">.*?</article>', page, re.S)
    assert len(cards) == 3 and "http" not in page  # nothing is loaded from other hosts
    for number in map(int, cards):
        card = page[page.index(f'id="s{number}"') :]
        assert f"Is &lt;b&gt;{number}&lt;/b&gt; blue?" in card and f"Answer {number}." in card
        picture = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", card)[1])))
        assert picture.size == (40, 30)
        assert max(abs(a - b) for a, b in zip(picture.getpixel((20, 15)), (20 * number, 90, 160))) < 8
    # the answer is the trained model's
    predictor = LlavaPredictor.from_pretrained(str(tmp_path / "with"))
    predictor.set_image(str(tmp_path / f"{cards[0]}.png"))
    said = predictor.ask(f"Is <b>{cards[0]}</b> blue?", max_new_tokens=128)
    shown = re.search(r"<b>answer</b>(.*?)</p>", page, re.S)[1]
    assert said.split()[:3] == html.unescape(shown).split()[:3]


def test_a_page_of_answers_in_streamed_training(recipe, tmp_path):
    overrides = [f"output_dir={tmp_path / 'streamed'}", "streaming=true", "eval_size=null", "sample_answers=2"]
    assert main(["train", str(recipe), *overrides, f"eval_data={tmp_path / 'data.json'}"]) == 0
    page = (tmp_path / "streamed" / "sample_answers" / "step-2.html").read_text()
    assert re.findall(r'<article id="s(\d)">', page) == ["0", "5"]  # of ten, evenly spread


def test_evaluation_data_that_is_a_stream_gives_its_first_samples():
    import datasets

    stream = datasets.IterableDataset.from_generator(lambda: ({"id": n} for n in range(5)))
    assert [sample["id"] for sample in spread(stream, 2)] == [0, 1]
    filled_up = FilledDataset([{"id": n} for n in range(3)], 16)  # as several processes evaluate it
    assert [sample["id"] for sample in spread(filled_up, 8)] == [0, 1, 2]


def test_a_recipe_scores_slices_at_each_evaluation_and_training_is_the_same(recipe, tmp_path, capsys):
    rows = [{"question_id": n, "image": f"{n}.png", "question": "Blue?", "answers": ["yes"] * 10} for n in range(5)]
    (tmp_path / "with space.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = f"vqa --questions '{tmp_path}/with space.jsonl' --images {tmp_path} --limit 2 --max-new-tokens 3"
    command = ["train", str(recipe), f"output_dir={tmp_path / 'with'}", f"benchmarks={json.dumps([line])}"]
    assert main(command) == 0
    assert main(["train", str(recipe), f"output_dir={tmp_path / 'without'}"]) == 0
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    lines = [json.loads(line) for line in (tmp_path / "with" / "benchmarks.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]  # the last one is of what is written at the end
    assert set(lines[0]["answers"]["vqa"]) == {"0", "1"} and 0 <= lines[0]["scores"]["eval_vqa_accuracy"] <= 100
    assert main([*command[:2], f"output_dir={tmp_path / 'x'}", "eval_size=null", "eval_strategy=no", command[3]]) == 2
    assert "set eval_size, or eval_data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("vqas --questions F", "does not begin with a benchmark: scienceqa, llava-bench, pope, vqa, captions"),
        ("", "does not begin with a benchmark"),
        ("vqa --images .", "the following arguments are required: --questions"),
        ("vqa --questions F --images . --device cuda", "--device does not apply to a training run"),
        ("scienceqa --problems F", "Give --images"),
    ],
)
def test_a_wrong_line_is_one_error_that_shows_it(line, message):
    with pytest.raises(ValueError, match=message):
        slice_of(line, "out")
