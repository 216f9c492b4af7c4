"""A tiny random LLaVA with a processor, and the answers that plain `generate` gives."""

import struct
import zlib
from pathlib import Path

import golden_text
import torch
from PIL import Image
from published import build
from tiny import tiny_text_config, tiny_vision_config

from modeling_llava import LlavaConfig, LlavaForConditionalGeneration
from modeling_llava.inference import model_lock


GOLDEN = Path(__file__).parent / "golden"
QUESTIONS = [
    "What is this?",
    "How many people are in the picture, and what do all of them wear on their heads?",
    "Why?",
    "  Is it   indented?\n",
    "Describe the weather.",
]


def tiny_processor(template="vicuna_v1", side=28):
    """Over the golden SentencePiece model (700 pieces); `(side // 14)²` image tokens per image."""
    processor = golden_text.tiny_processor(template=template, patches=side // 14)
    processor.image_processor.do_pad = True
    return processor


def tiny_llava(processor, model_type="llama", side=28, **text_overrides):
    """Weights large enough that pictures, questions and positions change the answer."""
    text = tiny_text_config(model_type, **{"vocab_size": 704, "max_position_embeddings": 512, **text_overrides})
    config = LlavaConfig(
        vision_config=tiny_vision_config(image_size=side),
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=processor.num_image_tokens,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        model.lm_head.weight[:259] = (
            0.0  # no control tokens and no single bytes: answers that survive being read as text
        )
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model


def published_llava(form="llava-hf", folder=None, max_position_embeddings=512):
    """
    A model and processor in the form of what is published, in float32, with answers and 512 positions as `tiny_llava`'s;
    saved again into `folder`, as training saves them.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    source = build(form)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(source)
    model.config.text_config.max_position_embeddings = max_position_embeddings
    with torch.no_grad():
        model.lm_head.weight[:259] = 0.0
        model.lm_head.weight[700:] = 0.0
    if folder is not None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return model, processor


def picture(seed, size=(40, 30)):
    """Noise."""
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy())


def png_header(width, height):
    """A PNG of a few bytes that says that it is large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000)))


def user_turn(text, images=()):
    items = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*items, {"type": "text", "text": text}]}


def assistant_turn(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def generated(model, processor, messages, max_new_tokens=12, **kwargs):
    """The answer of stock `generate` on the processor's own inputs, one prompt, nothing kept from before."""
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.inference_mode(), model_lock(model):  # a server's thread may be at its last token
        output = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": max_new_tokens, **kwargs})
    tokens = output[0, inputs["input_ids"].shape[1] :]
    return processor.decode(tokens, skip_special_tokens=True).strip()
