"""`llava estimate`: weights by arithmetic, a GPU that is too small, and mistakes."""

import json
import re
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import DryRunError
from tiny import tiny_text_config

from modeling_llava.cli.main import main


MODEL = "model=llava-hf/llava-1.5-7b-hf"


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "model is not set"),
        ("model=/nowhere", "nowhere"),
        (f"{MODEL} --measured nowhere", "nowhere/train_results.json does not exist"),
        (f"{MODEL} --samples-per-second 0", "above 0"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys):
    assert main(["estimate", "qlora", *words.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ({"model_type": "mixtral"}, 2, "(mixtral) has weights that are not linear layers"),
        ({"model_type": "qwen2_moe", "num_experts": 60}, 2, "mixture of experts"),
        ({"model_type": "gemma2"}, 0, "(gemma2) is estimated as a Llama"),
        ({"model_type": "phi3", "pad_token_id": 0}, 0, "trained parameters"),
    ],
)
def test_a_language_model_that_is_not_like_llama_is_reported(text, code, words, tmp_path, capsys):
    sizes = tiny_text_config().to_diff_dict()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": {**sizes, **text}}))
    assert main(["estimate", "lora", f"model={tmp_path}"]) == code
    printed = capsys.readouterr()
    assert words in printed.out + printed.err
    assert ("is estimated as a Llama" in printed.out) == (text["model_type"] == "gemma2")


@pytest.mark.parametrize("recipe, gpu", [("lora", "16"), ("finetune", "12")])
def test_the_proposed_change_fits_when_it_is_made(recipe, gpu, capsys):
    assert main(["estimate", recipe, MODEL, "--gpu", gpu]) == 1
    changes = capsys.readouterr().out.rpartition("GiB): ")[2].split()
    assert main(["estimate", recipe, MODEL, *changes, "--gpu", gpu]) == 0


@pytest.mark.parametrize("gpu, chosen", [("8", "on*"), ("12", "every second*"), ("16", "off*")])
def test_auto_takes_the_memory_that_a_gpu_has(gpu, chosen, capsys):
    assert main(["estimate", "qlora-8gb", MODEL, "--gpu", gpu]) == 0
    assert chosen in capsys.readouterr().out


@pytest.mark.parametrize("is_reached", [True, False])
def test_download_and_disk_are_told(is_reached, monkeypatch, tmp_path, capsys):
    def snapshot_download(model, dry_run, **kwargs):
        if not is_reached:
            raise DryRunError("offline")
        return [SimpleNamespace(file_size=3 * 2**30, will_download=name != "cached") for name in ("a", "b", "cached")]

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    main(["estimate", "qlora-8gb", MODEL, f"output_dir={tmp_path / 'new' / 'run'}"])
    printed = capsys.readouterr().out
    assert ("Download: 6.00 GiB." in printed) == is_reached and ("the Hub was not reached" in printed) != is_reached
    trained = int(re.search(r"([\d,]+) trained", printed)[1].replace(",", ""))
    # three checkpoints with float32 weights and two 8-bit moments, and the weights of the result
    disk = (3 * (4 + 2.1) + 4) * trained / 2**30
    assert f"Disk: {disk:.2f} GiB for 3 checkpoints and the result" in printed
    assert "--trial 20" in printed


def test_wall_time_from_a_given_and_a_measured_throughput(tmp_path, capsys):
    words = ["estimate", "lora", MODEL, "num_train_epochs=2"]
    main([*words, "--samples", "36000", "--samples-per-second", "4"])
    assert "5.0 h for 2 epoch(s) of 36,000 samples" in capsys.readouterr().out  # 72,000 / 4 / 3600
    (tmp_path / "train_results.json").write_text(json.dumps({"train_samples_per_second": 2.0}))
    main([*words, "max_steps=450", "global_batch_size=16", "--measured", str(tmp_path)])
    assert "1.0 h for 450 steps of 16 samples" in capsys.readouterr().out
    assert main([*words, "--samples-per-second", "4"]) == 2
    assert "--samples" in capsys.readouterr().err


def test_a_configuration_that_is_no_json_and_a_recipe_that_is_no_text_are_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "photo.yaml").write_bytes(b"\xff\xd8\xff")
    assert main(["estimate", "lora", f"model={tmp_path}"]) == 2
    assert f"{tmp_path / 'config.json'} is not JSON (" in capsys.readouterr().err
    assert main(["estimate", str(tmp_path / "photo.yaml")]) == 2
    assert "photo.yaml is not YAML: 'utf-8' codec can't decode" in capsys.readouterr().err


def test_an_evaluation_batch_above_the_training_batch_is_estimated(capsys):
    """Emulated, 7B in 4 bits: an evaluation batch of 8 × 2,048 tokens takes the reserved memory to 7.22 GiB."""
    words = ["estimate", "--gpu", "6.8", "qlora-8gb", MODEL]
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "per_device_eval_batch_size=8"]) == 1
    printed = capsys.readouterr().out
    held = "vision tower|projector|model, layers|embeddings, head|LoRA|16-bit copies|evaluation batch"
    parts = [line.split("│")[2] for line in printed.splitlines() if re.search(held, line.partition("│")[2])]
    assert sum(map(float, parts)) == pytest.approx(7.22, rel=0.05)
    assert "per_device_eval_batch_size=1" in printed
