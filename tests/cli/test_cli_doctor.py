"""`llava doctor` tells the truth about this machine, and about machines that lack something."""

import json
import subprocess
from importlib import metadata
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from modeling_llava import constants
from modeling_llava.cli import doctor
from modeling_llava.cli.main import main


def test_report_is_about_this_machine(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"] == metadata.version("torch")
    assert len(report["gpus"]) >= torch.cuda.device_count()
    assert report["problems"] == []
    assert report["cpu"]["memory_gib"] > 0 and report["disk_free_gib"] > 0
    assert {"qlora", "plots", "engine", "ray", "eval", "web", "gguf"} <= report["extras"].keys()
    assert report["four_bit"].startswith("works") == (report["extras"]["qlora"]["bitsandbytes"] is not None)
    with mock.patch("bitsandbytes.nn.Linear4bit", side_effect=OSError("libcudart.so.13")):
        assert doctor._try_four_bit(on_gpu=False) == "fails: OSError: libcudart.so.13"


def test_old_and_missing_packages_are_problems_with_their_fix(monkeypatch, capsys):
    found = {"transformers": "4.57.1", "peft": None, "torch": "99.0+cpu"}
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: found.get(name, real(name)))
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "transformers 4.57.1: pip install --upgrade 'transformers<6,>=5.23'" in printed
    assert "peft is missing: pip install --upgrade 'peft>=" in printed
    assert "torch 99" not in printed.partition("problem")[2]
    assert "no: fix the problems below first" in printed


def test_without_an_nvidia_gpu_a_machine_with_memory_can_be_talked_to_but_trains_no_7b():
    machine = {"gpus": [], "cpu": {"memory_gib": 16.0}, "four_bit": "works (cpu)"}
    works = doctor._what_works(machine)
    assert works["chat with 7B in 4 bit"] == "yes, slowly: on the CPU"
    assert works["chat with 7B in 16 bit"].startswith("no: requires 15")
    assert works["LoRA of 7B in 16 bit"] == works["LoRA of 13B in 4 bit"] == "no: requires an NVIDIA GPU"
    apple = {"name": "Apple GPU (mps)", "memory_gib": 32.0, "compute_capability": None, "bf16": True}
    works = doctor._what_works({**machine, "gpus": [apple], "cpu": {"memory_gib": 32.0}, "four_bit": "is missing"})
    assert works["chat with 7B in 16 bit"] == "yes, on the Apple GPU"
    assert works["chat with 7B in 4 bit"] == "no: 4 bit is missing"


@pytest.mark.parametrize("memory, fits", [(8.0, {"7B in 4 bit"}), (12.0, {"7B in 4 bit", "13B in 4 bit"})])
def test_what_fits_a_gpu_is_what_its_preset_is_made_for(memory, fits):
    gpu = {"name": "small", "memory_gib": memory, "compute_capability": "7.5", "bf16": False}
    works = doctor._what_works({"gpus": [gpu], "four_bit": "works (cuda)", "cpu": {"memory_gib": 16.0}})
    assert {
        what.removeprefix("LoRA of ") for what, answer in works.items() if "LoRA" in what and answer == "yes"
    } == fits
    assert "fp16" in works["bf16"]


@pytest.mark.parametrize(
    "cuda, driver, problem",
    [
        (None, "560.94", "build for the CPU, but there is a GPU"),
        ("13.0", "560.94", "needs NVIDIA's driver 580, it is 560"),
        ("12.6", "560.94", None),
        ("13.0", None, None),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_a_problem_with_its_fix(cuda, driver, problem, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None if driver is None else f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda *command, **kwargs: SimpleNamespace(stdout=f"{driver}\n"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    problems = doctor.diagnose()["problems"]
    assert len(problems) == (problem is not None) and all(problem in found for found in problems)


@pytest.mark.parametrize(
    "name, version, built, fix",
    [
        ("GTX 1080", (6, 1), ["sm_75", "sm_90a", "sm_120", "compute_120"], "for an older CUDA"),
        ("RTX 5090", (12, 0), ["sm_50", "sm_86", "sm_90"], "for a newer CUDA"),
        ("RTX 5090", (12, 0), ["sm_86", "compute_90"], None),
        ("RTX 4090", (8, 9), ["sm_75", "sm_86"], None),
        ("MI300", (9, 4), ["gfx942"], None),
    ],
)
def test_a_gpu_that_torch_has_no_kernels_for_is_a_problem(name, version, built, fix, monkeypatch):
    card = SimpleNamespace(name=name, total_memory=8 * 2**30, major=version[0], minor=version[1])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(doctor, "_try_four_bit", lambda on_gpu: "fails")
    problems = doctor.diagnose()["problems"]
    assert len(problems) == (fix is not None) and all(f"not for {name}: " in p and fix in p for p in problems)


def test_oldest_transformers_is_that_of_setup(request):
    setup = (request.config.rootpath / "setup.py").read_text()
    assert f'"transformers>={constants.TRANSFORMERS[0]},<{constants.TRANSFORMERS[1]}"' in setup
    assert constants.is_older("2.9.1", "2.13") and not constants.is_older("2.13.0+cpu", "2.6")
