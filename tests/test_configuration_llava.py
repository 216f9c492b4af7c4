import pytest
from tiny import tiny_config
from transformers import CLIPVisionConfig
from transformers import LlavaConfig as StockConfig

from modeling_llava import LlavaConfig


def test_default_configuration_is_llava_15():
    config, stock = LlavaConfig(), StockConfig()
    for field in ("image_token_index", "image_seq_length", "projector_hidden_act", "vision_feature_layer"):
        assert getattr(config, field) == getattr(stock, field)
    assert config.vision_config.to_dict() == stock.vision_config.to_dict()
    assert config.text_config.to_dict() == stock.text_config.to_dict()


def test_saved_configuration_loads_in_stock_and_back(tmp_path):
    ours = tiny_config(vision_feature_layer=[-2, -1], projector_num_layers=1, projector_hidden_act="linear")
    ours.save_pretrained(tmp_path)
    stock = StockConfig.from_pretrained(tmp_path)
    assert type(stock) is StockConfig
    assert stock.vision_feature_layer == [-2, -1]
    assert stock.image_token_id == 299
    stock.save_pretrained(tmp_path / "stock")
    again = LlavaConfig.from_pretrained(tmp_path / "stock")
    assert again.projector_num_layers == 1
    assert isinstance(again.vision_config, CLIPVisionConfig)


@pytest.mark.parametrize("wrong", [{"projector_num_layers": 0}, {"projector_num_layers": 1}])
def test_impossible_projectors_are_refused(wrong):
    with pytest.raises(ValueError, match="projector"):
        tiny_config(**wrong)


@pytest.mark.parametrize("layer", [4, -5, [-2, 9], []])
def test_layers_that_the_tower_does_not_have_are_refused(layer):
    with pytest.raises(ValueError, match="vision_feature_layer.* it has 3 layers, so 0 .* to 3"):
        tiny_config(vision_feature_layer=layer)
    for known in (0, 3, -1, -4, [-2, -1]):
        tiny_config(vision_feature_layer=known)
