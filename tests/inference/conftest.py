"""A tiny model, its processor and a predictor over them."""

import pytest
from tiny_predictor import tiny_llava, tiny_processor

from modeling_llava.inference.predictor import LlavaPredictor


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def model(processor):
    return tiny_llava(processor)


@pytest.fixture
def predictor(model, processor):
    return LlavaPredictor(model, processor)
