"""`benchmarks` in a recipe: command lines of `llava eval`, run by `llava train` at each evaluation."""

import json

import pytest
from test_eval_sample_answers import losses, recipe  # noqa: F401 (a fixture)

from modeling_llava.cli.eval import slice_of
from modeling_llava.cli.main import main


@pytest.fixture
def questions(tmp_path):
    rows = [{"question_id": n, "image": f"{n}.png", "question": "Blue?", "answers": ["yes"] * 10} for n in range(5)]
    path = tmp_path / "with space.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_recipe_scores_slices_at_each_evaluation_and_training_is_the_same(recipe, questions, tmp_path, capsys):  # noqa: F811
    line = f"vqa --questions '{questions}' --images {tmp_path} --limit 2 --max-new-tokens 3"
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
        ("vqa --questions F --images . --temperature 0.5", "--temperature does not apply to a training run"),
        ("scienceqa --problems F", "Give --images"),
    ],
)
def test_a_wrong_line_is_one_error_that_shows_it(line, message):
    with pytest.raises(ValueError, match=message):
        slice_of(line, "out")
