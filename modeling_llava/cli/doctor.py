"""`llava doctor`: versions, GPU, 4-bit support, disk, and what will work on this machine."""

import argparse

from ..versions import TRANSFORMERS, installed, is_older


USES_MODELS = False

CORE = {"torch": "2.6", "transformers": TRANSFORMERS[0], "accelerate": "1.10", "datasets": "4.0", "huggingface_hub": "1.0",
        "peft": "0.18", "pillow": "10.1", "safetensors": "0.5", "sentencepiece": "0.2", "tokenizers": "0.22"}  # fmt: skip
"""Oldest supported version of each package; setup.py says the same (a test holds it)."""

EXTRAS = {
    "qlora": (["bitsandbytes"], "train and run in 4 bit"),
    "plots": (["matplotlib"], "loss curves and answer grids"),
    "engine": (["openai", "spacy"], "data engine: instruction data, concept filter"),
    "ray": (["ray"], "the concept filter on a cluster"),
    "eval": (["openai", "sacrebleu"], "judged benchmarks"),
    "web": (["gradio"], "llava web"),
    "chat": (["prompt_toolkit"], "llava chat with history"),
    "gguf": (["gguf"], "llama.cpp and Ollama files"),
}

NEEDS_GIB = {
    "chat with 7B in 4 bit": 6.0,
    "QLoRA of 7B (qlora-8gb … qlora-24gb)": 7.5,
    "QLoRA of 13B": 12.5,
    "chat with 7B in 16 bit": 15.5,
    "LoRA of 7B in bf16": 20.0,
}
"""Least GPU memory, in GiB; `llava estimate RECIPE` computes it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    report = diagnose()
    if args.json:
        import json

        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0 if not report["problems"] else 1


def diagnose() -> dict:
    """
    The machine and what is wrong with it.

    Returns:
        `dict`: `python`, `packages`, `extras`, `gpus`, `cpu`, `four_bit`, `disk_free_gib`, `works`, `problems` (each with its
        fix).
    """
    import os
    import platform
    import shutil

    problems = []
    packages = {name: installed(name) for name in CORE}
    for name, oldest in CORE.items():
        found = packages[name]
        if found is None:
            problems.append(f"{name} is missing: pip install '{name}>={oldest}'.")
        elif is_older(found, oldest):
            problems.append(f"{name} {found} is too old: pip install --upgrade '{name}>={oldest}'.")
    if packages["transformers"] and not is_older(packages["transformers"], TRANSFORMERS[1]):
        problems.append(
            f"transformers {packages['transformers']} is not tested: pip install 'transformers<{TRANSFORMERS[1]}'."
        )
    extras = {
        name: {"for": purpose, "packages": {package: installed(package) for package in names}}
        for name, (names, purpose) in EXTRAS.items()
    }
    report = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages,
        "extras": extras,
        "gpus": [],
        "cpu": {"cores": os.cpu_count(), "memory_gib": _memory_gib()},
        "four_bit": "not tested: torch is missing",
        "disk_free_gib": round(shutil.disk_usage(os.getcwd()).free / 2**30, 1),
        "problems": problems,
    }
    if packages["torch"] is not None:
        report["gpus"] = _gpus()
        report["four_bit"] = _try_four_bit(bool(report["gpus"]))
    if report["disk_free_gib"] < 20:
        report["note"] = f"{report['disk_free_gib']} GiB of disk are free here; a 7B model takes 14 GiB."
    report["works"] = _what_works(report)
    return report


def _memory_gib() -> float | None:
    try:
        import psutil
    except ImportError:
        return None
    return round(psutil.virtual_memory().total / 2**30, 1)


def _gpus() -> list[dict]:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "compute_capability": f"{properties.major}.{properties.minor}",
                "bf16": properties.major >= 8,
            }
        )
    if not gpus and torch.backends.mps.is_available():
        gpus.append({"name": "Apple GPU (mps)", "memory_gib": _memory_gib(), "compute_capability": None, "bf16": True})
    return gpus


def _try_four_bit(on_gpu: bool) -> str:
    """Runs one 4-bit layer forward and backward: an installed package may not work here."""
    try:
        import bitsandbytes
        import torch
    except ImportError:
        return "bitsandbytes is not installed: pip install 'modeling-llava[qlora]' (Linux, Windows)"
    except Exception as error:  # it loads a compiled library
        return f"bitsandbytes does not load: {error}"
    try:
        device = "cuda" if on_gpu else "cpu"
        layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32).to(device)
        layer.support_avx512bf16_for_cpu = False
        inputs = torch.ones(2, 64, device=device, requires_grad=True)
        layer(inputs).sum().backward()
        return f"works ({device})" if torch.isfinite(inputs.grad).all() else f"gives no finite gradients on {device}"
    except Exception as error:
        return f"fails: {type(error).__name__}: {error}"


def _what_works(report: dict) -> dict[str, str]:
    if report.get("problems"):
        return {"llava": "no: fix the problems below first"}
    gpus = [gpu for gpu in report["gpus"] if gpu["compute_capability"]]
    memory = max((gpu["memory_gib"] for gpu in gpus), default=0.0)
    works = {"llava quickstart (CPU)": "yes"}
    for what, needed in NEEDS_GIB.items():
        four_bit = "4 bit" in what or "QLoRA" in what
        if four_bit and not report["four_bit"].startswith("works"):
            works[what] = f"no: 4 bit {report['four_bit']}"
        elif not gpus:
            works[what] = _without_nvidia(report, what, needed)
        elif memory < needed:
            works[what] = f"no: requires {needed} GiB of GPU memory, there are {memory}"
        else:
            works[what] = "yes"
    if gpus and not any(gpu["bf16"] for gpu in gpus):
        works["bf16"] = "no: recipes use fp16 here"
    return works


def _without_nvidia(report: dict, what: str, needed: float) -> str:
    """On a CPU or an Apple GPU, which use the machine's memory: chat works, training takes too long."""
    memory = report["cpu"]["memory_gib"] or 0.0
    if not what.startswith("chat"):
        return "no: requires an NVIDIA GPU"
    if memory < 1.25 * needed:  # the system uses it too
        return f"no: requires {1.25 * needed:.0f} GiB of memory, there are {memory}"
    return "yes, on the Apple GPU" if report["gpus"] and "4 bit" not in what else "yes, slowly: on the CPU"


def _print(report: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)  # fixes have brackets
    console.print(f"Python {report['python']}, {report['system']}", soft_wrap=True)
    table = Table("package", "found", "needed")
    for name, found in report["packages"].items():
        table.add_row(name, found or "missing", f"≥ {CORE[name]}")
    console.print(table)
    table = Table("extra", "for", "packages")
    for name, extra in report["extras"].items():
        found = ", ".join(f"{package} {version or 'missing'}" for package, version in extra["packages"].items())
        table.add_row(name, extra["for"], found)
    console.print(table)
    if any(None in extra["packages"].values() for extra in report["extras"].values()):
        console.print("To install what an extra lacks: pip install 'modeling-llava[EXTRA]', such as [web], or [all].")
    cpu = report["cpu"]
    console.print(
        f"CPU: {cpu['cores']} cores, {cpu['memory_gib']} GiB; {report['disk_free_gib']} GiB of disk free here"
    )
    for gpu in report["gpus"]:
        console.print(f"GPU: {gpu['name']}, {gpu['memory_gib']} GiB, bf16: {'yes' if gpu['bf16'] else 'no'}")
    if not report["gpus"]:
        console.print("GPU: none that torch can use")
    console.print(f"4 bit: {report['four_bit']}", soft_wrap=True)
    table = Table("here", "works")
    for what, answer in report["works"].items():
        table.add_row(what, answer)
    console.print(table)
    for problem in report["problems"]:
        console.print(f"problem: {problem}", style="red", soft_wrap=True)
    if "note" in report:
        console.print(f"note: {report['note']}", soft_wrap=True)
