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
from torch.distributed.checkpoint import FileSystemReader

from modeling_llava import LlavaForConditionalGeneration
from modeling_llava.training import train
from modeling_llava.training.checkpoints import find_resumable_checkpoint


pytestmark = pytest.mark.slow

CONFIGURATIONS = Path(__file__).parents[2] / "examples" / "accelerate"


def launch(engine, recipe, *overrides, processes=2):
    """`llava train` in two processes (or so many), with a configuration of `examples/accelerate`."""
    run_in_processes(engine, processes, "-m", "modeling_llava.cli.main", "train", str(recipe), *overrides)
    return json.loads((Path(overrides[0].partition("=")[2]) / "trainer_state.json").read_text())


def run_in_processes(engine, processes, *command):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launcher += ["--config_file", str(CONFIGURATIONS / f"{engine}.yaml"), "--main_process_port", str(port)]
    # A rank that waits for another one for ever ends here
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def curve(history, key):
    return [entry[key] for entry in history if key in entry]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_stream_gives_two_processes_what_it_gives_one_beyond_its_first_epoch(settings, tmp_path, engine):
    """
    Eleven rows, four a step: in the second epoch the rows go to the other process, and to the same steps. Every other
    row of the first eight has no answer, and is left out: no process is ahead by it.
    """
    rows = json.loads(Path(settings["data"]).read_text())[:11]
    for row in rows[1:8:2]:
        row["conversations"] = row["conversations"][:1]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings |= {
        "data": str(tmp_path / "rows.json"), "streaming": True, "shuffle_buffer": 0, "max_steps": 7, "save_steps": 4,
        "per_device_train_batch_size": 1, "global_batch_size": 4, "optim": "adamw_torch", "save_total_limit": None,
        "on_bad_sample": "drop",
    }  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    one = train(str(recipe), [f"output_dir={tmp_path / 'one'}"])
    two = launch(engine, recipe, f"output_dir={tmp_path / 'two'}")
    assert curve(two["log_history"], "loss") == pytest.approx(curve(one.log_history, "loss"), rel=1e-4)
    middle = f"resume={tmp_path / 'two' / 'checkpoint-4'}"
    again = launch(engine, recipe, f"output_dir={tmp_path / 'again'}", middle)
    assert curve(again["log_history"], "loss") == curve(two["log_history"], "loss")


EVALUATE = """
import json, sys
from modeling_llava.data import load_conversations
from modeling_llava.training import LlavaTrainer, LlavaTrainingArguments
from modeling_llava.training.setup import load_model_and_processor

settings = json.loads(sys.argv[1])
args = LlavaTrainingArguments(**settings)
rows = json.load(open(args.data))[:11]
rows[4]["conversations"].pop()
stream = load_conversations(rows, args.image_folder, streaming=True, on_bad_sample="drop")
known = load_conversations(rows, args.image_folder, on_bad_sample="drop")
model, processor = load_model_and_processor(args)
trainer = LlavaTrainer(model, args, train_dataset=stream, eval_dataset=stream, processing_class=processor)
trainer.train()
found = [trainer.evaluate()["eval_loss"], trainer.evaluate(known)["eval_loss"]]
if trainer.is_world_process_zero():
    if not args.is_sharded:
        trainer.save_model()  # the other process does not take part
    print("found", json.dumps(found))
"""


@pytest.mark.parametrize("engine, workers", [("ddp", 0), ("fsdp2", 2)])
def test_a_stream_is_evaluated_by_two_processes_as_by_one(settings, tmp_path, engine, workers):
    """Ten rows that can be used, in batches of two: the last round leaves both processes with nothing."""
    (tmp_path / "evaluate.py").write_text(EVALUATE)
    settings |= {"per_device_eval_batch_size": 2, "dataloader_num_workers": workers, "optim": "adamw_torch"}
    said = run_in_processes(engine, 2, str(tmp_path / "evaluate.py"), json.dumps(settings))
    streamed, known = json.loads(said.rpartition("found ")[2].splitlines()[0])
    assert streamed == pytest.approx(known, rel=1e-6)
    assert (tmp_path / "run" / "model.safetensors").is_file() == (engine == "ddp")


@pytest.mark.parametrize(
    ("engine", "packing"), [("ddp", "none"), ("ddp", "batch"), ("fsdp2", "none"), ("fsdp2", "batch")]
)
def test_two_processes_give_the_curve_and_the_weights_of_one(settings, tmp_path, engine, packing):
    """In order and one by one, so that every sixth sample leaves one process without a picture; evaluations too."""
    settings |= {
        "max_steps": 4, "per_device_train_batch_size": 1, "global_batch_size": 4, "save_steps": 2,
        "train_sampling_strategy": "sequential", "packing": packing, "optim": "adamw_torch", "save_total_limit": None,
        "eval_size": 7, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1,
    }  # fmt: skip
    if engine == "ddp":  # no search for unused parameters, which reentrant checkpointing would not stand
        settings |= {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    one = train(str(recipe), [f"output_dir={tmp_path / 'one'}"])
    two = launch(engine, recipe, f"output_dir={tmp_path / 'two'}")
    assert json.loads((tmp_path / "two" / "run.json").read_text())["devices"] == 2
    for key in ("loss", "grad_norm", "eval_loss"):
        assert curve(two["log_history"], key) == pytest.approx(curve(one.log_history, key), rel=1e-4), key
    assert len(curve(one.log_history, "eval_loss")) == 3
    expected = load_file(tmp_path / "one" / "model.safetensors")
    written = load_file(tmp_path / "two" / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(written[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    _, found = LlavaForConditionalGeneration.from_pretrained(tmp_path / "two", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    is_sharded = (tmp_path / "two" / "checkpoint-2" / "pytorch_model_fsdp_0" / "__1_0.distcp").is_file()
    assert is_sharded == (engine == "fsdp2")
    for name in ("processor_config.json", "recipe.yaml"):
        assert (tmp_path / "two" / "checkpoint-2" / name).is_file()

    # The same run from its middle, once with another number of processes; and once more when it had ended
    processes, tolerance = (1, 1e-4) if (engine, packing) == ("fsdp2", "batch") else (2, 0)
    (tmp_path / "two" / "checkpoint-4" / "trainer_state.json").unlink()
    assert find_resumable_checkpoint(tmp_path / "two").name == "checkpoint-2"
    again = launch(engine, recipe, f"output_dir={tmp_path / 'two'}", processes=processes)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["devices"] == processes
    assert curve(again["log_history"], "loss") == pytest.approx(
        curve(two["log_history"], "loss"), rel=tolerance, abs=0
    )
    (tmp_path / "two" / "model.safetensors").unlink()
    launch(engine, recipe, f"output_dir={tmp_path / 'two'}")
    for name, weight in load_file(tmp_path / "two" / "model.safetensors").items():
        torch.testing.assert_close(weight, written[name], rtol=10 * tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    "part",
    [
        {"stage": "pretrain"},
        {"adapter": "lora", "lora_dropout": 0.0, "train_vision_tower": True},
        {"adapter": "qlora", "lora_dropout": 0.0},
    ],
    ids=["pretrain", "lora", "qlora"],
)
def test_fsdp_writes_what_one_process_writes_where_a_part_is_trained(settings, tmp_path, part):
    if part.get("adapter") == "qlora":
        pytest.importorskip("bitsandbytes")
    settings |= part | {"save_steps": 2, "global_batch_size": 4, "optim": "adamw_torch"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    one = train(str(recipe), [f"output_dir={tmp_path / 'one'}"])
    two = launch("fsdp2", recipe, f"output_dir={tmp_path / 'two'}")
    assert curve(two["log_history"], "loss") == pytest.approx(curve(one.log_history, "loss"), rel=1e-4)
    (name,) = [path.name for path in (tmp_path / "one").glob("*.safetensors")]
    expected, written = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
    assert written.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(written[key], weight, rtol=1e-3, atol=1e-4, msg=key)
    folder = tmp_path / "two" / "checkpoint-2" / "pytorch_model_fsdp_0"
    assert len(list(folder.glob("*.distcp"))) == 2
    # what is frozen is not in a checkpoint (files are no measure: the format takes half a kilobyte for a tensor)
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    assert sum(entry.size.numel() for entry in stored.values()) == sum(weight.numel() for weight in expected.values())
