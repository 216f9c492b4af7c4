"""
Images to pixels: `LlavaImageProcessor` against stock transformers' Pillow one, on the same pictures.

    OMP_NUM_THREADS=1 python examples/benchmarks/images.py
    OMP_NUM_THREADS=1 python examples/benchmarks/images.py --image photo.jpg --rounds 51

Each side is measured twice: in a process of its own, as a worker of a `DataLoader` or a server is, the two in turn; and
both taking turns in one process, where the memory that one has freed saves the other page faults (stock has more than a
thousand per picture of its own, ours none). Figures are medians, in CPU milliseconds of one core per image; the pixels of
both are compared first. "file" starts at the JPEG on disk (decoding it takes both equally long), the other rows at the
decoded picture; "8 files" are a batch as a worker makes it. Writes `examples/results/benchmarks/images.json`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from tqdm import tqdm
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from modeling_llava import LlavaImageProcessor
from modeling_llava.data import load_image


SIDES = ("stock", "ours")
RESULT = Path(__file__).parents[1] / "results" / "benchmarks" / "images.json"


def picture(width: int, height: int) -> Image.Image:
    """Soft shapes and a little noise: about as hard for JPEG as a photograph."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.normal(0, 6, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def cases(path: str, size: int) -> dict:
    """Of each case the function of stock and ours, and how many images it takes."""
    landscape = load_image(path)
    portrait = landscape.transpose(Image.Transpose.ROTATE_90)
    inputs = {
        f"640×480 → {size}, padded": (True, [landscape]),
        f"640×480 file → {size}, padded": (True, [path]),
        f"480×640 → {size}, padded": (True, [portrait]),
        f"640×480 → {size}, cropped": (False, [landscape]),
        f"640×480 file → {size}, cropped": (False, [path]),
        f"8 of 640×480 → {size}, padded": (True, [landscape] * 8),
        f"8 files of 640×480 → {size}, padded": (True, [path] * 8),
    }
    options = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    result = {}
    for name, (pad, images) in inputs.items():
        ours, stock = LlavaImageProcessor(do_pad=pad, **options), LlavaImageProcessorPil(do_pad=pad, **options)

        def run_ours(ours=ours, images=images):
            images = [load_image(image) if isinstance(image, str) else image for image in images]
            return ours(images, return_tensors="pt").pixel_values

        def run_stock(stock=stock, images=images):
            return stock(images, return_tensors="pt").pixel_values

        result[name] = {"stock": run_stock, "ours": run_ours, "images": len(images)}
    return result


def measure(functions: dict, rounds: int) -> dict[str, float]:
    """Median CPU milliseconds per image of each function; they take turns."""
    times = {name: [] for name in SIDES if name in functions}
    for number in range(rounds + 3):
        for name in times:
            start = time.thread_time()
            functions[name]()
            if number >= 3:  # the first ones warm caches up
                times[name].append(time.thread_time() - start)
    return {name: statistics.median(values) * 1e3 / functions["images"] for name, values in times.items()}


def measure_in_own_process(side: str, case: str, path: str, args: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--side", side, "--case", case, "--path", path]
    command += ["--size", str(args.size), "--rounds", str(args.rounds)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", help="a picture of your own in place of a drawn one (it is resized to 640×480)")
    parser.add_argument("--size", type=int, default=336, help="pixels of the vision tower (default: 336)")
    parser.add_argument("--rounds", type=int, default=31, help="rounds to take the median of (default: 31)")
    parser.add_argument("--turns", type=int, default=3, help="processes of each side (default: 3)")
    parser.add_argument("--out", default=str(RESULT), help="where to write the result")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # what a process of one side is told
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 5 or args.turns < 1:
        parser.error("--rounds must be at least 5, --turns at least 1")
    torch.set_num_threads(1)
    if args.side:
        functions = cases(args.path, args.size)[args.case]
        print(measure({args.side: functions[args.side], "images": functions["images"]}, args.rounds)[args.side])
        return

    landscape = load_image(args.image).resize((640, 480), Image.BICUBIC) if args.image else picture(640, 480)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "picture.jpg")
        landscape.save(path, quality=90)
        kilobytes = os.path.getsize(path) / 1000
        for name, functions in tqdm(cases(path, args.size).items(), desc="Cases", unit="case"):
            difference = (functions["ours"]() - functions["stock"]()).abs().max().item()
            own = {side: [] for side in SIDES}
            for _ in range(args.turns):
                for side in SIDES:
                    own[side].append(measure_in_own_process(side, name, path, args))
            stock, ours = (statistics.median(own[side]) for side in SIDES)
            together = measure(functions, args.rounds)
            rows.append(
                {
                    "case": name,
                    "stock_ms": round(stock, 3),
                    "ours_ms": round(ours, 3),
                    "ratio": round(stock / ours, 2),
                    "in_one_process": {
                        "stock_ms": round(together["stock"], 3),
                        "ours_ms": round(together["ours"], 3),
                        "ratio": round(together["stock"] / together["ours"], 2),
                    },
                    "largest_difference": difference,
                }
            )
    machine = {
        "cpu": cpu_name(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pillow": PIL.__version__,
        "rounds": args.rounds,
        "turns": args.turns,
        "jpeg_kb": round(kilobytes, 1),
        "picture": args.image or "drawn",
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{'':38}{'stock ms':>10}{'ours ms':>10}{'faster':>9}{'in one process':>16}{'difference':>12}")
    for row in rows:
        print(
            f"{row['case']:38}{row['stock_ms']:10.2f}{row['ours_ms']:10.2f}{row['ratio']:8.2f}×"
            f"{row['in_one_process']['ratio']:15.2f}×{row['largest_difference']:12.1e}"
        )
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
