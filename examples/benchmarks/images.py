"""
Images to pixels: `LlavaImageProcessor` against stock transformers' Pillow one, on the same pictures, in one process.

    OMP_NUM_THREADS=1 python examples/benchmarks/images.py
    OMP_NUM_THREADS=1 python examples/benchmarks/images.py --image photo.jpg --rounds 51

The two take turns, so that whatever else the machine does slows both; the figures are medians over the rounds, in CPU
milliseconds of one core per image, and the pixels of both are compared first. "file" starts at the JPEG on disk (90 kB;
decoding it takes both equally long), the other rows at the decoded picture; "8 files" are a batch as a worker of a
`DataLoader` makes it. Writes `examples/results/benchmarks/images.json`.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from modeling_llava import LlavaImageProcessor
from modeling_llava.data import load_image


RESULT = Path(__file__).parents[1] / "results" / "benchmarks" / "images.json"


def picture(width: int, height: int) -> Image.Image:
    """Soft shapes and a little noise: about as hard for JPEG as a photograph."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.normal(0, 6, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def measure(ours, stock, rounds: int) -> dict:
    """Median CPU time of each, in milliseconds, and the ratio."""
    times = {"stock": [], "ours": []}
    for number in range(rounds + 3):
        for name, function in (("stock", stock), ("ours", ours)):
            start = time.thread_time()
            function()
            if number >= 3:  # the first ones warm caches up
                times[name].append(time.thread_time() - start)
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    return {**medians, "ratio": medians["stock"] / medians["ours"]}


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
    parser.add_argument("--out", default=str(RESULT), help="where to write the result")
    args = parser.parse_args()
    if args.rounds < 5:
        parser.error("--rounds must be at least 5")
    torch.set_num_threads(1)

    landscape = picture(640, 480)
    if args.image:
        landscape = load_image(args.image).resize((640, 480), Image.BICUBIC)
    portrait = landscape.transpose(Image.Transpose.ROTATE_90)
    options = {"size": {"shortest_edge": args.size}, "crop_size": {"height": args.size, "width": args.size}}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "picture.jpg")
        landscape.save(path, quality=90)
        landscape = load_image(path)
        cases = [
            (f"640×480 → {args.size}, padded", True, landscape, landscape),
            (f"640×480 file → {args.size}, padded", True, path, path),
            (f"480×640 → {args.size}, padded", True, portrait, portrait),
            (f"640×480 → {args.size}, cropped", False, landscape, landscape),
            (f"640×480 file → {args.size}, cropped", False, path, path),
            (f"8 of 640×480 → {args.size}, padded", True, [landscape] * 8, [landscape] * 8),
            (f"8 files of 640×480 → {args.size}, padded", True, [path] * 8, [path] * 8),
        ]
        for name, pad, ours_in, stock_in in cases:
            ours, stock = LlavaImageProcessor(do_pad=pad, **options), LlavaImageProcessorPil(do_pad=pad, **options)
            count = len(ours_in) if isinstance(ours_in, list) else 1

            def run_ours(ours=ours, images=ours_in if count > 1 else [ours_in]):
                images = [load_image(image) if isinstance(image, str) else image for image in images]
                return ours(images, return_tensors="pt").pixel_values

            def run_stock(stock=stock, image=stock_in):
                return stock(image, return_tensors="pt").pixel_values

            difference = (run_ours() - run_stock()).abs().max().item()
            result = measure(run_ours, run_stock, args.rounds)
            rows.append(
                {
                    "case": name,
                    "stock_ms": round(result["stock"] / count, 3),
                    "ours_ms": round(result["ours"] / count, 3),
                    "ratio": round(result["ratio"], 2),
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
        "picture": args.image or "drawn",
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{'':38}{'stock ms':>10}{'ours ms':>10}{'faster':>9}{'difference':>12}")
    for row in rows:
        print(
            f"{row['case']:38}{row['stock_ms']:10.2f}{row['ours_ms']:10.2f}{row['ratio']:8.2f}×"
            f"{row['largest_difference']:12.1e}"
        )
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
