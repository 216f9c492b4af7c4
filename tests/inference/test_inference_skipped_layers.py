"""What is not computed: the last layer of a prompt but for the token that is read, and the tower's layers after the features."""

import pytest
import torch
from tiny_predictor import picture, user_turn

from modeling_llava.inference import LlavaPredictor
from modeling_llava.inference.prompts import encode_prompt
from modeling_llava.kernels.efficient_layers import without_later_layers


@pytest.mark.parametrize("layer, computed", [(-2, -1), (-1, None), (1, 1), ([0, 1], 1)])
@torch.inference_mode()
def test_features_are_the_same_without_later_layers(model, layer, computed, monkeypatch):
    tower = model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    pixels = torch.randn(2, 3, *2 * [tower.config.image_size], generator=torch.Generator().manual_seed(1))
    expected = tower(pixels, output_hidden_states=True).hidden_states
    ran = []
    mlps, forward = [one.mlp for one in layers], type(layers[0].mlp).forward

    def counted(mlp, *args):  # a hook would keep its layer
        ran.append(mlps.index(mlp))
        return forward(mlp, *args)

    monkeypatch.setattr(type(mlps[0]), "forward", counted)
    with without_later_layers(tower, layer):
        found = tower(pixels, output_hidden_states=True).hidden_states
    for index in [layer] if isinstance(layer, int) else layer:
        assert torch.equal(found[index], expected[index])
    assert ran == list(range(len(layers)))[:computed]
    tower(pixels)
    assert ran[len(ran) - len(layers) :] == list(range(len(layers)))  # nothing is left behind


def test_a_prefix_and_a_prompt_pass_one_token_through_the_last_layer(model, processor):
    predictor = LlavaPredictor(model, processor)
    seen = []
    hook = model.model.language_model.layers[-1].mlp.register_forward_hook(
        lambda _, args, __: seen.append(len(args[0][0]))
    )
    predictor.set_image(picture(1))
    predictor.ask(["What is this?", "Why is it so?", "Who?"], max_new_tokens=2)
    hook.remove()
    assert len(encode_prompt([user_turn("Who?", [picture(1)])], processor)) > 10
    assert seen == [1, 3, 3]  # the image, three questions' ends, three answers' second tokens
