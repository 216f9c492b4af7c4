"""
How much a process grows in training, measured: `python measure_growth.py SETTINGS.json` trains for three optimizer steps
by the way of `llava train`, and prints what the process grew by from just before the first step to its highest point.

Linux only. Run it with `MALLOC_ENVIRONMENT`, or memory that the C library keeps for later is counted as well.
"""

import gc
import json
import sys
from pathlib import Path

from PIL import Image


GOLDEN = Path(__file__).parents[1] / "golden" / "llava_v15_tiny_lora"

MALLOC_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",  # tensors go back to the system when they are freed, as on a GPU to the allocator
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "OMP_NUM_THREADS": "1",
}


def write_model(folder: Path, vision: dict, text: dict) -> None:
    """A random LLaVA of these sizes with a real processor, saved in float32."""
    import torch
    from transformers import AutoConfig

    from modeling_llava import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    processor = LlavaProcessor.from_vision_language_pretrained(
        str(GOLDEN / "vision_tower"), str(GOLDEN / "language_model")
    )
    size = vision["image_size"]
    processor.image_processor.size = {"shortest_edge": size}
    processor.image_processor.crop_size = {"height": size, "width": size}
    processor.patch_size = vision["patch_size"]
    config = LlavaConfig(
        vision_config=AutoConfig.for_model("clip_vision_model", **vision),
        text_config=AutoConfig.for_model("llama", max_position_embeddings=2048, **text),
        image_token_index=processor.image_token_id,
        image_seq_length=(size // vision["patch_size"]) ** 2,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def write_data(folder: Path, samples: int, words: int) -> Path:
    """Instructions of equal length, each about a picture of its own."""
    rows = []
    for i in range(samples):
        Image.new("RGB", (60, 40), (20 * i % 256, 80, 160)).save(folder / f"{i}.png")
        turns = [("human", "<image>\nWhat is it?"), ("gpt", "It is a picture. " * (words // 4))]
        conversations = [{"from": speaker, "value": text} for speaker, text in turns]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": conversations})
    path = folder / "instruct.json"
    path.write_text(json.dumps(rows))
    return path


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) * 1024


def measure(settings: dict) -> dict:
    """Train, and tell the growth in bytes and what a micro-batch had."""
    import torch
    from transformers import TrainerCallback

    from modeling_llava.compat import register_auto_classes
    from modeling_llava.training import train

    register_auto_classes()
    result = {}

    class Measure(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
            for parameter in model.parameters():
                parameter.data.view(-1).view(torch.uint8).sum()  # weights that lie in a mapped file come into memory
            batch = next(iter(train_dataloader))
            result["tokens"] = batch["input_ids"].numel()
            result["supervised"] = (batch["labels"] != -100).float().mean().item()
            result["images"] = len(batch["pixel_values"])
            del batch
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            result["before"] = resident("VmRSS")

        def on_step_end(self, args, state, control, **kwargs):
            # before what is written at the end
            result["growth"] = resident("VmHWM") - result["before"]

    train(settings, callbacks=[Measure()])
    return result


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
