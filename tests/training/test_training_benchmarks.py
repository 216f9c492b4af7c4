"""The GPU benchmark, run from end to end on tiny shapes: stock and ours compute the same."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "train_gpu.py"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["7b-lora", "13b-qlora"])
def test_gpu_benchmark_runs_on_tiny_shapes(case, tmp_path):
    if "qlora" in case and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    words = ["--tiny", "--device", "cpu", "--rounds", "1", "--only", case, "--out", str(tmp_path / "result.json")]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]  # the script itself compares losses and gradient norms
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["workload"] for row in rows] == ["mix", "2048"]
    assert all(row["stock_tokens_per_second"] > 0 and row["ours_peak_gib"] > 0 for row in rows)
    assert all(row["estimated_gib"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_benchmark_without_a_gpu_is_one_line_and_2():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "no CUDA GPU" in done.stderr.splitlines()[-1]
