"""`llava init`, from folders to a model that stock transformers loads and answers with."""

import json
import shutil

import pytest
from PIL import Image
from tiny import tiny_text_config, tiny_vision_config
from transformers import AutoModel, AutoModelForCausalLM, CLIPImageProcessor, pipeline

from modeling_llava.cli.main import main


@pytest.fixture
def parts(tmp_path, golden):
    AutoModel.from_config(tiny_vision_config()).save_pretrained(tmp_path / "tower")
    size = {"height": 28, "width": 28}
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size).save_pretrained(tmp_path / "tower")
    AutoModelForCausalLM.from_config(tiny_text_config(vocab_size=700)).save_pretrained(tmp_path / "language")
    shutil.copy(golden / "tiny_spm.model", tmp_path / "language" / "tokenizer.model")
    return str(tmp_path / "tower"), str(tmp_path / "language")


def test_init_composes_a_model_that_the_pipeline_answers_with(parts, tmp_path, capsys):
    assert main(["init", *parts, str(tmp_path / "llava")]) == 0
    printed = capsys.readouterr().out
    assert "tokens per image" in printed and "llava train pretrain" in printed
    content = [{"type": "image", "image": Image.new("RGB", (40, 30))}, {"type": "text", "text": "What is it?"}]
    pipe = pipeline("image-text-to-text", model=str(tmp_path / "llava"))
    answer = pipe(text=[{"role": "user", "content": content}], max_new_tokens=3, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)
    assert not list(tmp_path.glob(".*unfinished"))


def test_settings_reach_the_model(parts, tmp_path):
    out, *_ = folders = [tmp_path / name for name in ("llava", "again", "other")]
    options = ["--projector-layers", "1", "--feature-layer", "-1", "--dtype", "bfloat16", "--crop"]
    for folder, seed in zip(folders, ([], ["--seed", "42"], ["--seed", "1"])):
        assert main(["init", *parts, str(folder), "--chat-template", "chatml", *options, *seed]) == 0
    weights, same, others = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert weights == same != others  # the projector is drawn anew, and equal for equal seeds
    config = json.loads((out / "config.json").read_text())
    assert config["projector_num_layers"] == 1 and config["projector_hidden_act"] == "linear"
    assert config["vision_feature_layer"] == -1 and config["dtype"] == "bfloat16"
    assert json.loads((out / "processor_config.json").read_text())["image_processor"]["do_pad"] is False
    assert "<|im_start|>" in (out / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.__setitem__(0, "/nowhere"), "/nowhere"),
        (lambda a: a.__setitem__(1, "/nowhere/model.gguf"), "does not exist"),
        (lambda a: a.extend(["--chat-template", "vicuna_v9"]), "vicuna_v9"),
        (lambda a: a.extend(["--projector-layers", "0"]), "at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(parts, tmp_path, capsys, change, message):
    arguments = [*parts, str(tmp_path / "llava")]
    change(arguments)
    assert main(["init", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("llava init: error:") and message in error
    assert not (tmp_path / "llava").exists()


def test_the_current_folder_is_not_replaced(parts, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["init", *parts, "."]) == 2
    assert "give a new folder" in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_not_touched(parts, tmp_path, capsys):
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "precious.txt").write_text("x")
    assert main(["init", *parts, str(tmp_path / "llava")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "llava").iterdir()] == ["precious.txt"]
