"""
Float32 matrix products on the CPU: PyTorch's own (MKL) against oneDNN, which `modeling_llava.kernels.cpu_linear` uses.

    OMP_NUM_THREADS=2 python examples/benchmarks/products.py

Shapes are those of `train.py`: a layer of 384 × 1024, and the head. GFLOP/s, median of 15. Written before the first run:
on a processor whose vector width MKL does not use (AMD with AVX-512) twice, on Intel as fast as before.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from train import machine

from modeling_llava.kernels import cpu_linear as onednn


RESULT = Path(__file__).parents[1] / "results" / "benchmarks" / "products.json"
SHAPES = [(3735, 384, 384), (3735, 384, 1024), (3735, 1024, 384), (512, 384, 32_064), (60, 64, 64)]


def speed(function, operations: int) -> float:
    times = []
    for _ in range(17):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return operations / statistics.median(times[2:]) / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if not onednn.is_available():
        raise SystemExit("This PyTorch has no oneDNN operator: everything is computed by `mm`, as before.")
    rows = []
    print(f"{'positions × in × out':24}{'what':24}{'mm':>8}{'oneDNN':>8}{'faster':>10}")
    for positions, inner, outer in SHAPES:
        x, weight, grad = torch.randn(positions, inner), torch.randn(outer, inner), torch.randn(positions, outer)
        products = {
            "forward": (x, weight),
            "gradient of the input": (grad, weight.t()),
            "gradient of the weight": (x.t(), grad.t()),
        }
        for what, (a, b) in products.items():
            operations = 2 * positions * inner * outer
            mm = speed(lambda a=a, b=b: a @ b.t(), operations)
            dnn = speed(lambda a=a, b=b: onednn._product(a, b), operations)
            rows.append({"shape": [positions, inner, outer], "what": what, "mm": round(mm), "onednn": round(dnn)})
            print(f"{f'{positions} × {inner} × {outer}':24}{what:24}{mm:8.0f}{dnn:8.0f}{dnn / mm:8.2f} ×")
    args.out.write_text(json.dumps({"machine": machine(), "unit": "GFLOP/s", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
