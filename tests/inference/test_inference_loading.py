"""One function and one pipeline for every kind of folder: full, merged, adapter, projector, 4-bit."""

import importlib.util
import json
import shutil

import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_predictor import published_llava
from transformers import AutoModelForImageTextToText

from modeling_llava import LlavaForConditionalGeneration
from modeling_llava.inference import LlavaPredictor, load_model
from modeling_llava.inference.loading import usable_device
from modeling_llava.io.checkpoints import base_of, checkpoint_kind
from modeling_llava.training import merge_adapter, train


MESSAGES = [
    {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (50, 40), "red")}, {"type": "text", "text": "What?"}]}
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The base, and what each kind of run made of it."""
    root = tmp_path_factory.mktemp("models")
    published_llava(folder=root / "full")
    Image.new("RGB", (50, 40), "red").save(root / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A red one."}]
    (root / "data.json").write_text(
        json.dumps([{"id": str(i), "image": "a.png", "conversations": turns} for i in range(4)])
    )
    settings = {
        "model": str(root / "full"), "data": str(root / "data.json"), "image_folder": str(root), "max_steps": 4,
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "projector_learning_rate": 1e-2, "lora_r": 4,
        "lora_alpha": 8, "lora_dropout": 0.0, "save_strategy": "no", "disable_tqdm": True, "report_to": "none",
    }  # fmt: skip
    kinds = {
        "projector": {"stage": "pretrain"},
        "lora": {"adapter": "lora"},
        "dora": {"adapter": "lora", "use_dora": True, "train_vision_tower": True},
        "qlora": {"adapter": "qlora"},
    }
    for kind, changes in kinds.items():
        train({**settings, "output_dir": str(root / kind), **changes}, console=Console(file=open("/dev/null", "w")))
    merge_adapter(str(root / "lora"), str(root / "merged"))
    return root


@torch.no_grad()
def logits(model, processor):
    inputs = processor.apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return model(**inputs.to(model.device)).logits.float()


@pytest.mark.parametrize("kind", ["full", "merged", "lora", "dora", "qlora", "projector"])
def test_load_model_recognises_every_kind(folders, kind):
    model, processor = load_model(folders / kind, device="cpu")
    assert checkpoint_kind(folders / kind) == {"full": "full", "merged": "full", "projector": "projector"}.get(
        kind, "adapter"
    )
    assert isinstance(model, LlavaForConditionalGeneration) and not model.training
    assert processor.chat_template and processor.num_image_tokens == 4
    base, _ = load_model(folders / "full", device="cpu")
    difference = (logits(model, processor) - logits(base, processor)).abs().max()
    assert (difference == 0) == (kind == "full")


def test_loading_gives_what_was_trained(folders, tmp_path):
    """Against plain PEFT for adapters, also for what it saves; a merged checkpoint equals its adapter."""
    from peft import PeftModel

    for kind in ("lora", "dora"):
        base = AutoModelForImageTextToText.from_pretrained(folders / "full")
        adapted = PeftModel.from_pretrained(base, folders / kind).eval()
        adapted.save_pretrained(tmp_path / kind)
        for folder in (folders / kind, tmp_path / kind):
            model, processor = load_model(folder, device="cpu")
            assert torch.allclose(logits(model, processor), logits(adapted, processor), atol=1e-5)
    adapter, merged = (load_model(folders / kind, device="cpu") for kind in ("lora", "merged"))
    assert torch.allclose(logits(*adapter), logits(*merged), atol=1e-4)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_load_in_4bit_quantises_the_language_model_alone(folders, kind):
    model, processor = load_model(folders / kind, load_in_4bit=True, dtype=torch.float32, device="cpu")
    names = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert names and all("language_model" in name for name in names)
    exact, _ = load_model(folders / kind, device="cpu")
    difference = (logits(model, processor) - logits(exact, processor)).abs().max()
    assert difference > 0
    pair = torch.stack([logits(model, processor).flatten(), logits(exact, processor).flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.7


def four_bit_layers(model):
    return [module for module in model.modules() if type(module).__name__ == "Linear4bit"]


def test_an_adapter_trained_on_4_bits_is_loaded_on_them_unless_told_otherwise(folders, caplog, tmp_path):
    pytest.importorskip("bitsandbytes")
    recipe = folders / "qlora" / "recipe.yaml"
    adapter = tmp_path / "fp4"
    shutil.copytree(folders / "qlora", adapter)
    (adapter / "recipe.yaml").write_text(
        recipe.read_text("utf-8").replace("quant_type: nf4", "quant_type: fp4").replace("double_quant: true", "double_quant: false")
    )  # fmt: skip
    for path, quant_type, nested in ((folders / "qlora", "nf4", True), (adapter, "fp4", False)):
        caplog.clear()
        given = {"path": folders / "full", "adapter": path} if nested else {"path": path}
        model, _ = load_model(**given, device="cpu")
        layers = four_bit_layers(model)
        assert layers
        states = {(layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) for layer in layers}
        assert states == {(quant_type, nested)}
        assert "4-bit" in caplog.text and "--no-4bit" in caplog.text and "load_in_4bit=False" in caplog.text
    assert LlavaPredictor.from_pretrained(folders / "qlora", device="cpu").model.is_quantized
    caplog.clear()
    assert not four_bit_layers(load_model(folders / "qlora", device="cpu", load_in_4bit=False)[0])
    assert not four_bit_layers(load_model(folders / "lora", device="cpu")[0])
    assert "4-bit" not in caplog.text


def test_a_model_merged_from_a_4_bit_adapter_is_loaded_as_it_is(folders, tmp_path):
    merge_adapter(str(folders / "qlora"), str(tmp_path / "merged"))
    assert (tmp_path / "merged" / "recipe.yaml").is_file()  # it goes along, for the model card
    assert not four_bit_layers(load_model(tmp_path / "merged", device="cpu")[0])


def test_without_bitsandbytes_16_bits_are_loaded_and_said(folders, caplog, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest)
    )
    model, _ = load_model(folders / "qlora", device="cpu")
    assert not four_bit_layers(model)
    assert "bitsandbytes is not installed" in caplog.text and "16 bits" in caplog.text


def test_an_adapter_on_a_model_of_choice(folders):
    given, processor = load_model(folders / "full", adapter=folders / "lora", device="cpu")
    own, _ = load_model(folders / "lora", device="cpu")
    assert torch.equal(logits(given, processor), logits(own, processor))
    with pytest.raises(ValueError, match="holds an adapter already"):
        load_model(folders / "lora", adapter=folders / "qlora")
    with pytest.raises(ValueError, match="is not an adapter folder"):
        load_model(folders / "full", adapter=folders / "projector")


def test_a_base_that_moved_is_named_and_can_be_given(folders, tmp_path):
    shutil.copytree(folders / "lora", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base_of(folders / "lora")[0] == str(folders / "full")
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="was trained on .*gone, which is not there"):
        load_model(tmp_path / "adapter")
    model, processor = load_model(tmp_path / "adapter", base=str(folders / "full"), device="cpu")
    assert torch.equal(logits(model, processor), logits(*load_model(folders / "lora", device="cpu")))


@pytest.mark.parametrize("device", ["cuda:99", "xpu:99", "graphics card"])
def test_a_device_that_is_not_there_is_one_error(device):
    with pytest.raises(ValueError, match='finds no device.*"cpu".*llava doctor'):
        usable_device(device)
    assert usable_device("cpu") == torch.device("cpu")
