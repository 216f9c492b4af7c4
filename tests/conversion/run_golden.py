"""What transformers' Auto classes compute for the golden cases: `python run_golden.py GOLDEN CONVERTED OUT.npz NAME …`."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


@torch.no_grad()
def run(golden: Path, converted: Path, names: list[str]) -> dict[str, np.ndarray]:
    result = {}
    for name in names:
        processor = AutoProcessor.from_pretrained(converted / name)
        model, info = AutoModelForImageTextToText.from_pretrained(converted / name, output_loading_info=True)
        assert not any(info.values()), (name, info)
        for i, case in enumerate(json.loads((golden / name / "expected.json").read_text("utf-8"))):
            messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": case["question"]}]}]
            prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
            inputs = processor(images=Image.open(golden / name / case["image"]), text=prompt, return_tensors="pt")
            generated = model.generate(**inputs, max_new_tokens=len(case["greedy_new_tokens"]), do_sample=False)
            values = {
                "prompt": np.array(prompt),
                "ids": inputs.input_ids[0],
                "pixels": inputs.pixel_values[0],
                "logits": model(**inputs).logits[0],
                "features": model.get_image_features(inputs.pixel_values).pooler_output[0],
                "greedy": generated[0, inputs.input_ids.shape[1] :],
                "image_token": np.array(model.config.image_token_id),
            }
            result |= {f"{name}/{i}/{key}": np.asarray(value) for key, value in values.items()}
    return result


if __name__ == "__main__":
    computed = run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[4:])
    assert not any(module.split(".")[0] == "modeling_llava" for module in sys.modules)
    np.savez(sys.argv[3], **computed)
