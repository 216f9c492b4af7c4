"""llama.cpp, where it is: `run_llama_cpp` gives what it computes from a pair of GGUF files."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


PROGRAM = Path(__file__).with_name("conversion") / "run_llama_cpp.py"


def llama_cpp_python() -> str | None:
    """A Python that has llama-cpp-python: the one that `LLAVA_LLAMA_CPP_PYTHON` names, or this one."""
    if os.environ.get("LLAVA_LLAMA_CPP_PYTHON"):
        return os.environ["LLAVA_LLAMA_CPP_PYTHON"]
    return sys.executable if importlib.util.find_spec("llama_cpp") else None


needs_llama_cpp = pytest.mark.skipif(
    llama_cpp_python() is None,
    reason="llama.cpp is not here: pip install llama-cpp-python, or name a Python that has it in LLAVA_LLAMA_CPP_PYTHON",
)


def llava_with_llama_cpp(*words: str | Path) -> None:
    """A command of `llava` in this Python, to whose packages llama-cpp-python is added."""
    where = "import llama_cpp, pathlib; print(pathlib.Path(llama_cpp.__file__).parents[1])"
    folder = subprocess.check_output([llama_cpp_python(), "-c", where], text=True).strip()
    program = f"import sys; sys.path.append({folder!r}); from modeling_llava.cli.main import main; sys.exit(main(sys.argv[1:]))"
    _run(sys.executable, "-c", program, *map(str, words))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def run_llama_cpp(
    folder: Path, images: list[np.ndarray], prompts: list[str], work: Path, num_tokens: int = 12
) -> list[dict[str, np.ndarray]]:
    """
    For each image (uint8 `[height, width, 3]`) and prompt (`<__media__>` in place of the image): `ids` of the prompt (−200
    for the image), `features`, `logits` of the prompt's last token, and `greedy`, the ids of the answer.
    """
    work.mkdir(exist_ok=True)
    cases = []
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        np.save(work / f"{i}.npy", image)
        cases.append({"image": str(work / f"{i}.npy"), "prompt": prompt})
    files = {name: str(next(folder.glob(f"{name}-*.gguf"))) for name in ("model", "mmproj")}
    (work / "job.json").write_text(json.dumps({**files, "num_tokens": num_tokens, "cases": cases}))
    _run(llama_cpp_python(), str(PROGRAM), str(work / "job.json"), str(work / "out.npz"))
    result = np.load(work / "out.npz")
    return [{key: result[f"{key}_{i}"] for key in ("ids", "features", "logits", "greedy")} for i in range(len(images))]
