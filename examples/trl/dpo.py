"""
Preference training (DPO, Rafailov et al. 2023) with TRL's `DPOTrainer`: of two answers to a question about an image, the better.

    pip install trl modeling-llava
    python examples/trl/dpo.py --model llava-hf/llava-1.5-7b-hf --data preferences.json --images images --output runs/dpo
    llava chat runs/dpo

`preferences.json` is a list of `{"image": "1.jpg", "prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}`. Only the LoRA
weights and the projector are trained: with them switched off the model is the reference, which takes no second model in memory.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, Image, List, load_dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

import modeling_llava  # noqa: F401, Auto classes give its model and processor for "llava"
from modeling_llava.text.stops import end_answers_with_eos, teaches_no_stop


def read_preferences(path: str, images: str) -> Dataset:
    """The rows in TRL's form: `prompt`, `chosen` and `rejected` as messages, `images` as a list."""

    def of_trl(row: dict) -> dict:
        return {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
            "images": [str(Path(images, row["image"]))],
        }

    rows = load_dataset("json", data_files=path, split="train")
    return rows.map(of_trl, remove_columns="image").cast_column("images", List(Image()))


def training_template(processor) -> str:
    """TRL tokenizes what the template writes and nothing else: it must write BOS, and EOS after an answer."""
    template = processor.chat_template
    if teaches_no_stop(processor):  # as that of llava-hf/llava-1.5-7b-hf
        template = end_answers_with_eos(template, processor.tokenizer.special_tokens_map)
    return "{{ bos_token }}" + template


def train(model, processor, dataset: Dataset, **settings) -> DPOTrainer:
    """Train LoRA weights of the language model and the projector; the processor's own template is saved with them."""
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=r"model\.language_model\..*_proj",
        modules_to_save=["multi_modal_projector"],
    )
    arguments = DPOConfig(
        max_length=None,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        report_to="none",
        **settings,
    )
    own, processor.chat_template = processor.chat_template, training_template(processor)
    trainer = DPOTrainer(model, args=arguments, train_dataset=dataset, processing_class=processor, peft_config=lora)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # in 16 bits AdamW loses small updates; in float16 it gives NaN
    trainer.train()
    processor.chat_template = own
    trainer.save_model()
    return trainer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", required=True, help="folder or Hub name of a LLaVA")
    parser.add_argument("--data", required=True, help="JSON or JSONL of image, prompt, chosen and rejected")
    parser.add_argument("--images", default=".", help="folder of the image paths")
    parser.add_argument("--output", default="runs/dpo")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs")
    parser.add_argument("--beta", type=float, default=0.1, help="how strongly the model is held to the reference")
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument("--max-steps", type=int, default=-1)
    args = parser.parse_args(arguments)
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    train(
        AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype),
        AutoProcessor.from_pretrained(args.model),
        read_preferences(args.data, args.images),
        output_dir=args.output,
        per_device_train_batch_size=args.batch_size,
        beta=args.beta,
        learning_rate=args.learning_rate,
        max_steps=args.max_steps,
        logging_steps=1,
    )


if __name__ == "__main__":
    main()
