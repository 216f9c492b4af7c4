"""The stock-ready check finds what is wrong with a folder, and its logits are those of whole models in memory."""

import json
import shutil

import pytest
import torch
from conversion_cases import GOLDEN, edit_json, random_original, rewrite
from published import build, build_siglip
from safetensors.torch import load_file, save_file
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration as StockLlava

from modeling_llava import LlavaProcessor
from modeling_llava.cli.main import main
from modeling_llava.conversion import check_stock_ready, convert_original_to_hf, original_to_hf
from modeling_llava.conversion.checks import NUM_COMPARED, hf_logits, original_logits, probe_image
from modeling_llava.conversion.hf_checkpoints import read_hf
from modeling_llava.conversion.originals import read_original


SOURCE = GOLDEN / "llava_v15_tiny"


@pytest.fixture
def broken(tmp_path, golden_hf):
    """A copy of a sound folder, to be broken."""
    return shutil.copytree(golden_hf, tmp_path / "hf")


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
    assert check_stock_ready(golden_hf, reference=SOURCE).is_stock_ready


def test_streamed_logits_are_those_of_a_model_in_memory(golden_hf):
    hf = read_hf(golden_hf)
    processor, model = LlavaProcessor.from_pretrained(golden_hf), StockLlava.from_pretrained(golden_hf)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why is it so?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=probe_image(), text=text, return_tensors="pt")
    with torch.no_grad():
        whole = model(**inputs).logits[:, -NUM_COMPARED:]
    assert torch.allclose(hf_logits(hf.config, hf.tensors, inputs), whole, atol=1e-5)
    before = original_logits(read_original(SOURCE), inputs, hf.config.image_token_id)
    assert torch.allclose(before, whole[..., :700], atol=1e-5)


def weights(edit):
    return lambda folder: change(folder, edit)


def field(file, **fields):
    return lambda folder: edit_json(folder / file, **fields)


def template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


@pytest.mark.parametrize(
    ("edit", "item", "said"),
    [
        (weights(lambda t: t.pop("language_model.model.norm.weight")), "keys", "1 missing_keys"),
        (weights(lambda t: t.update({"language_model.model.more": torch.ones(2)})), "keys", "1 unexpected_keys"),
        (
            weights(lambda t: t.update({"multi_modal_projector.linear_1.weight": torch.ones(64, 31)})),
            "keys",
            "linear_1",
        ),
        (weights(lambda t: t["multi_modal_projector.linear_1.bias"].fill_(float("nan"))), "logits", "not finite"),
        # The tower says how many image tokens there are, whatever the processor's settings make of it.
        (field("config.json", image_seq_length=10), "image tokens", "writes 9 for an image of 42x42 pixels"),
        (field("config.json", vision_feature_select_strategy="full"), "image tokens", "strategy is 'default'"),
        (field("processor_config.json", patch_size=7), "image tokens", "patch_size is 7"),
        (field("processor_config.json", patch_size=None), "image tokens", "patch_size is None"),
        (field("processor_config.json", num_additional_image_tokens=0), "image tokens", "image_tokens is 0"),
        (template("{{ raise_exception('no') }}"), "template", "no"),
        (template("nothing of the question"), "template", "no"),
    ],
)
def test_what_is_wrong_with_a_folder_is_found(broken, edit, item, said):
    edit(broken)
    report = check_stock_ready(broken)
    assert state_of(report)[item] == "failed" and said in report.failures()
    assert not report.is_stock_ready and not report.is_sound


@pytest.mark.parametrize(
    "edit",
    [
        field("config.json", vision_feature_layer=-1),
        field("config.json", projector_hidden_act="relu"),
        weights(lambda t: t["language_model.model.layers.1.mlp.down_proj.weight"][5].add_(0.5)),
    ],
)
def test_folder_that_computes_something_else_than_the_original_is_found(broken, edit):
    edit(broken)
    assert state_of(check_stock_ready(broken, reference=SOURCE))["logits"] == "failed"


def test_conversion_whose_check_fails_leaves_no_folder(tmp_path, monkeypatch):
    """The check stands between the files and their place: here the key map is made to swap two matrices."""
    real = original_to_hf.hf_tensors

    def swapped(*args):
        tensors = real(*args)
        one, two = (f"language_model.model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
        tensors[one], tensors[two] = tensors[two], tensors[one]
        return tensors

    monkeypatch.setattr(original_to_hf, "hf_tensors", swapped)
    with pytest.raises(ValueError, match="conversion to .* does not hold: logits: before and after differ"):
        convert_original_to_hf(SOURCE, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*/config.json"))


def test_token_that_was_added_never_wins(tmp_path, monkeypatch):
    """Its row is the mean of the others, so its logit is their mean: at most the largest. A row of zeros would win here."""
    source = random_original(tmp_path / "source")

    def negative(tensors):
        tensors["lm_head.weight"] = -tensors["lm_head.weight"].abs()
        tensors["model.norm.weight"] = tensors["model.norm.weight"].abs()
        return tensors

    rewrite(source, negative)
    assert convert_original_to_hf(source, tmp_path / "out").check.is_stock_ready
    change(tmp_path / "out", lambda t: t["language_model.lm_head.weight"][700:].fill_(5))
    report = check_stock_ready(tmp_path / "out", reference=source)
    assert "added has the largest logit" in report.failures()


def test_folder_that_cannot_be_checked_is_named(tmp_path, golden_hf):
    with pytest.raises(OSError, match="no config.json"):
        check_stock_ready(tmp_path)
    with pytest.raises(ValueError, match="llava convert"):
        check_stock_ready(SOURCE)
    shutil.copyfile(golden_hf / "config.json", tmp_path / "config.json")
    with pytest.raises(ValueError, match="holds no weights"):
        check_stock_ready(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter.*llava merge"):
        check_stock_ready(tmp_path)
    assert not check_stock_ready(build("vicuna"), logits=False).failures()
    # What `llava init` composes need not be CLIP and LLaMA; SigLIP's head uses more of a linear layer than the product.
    assert check_stock_ready(build_siglip("qwen3")).is_stock_ready


# On the command line


def test_command_converts_checks_and_converts_back(tmp_path, capsys):
    hf = tmp_path / "hf"
    folder = GOLDEN / "llava_v15_tiny_lora"
    words = [str(folder / "llava-lora"), str(hf), "--base", str(folder / "language_model")]
    assert main(["convert", *words, "--vision-tower", str(folder / "vision_tower"), "--dtype", "float16"]) == 0
    printed = capsys.readouterr().out
    assert "note: A lora and its base were merged" in printed and "next: llava chat" in printed
    assert next(iter(load_file(hf / "model.safetensors").values())).dtype == torch.float16
    assert main(["convert", str(hf), str(tmp_path / "back"), "--to", "original"]) == 0
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == "llava_llama"


def test_command_checks_a_folder_against_its_original(golden_hf, broken, capsys):
    assert main(["convert", "--check", str(golden_hf), "--against", str(SOURCE)]) == 0
    assert "stock transformers runs it" in capsys.readouterr().out
    change(broken, lambda t: t["language_model.model.norm.weight"].mul_(3))
    assert main(["convert", "--check", str(broken), "--against", str(SOURCE)]) == 1
    assert "failed  logits" in capsys.readouterr().out


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
        (["SRC", "OUT", "--against", "x"], "--against"),
        (["SRC"], "no output folder"),
        (["SRC", "OUT", "--check"], "--check"),
        (["nowhere", "OUT"], "nowhere"),
        (["LORA", "OUT"], "--base"),
        (["SRC", "OUT", "--class-token-last"], "--class-token-last"),
        (["SRC", "OUT", "--to", "original", "--base", "x"], "--base"),
        (["SRC", "OUT", "--dtype", "int3"], "'int3'"),
        (["SRC", "OUT", "--max-shard-size", "big"], "big"),
        (["HF", "OUT", "--to", "gguf", "--dtype", "q2"], "'q2'"),
        (["HF", "OUT"], "in the HF format already"),
    ],
)
def test_mistake_is_one_line(golden_hf, tmp_path, capsys, words, message):
    pytest.importorskip("gguf")
    lora, out = GOLDEN / "llava_v15_tiny_lora/llava-lora", tmp_path / "out"
    places = {"SRC": SOURCE, "HF": golden_hf, "OUT": out, "LORA": lora}
    assert main(["convert", *[str(places.get(word, word)) for word in words]]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("llava convert: error:") and message in error
    assert not (tmp_path / "out").exists()
