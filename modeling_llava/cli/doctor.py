"""`llava doctor`: versions, GPU, 4-bit support, disk, and what will work on this machine."""

import argparse
import json
import os
import platform
import shutil
import subprocess
from importlib import metadata

from ..constants import installed


USES_MODELS = False

OLDEST_DRIVER = {"12": 525, "13": 580}
"""Of NVIDIA's, for each major version of CUDA."""

CUDA_TORCH = (
    "install it again with the command that https://pytorch.org/get-started gives for this system and its driver"
)
"""A build for the GPU. `pip install torch` installs one on Linux, and one for the CPU on Windows."""

OTHER_TORCH = "install a build of torch for {} CUDA: https://pytorch.org/get-started/locally"
BITSANDBYTES = "bitsandbytes is not installed: pip install 'modeling-llava[qlora]' (Linux, Windows)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    report = diagnose()
    print(json.dumps(report, indent=2)) if args.json else _print(report)
    return 1 if report["problems"] else 0


def diagnose() -> dict:
    """The machine, what works on it, and `problems`, each with its fix."""
    packages, extras, problems = _packages()
    memory_gib = None
    if packages["psutil"] is not None:
        import psutil

        memory_gib = round(psutil.virtual_memory().total / 2**30, 1)
    gpus = [] if packages["torch"] is None else _gpus(problems, memory_gib)
    on_gpu = any(gpu["compute_capability"] for gpu in gpus)
    report = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages,
        "extras": extras,
        "gpus": gpus,
        "cpu": {"cores": os.cpu_count(), "memory_gib": memory_gib},
        "four_bit": _try_four_bit(on_gpu) if extras["qlora"]["bitsandbytes"] else BITSANDBYTES,
        "disk_free_gib": round(shutil.disk_usage(os.getcwd()).free / 2**30, 1),
        "problems": problems,
    }
    report["works"] = {"llava": "no: fix the problems below first"} if problems else _what_works(report)
    return report


def _packages() -> tuple[dict, dict, list[str]]:
    """Installed versions of what is required and of each extra, and what is wrong with them, by the package's own metadata."""
    from packaging.requirements import Requirement

    packages, extras, problems = {}, {}, []
    for line in metadata.requires("modeling-llava"):
        requirement = Requirement(line)
        found = installed(requirement.name)
        if requirement.marker is not None:
            extra = str(requirement.marker).split('"')[1]
            if extra not in ("all", "dev"):
                extras.setdefault(extra, {})[requirement.name] = found
            continue
        packages[requirement.name] = found
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} {found or 'is missing'}: pip install --upgrade '{requirement}'.")
    return packages, extras, problems


def _gpus(problems: list[str], memory_gib: float | None) -> list[dict]:
    """The GPUs that torch finds; why it cannot use one is added to the problems."""
    import torch

    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    architectures = [name for name in torch.cuda.get_arch_list() if name.startswith(("sm_", "compute_"))]
    gpus = []
    for card in cards:
        capability, total = f"{card.major}.{card.minor}", round(card.total_memory / 2**30, 1)
        gpus.append(
            {"name": card.name, "memory_gib": total, "compute_capability": capability, "bf16": card.major >= 8}
        )
        if architectures and not any(_runs_on(name, card.major, card.minor) for name in architectures):
            other = OTHER_TORCH.format("a newer" if card.major >= 10 else "an older")
            problems.append(f"torch {torch.__version__} has kernels for {architectures}, not for {card.name}: {other}")
    if gpus:
        return gpus
    if torch.backends.mps.is_available():
        return [{"name": "Apple GPU (mps)", "memory_gib": memory_gib, "compute_capability": None, "bf16": True}]
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True).stdout.partition(".")[0]
        build = torch.version.cuda
        needed = OLDEST_DRIVER.get((build or "").partition(".")[0], 0)
        if build is None:
            problems.append(f"torch {torch.__version__} is a build for the CPU, but there is a GPU: {CUDA_TORCH}")
        elif driver.isdigit() and int(driver) < needed:
            problems.append(
                f"CUDA {build} needs NVIDIA's driver {needed}, it is {driver}: update it, or {OTHER_TORCH.format('an older')}"
            )
    return []


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether a GPU takes kernels for `sm_86` (those of its major version, from that minor one on) or PTX, `compute_90` (from there on)."""
    kind, _, number = architecture.partition("_")
    oldest = divmod(int(number.rstrip("af")), 10)
    return oldest <= (major, minor) and (kind == "compute" or oldest[0] == major)


def _try_four_bit(on_gpu: bool) -> str:
    """Runs one 4-bit layer forward and backward: an installed package may not work here."""
    try:
        import bitsandbytes
        import torch

        device = "cuda" if on_gpu else "cpu"
        layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32).to(device)
        layer.support_avx512bf16_for_cpu = False
        inputs = torch.ones(2, 64, device=device, requires_grad=True)
        layer(inputs).sum().backward()
        return f"works ({device})" if torch.isfinite(inputs.grad).all() else f"gives no finite gradients on {device}"
    except Exception as error:  # a compiled library that does not load, a kernel that is missing: whatever they raise
        return f"fails: {type(error).__name__}: {error}"


def _what_works(report: dict) -> dict[str, str]:
    """Without an NVIDIA GPU, chat works in the machine's memory, which the system uses too; training takes too long."""
    gpus = [gpu for gpu in report["gpus"] if gpu["compute_capability"]]
    memory = max((gpu["memory_gib"] for gpu in gpus), default=(report["cpu"]["memory_gib"] or 0.0) / 1.25)
    works = {"llava quickstart": "yes, on the CPU"}
    for what, needed in _needed_gib().items():
        is_apple = bool(report["gpus"]) and not gpus and "16 bit" in what
        if "4 bit" in what and not report["four_bit"].startswith("works"):
            works[what] = f"no: 4 bit {report['four_bit']}"
        elif not gpus and not what.startswith("chat"):
            works[what] = "no: requires an NVIDIA GPU"
        elif memory < needed:
            works[what] = f"no: requires {needed} GiB, there are {memory:.1f}"
        else:
            works[what] = "yes" if gpus else "yes, on the Apple GPU" if is_apple else "yes, slowly: on the CPU"
    if gpus and not any(gpu["bf16"] for gpu in gpus):
        works["bf16"] = "no: recipes use fp16 here"
    return works


def _needed_gib() -> dict[str, float]:
    """Least GPU memory of each use, in GiB, as `llava estimate` computes it."""
    from ..training.estimate import CUDA_CONTEXT, GIB, Settings, estimate, load_config, sizes_of
    from ..training.recipes import read_recipe

    needed = {}
    for size in ("7B", "13B"):
        sizes = sizes_of(load_config(f"llava-hf/llava-1.5-{size.lower()}-hf"))
        for adapter, preset, words in (("qlora", "qlora-8gb", "4 bit"), ("lora", "lora", "16 bit")):
            chat = estimate(sizes, Settings(adapter=adapter, lora_r=0))
            needed[f"chat with {size} in {words}"] = sum(chat.weights.values()) + chat.generation + CUDA_CONTEXT
            least = {"activation_checkpointing": "offload", "per_device_train_batch_size": 1}
            needed[f"LoRA of {size} in {words}"] = estimate(sizes, Settings(**read_recipe(preset) | least)).total
    return {what: round(size / GIB, 1) for what, size in needed.items()}


def _print(report: dict) -> None:
    print(f"Python {report['python']}, {report['system']}")
    for name, found in {"installed": report["packages"], **report["extras"]}.items():
        listed = ", ".join(f"{package} {version or 'missing'}" for package, version in found.items())
        print(f"{name}: {listed}")
    print("To install what an extra lacks: pip install 'modeling-llava[EXTRA]', such as [web], or [all].")
    print("CPU: {cores} cores, {memory_gib} GiB".format(**report["cpu"]))
    print(f"disk: {report['disk_free_gib']} GiB free here; the files of a 7B model take 14 GiB")
    for gpu in report["gpus"] or [None]:
        print(f"GPU: {gpu['name']}, {gpu['memory_gib']} GiB" if gpu else "GPU: none that torch can use")
    print(f"4 bit: {report['four_bit']}\n")
    for what, answer in report["works"].items():
        print(f"{what:24} {answer}")
    for problem in report["problems"]:
        print(f"problem: {problem}")
