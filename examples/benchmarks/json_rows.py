"""
Reading large JSON files: a file of the shape of LLaVA-1.5's mix (665,000 rows, 1 GB) and one of COCO's instances.

    OMP_NUM_THREADS=1 python examples/benchmarks/json_rows.py --label after
    OMP_NUM_THREADS=1 PYTHONPATH=OTHER_CHECKOUT python examples/benchmarks/json_rows.py --label before

Each part runs in a process of its own, `--rounds` times; medians. Next to the seconds on the clock are those of the
processor, which other work on the machine changes less. "anonymous" is what the process itself holds, without the pages
of a mapped file, which the system takes back when it needs them.

* count: where the rows are. open: also every row is checked; then 10,000 rows of the opened file at random.
* shard: one of eight workers streams its rows; "first" is the wait for its first one.
* refused: count, in a file whose last row holds NaN, which msgspec refuses. lines: count, of JSON lines.
* coco: the boxes of 860,000 annotations with segmentations.

Predicted, before (each row is decoded in a window of text to see where it ends) → after (msgspec finds the rows):
count 9 → 1.5 s; open 30 → 28 s, as decoding and checking prevail; at random 40 → 50 µs a row; shard 12 → 5 s, its first
row 0 → 1.5 s; refused 9 → 20 s; lines as before; coco 14 → 13 s. Anonymous memory of open: 180 → 100 MB above the imports.

Measured, in seconds of the processor on two cores full of other work (one round): count 8.1 → 1.8; open 41 → 40 and 67 →
63 µs a row; shard 13.0 → 7.0, its first row after the whole file; refused 8.1 → 21; lines 1.1 → 1.3; coco 10 → 14, since an
item of 320 bytes is sought and read by itself. Anonymous memory of open: 200 → 108 MiB; the mapped file is 0.9 GiB.

refused since then, by `json` over the file as Latin-1 text (predicted: half of the time, the file's size in memory), with
100,000 rows (150 MB): 3.2 → 1.3 s and 6 → 158 MiB.

Writes `examples/results/benchmarks/json_rows.json`.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import psutil


RESULT = Path(__file__).parents[1] / "results" / "benchmarks" / "json_rows.json"
WORDS = "the a man dog red table stands next to with of is are in on image shows two people — “café” answer".split()


def write_files(folder: Path, number: int) -> None:
    rng = random.Random(0)
    text = " ".join(rng.choices(WORDS, k=50_000))

    def said(length: int) -> str:
        start = rng.randrange(len(text) - length)
        return text[start : start + length]

    with (
        open(folder / "mix.json", "w") as array,
        open(folder / "refused.json", "w") as refused,
        open(folder / "mix.jsonl", "w") as lines,
    ):
        for i in range(number):
            turns = rng.choice((1, 1, 2, 4, 8, 12))
            conversations = []
            for turn in range(turns):
                conversations.append({"from": "human", "value": "<image>\n" * (turn == 0) + said(60)})
                conversations.append({"from": "gpt", "value": said(rng.choice((20, 60, 400)))})
            row = {"id": f"{i:012d}", "image": f"coco/train2017/{i:012d}.jpg", "conversations": conversations}
            row = json.dumps(row)
            array.write(("[" if i == 0 else ", ") + row)
            refused.write(("[" if i == 0 else ", ") + (row if i < number - 1 else row[:-1] + ', "score": NaN}'))
            lines.write(row + "\n")
        array.write("]")
        refused.write("]")
    with open(folder / "coco.json", "w") as file:
        images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 480} for i in range(number // 6)]
        categories = [{"id": i, "name": f"thing {i}"} for i in range(80)]
        file.write(json.dumps({"info": {}, "images": images, "categories": categories})[:-1] + ', "annotations": [')
        for i in range(int(number * 1.3)):
            points = [round(rng.random() * 480, 2) for _ in range(rng.choice((16, 40, 90)))]
            box = [round(rng.random() * 200, 2) for _ in range(4)]
            item = {"segmentation": [points], "area": 702.1, "iscrowd": 0, "image_id": i % len(images), "bbox": box}
            file.write((i > 0) * ", " + json.dumps({**item, "category_id": i % 80, "id": i}))
        file.write("]}")


def measure(part: str, folder: Path) -> dict:
    """One part, in this process."""
    from modeling_llava.data import load_conversations
    from modeling_llava.data.sources import open_sources
    from modeling_llava.data_engine.coco import read_coco

    load_conversations([json.loads(next(open(folder / "mix.jsonl")))])  # imports, and first uses
    process, found, done = psutil.Process(), {}, threading.Event()

    def anonymous() -> float:
        memory = process.memory_info()
        return (memory.rss - memory.shared) / 2**20

    def watch() -> None:
        while not done.wait(0.01):
            peaks.append(anonymous())

    before, peaks = anonymous(), [0.0]
    watcher = threading.Thread(target=watch)
    watcher.start()
    start, cpu = time.perf_counter(), time.process_time()
    if part in ("count", "lines", "refused"):
        name = {"count": "mix.json", "lines": "mix.jsonl", "refused": "refused.json"}[part]
        found["rows"] = open_sources(str(folder / name))[0][0].count()
    elif part == "open":
        dataset = load_conversations(folder / "mix.json")
        found["rows"] = len(dataset)
    elif part == "shard":
        rows = iter(load_conversations(folder / "mix.json", streaming=True, rank=3, world_size=8))
        next(rows)
        found["first_seconds"] = time.perf_counter() - start
        found["rows"] = 1 + sum(1 for _ in rows)
    else:
        found["rows"] = sum(map(len, read_coco(folder / "coco.json")[2].values()))
    found |= {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - cpu}
    if part == "open":
        indices = random.Random(1).sample(range(len(dataset)), min(10_000, len(dataset)))
        cpu = time.process_time()
        for index in indices:
            dataset[index]
        found["processor_microseconds_per_random_row"] = 1e6 * (time.process_time() - cpu) / len(indices)
    done.set()
    watcher.join()
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    return found | {"anonymous_mebibytes_above_start": max(peaks) - before, "peak_rss_mebibytes": peak}


def main():
    parts = ("count", "open", "shard", "refused", "lines", "coco")
    parser = argparse.ArgumentParser()
    parser.add_argument("--label", default="after", help="what the results are written under")
    parser.add_argument("--rows", type=int, default=665_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the files there for another run")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--part", choices=parts, help="measure one part in this process")
    args = parser.parse_args()
    if args.part:
        print(json.dumps(measure(args.part, args.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        folder.mkdir(exist_ok=True)
        if not (folder / "coco.json").exists():
            write_files(folder, args.rows)
        results = json.loads(RESULT.read_text("utf-8")) if RESULT.exists() else {}
        results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        results["system"] = platform.platform()
        results["versions"] = {package: version(package) for package in ("msgspec", "numpy", "torch")}
        results["mebibytes"] = {file.name: round(file.stat().st_size / 2**20) for file in sorted(folder.iterdir())}
        measured = results.setdefault(args.label, {})
        for part in args.only:
            command = [sys.executable, __file__, "--folder", str(folder), "--part", part]
            runs = [json.loads(subprocess.check_output(command)) for _ in range(args.rounds)]
            measured[part] = {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
            print(args.label, part, measured[part], flush=True)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
