"""`llava web` from outside: the command, and a real browser (headless Chromium) that uploads, asks and reads."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from tiny_predictor import generated, png_header, tiny_llava, tiny_processor, user_turn

from modeling_llava.cli.main import main
from modeling_llava.cli.web import _title
from modeling_llava.inference.web.page import NO_IMAGE


# Nothing of the browser's own may reach the network: it is the page that is watched.
BROWSER_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,1000",
]  # fmt: skip


@pytest.fixture(scope="module")
def model_and_processor():
    processor = tiny_processor()
    return tiny_llava(processor, max_position_embeddings=4096), processor


@pytest.fixture(scope="module")
def folder(model_and_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("web") / "model"
    for part in model_and_processor:
        part.save_pretrained(folder)
    return folder


def square(colour):
    """An image whose answer differs by its colour."""
    image = Image.new("RGB", (320, 240), "white")
    ImageDraw.Draw(image).rectangle((80, 60, 240, 180), fill=colour)
    return image


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["/nowhere/model"], "neither a folder nor the name"),
        (["MODEL", "--people", "0"], "must be above 0"),
        (["MODEL", "--examples", "/nowhere"], "/nowhere has no images"),
        (["MODEL", "--max-upload-mb", "inf"], "must be above 0"),
        (["MODEL", "--port", "0"], "--port must be 1 to 65535, got 0"),
        (["MODEL", "--port", "99999"], "--port must be 1 to 65535, got 99999"),
        (["MODEL", "--host", "nowhere.invalid"], "--host nowhere.invalid: "),
        (["MODEL", "--host", "192.0.2.1"], "--host 192.0.2.1: "),
    ],
)
def test_a_wrong_argument_is_one_line(folder, arguments, message, capsys):
    assert main(["web", *(str(folder) if word == "MODEL" else word for word in arguments)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("llava web: error:") and message in error


def test_a_port_that_is_taken_is_one_line_before_a_model_is_loaded(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["web", str(folder), "--port", port]) == 2
    said = capsys.readouterr().err
    assert f"--port {port}: Address already in use" in said and "Loading" not in said


def test_visitors_read_a_folders_name_and_not_where_it_lies(folder):
    assert _title(str(folder)) == _title(f"{folder}{os.sep}") == "model"
    assert _title("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"


@pytest.mark.parametrize("version, fix", [(None, "install 'modeling-llava[web]'"), ("5.50.0", "≥ 6.24, 5.50.0 is")])
def test_without_gradio_or_with_an_old_one_the_fix_is_named(folder, capsys, monkeypatch, version, fix):
    if version is None:
        monkeypatch.setitem(sys.modules, "gradio", None)
    else:
        monkeypatch.setattr(pytest.importorskip("gradio"), "__version__", version)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
    assert main(["web", str(folder)]) == 2
    error = capsys.readouterr().err
    assert fix in error.splitlines()[-1] and "Loading" not in error


@pytest.fixture(scope="module")
def site(folder, tmp_path_factory):
    """The command, running; its address."""
    pytest.importorskip("gradio", reason="Gradio is not installed (extra `web`)")
    temporary = tmp_path_factory.mktemp("site")
    log = temporary / "web.log"
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "modeling_llava.cli.main", "web", str(folder), "--port", port]
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.monotonic() + 600
        while "Open http" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield log.read_text().split("Open ")[1].split()[0]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(240) == 130
    assert "Traceback" not in log.read_text()
    assert not list(temporary.glob("llava-web-*"))  # images of visitors do not stay


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium with a profile of its own."""
    selenium = pytest.importorskip("selenium", reason="selenium is not installed")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("chromium and chromedriver (Debian: chromium, chromium-driver) are not installed")
    from selenium.webdriver.chrome.service import Service

    options = selenium.webdriver.ChromeOptions()
    options.binary_location = program
    for flag in [*BROWSER_FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = selenium.webdriver.Chrome(options=options, service=Service(driver))
    browser.set_page_load_timeout(240)
    yield browser
    browser.quit()


class Page:
    """The page in a browser, by what is on it."""

    def __init__(self, browser, url):
        self.browser = browser
        browser.get(url)
        self.wait(lambda: self.find("#question textarea") and self.enabled("ask"))

    def find(self, selector):
        return self.browser.find_elements("css selector", selector)

    def wait(self, condition, seconds=600):
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while True:
            try:
                found = condition()
            except StaleElementReferenceException:  # drawn again
                found = None
            if found:
                return found
            if time.monotonic() > end:
                raise AssertionError(f"not within {seconds} s; the page says: {self.find('body')[0].text}")
            time.sleep(0.05)

    def enabled(self, button):
        elements = self.find(f"#{button}")
        return bool(elements) and elements[0].is_enabled()

    def press(self, button):
        self.wait(lambda: self.enabled(button))
        self.find(f"#{button}")[0].click()

    def upload(self, path):
        self.find("#image input[type=file]")[0].send_keys(str(path))

    def type(self, text):
        self.find("#question textarea")[0].send_keys(text)

    def question(self):
        return self.find("#question textarea")[0].get_attribute("value")

    def set_longest_answer(self, tokens):
        if not self.find("#sampling input[type=number]"):
            self.find("#sampling button")[0].click()
        field = self.wait(lambda: self.find("#sampling input[type=number]")[2:])[0]
        self.wait(field.is_displayed)
        field.send_keys("\ue009a\ue000", f"{tokens}\t")  # Ctrl-A

    def watch_answer(self):
        """Keeps the lengths that the answer has had in `window.seen`."""
        self.browser.execute_script(
            """window.seen = [];
            new MutationObserver(() => {
                const answer = document.querySelector('#chat [data-testid=bot]');
                const length = answer ? answer.innerText.trim().length : 0;
                if (length > 1) window.seen.push(length);
            }).observe(document.body, {subtree: true, childList: true, characterData: true});"""
        )

    def said(self):
        """The bubbles' texts: question, answer, question, …"""
        return [element.text.strip() for element in self.find("#chat [data-testid=user], #chat [data-testid=bot]")]

    def status(self):
        return self.find("#status")[0].text


@pytest.mark.slow
def test_in_a_real_browser(site, browser, tmp_path, model_and_processor):
    red = square("red")
    red.save(tmp_path / "red.png")
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 60_000))
    page = Page(browser, site)
    page.upload(tmp_path / "red.png")
    page.wait(lambda: "4 image tokens" in page.status())
    page.wait(lambda: page.find("#image img"))

    # A streamed answer: it is there before it is whole, and it grows. Its length is set on the page.
    page.set_longest_answer(300)
    page.watch_answer()
    page.type("What is it?")
    page.press("ask")
    page.wait(lambda: "300 tokens" in page.status())
    first = page.said()[1]
    grown = browser.execute_script("return window.seen")
    assert len(set(grown)) > 3 and grown == sorted(grown) and grown[0] < len(first)
    assert page.question() == ""
    whole = " ".join(generated(*model_and_processor, [user_turn("What is it?", [red])], 300).split())
    plain = [text.replace("*", "").replace("_", "")[:20] for text in (first, whole)]  # what Markdown takes away
    assert plain[0] == plain[1]

    # A second question, stopped; asked again, and stopped again.
    page.set_longest_answer(1000)
    page.type("Why?\n")
    page.wait(lambda: len(page.said()) == 4 and page.said()[3] not in ("", "…"))
    page.press("stop")
    page.wait(lambda: "Stopped." in page.status() and page.enabled("ask"))
    stopped = page.said()
    page.press("retry")
    page.wait(lambda: page.enabled("stop") and len(page.said()) == 4 and page.said()[3] not in ("", "…"))
    page.press("stop")
    page.wait(lambda: "Stopped." in page.status() and page.enabled("ask"))
    assert page.said()[:3] == stopped[:3] and page.said()[3][:8] == stopped[3][:8]

    # A new chat; what is not an image is named; an example keeps the question that was typed.
    page.press("reset")
    page.wait(lambda: page.said() == [] and "4 image tokens" in page.status() and not page.enabled("retry"))
    page.find("#image button[aria-label='Remove Image']")[0].click()
    page.wait(lambda: page.find("#image input[type=file]"))
    page.upload(tmp_path / "bomb.png")
    page.wait(lambda: "has far more than 50.0 million pixels" in page.find("body")[0].text)
    page.wait(lambda: page.status() == "No image: the one above cannot be read.")
    page.find("#image button[aria-label='Remove Image']")[0].click()
    page.wait(lambda: page.status() == NO_IMAGE)
    for typed in ("", "And what is on the left?"):
        page.type(typed)
        for number in range(2):
            page.find("#examples button")[number].click()
            page.wait(lambda begin=typed or "How many balls": page.question().startswith(begin))
            page.wait(lambda: page.find("#image img") and "4 image tokens" in page.status())
        page.press("reset")
        page.wait(lambda: page.question() == "")

    # Not one request left for another host, and no script complained.
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    own = (site, "data:", "blob:", "chrome:", "chrome-extension:")
    assert urls and [url for url in urls if not url.startswith(own)] == []
    responses = [event["params"]["response"] for event in events if event["method"] == "Network.responseReceived"]
    assert [response["url"] for response in responses if response["status"] >= 400] == []
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.slow
def test_it_listens_on_this_machine_alone(site):
    port = int(site.rsplit(":", 1)[1].strip("/"))
    table = Path("/proc/net/tcp")
    if not table.exists():
        pytest.skip("no /proc/net/tcp here")
    listening = {row.split()[1] for row in table.read_text().splitlines()[1:] if row.split()[3] == "0A"}
    assert f"0100007F:{port:04X}" in listening and f"00000000:{port:04X}" not in listening
    assert urllib.request.urlopen(site).status == 200
