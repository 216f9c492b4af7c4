"""One run, killed 20 times at random moments and started again each time, is the run that was never killed."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from test_training_resume import assert_equal_runs


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")]

KILLS = 20

# Runs are forked from a process that has imported everything. What a run is doing stands in memory that both share.
DRIVER = """
import json, mmap, os, random, signal, sys, time
from rich.console import Console
from transformers import TrainerCallback
from modeling_llava.training import LlavaTrainer, train
import modeling_llava.training.run, modeling_llava.training.trainer, modeling_llava.data.collator, peft

settings, kills = json.loads(sys.argv[1]), int(sys.argv[2])
doing = mmap.mmap(-1, 1)


def told(name, method):
    def inner(self, *args, **kwargs):
        before = doing[0]
        doing[0] = ord(name)
        try:
            return method(self, *args, **kwargs)
        finally:
            doing[0] = before
    return inner


for letter, name in (("s", "training_step"), ("c", "_save_checkpoint"), ("e", "evaluate")):
    setattr(LlavaTrainer, name, told(letter, getattr(LlavaTrainer, name)))


def start(folder):
    child = os.fork()
    if child == 0:
        doing[0] = ord("b")
        try:
            result = train({**settings, "output_dir": folder}, console=Console(file=open(os.devnull, "w")))
            with open(os.path.join(folder, "result.json"), "w") as file:
                json.dump({"history": result.log_history}, file)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return child


began = time.monotonic()
_, status = os.waitpid(start(settings["output_dir"] + "/whole"), 0)
assert status == 0
whole = time.monotonic() - began
moments, rng = [], random.Random(0)
while len(moments) < kills:
    child = start(settings["output_dir"] + "/killed")
    if len(moments) % 4:  # wait for one of the three in turn, then a random while
        wanted = ord(" sce"[len(moments) % 4])
        until = time.monotonic() + 2 * whole
        while doing[0] != wanted and time.monotonic() < until and os.waitid(
            os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ) is None:
            time.sleep(0.0002)
        time.sleep(rng.uniform(0, 0.03))
    else:
        time.sleep(rng.uniform(0, 0.05 * whole + 0.3))
    moment = chr(doing[0])
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert status == 0  # the run had ended: what follows would not be a kill
        break
    moments.append(moment)
_, status = os.waitpid(start(settings["output_dir"] + "/killed"), 0)
assert status == 0
print(json.dumps(moments))
"""


def test_a_run_killed_at_random_moments_equals_the_run_that_was_not(settings, tmp_path):
    settings |= {
        "output_dir": str(tmp_path), "adapter": "lora", "lora_dropout": 0.2, "max_steps": 90, "eval_size": 4,
        "eval_strategy": "steps", "eval_steps": 3, "save_steps": 2, "first_turn_order": "random", "preview_samples": 0,
    }  # fmt: skip
    command = [sys.executable, "-c", DRIVER, json.dumps(settings), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stderr[-3000:]
    moments = json.loads(done.stdout.splitlines()[-1])
    print(Counter(moments))
    assert len(moments) == KILLS and set("sce") <= set(moments)
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")
