"""What a beginner does wrong in the first hour is answered by one line; a defect of ours keeps its traceback."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from tiny_predictor import picture, tiny_llava, tiny_processor

from modeling_llava.cli.errors import one_line
from modeling_llava.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors") / "model"
    processor = tiny_processor()
    for part in (tiny_llava(processor), processor):
        part.save_pretrained(folder)
    return folder


def last_line(capsys, command):
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"llava {command}: error: ")
    return line


def test_a_real_lack_of_memory_is_told_with_what_to_take_instead():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert "smaller per_device_train_batch_size" in one_line(caught.value, "train")
    assert "--load-in-4bit" in one_line(caught.value, "chat")
    assert one_line(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0"), "eval").startswith(
        "Out of memory (CUDA out of memory). Use a smaller --batch-size"
    )
    assert one_line(MemoryError(), "merge").startswith("Out of memory. Use")
    cublas = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert one_line(RuntimeError(cublas), "train").startswith("Out of memory (CUDA error: CUBLAS")


def test_a_gpu_without_kernels_is_told_where_to_look():
    text = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors …"
    assert "llava doctor" in one_line(torch.AcceleratorError(text), "chat")


def test_an_error_of_a_worker_is_the_workers_last_line():
    def broken(examples):
        raise ValueError("sample 'a' is wrong: fix it.")

    loader = torch.utils.data.DataLoader([1], num_workers=1, collate_fn=broken)
    with pytest.raises(ValueError) as caught:
        next(iter(loader))
    assert "Traceback" in str(caught.value) and one_line(caught.value, "train") == "sample 'a' is wrong: fix it."


def test_a_gpu_that_is_not_there_is_one_line(folder, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    picture(0).save(tmp_path / "a.png")
    assert main(["chat", str(folder), "--image", str(tmp_path / "a.png"), "--device", "cuda"]) == 2
    assert "llava doctor" in last_line(capsys, "chat")


def test_a_word_that_is_no_folder_does_not_wait_for_the_hub(capsys, monkeypatch):
    def called(*arguments, **options):
        raise AssertionError("asked the Hub")

    monkeypatch.setattr("modeling_llava.io.checkpoints.find_adapter_config_file", called)
    for command in (["chat", "runs-my"], ["merge", "runs/my/adapter", "out"], ["web", "runs-my"]):
        assert main(command) == 2
        assert f"{command[1]!r} is neither a folder nor the name of a model" in last_line(capsys, command[0])


def test_no_network_is_one_line():
    httpx = pytest.importorskip("httpx")
    error = httpx.ConnectError("[Errno -2] Name or service not known")
    assert one_line(error, "publish").startswith("The server does not answer ([Errno -2] Name")
    error = OSError("We couldn't connect to 'https://huggingface.co' to load the files, and couldn't\nfind them")
    assert f"There is nothing of that name here ({os.getcwd()}) or in the Hub's cache" in one_line(error, "chat")
    error = OSError("a/b is not a local folder\nIf this is a private repository")
    assert one_line(error, "chat") == "a/b is not a local folder If this is a private repository"


def test_a_missing_file_is_named_without_its_number(tmp_path):
    with pytest.raises(OSError) as caught:
        open(tmp_path / "q.jsonl")
    assert one_line(caught.value, "eval") == f"{tmp_path / 'q.jsonl'}: No such file or directory."


def test_a_defect_keeps_its_traceback():
    assert one_line(KeyError("x"), "chat") is None and one_line(RuntimeError("shape mismatch"), "chat") is None


def test_an_old_transformers_is_one_line_with_the_command_that_fixes_it(folder, capsys, monkeypatch):
    monkeypatch.setattr("modeling_llava.constants.installed", lambda package: "5.17.0")
    for command in (["chat", str(folder)], ["estimate", "qlora", f"model={folder}"], ["data", "check", "my.json"]):
        assert main(command) == 2
        assert last_line(capsys, command[0]).endswith(
            "error: modeling_llava needs transformers ≥ 5.23, 5.17.0 is installed: "
            "pip install --upgrade 'transformers>=5.23,<6'."
        )


def test_importing_us_over_an_old_transformers_says_so_first(tmp_path):
    """Before a name is missed that it has not."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "transformers-4.57.1.dist-info").mkdir()
    (tmp_path / "transformers-4.57.1.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 4.57.1\n")
    done = subprocess.run(
        [sys.executable, "-c", "import modeling_llava"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert "ImportError: modeling_llava needs transformers ≥ 5.23, 4.57.1 is installed" in done.stderr


def without(*names):
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


def holding(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    "breaking, said",
    [
        (without("tokenizer.json", "tokenizer.model"), "has no tokenizer (tokenizer.json, "),
        (without("model.safetensors"), "broken holds no weights (model.safetensors). It holds: "),
        (holding("tokenizer.json", '{"a":'), "broken/tokenizer.json is not JSON (Expecting value"),
        (holding("config.json", '{"a":'), "broken/config.json is not JSON (Expecting value"),
        (holding("model.safetensors", "<html>"), "broken/model.safetensors is damaged or cut off ("),
        (holding("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n"), "is Git LFS's pointer"),
        (holding("config.json", '{"model_type": "llama"}'), "is a language model (llama). Make a LLaVA of it"),
        (holding("config.json", '{"model_type": "bert2"}'), "its config.json says model_type 'bert2'"),
        (holding("config.json", '{"model_type": "llava_llama", "mm_vision_tower": "x"}'), "first: llava convert "),
        (
            holding("model.safetensors.index.json", '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
            "names model-00001-of-00002.safetensors, which is not there",
        ),
    ],
)
def test_a_broken_folder_is_named_by_its_broken_file(breaking, said, folder, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    breaking(broken)
    if said.startswith("names"):
        (broken / "model.safetensors").unlink()
    assert main(["chat", str(broken)]) == 2
    assert said in last_line(capsys, "chat")


def test_what_training_and_conversion_read_is_named_as_well(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "my.json").write_text("[]")
    for command in (
        ["data", "check", str(tmp_path / "my.json"), "--processor", str(tmp_path / "broken")],
        ["convert", str(tmp_path / "broken"), str(tmp_path / "out"), "--to", "original"],
    ):
        assert main(command) == 2
        assert "broken/tokenizer.json is not JSON" in last_line(capsys, command[0])


def test_a_broken_chat_template_is_one_line(folder, tmp_path, capsys, monkeypatch):
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / "chat_template.jinja").write_text("{% if %}")
    picture(0).save(tmp_path / "a.png")
    assert main(["chat", str(tmp_path / "broken"), "--image", str(tmp_path / "a.png")]) == 2
    assert "The chat template cannot be used (Expected an expression" in last_line(capsys, "chat")


def test_the_wrong_kind_of_model_is_not_answered_by_a_list_of_all_kinds():
    from transformers import AutoModelForCausalLM, CLIPConfig

    with pytest.raises(ValueError) as caught:
        AutoModelForCausalLM.from_config(CLIPConfig())
    assert one_line(caught.value, "init").startswith("CLIP is the wrong kind of model here: a language model is req")


def test_offline_mode_is_said_where_it_is_the_reason(monkeypatch):
    error = OSError("We couldn't connect to 'https://huggingface.co' to load the files")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert one_line(error, "chat").endswith("HF_HUB_OFFLINE is set, so the Hub was not asked.")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert "HF_HUB_OFFLINE" not in one_line(error, "chat")


def test_merging_a_name_that_the_hub_does_not_give_is_not_called_a_full_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("modeling_llava.io.checkpoints.cached_file", lambda *args, **kwargs: None)
    monkeypatch.setattr("modeling_llava.io.checkpoints.find_adapter_config_file", lambda *args, **kwargs: None)
    assert main(["merge", "owner/nothing", str(tmp_path / "out")]) == 2
    assert "'owner/nothing' is not a folder here, and the Hub does not give it" in last_line(capsys, "merge")
