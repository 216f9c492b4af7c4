"""`llava doctor` tells the truth about this machine, and about machines that lack something."""

import json
import re

from modeling_llava import versions
from modeling_llava.cli import doctor
from modeling_llava.cli.main import main


def test_report_is_about_this_machine(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    import torch
    import transformers

    assert report["packages"]["transformers"] == transformers.__version__
    assert len(report["gpus"]) >= torch.cuda.device_count()
    assert report["problems"] == []
    assert report["cpu"]["memory_gib"] > 0 and report["disk_free_gib"] > 0


def test_tables_name_every_extra_and_what_works(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in (*doctor.EXTRAS, "llava quickstart", "4 bit:"):
        assert name in printed


def test_four_bit_is_tried_and_not_assumed():
    bitsandbytes_is_there = doctor.installed("bitsandbytes") is not None
    assert doctor._try_four_bit(on_gpu=False).startswith("works") == bitsandbytes_is_there


def test_old_and_missing_packages_are_problems_with_their_fix(monkeypatch, capsys):
    found = {"transformers": "4.57.1", "peft": None}
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: found.get(name, real(name)))
    assert main(["doctor", "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert any("transformers 4.57.1 is too old" in p and "pip install --upgrade" in p for p in problems)
    assert any("peft is missing: pip install 'peft>=" in p for p in problems)
    assert main(["doctor"]) == 1
    assert "no: fix the problems below first" in capsys.readouterr().out


def test_fixes_keep_their_brackets(monkeypatch, capsys):
    """rich would take `[qlora]` for a style."""
    monkeypatch.setattr(doctor, "_try_four_bit", lambda on_gpu: "is missing: pip install 'modeling-llava[qlora]'")
    main(["doctor"])
    assert "4 bit: is missing: pip install 'modeling-llava[qlora]'" in capsys.readouterr().out


def test_without_an_nvidia_gpu_a_machine_with_memory_can_be_talked_to_but_trains_no_7b():
    machine = {"gpus": [], "cpu": {"memory_gib": 16.0}, "four_bit": "works (cpu)"}
    works = doctor._what_works(machine)
    assert works["chat with 7B in 4 bit"] == "yes, slowly: on the CPU"
    assert works["chat with 7B in 16 bit"] == "no: requires 19 GiB of memory, there are 16.0"
    assert works["LoRA of 7B in bf16"] == works["QLoRA of 13B"] == "no: requires an NVIDIA GPU"
    apple = {"name": "Apple GPU (mps)", "memory_gib": 32.0, "compute_capability": None, "bf16": True}
    works = doctor._what_works({**machine, "gpus": [apple], "cpu": {"memory_gib": 32.0}, "four_bit": "is missing"})
    assert works["chat with 7B in 16 bit"] == "yes, on the Apple GPU"
    assert works["chat with 7B in 4 bit"] == "no: 4 bit is missing"


def test_small_gpu_without_bf16(monkeypatch):
    gpu = {"name": "small", "memory_gib": 8.0, "compute_capability": "7.5", "bf16": False}
    works = doctor._what_works({"gpus": [gpu], "four_bit": "works (cuda)"})
    assert works["QLoRA of 7B (qlora-8gb … qlora-24gb)"] == "yes"
    assert works["LoRA of 7B in bf16"] == "no: requires 20.0 GiB of GPU memory, there are 8.0"
    assert "fp16" in works["bf16"]


def test_versions_are_compared_as_numbers():
    assert doctor.is_older("2.9.1", "2.13") and not doctor.is_older("2.13.0+cpu", "2.6")


def test_oldest_versions_are_those_of_setup(request):
    setup = (request.config.rootpath / "setup.py").read_text()
    for package, oldest in doctor.CORE.items():
        assert re.search(rf'"{package}>={re.escape(oldest)}[",]', setup), package
    assert f'"transformers>={versions.TRANSFORMERS[0]},<{versions.TRANSFORMERS[1]}"' in setup
