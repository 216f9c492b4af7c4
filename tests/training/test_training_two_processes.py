"""Two real processes on this machine's CPU, launched as users launch them, give what one process gives."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from modeling_llava import LlavaForConditionalGeneration
from modeling_llava.training import train
from modeling_llava.training.run_record import find_resumable_checkpoint


pytestmark = pytest.mark.slow

CONFIGURATIONS = Path(__file__).parents[2] / "examples" / "accelerate"


def launch(engine, recipe, *overrides):
    """`llava train` in two processes, with a configuration of `examples/accelerate`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launcher += ["--config_file", str(CONFIGURATIONS / f"{engine}.yaml"), "--main_process_port", str(port)]
    command = [*launcher, "-m", "modeling_llava.cli.main", "train", str(recipe), *overrides]
    # A rank that waits for another one for ever ends here
    done = subprocess.run(command, capture_output=True, text=True, cwd=recipe.parent, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((Path(overrides[0].partition("=")[2]) / "trainer_state.json").read_text())


def curve(history, key):
    return [entry[key] for entry in history if key in entry]


@pytest.mark.parametrize("packing", ["none", "batch"])
def test_two_processes_give_the_curve_and_the_weights_of_one(settings, tmp_path, packing):
    """In order and one by one, so that every sixth sample leaves one process without a picture."""
    settings |= {
        "max_steps": 4, "per_device_train_batch_size": 1, "global_batch_size": 4, "save_steps": 2,
        "train_sampling_strategy": "sequential", "packing": packing, "optim": "adamw_torch", "save_total_limit": None,
    }  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    one = train(str(recipe), [f"output_dir={tmp_path / 'one'}"])
    two = launch("ddp", recipe, f"output_dir={tmp_path / 'two'}")
    assert json.loads((tmp_path / "two" / "run.json").read_text())["devices"] == 2
    for key in ("loss", "grad_norm"):
        assert curve(two["log_history"], key) == pytest.approx(curve(one.log_history, key), rel=1e-4), key
    model, found = LlavaForConditionalGeneration.from_pretrained(tmp_path / "two", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    expected = load_file(tmp_path / "one" / "model.safetensors")
    assert load_file(tmp_path / "two" / "model.safetensors").keys() == expected.keys()
    whole = LlavaForConditionalGeneration.from_pretrained(tmp_path / "one")
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)

    # The same run from its middle
    (tmp_path / "two" / "checkpoint-4" / "trainer_state.json").unlink()
    assert find_resumable_checkpoint(tmp_path / "two").name == "checkpoint-2"
    again = launch("ddp", recipe, f"output_dir={tmp_path / 'two'}")
    assert curve(again["log_history"], "loss") == curve(two["log_history"], "loss")
