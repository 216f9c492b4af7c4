"""Runs that can come to nothing: said before the model is loaded where that can be, and never written as a result."""

import errno
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from modeling_llava.training import checkpoints, train


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr("modeling_llava.training.run.load_model_and_processor", lambda args: pytest.fail("loaded"))


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ({"logging_steps": 1}, "the loss is nan"),
        ({"logging_steps": 50, "stage": "pretrain"}, r"weights are not finite \(model.multi_modal_projector"),
    ],
)
def test_a_run_that_diverges_ends_and_its_last_good_checkpoint_stays(settings, tmp_path, part, what):
    """At a rate of 1e30 the weights of step 2 are not finite; the loss was logged as 0, and the run ended as if well."""
    settings |= {
        "max_steps": 6,
        "warmup_steps": 0,
        "learning_rate": 1e30,
        "save_steps": 1,
        "save_total_limit": 1,
        **part,
    }
    with pytest.raises(ValueError, match=rf"at step 2 {what}.*checkpoint-1 is the last.*a lower learning_rate"):
        train(settings)
    written = sorted(path.name for path in Path(settings["output_dir"]).iterdir() if path.suffix != ".png")
    assert written == ["checkpoint-1"]


@pytest.mark.parametrize("form", [{}, {"streaming": True}])
def test_a_run_that_learnt_nothing_writes_nothing_to_resume_from(settings, form):
    settings |= {"max_length": 5, "overflow": "drop", "preview_samples": 0, **form}
    with pytest.raises(ValueError, match=r"nothing was learnt in 2 .* samples dropped: . too long"):
        train(settings)
    train({**settings, "max_length": 256})
    history = json.loads((Path(settings["output_dir"]) / "trainer_state.json").read_text())["log_history"]
    assert history[0]["step"] == 1 and history[0]["loss"] > 1


def test_batches_that_the_data_does_not_fill_are_said(settings):
    settings |= {"packing": "full", "per_device_train_batch_size": 25, "dataloader_drop_last": True}
    with pytest.raises(ValueError, match=r"\d packs do not fill a batch of 25"):
        train(settings)


def test_a_metric_that_no_evaluation_gives_is_said_first(settings, no_model):
    settings |= {"eval_size": 4, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    for wish in ({"load_best_model_at_end": True}, {"early_stopping_patience": 2}):
        with pytest.raises(ValueError, match="metric_for_best_model=accuracy, but .* the loss alone"):
            train({**settings, **wish, "metric_for_best_model": "accuracy"})


def test_a_reporter_that_is_not_installed_is_said_first(settings, no_model):
    absent = next(name for name in ("wandb", "swanlab", "trackio") if find_spec(name) is None)
    with pytest.raises(ImportError, match=f"report_to={absent}: .* installed.* Or set report_to=none"):
        train({**settings, "report_to": absent})


def test_a_model_is_not_written_over_by_what_is_trained_from_it(settings, no_model):
    before = sorted(path.name for path in Path(settings["model"]).iterdir())
    place = Path(settings["model"]) / "." / ".." / Path(settings["model"]).name
    with pytest.raises(ValueError, match="is the folder of the model, whose files the run would replace"):
        train({**settings, "output_dir": str(place)})
    assert sorted(path.name for path in Path(settings["model"]).iterdir()) == before


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_ended(
    settings, tmp_path, no_model, monkeypatch
):
    monkeypatch.setattr(checkpoints, "WAIT_FOR_WORKERS", 0.3)
    hold = (
        "import sys, time; from modeling_llava.training.checkpoints import output_dir_lock\n"
        "with output_dir_lock(sys.argv[1]):\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, settings["output_dir"]], stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(OSError, match="another run uses this folder.*choose another output_dir"):
            train(settings)
        first.kill()
    with checkpoints.output_dir_lock(settings["output_dir"]):
        pass


def test_a_folder_that_cannot_be_written_is_said_first_and_none_is_left(settings, tmp_path, no_model, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        train({**settings, "output_dir": str(tmp_path / "file" / "run")})
    with pytest.raises(FileNotFoundError, match="no/such/data"):
        train({**settings, "data": "no/such/data.json"})
    assert not Path(settings["output_dir"]).exists()

    def refuse(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setattr(checkpoints.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match="Read-only file system"):
        train(settings)
