"""A processor over the golden tokenizer (9 image tokens per image of 42 pixels), for every test of the data."""

import pytest

from modeling_llava import LlavaProcessor


@pytest.fixture(scope="session")
def processor(golden) -> LlavaProcessor:
    folder = golden / "llava_v15_tiny_lora"
    return LlavaProcessor.from_vision_language_pretrained(folder / "vision_tower", folder / "language_model")
