"""`llava quickstart`, all of it: small in the default suite, whole in the slow one."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from modeling_llava.cli.main import main
from modeling_llava.cli.quickstart import next_commands
from modeling_llava.tiny_world.quickstart import FAST, PHASES, Quickstart


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "run"
    assert main(["quickstart", "--fast", "--out", str(out), "--keep", "--threads", "1"]) == 0
    return out


def test_it_writes_results_images_and_recipes(finished):
    results = json.loads((finished / "results.json").read_text())
    conditions = ["with the image", "blank images", "shuffled images", "majority answer", "held-out pairs"]
    assert sorted(results["scores"]) == sorted(conditions)
    assert set(results["seconds"]) == set(PHASES) and results["pipeline_agrees"] is True
    assert results["peak_rss_bytes"] > 1e8
    for name in ("loss_curve.png", "answers.png"):
        with Image.open(finished / name) as image:
            assert image.width > 1000 and len(image.convert("L").getcolors()) > 20
    from modeling_llava.training import read_recipe

    for stage in ("pretrain", "finetune"):
        assert read_recipe(finished / f"{stage}.yaml")["stage"] == stage
    log = (finished / "finetune.log").read_text()
    assert "What is trained" in log and "<image> × 36" in log
    assert not list(finished.glob("*.part")) and (finished / "parts" / "vision_encoder").is_dir()


def test_the_same_command_says_that_it_is_finished(finished, capsys):
    before = (finished / "progress.json").stat().st_mtime_ns
    assert main(["quickstart", "--fast", "--out", str(finished)]) == 0
    printed = capsys.readouterr().out
    assert "holds a finished quickstart" in printed and all(command in printed for command in next_commands(finished))
    assert (finished / "progress.json").stat().st_mtime_ns == before


def test_an_interrupted_run_resumes(finished):
    progress = json.loads((finished / "progress.json").read_text())
    scores = progress["phases"]["exam"]["scores"]
    for phase in ("exam", "figures"):
        del progress["phases"][phase]
    (finished / "progress.json").write_text(json.dumps(progress))
    begun = []
    results = Quickstart(finished, FAST, on_phase=begun.append).run()
    assert begun == ["exam", "figures"] and results["scores"] == scores


def test_another_seed_in_the_same_folder_is_one_line(finished, capsys):
    assert main(["quickstart", "--fast", "--out", str(finished), "--seed", "1"]) == 2
    error = capsys.readouterr().err.strip()
    assert "seed was 0 and is 1" in error and "\n" not in error


def test_a_folder_with_something_else_is_not_touched(tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("x")
    assert main(["quickstart", "--fast", "--out", str(tmp_path)]) == 2
    assert "is not a quickstart" in capsys.readouterr().err
    assert main(["quickstart", "--out", str(tmp_path), "--steps-scale", "0"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.slow
def test_the_whole_of_it_learns_to_see(tmp_path):
    """Right with the image, and no better than a guess without."""
    program = [sys.executable, "-m", "modeling_llava.cli.main", "quickstart", "--out", str(tmp_path / "run")]
    done = subprocess.run([*program, "--threads", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    scores = {name: shares["all"] for name, shares in results["scores"].items()}
    assert scores["with the image"] >= 0.9, scores
    for without in ("blank images", "shuffled images"):
        assert scores[without] <= scores["majority answer"] + 0.05, scores
    assert scores["majority answer"] < 0.5
