"""The GPU benchmark, run from end to end on tiny shapes: stock and ours compute the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "train_gpu.py"
DRY = ["--plan", "dry", "--device", "cpu"]


@pytest.mark.slow
def test_gpu_benchmark_writes_each_row_and_measures_none_twice(tmp_path):
    command = [sys.executable, SCRIPT, *DRY, "--out", str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["step", "trainer", "decode"]
    assert all(row["stock_speed"] > 0 and row["ours_speed"] > 0 for row in rows), rows
    assert rows[0]["losses_differ_by"] < 1e-4 and rows[0]["gradient_norms_differ_by"] < 1e-3
    assert rows[0]["ours_estimated_gib"] > 0
    before = (tmp_path / "result.json").stat().st_mtime_ns
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert (tmp_path / "result.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_gpu_benchmark_computes_the_same_on_a_4_bit_base():
    pytest.importorskip("bitsandbytes")
    losses = []
    for side in ("stock", "ours"):
        command = [sys.executable, SCRIPT, *DRY, "--measure", "step", "13b-qlora", side, "mix"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        losses.append(json.loads(done.stdout.splitlines()[-1])["losses"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
