"""Our saved checkpoint behind `transformers serve` and `transformers chat`, in processes that cannot import us."""

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from stock import WITHOUT_US
from tiny_predictor import generated, picture, published_llava, user_turn


pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-c", f"{WITHOUT_US}\nfrom transformers.cli.transformers import main\nmain()"]
QUESTION = "What is it?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served") / "model"


@pytest.fixture(scope="module")
def model_and_processor(folder):
    return published_llava(folder=folder)


@pytest.fixture(scope="module")
def served(folder, model_and_processor):
    """The address of `transformers serve`."""
    for module in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(module, reason="what `transformers serve` needs is not installed (transformers[serving])")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.parent / "serve.log"
    command = [*COMMAND, "serve", str(folder), "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 600
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(240)


def test_a_picture_is_answered_through_chat_completions_streamed_or_not(served, folder, model_and_processor):
    file = io.BytesIO()
    picture(1).save(file, "PNG")
    image = {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}
    content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": QUESTION}]
    body = {
        "model": str(folder),
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
        "temperature": 0,
    }

    def post(**settings):
        headers = {"Content-Type": "application/json"}
        data = json.dumps({**body, **settings}).encode()
        request = urllib.request.Request(f"{served}/v1/chat/completions", data, headers)
        with urllib.request.urlopen(request, timeout=600) as response:
            return response.read().decode()

    expected = generated(*model_and_processor, [user_turn(QUESTION, [picture(1)])], 8)
    answer = json.loads(post())
    assert answer["choices"][0]["message"]["content"].strip() == expected
    assert answer["usage"]["completion_tokens"] == 8
    lines = post(stream=True).splitlines()
    events = [json.loads(line[5:]) for line in lines if line.startswith("data:") and "[DONE]" not in line]
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"]]
    assert "".join(pieces).strip() == expected and sum(bool(piece) for piece in pieces) > 1


def test_transformers_chat_talks_to_it(served, folder, model_and_processor):
    command = [*COMMAND, "chat", str(folder), f"{served}/v1", "max_new_tokens=8", "do_sample=False"]
    typed = f"{QUESTION}\nn\n!exit\n"  # n: do not go on after the cut
    # In offline mode huggingface_hub's client calls no server at all, not even one on this machine.
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = generated(*model_and_processor, [user_turn(QUESTION)], 8)
    answer, said = (re.sub(r"\W", "", text) for text in (answer, done.stdout))  # the terminal draws Markdown
    assert answer in said
