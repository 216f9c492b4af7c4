"""
Ids and labels of a conversation: `encode_conversation` against stock `apply_chat_template` with its assistant mask.

    python examples/benchmarks/encode_conversation.py

Both render the same template and give the same ids (576 tokens per image) and the same supervised positions, which is
checked first. The stock processor is spared the pixels. Median of seven rounds over the golden conversations.
"""

import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers.models.llava.processing_llava import LlavaProcessor as StockLlavaProcessor

from modeling_llava import LlavaImageProcessor, LlavaProcessor
from modeling_llava.data.labels import conversation_length, encode_conversation
from modeling_llava.data.schema import from_llava_row
from modeling_llava.processing_llava import load_chat_template
from modeling_llava.text.tokenization import add_image_token, load_tokenizer


GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
ROUNDS = 7


class StockWithoutPixels(StockLlavaProcessor):
    def _process_images(self, images, **kwargs):
        num_images = sum(len(own) for own in images)
        return {"pixel_values": [PIXELS] * num_images}, [self.image_token * 576] * num_images


PIXELS = torch.zeros(3, 336, 336)


def main():
    tokenizer = load_tokenizer(GOLDEN / "tiny_spm.model")
    add_image_token(tokenizer)
    ours, stock = (
        cls(
            LlavaImageProcessor(size=336, crop_size=336),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=load_chat_template("vicuna_v1"),
        )
        for cls in (LlavaProcessor, StockWithoutPixels)
    )
    rows = json.loads((GOLDEN / "masks_tiny.json").read_text("utf-8"))["versions"]["v1"]
    conversations = [from_llava_row({**row, "image": "x" if row["has_image"] else None})["messages"] for row in rows]
    with_pixels = json.loads(json.dumps(conversations))
    for messages in with_pixels:
        for message in messages:
            for item in message["content"]:
                if item["type"] == "image":
                    item["image"] = PIXELS

    def stock_mask(messages):
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, "return_tensors": "pt"}
        return stock.apply_chat_template(messages, **options)

    for messages, stock_messages in zip(conversations, with_pixels):
        encoded, output = encode_conversation(messages, ours), stock_mask(stock_messages)
        assert torch.equal(encoded["input_ids"], output["input_ids"][0])
        mask = torch.as_tensor(output["assistant_masks"][0]).bool()
        assert torch.equal(encoded["labels"], encoded["input_ids"].masked_fill(~mask, -100))

    print(f"{platform.machine()}, {platform.python_version()}, transformers {transformers.__version__}, one thread")
    print(
        f"{len(conversations)} conversations, mean {sum(map(len, conversations)) / 2 / len(conversations):.1f} turns"
    )
    baseline = None
    for name, function, samples in [
        ("stock apply_chat_template, ids and mask", stock_mask, with_pixels),
        ("encode_conversation, ids and labels", lambda m: encode_conversation(m, ours), conversations),
        ("conversation_length", lambda m: conversation_length(m, ours), conversations),
    ]:
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for messages in samples:
                function(messages)
            times.append((time.perf_counter() - start) / len(samples))
        median = statistics.median(times)
        baseline = baseline or median
        print(f"{name:42s} {median * 1e6:7.0f} µs per conversation   {baseline / median:5.1f} times as fast")


if __name__ == "__main__":
    main()
