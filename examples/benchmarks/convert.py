"""
Conversion of a checkpoint of about 4 GB: seconds against a plain copy of its files, and peak memory against the largest shard.

    python examples/benchmarks/convert.py                          # makes the checkpoint (4 GB) in a temporary folder
    python examples/benchmarks/convert.py --folder DIR --layers 4  # elsewhere, and smaller

A LLaVA with random bfloat16 weights (CLIP-L/14 at 336 pixels, Llama layers of 2048) goes original → HF → original and HF →
GGUF (f16). Each conversion is a process of its own; its memory is the highest resident size less what the process had
after its imports. The same checkpoint's weights are copied with `shutil.copyfile` on the same disk. Both find the source in
the system's cache, both times include flushing, they take turns at being first, and the first round is left out. The checks
at the end of a conversion load a model and are left out; `--check` includes them. The tensors that came back from original →
HF → original are compared bit for bit.

Wanted: time ≤ 1.5 × the copy for safetensors, memory < 1.5 × the largest shard written (2 GB).
Predicted before the first run: time 1.1 × (reading and writing once, renaming apart), memory 0.6 × (one tensor at a time,
and the mapped pages that the system has not taken back).
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).parents[2]
RESULT = ROOT / "examples" / "results" / "benchmarks" / "convert.json"
TOKENIZER = ROOT / "tests" / "golden" / "tiny_spm.model"
DIRECTIONS = {
    # name: (source folder, output folder, function)
    "original → HF": ("original", "hf", "convert_original_to_hf"),
    "HF → original": ("hf", "back", "convert_hf_to_original"),
    "HF → GGUF (f16)": ("hf", "gguf", "convert_hf_to_gguf"),
}


def make_checkpoint(folder: Path, layers: int) -> None:
    """A LLaVA with random weights, its vocabulary that of the tests' tokenizer."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig

    from modeling_llava import LlavaConfig, LlavaForConditionalGeneration, LlavaImageProcessor, LlavaProcessor
    from modeling_llava.text.chat_templates import load_chat_template
    from modeling_llava.text.tokenization import add_image_token, load_tokenizer

    tokenizer = load_tokenizer(TOKENIZER)
    add_image_token(tokenizer)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="2GB")
    LlavaProcessor(
        image_processor=LlavaImageProcessor(size=336, crop_size=336, do_pad=True),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=load_chat_template("vicuna_v1"),
    ).save_pretrained(folder)


def weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".gguf", ".bin"))


def read_weights(source: Path) -> None:
    """Brings a folder's weights into the system's cache, so that whoever reads them next finds them there."""
    for path in weight_files(source):
        with open(path, "rb") as file:
            while file.read(2**24):
                pass


def copy_weights(source: Path, target: Path) -> float:
    """Seconds to copy a folder's weights and flush them."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    os.sync()
    read_weights(source)
    begun = time.perf_counter()
    for path in weight_files(source):
        shutil.copyfile(path, target / path.name)
    os.sync()
    seconds = time.perf_counter() - begun
    shutil.rmtree(target)
    return seconds


def convert_here(function: str, source: str, output: str, check: bool) -> None:
    """One conversion, in this process; prints seconds and the growth of its peak memory in bytes."""
    import psutil
    import torch
    import transformers.models.llava.modeling_llava

    from modeling_llava import LlavaForConditionalGeneration, LlavaProcessor, conversion

    convert = getattr(conversion, function)
    # What a conversion imports is loaded before, so that it does not count as the conversion's memory.
    assert torch and transformers and LlavaForConditionalGeneration and LlavaProcessor
    before = psutil.Process().memory_info().rss
    begun = time.perf_counter()
    convert(source, output, check=check)
    os.sync()
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "growth": max(0, peak - before)}))


def measure(function: str, source: Path, output: Path, check: bool = False) -> dict[str, float]:
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    read_weights(source)
    command = [
        sys.executable,
        __file__,
        "--convert",
        function,
        str(source),
        str(output),
        *(["--check"] if check else []),
    ]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two folders hold the same tensors under the same names, bit for bit; one tensor in memory at a time."""
    import torch
    from safetensors import safe_open

    def where(folder: Path) -> dict:
        opened = [(path.parent.relative_to(folder), safe_open(path, "pt")) for path in weight_files(folder)]
        return {(parent, name): file for parent, file in opened for name in file.keys()}

    ours, theirs = where(first), where(second)
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[key].get_tensor(key[1]).view(torch.uint8), theirs[key].get_tensor(key[1]).view(torch.uint8))
        for key in ours
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", help="where the checkpoints go (16 GB; default: a temporary folder)")
    parser.add_argument("--layers", type=int, default=32, help="layers of the language model (32: 4 GB)")
    parser.add_argument("--rounds", type=int, default=4, help="conversions of each direction")
    parser.add_argument("--check", action="store_true", help="with the check at the end of each conversion")
    parser.add_argument("--out", type=Path, default=RESULT, help=f"result file (default: {RESULT.relative_to(ROOT)})")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        return make_checkpoint(args.make, args.layers)
    if args.convert:
        return convert_here(*args.convert, check=args.check)

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        print(f"making a checkpoint with {args.layers} layers in {folder} …", flush=True)
        # In a process of its own: a child of a process that was once large reports that peak as its own.
        made = [sys.executable, __file__, "--make", str(folder / "made"), "--layers", str(args.layers)]
        subprocess.run(made, check=True, capture_output=True)
        measure("convert_hf_to_original", folder / "made", folder / "original")
        shutil.rmtree(folder / "made")
        size = sum(path.stat().st_size for path in weight_files(folder / "original"))
        rows = []
        for direction, (source, output, function) in DIRECTIONS.items():
            copies, runs = [], []
            for number in range(args.rounds + 1):
                if number % 2:
                    copies.append(copy_weights(folder / source, folder / "copy"))
                runs.append(measure(function, folder / source, folder / output, args.check))
                if not number % 2:
                    copies.append(copy_weights(folder / source, folder / "copy"))
            copies, runs = copies[1:], runs[1:]  # the first round writes where nothing was before, which can be slower
            largest = max(path.stat().st_size for path in weight_files(folder / output))
            row = {
                "direction": direction,
                "copy_s": round(statistics.median(copies), 2),
                "convert_s": round(statistics.median(run["seconds"] for run in runs), 2),
                "time_ratio": round(statistics.median(r["seconds"] / c for r, c in zip(runs, copies)), 2),
                "growth_gb": round(max(run["growth"] for run in runs) / 1e9, 3),
                "largest_file_gb": round(largest / 1e9, 3),
                "memory_ratio": round(max(run["growth"] for run in runs) / largest, 2),
            }
            rows.append(row)
            print(
                f"{direction:16} copy {row['copy_s']:6.1f} s   convert {row['convert_s']:6.1f} s   {row['time_ratio']:.2f} ×   "
                f"memory {row['growth_gb']:.2f} GB = {row['memory_ratio']:.2f} × the largest file written",
                flush=True,
            )
        identical = same_tensors(folder / "original", folder / "back")
        print(f"original → HF → original: tensors {'the same bit for bit' if identical else 'DIFFER'}")

    import torch
    import transformers

    machine = {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "checkpoint_gb": round(size / 1e9, 3),
        "rounds": args.rounds,
        "with_check": args.check,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps(
            {"machine": machine, "rows": rows, "round_trip_bit_for_bit": identical}, indent=2, ensure_ascii=False
        )
        + "\n"
    )
    print(f"kept in {args.out}")
    if not identical:
        sys.exit(1)


if __name__ == "__main__":
    main()
