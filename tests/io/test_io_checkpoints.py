"""What a folder is, before its weights are read; and what a plain PEFT adapter over our class says of itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_text_config
from tiny_predictor import tiny_llava, tiny_processor
from transformers import AutoModelForImageTextToText, AutoModelForPreTraining

from modeling_llava import LlavaForConditionalGeneration
from modeling_llava.cli.main import main
from modeling_llava.inference.loading import load_model
from modeling_llava.io.adapters import find_base, four_bits_of
from modeling_llava.io.checkpoints import (
    checkpoint_kind,
    load_processor,
    load_projector,
    save_projector,
    saved_tensors,
)
from modeling_llava.training.merge import merge_adapter


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
    kept = [change(name, tensor) for name, tensor in tensors.items()]
    save_file({name: tensor.contiguous() for name, tensor in filter(None, kept)}, target / "adapter_model.safetensors")
    return target


def test_an_adapter_lands_under_todays_names_and_those_of_earlier_versions(saved, adapter, tmp_path):
    old = changed(
        adapter, tmp_path / "old", lambda name, t: (name.replace("model.language_model", "language_model.model"), t)
    )
    for folder in (adapter, old):
        assert find_base(folder) == (str(saved), None)
        assert checkpoint_kind(folder) == "adapter"


def without(sign):
    return lambda name, tensor: None if sign in name else (name, tensor)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda name, t: (name.replace("model.language_model.", "model."), t), "fit no module"),  # a language model's
        (lambda name, t: (name.replace("layers.0", "layers.7"), t), "fit no module"),  # of a deeper one
        (lambda name, t: (name, torch.zeros(t.shape[0] * 3, t.shape[1] * 3)), "another size"),  # of a wider one
        (
            lambda name, t: (name, t[:1] if "lora_B" in name else t),
            "another size",
        ),  # of one with fewer key and value heads
        (without("lora_B"), "are missing"),
        (without("layers.1"), "are missing"),  # or of a base with fewer layers
        (without("lora"), "holds no weights|has no adapter_model"),
    ],
    ids=["language model", "deeper", "wider", "fewer heads", "half", "shallower", "nothing"],
)
def test_an_adapter_that_is_not_whole_or_of_another_model_is_refused(saved, adapter, tmp_path, change, said):
    other = changed(adapter, tmp_path / "other", change)
    for call in (
        find_base,
        load_model,
        LlavaForConditionalGeneration.from_pretrained,
        AutoModelForImageTextToText.from_pretrained,
    ):
        with pytest.raises(ValueError, match=f"other .*{said}"):
            call(other)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 4},
        {"r": "four"},
        {"peft_type": "FOO"},
        {"peft_type": None},
        {"target_modules": "(("},
        {"target_modules": "no"},
    ],
    ids=str,
)
def test_an_adapter_whose_configuration_was_changed_is_refused(adapter, tmp_path, fields):
    other = changed(adapter, tmp_path / "other", lambda name, t: (name, t))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(ValueError, match=f"adapter {other} .*base"):
        find_base(other)


@pytest.mark.parametrize("content", [b"hello" * 100, b""])
def test_pickled_adapter_weights_that_cannot_be_read_are_named(adapter, tmp_path, content):
    other = changed(adapter, tmp_path / "other", lambda name, t: (name, t))
    (other / "adapter_model.safetensors").unlink()
    (other / "adapter_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match="adapter_model.bin is damaged"):
        find_base(other)


def test_an_adapter_of_pickles_and_earlier_names_lands(saved, adapter, tmp_path):
    """As plain PEFT saved it over transformers 4.51, with the projector trained whole."""
    from peft import LoraConfig, get_peft_model

    model = LlavaForConditionalGeneration.from_pretrained(saved)
    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"], init_lora_weights=False
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "today")
    tensors = load_file(tmp_path / "today" / "adapter_model.safetensors")
    for before, after in ((".model.language_model.", ".language_model.model."), (".model.model.", ".model.")):
        tensors = {name.replace(before, after): torch.ones_like(tensor) for name, tensor in tensors.items()}
    shutil.copytree(tmp_path / "today", tmp_path / "old")
    (tmp_path / "old" / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "old" / "adapter_model.bin")
    loaded = dict(load_model(tmp_path / "old")[0].named_parameters())
    assert all((p == 1).all() for name, p in loaded.items() if ".lora_" in name or ".modules_to_save." in name)
    merged = load_file(merge_adapter(str(tmp_path / "old"), str(tmp_path / "merged")) / "model.safetensors")
    assert (merged["multi_modal_projector.linear_1.weight"] == 1).all()


def tensors_of(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def config_of(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: v for name, v in (config | fields).items() if v != "none"}))


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda f: tensors_of(f, lambda ts: {n: t for n, t in ts.items() if "projector" not in n}), "4 are missing"),
        (lambda f: tensors_of(f, lambda ts: {n: t for n, t in ts.items() if "lm_head" not in n}), "1 are missing"),
        (
            lambda f: tensors_of(f, lambda ts: {n: t[:3] if "linear_1.b" in n else t for n, t in ts.items()}),
            "other sizes",
        ),
        (lambda f: tensors_of(f, lambda ts: {}), "0 parameters"),
        (lambda f: config_of(f, text_config="none"), "parameters, the model of its config.json has"),  # a model of 7B
        (lambda f: config_of(f, text_config={"model_type": "llama", "hidden_size": "wide"}), "hidden_size"),
        (lambda f: (f / "config.json").write_text("{}"), "config.json of .* is empty"),
        (lambda f: (f / "config.json").unlink(), "holds no model"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (
            lambda f: (f / "model.safetensors").rename(f / "model.safetensors.index.json").write_text("{}"),
            "of its kind",
        ),
        (lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"), "holds no weights"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_and_nothing_is_drawn_at_random(saved, tmp_path, damage, said):
    folder = Path(shutil.copytree(saved, tmp_path / "broken"))
    damage(folder)
    for call in (LlavaForConditionalGeneration.from_pretrained, load_model):
        with pytest.raises(ValueError, match=said):
            call(folder)


def test_random_weights_are_drawn_for_those_who_ask(saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "cut"))
    tensors_of(folder, lambda tensors: {name: t for name, t in tensors.items() if "vision" not in name})
    LlavaForConditionalGeneration.from_pretrained(folder, ignore_mismatched_sizes=True)
    _, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)  # is told
    assert len(info["missing_keys"]) > 10


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
    for fields, said in (
        ({"vision_feature_layer": -1}, "vision_feature_layer=-1, but the model has -2"),
        ({"projector_hidden_act": None}, "projector_hidden_act=None"),
        ({"components": None}, "0 weights are missing .* 1 are not the model's"),
    ):
        (tmp_path / "projector_config.json").write_text(json.dumps({**config, **fields}))
        with pytest.raises(ValueError, match=said):
            find_base(tmp_path)  # before a model is loaded
    (tmp_path / "projector_config.json").write_text(json.dumps(config))
    for content, said in ((b"cut", "projector.safetensors is damaged"), (None, "no projector.safetensors")):
        (tmp_path / "projector.safetensors").unlink()
        if content is not None:
            (tmp_path / "projector.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=said):
            find_base(tmp_path)
    with pytest.raises(ValueError, match="a projector alone. Merge"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


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


def test_a_state_dict_of_experts_that_are_fused_in_memory_is_refused():
    model = LlavaForConditionalGeneration(tiny_config(text=tiny_text_config("mixtral", num_local_experts=2)))
    with pytest.raises(ValueError, match="fused with others"):
        model.load_state_dict(saved_tensors(model))
