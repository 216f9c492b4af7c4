"""Stock transformers on folders that we wrote, in a process that cannot import this package."""

import json
import os
import subprocess
import sys


WITHOUT_US = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_llava":
            raise ModuleNotFoundError("modeling_llava is not installed here")
sys.meta_path.insert(0, Absent())
"""
STOCK = """
import json, os, sys, torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, pipeline

def answers(folder, base, most, conversations, settings):
    settings = {"do_sample": False, **settings}
    if base is None:
        pipe = pipeline("image-text-to-text", model=folder, dtype=torch.float32)
        model, processor = pipe.model, pipe.processor
    else:
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        model, processor = PeftModel.from_pretrained(model, folder).eval(), AutoProcessor.from_pretrained(folder)
        if os.path.isfile(f"{folder}/generation_config.json"):
            settings["generation_config"] = GenerationConfig.from_pretrained(folder, do_sample=False)
    settings |= {"max_new_tokens": most, "tokenizer": processor.tokenizer}
    for messages in conversations:
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                asked = messages[:i]
                inputs = processor.apply_chat_template(
                    asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
                )
                ids = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1]:]
                text = processor.decode(ids, skip_special_tokens=True)
                if base is None:
                    same = pipe(text=asked, return_full_text=False, generate_kwargs=settings)[0]["generated_text"]
                    assert same.strip() == text.strip(), (same, text)
                prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
                yield {"prompt": prompt, "text": text.strip(), "ids": ids.tolist()}

for job in json.loads(sys.stdin.read()):
    print(json.dumps(list(answers(**job))), flush=True)
"""


def run(folder, *command, stdin=""):
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        input=stdin, capture_output=True, text=True, cwd=folder, env=environment, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-3000:])
    return done


def stock_answers(cwd, jobs: list[dict]) -> list[list[dict]]:
    """
    What stock answers to each user's turn: `prompt`, `text` and `ids`. A job has `folder`, `base` (`None`: by the pipeline; else
    by PEFT, with the generation configuration that lies in the adapter's folder), `most` tokens, `conversations` and `settings`.
    """
    lines = run(cwd, "-c", WITHOUT_US + STOCK, stdin=json.dumps(jobs, default=str)).stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("[")]
