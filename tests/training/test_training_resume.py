"""A run that is killed resumes as if it had not been: the same losses and the same weights, bit for bit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback

from modeling_llava.training import LlavaTrainingArguments, train
from modeling_llava.training.checkpoints import (
    checkpoint_folders,
    find_resumable_checkpoint,
    load_shards,
    why_incomplete,
)
from modeling_llava.training.run import full_disk_explained
from modeling_llava.training.setup import load_model_and_processor


# Runs every scenario in a process of its own, forked from one that has imported everything already.
DRIVER = '''
import contextlib, json, os, random, signal, sys, time
from rich.console import Console
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState
from modeling_llava.training import train
import modeling_llava.training.run, modeling_llava.training.trainer, modeling_llava.data.collator, peft


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(TrainerCallback):
    def __init__(self, moment, step):
        self.moment, self.step = moment, step

    def on_step_end(self, args, state, control, **kwargs):
        if (self.moment, self.step) == ("step", state.global_step):
            die()

    def on_prediction_step(self, args, state, control, **kwargs):
        if (self.moment, self.step) == ("evaluation", state.global_step):
            die()


def run(settings, moment=None, step=0):
    """Train in a forked process; `moment`: where it is killed."""
    child = os.fork()
    if child == 0:
        if moment == "save":  # weights and optimizer are written, trainer_state.json is not
            save = TrainerState.save_to_json
            TrainerState.save_to_json = lambda state, path: die() if state.global_step == step else save(state, path)
        if moment == "state":  # a part of trainer_state.json is written
            save = TrainerState.save_to_json

            def half(state, path):
                save(state, path)
                if state.global_step == step:
                    text = open(path).read()
                    open(path, "w").write(text[: len(text) // 2])
                    die()

            TrainerState.save_to_json = half
        try:
            result = train(settings, callbacks=[Killer(moment, step)], console=Console(file=open(os.devnull, "w")))
            with open(os.path.join(settings["output_dir"], "result.json"), "w") as file:
                json.dump({"history": result.log_history, "resumed_from": str(result.resumed_from)}, file)
        except BaseException as error:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if moment == "random":
        time.sleep(random.uniform(0, 1.5))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


for settings, moment, step in json.loads(sys.argv[1]):
    random.seed(step)
    status = run(settings, moment, step)
    assert moment == "random" or status == (0 if moment is None else -signal.SIGKILL), (moment, step, status)
'''

KINDS = {
    "full": {"neftune_noise_alpha": 5.0, "train_vision_tower": True},
    "lora": {"adapter": "lora", "lora_dropout": 0.2, "train_vision_tower": True},
    "pretrain": {"stage": "pretrain"},
    "qlora": {"adapter": "qlora", "lora_dropout": 0.2},
}


def drive(jobs):
    done = subprocess.run([sys.executable, "-c", DRIVER, json.dumps(jobs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def history(folder):
    """What was logged at each step, without times."""
    entries = json.loads((Path(folder) / "result.json").read_text())["history"]
    kept = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss")
    return [{key: entry[key] for key in kept if key in entry} for entry in entries if "train_runtime" not in entry]


def weights(folder):
    files = sorted(Path(folder).glob("*.safetensors"))
    assert len(files) == 1
    return load_file(files[0])


def assert_equal_runs(first, second):
    assert history(first) == history(second)
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def scenario(settings, kind, folder):
    return {
        **settings, **KINDS[kind], "output_dir": str(folder), "max_steps": 7, "max_samples": 12, "eval_size": 2,
        "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "first_turn_order": "random",
        "type_weights": {"conversation": 1, "detail": 1, "complex": 2}, "save_total_limit": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "moments"),
    [
        ("full", [("step", 3), ("save", 4)]),
        ("lora", [("state", 6)]),
        pytest.param("full", [("evaluation", 4)], marks=pytest.mark.slow),
        pytest.param("pretrain", [("step", 5)], marks=pytest.mark.slow),
        pytest.param("qlora", [("save", 4)], marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_equals_not_killed(settings, tmp_path, kind, moments):
    """5 steps an epoch: killed in the first epoch and in the second, with dropout, noise, mixture and random order."""
    uninterrupted = scenario(settings, kind, tmp_path / "whole")
    jobs = [(uninterrupted, None, 0)]
    for moment, step in moments:
        killed = scenario(settings, kind, tmp_path / f"{moment}{step}")
        jobs += [(killed, moment, step), (killed, None, 0)]
    drive(jobs)
    for moment, step in moments:
        folder = tmp_path / f"{moment}{step}"
        assert_equal_runs(tmp_path / "whole", folder)
        last_complete = (step - 1) // 2 * 2 if moment in ("save", "state", "evaluation", "step") else step
        expected = folder / f"checkpoint-{last_complete}" if last_complete else None
        assert json.loads((folder / "result.json").read_text())["resumed_from"] == str(expected)


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments_equals_not_killed(settings, tmp_path):
    whole, killed = ({**scenario(settings, "lora", tmp_path / name), "max_steps": 60} for name in ("whole", "killed"))
    drive([(whole, None, 0), *((killed, "random", number) for number in range(20)), (killed, None, 0)])
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


def test_a_checkpoint_that_is_cut_off_anywhere_is_not_picked(settings, tmp_path):
    train({**settings, "max_steps": 3, "save_steps": 1, "save_total_limit": None, "adapter": "lora"})
    run = tmp_path / "run"
    assert [path.name for path in checkpoint_folders(run)] == ["checkpoint-3", "checkpoint-2", "checkpoint-1"]
    assert find_resumable_checkpoint(run).name == "checkpoint-3"
    newest = run / "checkpoint-3"
    files = ("trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    for name in files:
        whole = (newest / name).read_bytes()
        for size in (0, 7, len(whole) // 2, len(whole) - 1):
            (newest / name).write_bytes(whole[:size])
            if name == "trainer_state.json" and size == len(whole) - 1:
                continue  # the last byte is a line break
            assert name in why_incomplete(newest), (name, size)
            assert find_resumable_checkpoint(run).name == "checkpoint-2"
        (newest / name).write_bytes(whole)
    assert why_incomplete(newest) is None
    for name, what in zip(files[1:4], ("no weights", "no optimizer state", "no state of the schedule")):
        kept = (newest / name).rename(tmp_path / name)
        assert what in why_incomplete(newest)
        kept.rename(newest / name)
    (newest / "optimizer.pt").unlink()
    shutil.rmtree(run / "checkpoint-1"), shutil.rmtree(run / "checkpoint-2")
    assert find_resumable_checkpoint(run) is None
    assert find_resumable_checkpoint(tmp_path / "nothing") is None


def test_folders_are_ordered_by_step_and_not_by_name(tmp_path):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-x", "checkpoint-20"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]


def test_a_checkpoint_that_is_written_again_is_incomplete_until_it_is_whole(settings, tmp_path, monkeypatch):
    """A run that goes back and dies while it writes checkpoint-2 anew must not leave the old trainer_state.json there."""
    from transformers.trainer_callback import TrainerState

    train({**settings, "save_steps": 1, "stage": "pretrain"})
    monkeypatch.setattr(TrainerState, "save_to_json", lambda state, path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train({**settings, "save_steps": 1, "stage": "pretrain", "resume": str(tmp_path / "run" / "checkpoint-1")})
    assert "trainer_state.json is missing" in why_incomplete(tmp_path / "run" / "checkpoint-2")
    assert find_resumable_checkpoint(tmp_path / "run").name == "checkpoint-1"


def test_resume_settings(settings, tmp_path, caplog):
    first = train({**settings, "save_steps": 1, "stage": "pretrain"})
    assert first.resumed_from is None
    with pytest.raises(ValueError, match="resume=never, but .* holds checkpoint-2"):
        train({**settings, "stage": "pretrain", "resume": "never"})
    (tmp_path / "half").mkdir()
    with pytest.raises(ValueError, match="not complete .*trainer_state.json is missing"):
        train({**settings, "stage": "pretrain", "resume": str(tmp_path / "half")})
    with pytest.raises(FileNotFoundError, match="there is no such checkpoint"):
        train({**settings, "stage": "pretrain", "resume": str(tmp_path / "run" / "checkpoint-9")})
    again = train({**settings, "save_steps": 1, "stage": "pretrain"})
    assert again.resumed_from.name == "checkpoint-2" and again.global_step == 2  # finished: nothing is trained again
    assert not [r for r in caplog.records if "other settings" in r.message]
    with open(tmp_path / "run" / "checkpoint-2" / "recipe.yaml", "a") as recipe:
        recipe.write("a_setting_of_another_version: 1\n")  # is named, and does not prevent the resume
    further = train({**settings, "save_steps": 1, "stage": "pretrain", "max_steps": 3, "learning_rate": 5e-4})
    assert further.global_step == 3
    message = next(r.message for r in caplog.records if "other settings" in r.message)
    assert "learning_rate 0.001 → 0.0005" in message and "max_steps 2 → 3" in message
    assert "a_setting_of_another_version 1 → None" in message
    (tmp_path / "run" / "checkpoint-3" / "recipe.yaml").write_text("# taken out by hand\n")
    assert train({**settings, "save_steps": 1, "stage": "pretrain", "max_steps": 4}).global_step == 4


def test_a_resumed_run_takes_its_own_learning_rates_and_weight_decay(settings, tmp_path, make_trainer):
    """PyTorch's states hold both, and what was changed had no effect."""
    settings |= {
        "stage": "pretrain",
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "max_steps": 4,
        "save_steps": 2,
    }
    train(settings)
    kept = {"learning_rate": 1e-3}
    changed = {"learning_rate": 1e-5, "weight_decay": 0.5}
    rates, decay = {}, {}
    for name, own in (("kept", kept), ("changed", changed)):
        trainer = make_trainer(**own, output_dir=str(tmp_path / name))
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        rates[name] = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
        decay[name] = {group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert rates["kept"] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert rates["changed"] == pytest.approx([1e-3, 7.5e-4, 5e-6, 2.5e-6])
    assert decay == {"kept": {0.0}, "changed": {0.0, 0.5}}


@pytest.mark.parametrize(
    "change", [{"lora_r": 2}, {"train_vision_tower": True}, {"use_dora": True}, {"lora_target": ["q_proj"]}]
)
def test_a_checkpoint_of_other_trained_weights_is_named_before_a_model_is_loaded(settings, monkeypatch, change):
    settings = {**settings, "adapter": "lora", "lora_r": 4, "save_steps": 1, "max_steps": 1}
    train(settings)
    monkeypatch.setattr("modeling_llava.training.run.load_model_and_processor", lambda args: pytest.fail("loaded"))
    (name,) = change
    with pytest.raises(ValueError, match=rf"checkpoint-1 cannot be resumed.*\({name} .*another output_dir"):
        train({**settings, **change, "max_steps": 2})


def test_a_run_begun_before_a_setting_existed_is_resumed(settings, tmp_path):
    train({**settings, "save_steps": 1, "max_steps": 1})
    recipe = tmp_path / "run" / "checkpoint-1" / "recipe.yaml"
    lines = recipe.read_text().splitlines(keepends=True)
    recipe.write_text("".join(line for line in lines if not line.startswith(("train_projector", "lora_vision_tower"))))
    assert train({**settings, "max_steps": 2}).resumed_from.name == "checkpoint-1"


@pytest.fixture
def limit_files():
    """No file can grow above what this is called with, as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class At(TrainerCallback):
    def __init__(self, event, step, action):
        setattr(self, event, lambda args, state, control, **kwargs: action() if state.global_step == step else None)


@pytest.mark.parametrize("limit", [100_000, 1_000_000], ids=["weights", "optimizer"])
def test_a_full_disk_is_reported_and_the_last_good_checkpoint_stays(settings, tmp_path, limit, limit_files):
    """0.85 MB of weights, 1.3 MB of the optimizer."""
    settings |= {"save_steps": 1, "max_steps": 3, "optim": "adamw_torch"}
    with pytest.raises(OSError, match="could not be written.*complete checkpoint is checkpoint-1"):
        train(settings, callbacks=[At("on_step_end", 2, lambda: limit_files(limit))])
    limit_files(-1)
    assert find_resumable_checkpoint(tmp_path / "run").name == "checkpoint-1"
    result = train(settings)
    assert (result.resumed_from.name, result.global_step) == ("checkpoint-1", 3)


def test_a_disk_that_fills_with_small_files_is_reported_too_and_leaves_no_part_of_them(
    settings, tmp_path, limit_files
):
    """Pictures and records of the end of a run: the weights and what is smaller than 2 kB still find room."""
    pytest.importorskip("matplotlib")
    settings |= {"stage": "pretrain", "save_steps": 2}
    with pytest.raises(OSError, match="run could not be written.*complete checkpoint is checkpoint-2"):
        train(settings, callbacks=[At("on_save", 2, lambda: limit_files(2_000))])
    limit_files(-1)
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    (tmp_path / "run" / "all_results.json").write_text("")  # what transformers leaves when it is this that fails
    assert train(settings).resumed_from.name == "checkpoint-2"


def test_a_full_disk_under_the_tokenizer_is_reported(base_model, tmp_path, limit_files):
    """Its library raises a bare `Exception`."""
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    limit_files(1_000)
    with pytest.raises(OSError, match="could not be written: .*There is no complete checkpoint yet"):
        with full_disk_explained(tmp_path):
            tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))


def test_a_sharded_checkpoint_is_refused_where_the_run_is_not_sharded(settings, tmp_path):
    settings |= {"stage": "pretrain", "save_steps": 1}
    train(settings)
    for shards in ("pytorch_model_fsdp_0", "optimizer_0"):
        (tmp_path / "run" / "checkpoint-2" / shards).mkdir()
        (tmp_path / "run" / "checkpoint-2" / shards / ".metadata").touch()
    with pytest.raises(ValueError, match="checkpoint-2 is sharded by FSDP2, and this run is not sharded"):
        train({**settings, "max_steps": 3})
    args = LlavaTrainingArguments(**settings)
    with pytest.raises(OSError, match="process 0: "):  # torch's own exception is none that `except Exception` catches
        load_shards(load_model_and_processor(args)[0], tmp_path / "run" / "checkpoint-2", args)
