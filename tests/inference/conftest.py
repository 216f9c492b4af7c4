"""A tiny model, its processor and a predictor over them."""

import pytest
from tiny_predictor import published_llava, tiny_llava, tiny_processor

from modeling_llava.inference.predictor import LlavaPredictor


@pytest.fixture(scope="module", params=["ours", "llava-hf"])
def pair(request):
    """Model and processor: with a template and files of ours, and in the form that is published."""
    if request.param == "llava-hf":
        return published_llava()
    processor = tiny_processor()
    return tiny_llava(processor), processor


@pytest.fixture(scope="module")
def processor(pair):
    return pair[1]


@pytest.fixture(scope="module")
def model(pair):
    return pair[0]


@pytest.fixture
def predictor(model, processor):
    return LlavaPredictor(model, processor)
