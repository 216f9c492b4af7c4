"""What a folder is, before its weights are read; and what a plain PEFT adapter over our class says of itself."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_predictor import tiny_llava, tiny_processor
from transformers import AutoModelForImageTextToText, AutoModelForPreTraining

from modeling_llava import LlavaForConditionalGeneration
from modeling_llava.cli.main import main
from modeling_llava.io.checkpoints import (
    checkpoint_kind,
    find_base,
    four_bits_of,
    load_processor,
    load_projector,
    save_projector,
)


ORIGINAL = {"model_type": "llava_llama", "mm_vision_tower": "openai/clip", "mm_projector_type": "mlp2x_gelu"}
NOTHING = b"weights that nobody may read"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    processor = tiny_processor()
    tiny_llava(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(saved):
    from peft import LoraConfig, get_peft_model

    folder = saved.parent / "adapter"
    model = LlavaForConditionalGeneration.from_pretrained(saved)
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def folder_of(path, config=None, **files):
    path.mkdir()
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        name = name.replace("__", ".")
        (path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


@pytest.mark.parametrize(
    "config, files, said",
    [
        (ORIGINAL, {"pytorch_model__bin": NOTHING}, ["llava convert {} OUT"]),
        (ORIGINAL | {"model_type": "llava"}, {"model__safetensors": NOTHING}, ["llava convert {} OUT"]),
        (
            ORIGINAL,
            {"adapter_config__json": {"base_model_name_or_path": "lmsys/vicuna"}, "adapter_model__bin": NOTHING},
            ["llava convert {} OUT --base lmsys/vicuna"],
        ),
        (
            None,
            {"adapter_config__json": {}, "non_lora_trainables__bin": NOTHING},
            ["llava convert {} OUT --base BASE"],
        ),
        (ORIGINAL, {"mm_projector__bin": NOTHING}, ["llava convert {} OUT --base BASE"]),
        (None, {"mm_projector__bin": NOTHING}, ["llava convert {} OUT --base BASE"]),
        (ORIGINAL | {"model_type": "llava_mpt"}, {}, ["llava_mpt", "LLaMA and Mistral"]),
        (ORIGINAL | {"image_aspect_ratio": "anyres"}, {"pytorch_model__bin": NOTHING}, ["anyres", "LLaVA-NeXT"]),
        ({"model_type": "llava_next", "text_config": {}}, {"model__safetensors": NOTHING}, ["'llava_next'"]),
        ({"model_type": "llava_onevision", "text_config": {}}, {}, ["'llava_onevision'"]),
        ({"model_type": "clip"}, {}, ["'clip'"]),
        ({"model_type": "qwen2"}, {"model__safetensors": NOTHING}, ["qwen2", "llava init VISION {} OUT"]),
    ],
)
def test_what_is_not_a_llava_is_named_before_weights_are_read(tmp_path, config, files, said):
    folder = folder_of(tmp_path / "folder", config, **files)
    for call in (checkpoint_kind, LlavaForConditionalGeneration.from_pretrained):
        with pytest.raises(ValueError) as error:
            call(folder)
        assert all(words.format(folder) in str(error.value) for words in said)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name, said", [("mm_projector.bin", "llava convert"), ("model.gguf", "GGUF"), ("model.safetensors", "the folder")]
)
def test_one_file_in_the_place_of_a_folder_is_named(tmp_path, name, said, capsys):
    (tmp_path / name).write_bytes(NOTHING)
    assert main(["chat", str(tmp_path / name)]) == 2
    assert said in (error := capsys.readouterr().err) and name in error


@pytest.mark.parametrize("content", ["{ cut", "[1]"])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, content):
    (folder_of(tmp_path / "folder") / "config.json").write_text(content)
    with pytest.raises(ValueError, match="folder/config.json"):
        checkpoint_kind(tmp_path / "folder")


def changed(adapter, target, change):
    shutil.copytree(adapter, target)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: t for old, tensor in tensors.items() for name, t in [change(old, tensor)]}, target / "adapter_model.safetensors")  # fmt: skip
    return target


def test_an_adapter_lands_under_todays_names_and_those_of_earlier_versions(saved, adapter, tmp_path):
    old = changed(
        adapter, tmp_path / "old", lambda name, t: (name.replace("model.language_model", "language_model.model"), t)
    )
    for folder in (adapter, old):
        assert find_base(folder) == (str(saved), None)
        assert checkpoint_kind(folder) == "adapter"


@pytest.mark.parametrize(
    "change",
    [
        lambda name, t: (name.replace("model.language_model.", "model."), t),  # of the language model alone
        lambda name, t: (name.replace("layers.0", "layers.7"), t),  # of a deeper one
        lambda name, t: (name, torch.zeros(t.shape[0] * 3, t.shape[1] * 3)),  # of a wider one
    ],
    ids=["language model", "deeper", "wider"],
)
def test_an_adapter_of_another_model_is_refused(saved, adapter, tmp_path, change):
    other = changed(adapter, tmp_path / "other", change)
    for call in (
        find_base,
        LlavaForConditionalGeneration.from_pretrained,
        AutoModelForImageTextToText.from_pretrained,
    ):
        with pytest.raises(ValueError, match="other is not for the base .* tensors, .* fit no module"):
            call(other)


def test_a_base_or_a_recipe_that_cannot_be_read_is_named(adapter, tmp_path):
    folder = changed(adapter, tmp_path / "other", lambda name, t: (name, t))
    config = json.loads((folder / "adapter_config.json").read_text())
    for base, said in ((None, "names no base"), ("/no/where", "is not there"), (str(adapter), "an adapter itself")):
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        with pytest.raises(ValueError, match=said):
            find_base(folder)
    (folder / "recipe.yaml").write_text("adapter: [")
    with pytest.raises(ValueError, match="recipe.yaml is not YAML"):
        four_bits_of(folder)


def test_a_projector_of_another_model_is_refused(saved, tmp_path):
    model = LlavaForConditionalGeneration.from_pretrained(saved)
    model.requires_grad_(False).model.multi_modal_projector.requires_grad_(True)
    save_projector(model, tmp_path)
    assert load_projector(model, tmp_path) == ["multi_modal_projector"]
    tensors = load_file(tmp_path / "projector.safetensors")
    name = next(iter(tensors))
    for wrong, said in (
        ({**tensors, name: torch.zeros(3)}, "but the model's is"),
        ({name: tensors[name]}, "are missing"),
    ):
        save_file(wrong, tmp_path / "projector.safetensors")
        with pytest.raises(ValueError, match=said):
            load_projector(model, tmp_path)
    config = json.loads((tmp_path / "projector_config.json").read_text())
    (tmp_path / "projector_config.json").write_text(json.dumps({**config, "vision_feature_layer": -1}))
    with pytest.raises(ValueError, match="vision_feature_layer=-1, but the model has -2"):
        load_projector(model, tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_an_adapter_emptied_by_zero3_is_named(adapter, tmp_path, form):
    empty = changed(adapter, tmp_path / "empty", lambda name, t: (name, torch.empty(0)))
    if form == "bin":
        torch.save(load_file(empty / "adapter_model.safetensors"), empty / "adapter_model.bin")
        (empty / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="lora_.* is empty .*ZeRO-3"):
        checkpoint_kind(empty)


def test_a_processor_without_patch_size_takes_it_from_the_model(saved, tmp_path):
    folder = tmp_path / "older"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "processor_config.json").read_text())
    for name in ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy"):
        del config[name]
    (folder / "processor_config.json").write_text(json.dumps(config))
    assert load_processor(folder).num_image_tokens == (28 // 14) ** 2  # the class token is dropped


def test_a_plain_adapter_names_the_stock_class(adapter):
    """PEFT's AutoPeftModel imports what stands there, and refuses packages that it does not know."""
    mapping = json.loads((adapter / "adapter_config.json").read_text())["auto_mapping"]
    assert mapping == {
        "base_model_class": "LlavaForConditionalGeneration",
        "parent_library": "transformers.models.llava.modeling_llava",
    }


def test_auto_model_for_pretraining_gives_our_class(saved):
    assert type(AutoModelForPreTraining.from_pretrained(saved)) is LlavaForConditionalGeneration


def test_a_llava_or_a_checkpoint_of_the_original_is_no_part_of_a_new_one(saved, golden):
    """transformers takes random weights for those of a tower that it does not find."""
    language = str(golden / "llava_v15_tiny_lora" / "language_model")
    with pytest.raises(ValueError, match="does not hold a whole CLIPVisionModel"):
        LlavaForConditionalGeneration.from_vision_language_pretrained(str(saved), language)
    with pytest.raises(ValueError, match="llava convert"):
        LlavaForConditionalGeneration.from_vision_language_pretrained(str(saved), str(golden / "llava_v15_tiny"))


def test_estimate_names_what_is_not_a_llava(golden, capsys):
    assert main(["estimate", "lora", f"model={golden / 'llava_v15_tiny_lora' / 'llava-lora'}"]) == 2
    base = (
        golden / "llava_v15_tiny_lora" / "language_model"
    )  # the adapter calls it "language_model", which lies next to it
    assert f"OUT --base {base}" in capsys.readouterr().err
