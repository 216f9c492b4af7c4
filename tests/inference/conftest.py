"""A tiny model, its processor and a predictor over them."""

from types import SimpleNamespace

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


@pytest.fixture
def passes(model):
    """What went through the model, pass by pass: `images` of the vision tower, `tokens` and `rows` of the language model."""
    seen = SimpleNamespace(images=[], tokens=[], rows=[])
    hooks = [
        model.model.vision_tower.register_forward_pre_hook(lambda _, args: seen.images.append(len(args[0]))),
        model.model.language_model.layers[0].register_forward_pre_hook(
            lambda _, args: seen.tokens.append(args[0].shape[1])
        ),
        model.lm_head.register_forward_pre_hook(lambda _, args: seen.rows.append(len(args[0]))),
    ]
    yield seen
    for hook in hooks:
        hook.remove()
