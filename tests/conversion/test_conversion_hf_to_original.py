"""HF → original, for checkpoints that came from there, were trained since, or never were in that form."""

import json
import shutil

import pytest
import torch
from conversion_cases import GOLDEN, REMOVED, TOWER, copy_original, edit_json, original_tensors, rewrite, same
from golden_text import golden_rows
from published import build
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration as StockLlava

from modeling_llava import LlavaProcessor
from modeling_llava.conversion import convert_hf_to_original, convert_original_to_hf
from modeling_llava.conversion.vocabularies import sentencepiece_model
from modeling_llava.text.chat_templates import load_chat_template
from modeling_llava.text.tokenization import load_tokenizer


TOKENIZERS = ("tokenizer.model", "tokenizer.json")
HUB_TOWER = "openai/clip-vit-large-patch14-336"


def read(path) -> dict:
    return json.loads(path.read_text("utf-8"))


@pytest.fixture
def trained(tmp_path):
    """A HF folder as training leaves it: converted, changed, saved by stock transformers (no `original/`)."""

    def make(change=lambda model: None, name="llava_v15_tiny", **config):
        source = copy_original(tmp_path / "source", name, **config)
        convert_original_to_hf(source, tmp_path / "hf", check=False, vision_tower=TOWER)
        model = StockLlava.from_pretrained(tmp_path / "hf")
        with torch.no_grad():
            change(model)
        model.save_pretrained(tmp_path / "trained")
        LlavaProcessor.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "trained")
        return tmp_path / "trained"

    return make


def check_back(folder, source, changed: set[str]):
    """What came back against the source: same keys, and only `changed` differ."""
    before, after = original_tensors(source), original_tensors(folder)
    assert before.keys() == after.keys()
    assert {key for key in before if not torch.equal(before[key], after[key])} == changed


def test_trained_checkpoint_goes_back_with_its_own_weights(tmp_path, trained):
    folder = trained(lambda model: model.lm_head.weight.mul_(1.1), mm_vision_tower=HUB_TOWER)
    conversion = convert_hf_to_original(folder, tmp_path / "back")
    assert conversion.check.is_sound
    check_back(tmp_path / "back", tmp_path / "source", {"lm_head.weight"})
    before, after = (read(tmp_path / x / "config.json") for x in ("source", "back"))
    assert before == after and not list((tmp_path / "back").glob("*/"))  # the tower is named, and not written
    # The tokenizer's files are made again: stock transformers dropped tokenizer.model when it loaded and saved.
    assert not (folder / "tokenizer.model").exists()
    made = read(tmp_path / "back/tokenizer_config.json")
    original = read(tmp_path / "source/tokenizer_config.json")
    both = original.keys() & made.keys()
    assert {key: original[key] for key in both} == {key: made[key] for key in both}
    assert "<image>" not in json.dumps(made)


def test_what_the_language_model_became_since_stands_in_the_configuration(tmp_path, trained):
    """A longer context, say: the configuration that the checkpoint came with is brought up to date."""
    folder = trained(mm_vision_tower=HUB_TOWER)
    text = read(folder / "config.json")["text_config"]
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0}
    edit_json(folder / "config.json", text_config=text | {"rope_parameters": rope, "max_position_embeddings": 4096})
    conversion = convert_hf_to_original(folder, tmp_path / "back")
    assert conversion.check.is_sound
    before, after = (read(tmp_path / x / "config.json") for x in ("source", "back"))
    assert {key: value for key, value in after.items() if before.get(key) != value} == {
        "rope_theta": 50000.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "max_position_embeddings": 4096,
    }


def test_linear_projector_saved_by_stock_transformers_is_recognised(tmp_path, trained):
    folder = trained(lambda model: model.model.multi_modal_projector.linear_1.weight.mul_(2), name="llava_v1_tiny")
    edit_json(folder / "config.json", projector_num_layers=REMOVED)  # a field of ours
    convert_hf_to_original(folder, tmp_path / "back")
    check_back(tmp_path / "back", tmp_path / "source", {"model.mm_projector.weight"})


@pytest.mark.parametrize("change", ["weight", "bias"])
def test_almost_an_identity_is_not_taken_for_one(tmp_path, trained, change):
    def bend(model):
        layer = model.model.multi_modal_projector.linear_2
        (layer.weight if change == "weight" else layer.bias).view(-1)[1] = 1e-6

    folder = trained(bend, name="llava_v1_tiny")
    edit_json(folder / "config.json", projector_num_layers=2)
    with pytest.raises(ValueError, match="projector of 2 layers with activation 'linear'"):
        convert_hf_to_original(folder, tmp_path / "back")
    edit_json(folder / "config.json", projector_num_layers=1)
    with pytest.raises(ValueError, match="linear_2 is not the identity"):
        convert_hf_to_original(folder, tmp_path / "back")


def test_tower_that_was_trained_since_is_written_inside(tmp_path, trained):
    folder = trained(lambda model: model.model.vision_tower.pre_layrnorm.weight.mul_(1.2), mm_vision_tower=HUB_TOWER)
    conversion = convert_hf_to_original(folder, tmp_path / "back")
    assert any("is no longer exactly openai/" in note for note in conversion.notes)
    config = read(tmp_path / "back/config.json")
    assert config["unfreeze_mm_vision_tower"] is True and config["mm_vision_tower"] == HUB_TOWER
    key = "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight"
    expected = load_file(TOWER / "model.safetensors")["vision_model.pre_layrnorm.weight"] * 1.2
    assert torch.equal(original_tensors(tmp_path / "back")[key], expected)
    convert_original_to_hf(tmp_path / "back", tmp_path / "again", vision_tower=TOWER)
    assert torch.equal(StockLlava.from_pretrained(tmp_path / "again").model.vision_tower.pre_layrnorm.weight, expected)


@pytest.fixture
def composed(tmp_path):
    """A HF folder that never was an original: no record, no `original/`."""
    source = copy_original(tmp_path / "source")
    convert_original_to_hf(source, tmp_path / "hf", check=False)
    shutil.rmtree(tmp_path / "hf/original")
    edit_json(tmp_path / "hf/config.json", original_checkpoint=REMOVED)
    return tmp_path / "hf"


def test_checkpoint_that_never_was_an_original_becomes_one(tmp_path, composed):
    conversion = convert_hf_to_original(composed, tmp_path / "back")
    assert conversion.check.is_sound and any("vision tower is in" in note for note in conversion.notes)
    config = read(tmp_path / "back/config.json")
    expected = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "vision_tower",
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
        "vocab_size": 700,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "torch_dtype": "float32",
    }
    assert {key: config.get(key) for key in expected} == expected
    assert "rope_parameters" not in config and "text_config" not in config
    assert same(tmp_path / "source", tmp_path / "back")
    assert same(tmp_path / "back/vision_tower", TOWER)
    tokenizer = load_tokenizer(tmp_path / "back")
    assert len(tokenizer) == 700 and tokenizer.pad_token == "<unk>"
    again = convert_original_to_hf(tmp_path / "back", tmp_path / "again")
    assert again.check.is_stock_ready
    assert same(composed, tmp_path / "again")


def test_template_that_a_checkpoint_was_trained_with_comes_back(tmp_path, composed):
    template = load_chat_template("chatml", image_wrap=("<im_start>", "<im_end>"))
    (composed / "chat_template.jinja").write_text(template)
    convert_hf_to_original(composed, tmp_path / "back")
    convert_original_to_hf(tmp_path / "back", tmp_path / "again", check=False)
    assert LlavaProcessor.from_pretrained(tmp_path / "again").chat_template == template


@pytest.mark.parametrize("name", ["tiny_spm.model", "tiny_spm_ws.model"])
def test_sentencepiece_model_made_from_json_gives_the_same_ids(tmp_path, name):
    load_tokenizer(GOLDEN / name).save_pretrained(tmp_path)
    (tmp_path / "made.model").write_bytes(sentencepiece_model(tmp_path / "tokenizer.json"))
    exact = SentencePieceProcessor(model_file=str(GOLDEN / name))
    made = SentencePieceProcessor(model_file=str(tmp_path / "made.model"))
    assert made.get_piece_size() == exact.get_piece_size()
    for i in range(exact.get_piece_size()):
        for ask in ("id_to_piece", "is_control", "is_unknown", "is_byte"):
            assert getattr(made, ask)(i) == getattr(exact, ask)(i)
    rows = golden_rows("masks_tiny_ws.json" if "ws" in name else "masks_tiny.json", "v1")
    texts = [turn["value"] for row in rows for turn in row["conversations"]]
    assert len(texts) > 10
    for text in texts:
        assert made.encode(text) == exact.encode(text), text


def test_token_that_was_added_after_the_conversion_is_kept(tmp_path, trained):
    folder = trained(mm_vision_tower=HUB_TOWER)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<box>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    convert_hf_to_original(folder, tmp_path / "back")
    assert original_tensors(tmp_path / "back")["lm_head.weight"].shape[0] == 702  # 700, the image token, <box>
    added = read(tmp_path / "back/tokenizer_config.json")["added_tokens_decoder"]
    assert added["701"]["content"] == "<box>"


def test_projector_without_bias_gets_zeros(tmp_path, composed):
    rewrite(composed, lambda t: {k: v for k, v in t.items() if not ("multi_modal" in k and k.endswith("bias"))})
    edit_json(composed / "config.json", multimodal_projector_bias=False)
    conversion = convert_hf_to_original(composed, tmp_path / "back")
    assert conversion.check.is_sound
    assert not original_tensors(tmp_path / "back")["model.mm_projector.0.bias"].any()


@pytest.mark.parametrize("layout", ["stock 5", "in memory"])
def test_other_spellings_of_hf_keys_are_read(tmp_path, composed, layout):
    """transformers 5 saves a tower that it made without `vision_model.`; some tools save the names in memory."""

    def rename(key):
        if layout == "stock 5":
            return key.replace("vision_tower.vision_model.", "vision_tower.")
        key = key.replace("language_model.model.", "model.language_model.")
        key = key.replace("language_model.lm_head", "lm_head")
        return f"model.{key}" if key.startswith(("vision_tower", "multi_modal")) else key

    rewrite(composed, lambda tensors: {rename(key): value for key, value in tensors.items()})
    convert_hf_to_original(composed, tmp_path / "back")
    assert same(tmp_path / "source", tmp_path / "back")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_feature_layer": [-2, -1]}, "features of several layers"),
        ({"projector_hidden_act": "relu"}, "activation 'relu'"),
        ({"quantization_config": {"load_in_4bit": True}}, "is quantised"),
        ({"model_type": "llava_next"}, "llava_next"),
    ],
)
def test_what_the_original_has_no_form_for_is_said(tmp_path, composed, fields, message):
    if "vision_feature_layer" in fields:
        rewrite(composed, lambda t: t | {"multi_modal_projector.linear_1.weight": torch.randn(64, 64)})
    edit_json(composed / "config.json", **fields)
    with pytest.raises(ValueError, match=message):
        convert_hf_to_original(composed, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_what_is_not_a_whole_checkpoint_says_what_to_do(tmp_path, composed):
    with pytest.raises(ValueError, match="CLIP with LLaMA or Mistral"):
        convert_hf_to_original(build("qwen2.5"), tmp_path / "back")
    rewrite(composed, lambda t: t | {"language_model.extra": t.pop("language_model.model.norm.weight")})
    for change, message in (
        (lambda: None, r"1 missing: 'language_model\.model\.norm\.weight'.*1 not known: 'language_model\.ext"),
        (lambda: (composed / "model.safetensors").unlink(), "holds no weights"),
        (lambda: [(composed / name).unlink() for name in TOKENIZERS], "hf has no tokenizer"),
        (lambda: (composed / "processor_config.json").unlink(), "no processor"),
        (lambda: (composed / "projector_config.json").write_text("{}"), "a projector alone.*llava merge"),
        (lambda: (composed / "adapter_config.json").write_text("{}"), "is an adapter.*llava merge"),
    ):
        change()
        with pytest.raises(ValueError, match=message):
            convert_hf_to_original(composed, tmp_path / "back")
