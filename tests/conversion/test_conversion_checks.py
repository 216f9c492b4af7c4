"""The stock-ready check finds what is wrong with a folder, and its logits are those of whole models in memory."""

import json
import shutil

import pytest
import torch
from conversion_cases import GOLDEN, edit_json, original_tensors, random_original, rewrite
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration as StockLlava

from modeling_llava import LlavaForConditionalGeneration, LlavaProcessor
from modeling_llava.cli.main import main
from modeling_llava.conversion import check_stock_ready, convert_original_to_hf
from modeling_llava.conversion import tensors as tensors_module
from modeling_llava.conversion.checks import NUM_COMPARED, hf_logits, original_logits, probe_image
from modeling_llava.conversion.hf_checkpoints import read_hf
from modeling_llava.conversion.originals import read_original


@pytest.fixture(scope="module")
def golden_hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "out"
    convert_original_to_hf(GOLDEN / "llava_v15_tiny", folder, check=False)
    return folder


@pytest.fixture
def broken(tmp_path, golden_hf):
    """A copy of a sound folder, to be broken."""
    shutil.copytree(golden_hf, tmp_path / "hf")
    return tmp_path / "hf"


def state_of(report) -> dict[str, str]:
    return {item.name: item.state for item in report.items}


def change(folder, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_sound_folder_is_stock_ready(golden_hf):
    report = check_stock_ready(golden_hf)
    assert report.is_stock_ready and report.is_sound
    assert state_of(report) == dict.fromkeys(["projector", "keys", "template", "image tokens", "logits"], "ok")
    assert check_stock_ready(golden_hf, reference=GOLDEN / "llava_v15_tiny").is_stock_ready


def test_streamed_logits_are_those_of_a_model_in_memory(golden_hf, monkeypatch):
    monkeypatch.setattr(tensors_module, "PIECE_BYTES", 1000)  # a few rows of each matrix at once
    hf = read_hf(golden_hf)
    processor, model = LlavaProcessor.from_pretrained(golden_hf), StockLlava.from_pretrained(golden_hf)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why is it so?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=probe_image(), text=text, return_tensors="pt")
    with torch.no_grad():
        whole = model(**inputs).logits[:, -NUM_COMPARED:]
    tensors = {entry.hf: tensor for entry, tensor in hf.tensors.items()}
    assert torch.allclose(hf_logits(hf.config.to_dict(), tensors, inputs), whole, atol=1e-5)
    original = read_original(GOLDEN / "llava_v15_tiny")
    before = original_logits(original, inputs, hf.config.image_token_id)
    assert torch.allclose(before, whole[..., :700], atol=1e-5)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("language_model.model.norm.weight"), "1 missing_keys"),
        (lambda t: t.update({"language_model.model.more.weight": torch.ones(2)}), "1 unexpected_keys"),
        (lambda t: t.update({"multi_modal_projector.linear_1.weight": torch.ones(64, 31)}), "linear_1"),
    ],
)
def test_keys_that_stock_transformers_does_not_find(broken, edit, message):
    change(broken, edit)
    report = check_stock_ready(broken)
    assert state_of(report)["keys"] == "failed" and message in report.failures()
    assert not report.is_stock_ready and not report.is_sound


@pytest.mark.parametrize(
    "file, field, said",
    [
        ("config.json", {"image_seq_length": 10}, "the processor writes 9 for an image of 42x42 pixels"),
        ("config.json", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'default'"),
        ("processor_config.json", {"patch_size": 7}, "patch_size is 7"),
        ("processor_config.json", {"patch_size": None}, "patch_size is None"),
        ("processor_config.json", {"num_additional_image_tokens": 0}, "num_additional_image_tokens is 0"),
    ],
)
def test_processor_and_model_that_disagree_about_image_tokens(broken, file, field, said):
    """The tower says how many there are, whatever the processor's settings make of it."""
    edit_json(broken / file, **field)
    report = check_stock_ready(broken)
    assert state_of(report)["image tokens"] == "failed" and said in report.failures()


def test_template_that_fails(broken):
    (broken / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    report = check_stock_ready(broken)
    assert state_of(report)["template"] == "failed" and "no" in report.failures()
    (broken / "chat_template.jinja").write_text("nothing of the question")
    assert state_of(check_stock_ready(broken))["template"] == "failed"


def test_other_weights_than_the_originals_are_found(broken):
    def bend(tensors):
        tensors["language_model.model.layers.1.mlp.down_proj.weight"][5, 7] += 0.5

    change(broken, bend)
    assert check_stock_ready(broken).is_stock_ready  # by itself it is a fine checkpoint
    report = check_stock_ready(broken, reference=GOLDEN / "llava_v15_tiny")
    assert state_of(report)["logits"] == "failed" and "before and after differ by" in report.failures()


@pytest.mark.parametrize(
    "fields",
    [{"vision_feature_layer": -1}, {"projector_hidden_act": "relu"}, {"text_config": {"rms_norm_eps": 0.1}}],
)
def test_configuration_that_computes_something_else_is_found(broken, fields):
    config = json.loads((broken / "config.json").read_text())
    for name, value in fields.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (broken / "config.json").write_text(json.dumps(config))
    report = check_stock_ready(broken, reference=GOLDEN / "llava_v15_tiny")
    assert state_of(report)["logits"] == "failed"


def test_not_a_number_is_found(broken):
    change(broken, lambda t: t["multi_modal_projector.linear_1.bias"].fill_(float("nan")))
    report = check_stock_ready(broken)
    assert state_of(report)["logits"] == "failed" and "not finite" in report.failures()


def test_conversion_whose_check_fails_leaves_no_folder(tmp_path, monkeypatch):
    """The check stands between the files and their place: here the key map is made to swap two matrices."""
    from modeling_llava.conversion import original_to_hf

    real = original_to_hf.hf_tensors

    def swapped(*args):
        tensors = real(*args)
        one, two = (f"language_model.model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
        tensors[one], tensors[two] = tensors[two], tensors[one]
        return tensors

    monkeypatch.setattr(original_to_hf, "hf_tensors", swapped)
    with pytest.raises(ValueError, match="conversion of .* does not hold: logits: before and after differ"):
        convert_original_to_hf(GOLDEN / "llava_v15_tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*/config.json"))


def test_token_that_was_added_never_wins(tmp_path):
    """Its row is the mean of the others, so its logit is their mean: at most the largest."""
    (tmp_path / "source").mkdir()
    source = random_original(tmp_path / "source")

    def negative(tensors):  # a head that makes every logit negative would let a row of zeros win
        tensors["lm_head.weight"] = -tensors["lm_head.weight"].abs()
        tensors["model.norm.weight"] = tensors["model.norm.weight"].abs()
        return tensors

    rewrite(source, negative)
    assert convert_original_to_hf(source, tmp_path / "out").check.is_stock_ready
    model = StockLlava.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = model(input_ids=torch.randint(0, 700, (4, 50))).logits
    assert int(logits.argmax(-1).max()) < 700


def test_a_siglip_tower_with_its_head_is_run(tmp_path):
    """Its attention uses more of a linear layer than the product."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = SiglipVisionConfig(**size, image_size=32, patch_size=8)
    SiglipVisionModel(vision).save_pretrained(tmp_path / "siglip")
    parts = str(tmp_path / "siglip"), str(GOLDEN / "llava_v15_tiny_lora" / "language_model")
    LlavaForConditionalGeneration.from_vision_language_pretrained(*parts).save_pretrained(tmp_path / "llava")
    LlavaProcessor.from_vision_language_pretrained(*parts).save_pretrained(tmp_path / "llava")
    assert check_stock_ready(tmp_path / "llava").is_stock_ready


def test_folder_that_is_none_is_said(tmp_path, golden_hf):
    with pytest.raises(OSError, match="no config.json"):
        check_stock_ready(tmp_path)
    with pytest.raises(ValueError, match="llava convert"):
        check_stock_ready(GOLDEN / "llava_v15_tiny")
    shutil.copyfile(golden_hf / "config.json", tmp_path / "config.json")
    with pytest.raises(ValueError, match="holds no weights"):
        check_stock_ready(tmp_path)


def test_language_model_of_another_family_is_checked_too(tmp_path):
    """What `llava init` composes need not be LLaMA: stock transformers' own loading is what decides."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM

    from modeling_llava import LlavaForConditionalGeneration

    config = Qwen2Config(
        vocab_size=700,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "language")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(GOLDEN / "llava_v15_tiny" / name, tmp_path / "language" / name)
    vision = json.loads((GOLDEN / "llava_v15_tiny/vision_tower/config.json").read_text("utf-8"))
    CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(tmp_path / "tower")
    paths = (str(tmp_path / "tower"), str(tmp_path / "language"))
    LlavaForConditionalGeneration.from_vision_language_pretrained(*paths).save_pretrained(tmp_path / "hf")
    LlavaProcessor.from_vision_language_pretrained(*paths).save_pretrained(tmp_path / "hf")
    assert AutoModelForCausalLM  # the language model is one of transformers' own
    report = check_stock_ready(tmp_path / "hf")
    assert report.is_stock_ready, str(report)


# On the command line


def test_command_checks_a_folder_against_its_original(golden_hf, broken, capsys):
    original = str(GOLDEN / "llava_v15_tiny")
    assert main(["convert", "--check", str(golden_hf), "--against", original]) == 0
    assert "stock transformers runs it" in capsys.readouterr().out
    change(broken, lambda t: t["language_model.model.norm.weight"].mul_(3))
    assert main(["convert", "--check", str(broken), "--against", original]) == 1
    assert "failed  logits" in capsys.readouterr().out


def test_command_converts_with_base_and_tower(tmp_path, capsys):
    folder = GOLDEN / "llava_v15_tiny_lora"
    words = [str(folder / "llava-lora"), str(tmp_path / "out"), "--base", str(folder / "language_model")]
    assert main(["convert", *words, "--vision-tower", str(folder / "vision_tower"), "--dtype", "float16"]) == 0
    assert "note: A lora and its base were merged into one checkpoint" in capsys.readouterr().out
    assert next(iter(original_tensors(tmp_path / "out").values())).dtype == torch.float16


def test_command_writes_gguf(golden_hf, tmp_path, capsys):
    pytest.importorskip("gguf")
    words = [str(golden_hf), str(tmp_path / "out"), "--to", "gguf", "--dtype", "q8_0", "--class-token-last"]
    assert main(["convert", *words]) == 0
    printed = capsys.readouterr().out
    assert "next: llama-mtmd-cli -m" in printed and "issue 25814" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mmproj-q8_0.gguf", "model-q8_0.gguf"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SRC", "OUT", "--against", "x"], "--against goes with --check"),
        (["SRC", "OUT", "--class-token-last"], "--class-token-last has no effect with --to hf"),
        (["SRC", "OUT", "--dtype", "int3"], "dtype 'int3' is not known"),
        (["SRC", "OUT", "--max-shard-size", "big"], "'big' is not a size"),
        (["HF", "OUT", "--to", "gguf", "--dtype", "q2"], "dtype 'q2' is not a GGUF type"),
        (["HF", "OUT"], "in the HF format already"),
    ],
)
def test_mistake_is_one_line(golden_hf, tmp_path, capsys, words, message):
    pytest.importorskip("gguf")
    places = {"SRC": str(GOLDEN / "llava_v15_tiny"), "HF": str(golden_hf), "OUT": str(tmp_path / "out")}
    assert main(["convert", *[places.get(word, word) for word in words]]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("llava convert: error:") and message in error
    assert not (tmp_path / "out").exists()
