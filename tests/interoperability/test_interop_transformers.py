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
from tiny_predictor import assistant_turn, generated, picture, published_llava, user_turn


# What a machine without `modeling-llava` is.
WITHOUT_US = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_llava":
            raise ModuleNotFoundError("modeling_llava is not installed here")
sys.meta_path.insert(0, Absent())
from transformers.cli.transformers import main
main()
"""
QUESTION = "What is it?"


@pytest.fixture(scope="module")
def model_and_processor():
    return published_llava()


@pytest.fixture(scope="module")
def folder(model_and_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    for part in model_and_processor:
        part.save_pretrained(folder)
    return folder


def transformers_command(*arguments):
    return [sys.executable, "-c", WITHOUT_US, *map(str, arguments)]


@pytest.fixture(scope="module")
def served(folder):
    """The address of `transformers serve`."""
    for module in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(module, reason="what `transformers serve` needs is not installed (transformers[serving])")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.parent / "serve.log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = transformers_command("serve", folder, "--port", port, "--host", "127.0.0.1", "--device", "cpu")
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
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


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return response.read().decode()


def image_item(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
    }


def request_body(folder, messages, **settings):
    return {"model": str(folder), "messages": messages, "max_tokens": 8, "temperature": 0, **settings}


@pytest.mark.slow
def test_a_picture_is_answered_through_chat_completions(served, folder, model_and_processor):
    image = picture(1)
    messages = [{"role": "user", "content": [image_item(image), {"type": "text", "text": QUESTION}]}]
    answer = json.loads(post(f"{served}/v1/chat/completions", request_body(folder, messages)))
    first = generated(*model_and_processor, [user_turn(QUESTION, [image])], 8)
    assert answer["choices"][0]["message"]["content"].strip() == first
    assert answer["usage"]["completion_tokens"] == 8

    # The conversation goes on; another picture has another answer.
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    answer = json.loads(post(f"{served}/v1/chat/completions", request_body(folder, messages)))
    turns = [user_turn(QUESTION, [image]), assistant_turn(first), user_turn("Why?")]
    assert answer["choices"][0]["message"]["content"].strip() == generated(*model_and_processor, turns, 8)
    messages = [{"role": "user", "content": [image_item(picture(2)), {"type": "text", "text": QUESTION}]}]
    answer = json.loads(post(f"{served}/v1/chat/completions", request_body(folder, messages)))
    second = generated(*model_and_processor, [user_turn(QUESTION, [picture(2)])], 8)
    assert answer["choices"][0]["message"]["content"].strip() == second != first


@pytest.mark.slow
def test_answers_are_streamed(served, folder, model_and_processor):
    messages = [{"role": "user", "content": [image_item(picture(1)), {"type": "text", "text": QUESTION}]}]
    lines = post(f"{served}/v1/chat/completions", request_body(folder, messages, stream=True)).splitlines()
    events = [json.loads(line[5:]) for line in lines if line.startswith("data:") and "[DONE]" not in line]
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"]]
    assert "".join(pieces).strip() == generated(*model_and_processor, [user_turn(QUESTION, [picture(1)])], 8)
    assert sum(bool(piece) for piece in pieces) > 1


@pytest.mark.slow
def test_transformers_chat_talks_to_it(served, folder, model_and_processor):
    command = transformers_command("chat", folder, f"{served}/v1", "max_new_tokens=8", "do_sample=False")
    typed = f"{QUESTION}\nn\n!exit\n"  # n: do not go on after the cut
    # In offline mode huggingface_hub's client calls no server at all, not even one on this machine.
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = generated(*model_and_processor, [user_turn(QUESTION)], 8)

    def letters(text):  # the terminal draws Markdown
        return re.sub(r"\W", "", text)

    assert letters(answer) in letters(done.stdout)
