"""The golden conversations as messages, processors that give one token per image, and SentencePiece as a reference."""

import json
import re
import struct
from pathlib import Path

import sentencepiece

from modeling_llava import LlavaImageProcessor, LlavaProcessor
from modeling_llava.data.schema import from_llava_row
from modeling_llava.processing_llava import load_chat_template
from modeling_llava.text.tokenization import add_image_token, load_tokenizer


GOLDEN = Path(__file__).parent / "golden"
MODELS = {"masks_tiny.json": "tiny_spm.model", "masks_tiny_ws.json": "tiny_spm_ws.model"}
TEMPLATES = {  # the original's name → ours
    "v0": "vicuna_v0",
    "v1": "vicuna_v1",
    "llava_v1": "llava_v1",
    "llava_llama_2": "llama_2",
    "v0_mmtag": "v0_mmtag",
    "v1_mmtag": "v1_mmtag",
    "plain": "plain",
}
STOPS = {  # what follows an answer and is learned with it
    "plain": "\n",
    "vicuna_v0": "\n###",
    "v0_mmtag": "\n###",
    "vicuna_v1": "</s>",
    "llava_v1": "</s>",
    "v1_mmtag": "</s>",
    "llama_2": " </s>",
    "chatml": "<|im_end|>",
}
GOLDEN_CASES = [(file, version) for file in MODELS for version in TEMPLATES]


def golden_rows(file: str, version: str) -> list[dict]:
    return json.loads((GOLDEN / file).read_text("utf-8"))["versions"][version]


def golden_messages(row: dict) -> list[dict]:
    return from_llava_row({**row, "image": "picture.jpg" if row["has_image"] else None})["messages"]


def tiny_processor(
    model="tiny_spm.model", template="vicuna_v1", patches=1, tokenizer=None, **kwargs
) -> LlavaProcessor:
    """A processor over a golden tokenizer, `patches`² tokens per image."""
    if tokenizer is None:
        tokenizer = load_tokenizer(GOLDEN / model, padding_side="left")
        add_image_token(tokenizer)
    side = 14 * patches
    return LlavaProcessor(
        LlavaImageProcessor(size=side, crop_size=side),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=load_chat_template(template) if template.isidentifier() else template,
        **kwargs,
    )


def with_pieces(model: bytes, pieces: dict[str, float]) -> bytes:
    """A SentencePiece model with more pieces: in the file, fields of one number simply follow each other."""
    for piece, score in pieces.items():
        text = piece.encode()
        message = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score)
        model += b"\x0a" + bytes([len(message)]) + message
    return model


def without_dummy_prefix(model: bytes) -> bytes:
    """A SentencePiece model that adds no space in front; a later normaliser field overrides an earlier one."""
    return model + b"\x1a\x02\x18\x00"


def split_at(text: str, literals) -> list[str]:
    """Text cut at literals, which are pieces of their own."""
    longest_first = sorted(literals, key=len, reverse=True)
    return [piece for piece in re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if piece]


def decode(processor: sentencepiece.SentencePieceProcessor, ids: list[int], specials: dict[int, str]) -> str:
    """Text of ids, to the letter: also the space that a decoder would take off its beginning."""
    data = b""
    for i in ids:
        if i in specials:
            data += specials[i].encode()
        elif processor.is_byte(i):
            data += bytes([int(processor.id_to_piece(i)[3:5], 16)])
        else:
            data += processor.id_to_piece(i).replace("▁", " ").encode()
    return data.decode("utf-8")
