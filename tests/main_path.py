"""The main path, measured: which files of the package a small `llava train` with LoRA executes, and how long they are."""

import ast
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from coverage import CoverageData
from published import build
from tiny_predictor import picture


PACKAGE = Path(__file__).parents[1] / "modeling_llava"


def code_lines(path: Path) -> int:
    """Lines with code: neither blank, nor comment, nor docstring."""
    source = path.read_text("utf-8")
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and n not in docstrings for n, line in lines)


def runs_a_function(path: Path, executed: set[int]) -> bool:
    """Whether a line inside of a function was executed, not its definition alone."""
    return any(
        executed & set(range(node.body[0].lineno, node.end_lineno + 1))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
    )


def executed_files(folder: Path, *command: str, said: str = "") -> list[Path]:
    """The package's files of which `llava COMMAND` executes a function, in this process' environment."""
    data = folder / "coverage"
    run = [sys.executable, "-m", "coverage", "run", f"--data-file={data}", f"--source={PACKAGE}", "-m"]
    done = subprocess.run(
        [*run, "modeling_llava.cli.main", *command], cwd=folder, input=said, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    read = CoverageData(str(data))
    read.read()
    files = (Path(name) for name in sorted(read.measured_files()))
    return [path for path in files if runs_a_function(path, set(read.lines(str(path)) or ()))]


def measure(folder: Path) -> dict[str, list[Path]]:
    """`{"train": files, "chat": further files}` of README's two commands, on a tiny model in llava-hf's form."""
    (folder / "images").mkdir()
    rows = []
    for number in range(4):
        picture(number).save(folder / "images" / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A picture."}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "my.json").write_text(json.dumps(rows))
    settings = ["max_steps=2", "per_device_train_batch_size=2", "report_to=none", "lora_r=4"]
    words = ["lora", f"model={build('llava-hf')}", "data=my.json", "image_folder=images", "output_dir=run", *settings]
    train = executed_files(folder, "train", *words)
    words = ["chat", "run", "--image", "images/0.png", "--max-new-tokens", "4"]
    chat = executed_files(folder, *words, said="What is it?\n")
    return {"train": train, "chat": [path for path in chat if path not in train]}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for command, files in measure(Path(scratch)).items():
            print(f"{command}: {len(files)} files, {sum(map(code_lines, files))} lines of code")
            for path in files:
                print(f"  {code_lines(path):4d}  {path.relative_to(PACKAGE)}")
