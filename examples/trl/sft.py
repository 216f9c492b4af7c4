"""
TRL's `SFTTrainer` on conversations with images, packed and with loss on the answers alone.

    pip install trl modeling-llava
    python examples/trl/sft.py --model llava-hf/llava-1.5-7b-hf --data my.json --images images --output runs/trl
    python examples/trl/sft.py --model llava-hf/llava-1.5-7b-hf --data my.json --images images --parity 8

TRL packs text alone and finds answers by `{% generation %}` marks, which most templates do not have. `LlavaDataCollator`
concatenates the samples of a batch into one row and gives the labels; the language model's attention keeps the samples apart.
`--parity N` trains nothing: it prints the loss and the gradient of the first N samples one by one, padded and packed, as
`SFTTrainer` computes them, and fails where they differ by more than 1e-5.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

import modeling_llava  # noqa: F401, Auto classes give its model and processor for "llava"
from modeling_llava.data import LlavaDataCollator, from_llava_row
from modeling_llava.kernels.packed_attention import use_varlen_attention
from modeling_llava.text.stops import end_answers_with_eos, teaches_no_stop


LARGEST_DIFFERENCE = 1e-5


class RowCollator(LlavaDataCollator):
    """A `LlavaDataCollator` of rows as they are in the file, of which TRL takes a `datasets.Dataset` alone."""

    def __call__(self, rows: list[dict]) -> dict:
        return super().__call__([from_llava_row(row, number) for number, row in enumerate(rows)])


def make_trainer(model, processor, dataset, collator, **settings) -> SFTTrainer:
    """An `SFTTrainer` with LoRA on the language model and the whole projector."""
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=r"model\.language_model\..*_proj",
        modules_to_save=["multi_modal_projector"],
    )
    # The collator reads the images and cuts or drops long samples; TRL must leave the rows as they are.
    arguments = SFTConfig(remove_unused_columns=False, max_length=None, **settings)
    trainer = SFTTrainer(
        model, arguments, data_collator=collator, train_dataset=dataset, processing_class=processor, peft_config=lora
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # in 16 bits AdamW loses small updates; in float16 it gives NaN
    return trainer


def measure_parity(trainer: SFTTrainer, rows: list[dict]) -> dict[str, tuple[float, float]]:
    """
    The loss (nats per supervised token) of `rows`, one by one, padded and packed, and how far the gradient is from that of
    one by one (relative L2 norm of the difference).
    """
    processor, folder = trainer.processing_class, trainer.data_collator.image_folder
    pad, pack = (RowCollator(processor, image_folder=folder, packing=packing) for packing in (False, True))
    batches = {"one by one": [pad([row]) for row in rows], "padded": [pad(rows)], "packed": [pack(rows)]}
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainer.model.train()
    expected, parity = None, {}
    for way, inputs in batches.items():
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in inputs)
        trainer.model.zero_grad()
        loss = 0.0
        for batch in inputs:
            part = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), num_items_in_batch=count)
            part.backward()
            loss += part.item()
        gradient = torch.cat(
            [p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in trained]
        )
        expected = gradient if expected is None else expected
        parity[way] = loss, ((gradient - expected).norm() / expected.norm()).item()
    return parity


def print_parity(parity: dict[str, tuple[float, float]]) -> bool:
    """The table; whether all ways are equal."""
    expected = parity["one by one"][0]
    print(f"{'':12}{'loss':>12}{'difference':>14}{'gradient':>14}")
    for way, (loss, gradient) in parity.items():
        print(f"{way:12}{loss:12.6f}{abs(loss - expected) / expected:14.1e}{gradient:14.1e}")
    return all(max(abs(loss - expected) / expected, grad) <= LARGEST_DIFFERENCE for loss, grad in parity.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", required=True, help="folder or Hub name of a LLaVA")
    parser.add_argument("--data", required=True, help="LLaVA's JSON, or JSON of messages")
    parser.add_argument("--images", help="folder of relative image paths")
    parser.add_argument("--output", default="runs/trl")
    parser.add_argument("--batch-size", type=int, default=8, help="samples that are concatenated into one row")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--parity", type=int, metavar="N", help="compare N samples and train nothing")
    args = parser.parse_args(arguments)

    on_gpu = torch.cuda.is_available() and not args.parity
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="bfloat16" if on_gpu else "float32")
    processor = AutoProcessor.from_pretrained(args.model)
    if teaches_no_stop(processor):  # as the template of llava-hf/llava-1.5-7b-hf
        tokens = processor.tokenizer.special_tokens_map
        processor.chat_template = end_answers_with_eos(processor.chat_template, tokens)
    use_varlen_attention(model)
    dataset = load_dataset("json", data_files=args.data, split="train")
    collator = RowCollator(processor, image_folder=args.images, packing=True)
    trainer = make_trainer(
        model,
        processor,
        dataset,
        collator,
        output_dir=args.output,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        max_steps=args.max_steps,
        logging_steps=1,
        bf16=on_gpu,
        use_cpu=not torch.accelerator.is_available(),
        report_to="none",
    )
    if args.parity:
        rows = list(dataset.select(range(min(args.parity, len(dataset)))))
        return 0 if print_parity(measure_parity(trainer, rows)) else 1
    trainer.train()
    trainer.save_model()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
