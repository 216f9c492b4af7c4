"""The browser chat without a browser: its guard, its sessions, its uploads, and the whole server over HTTP."""

import asyncio
import io
import json
import os
import socket
import threading
import time

import pytest
from PIL import Image
from tiny_predictor import assistant_turn, generated, picture, png_header, tiny_llava, tiny_processor, user_turn
from web_visitor import Refused, Visitor, conversation_of, generating, warnings_of

from modeling_llava.inference.chat import Chat
from modeling_llava.inference.predictor import LlavaPredictor
from modeling_llava.inference.web.examples import collect_examples
from modeling_llava.inference.web.guard import Guard
from modeling_llava.inference.web.page import Limits, build_page, launch
from modeling_llava.inference.web.sessions import Sessions, read_upload


QUESTION = "What is this?"
LIMITS = Limits(upload_bytes=200_000, pixels=1_000_000, question_characters=500, new_tokens=400)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def model(processor):
    return tiny_llava(processor, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def make_chat(model, processor):
    return lambda: Chat(LlavaPredictor(model, processor))


def expected(model, processor, question, image, earlier=(), length=12):
    return generated(model, processor, [*earlier, user_turn(question, [image])], length)


# Uploads


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_images_are_told_by_their_content(tmp_path, kind):
    path = tmp_path / "name.txt"
    picture(1).convert("P" if kind == "GIF" else "RGB").save(path, kind)
    read = read_upload(path, 10**6)
    assert read.name == "name.txt" and read.image == path.read_bytes()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is not an image of the formats JPEG, PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),  # would start Ghostscript
        (b"root:x:0:0:root:/root:/bin/bash\n", "is not an image"),
        (png(picture(1))[:200], "is damaged"),
        (png_header(2001, 1000), "has 2.0 million pixels; the limit is 1.0"),
        (png_header(60_000, 60_000), "has far more than 1.0 million pixels"),
    ],
    ids=["nothing", "SVG", "EPS", "text", "cut off", "too many pixels", "bomb"],
)
def test_what_is_not_an_image_is_refused_before_it_is_decoded(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"^a.png {message}"):
        read_upload(tmp_path / "a.png", LIMITS.pixels)


# Sessions


def test_tabs_are_apart_and_only_the_latest_keep_their_images_encoded(make_chat, tmp_path):
    sessions = Sessions(make_chat, max_encoded=2, max_sessions=3)
    tabs = []
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
        tabs.append(sessions[str(number)])
        assert tabs[-1].look(tmp_path / f"{number}.png", 10**6)
    assert sessions["2"] is tabs[2]
    assert [tab.chat.encoded for tab in tabs] == [False, True, True]
    assert "".join(tabs[0].chat.ask(QUESTION, max_new_tokens=4))  # encoded again
    assert not sessions["0"].look(tmp_path / "0.png", 10**6)  # it is about that image already
    assert [turn[0] for turn in tabs[0].chat.conversation.turns] == [QUESTION]
    sessions["3"]
    assert "0" in sessions and "1" not in sessions


def test_a_wrong_upload_ends_the_conversation_about_the_one_before(make_chat, tmp_path):
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"x")
    tab = Sessions(make_chat)["a"]
    tab.look(tmp_path / "a.png", 10**6)
    list(tab.chat.ask(QUESTION, max_new_tokens=4))
    with pytest.raises(ValueError, match="is not an image"):
        tab.look(tmp_path / "b.png", 10**6)
    assert tab.chat.conversation.images == [] and tab.chat.conversation.turns == []


# The guard


def status(guard, path, method="GET", body=b"", **headers):
    sent = []

    async def receive():
        return {"type": "http.request", "body": body}

    async def send(message):
        sent.append(message)

    headers = {"host": "localhost:7860", **headers}
    scope = {"type": "http", "path": path, "method": method}
    scope["headers"] = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"])


def guarded(hosts=("localhost", "127.0.0.1", "::1"), proxied=(), root_path=""):
    """A guard, and the paths that it lets through."""
    seen = []

    async def application(scope, receive, send):
        seen.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"referrer-policy", b"unsafe-url")]})

    return Guard(application, 1000, hosts, proxied, root_path), seen


def test_guard_passes_on_what_the_page_needs_and_adds_its_headers():
    guard, _ = guarded()
    for host in ("localhost:7860", "127.0.0.1:1", "[::1]:7860", "LOCALHOST"):
        found, headers = status(guard, "/gradio_api/file=/a.png", host=host)
        assert found == 200 and b"default-src 'self'" in headers[b"content-security-policy"]
        assert headers[b"referrer-policy"] == b"no-referrer"
    assert status(guard, "/gradio_api/upload", "POST", content_length="1000")[0] == 200
    assert status(guarded(hosts=None)[0], "/", host="my-machine:7860")[0] == 200  # --host 0.0.0.0: by whatever name


def test_guard_refuses_other_names_other_servers_files_and_long_requests():
    guard, seen = guarded()
    for host in ("evil.example:7860", ""):
        assert status(guard, "/", host=host)[0] == 403
    for path in ("/gradio_api/file=http://169.254.169.254/latest", "/gradio_api/proxy=https://a.hf.space/"):
        assert status(guard, path)[0] == 403
    assert status(guard, "/gradio_api/upload", "POST", content_length="1001")[0] == 413
    assert status(guard, "/gradio_api/upload", "POST")[0] == 411
    assert seen == []


def test_names_that_a_proxy_passes_on_are_let_in_and_no_others():
    guard, _ = guarded(("localhost",), {"demo.example.org"})
    join = ["/gradio_api/queue/join", "POST", b"{}"]
    for host in ("demo.example.org", "localhost:7860"):  # passed on, or replaced
        for origin in ("https://demo.example.org", f"http://{host}"):
            assert status(guard, *join, host=host, origin=origin, content_length="2")[0] == 200
    for headers in (
        {"host": "elsewhere.example.org"},
        {"host": "demo.example.org.evil.org"},
        {"origin": "https://elsewhere.example.org"},
        {"origin": "https://demo.example.org.evil.org"},
        {"origin": "http://localhost:3000"},  # another program's page on this machine
        {"origin": "null"},
    ):
        assert status(guard, *join, content_length="2", **headers)[0] == 403, headers


def test_a_request_may_have_the_proxys_path_before_it_or_not():
    guard, seen = guarded(root_path="/llava")
    for path in ("/llava/config", "/config", "/llava/"):
        assert status(guard, path)[0] == 200
    assert seen == ["/config", "/config", "/"]


def test_each_refusal_is_one_line_that_names_what_came_and_the_option(caplog):
    guard, _ = guarded()
    for _ in range(3):
        status(guard, "/", host="proxied.example.org")
        status(guard, "/join", "POST", b"{}", origin="https://origin.example.org:8443", content_length="2")
        status(guard, "/file=http://a\nforged line")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3 and not any("\n" in line for line in lines)
    assert "--allow-host proxied.example.org" in lines[0] and "--allow-host origin.example.org" in lines[1]


def test_examples_are_drawn_or_small_copies_without_a_cameras_notes(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    drawn = collect_examples(None, tmp_path / "a")
    assert len(drawn) == 2 and all(Image.open(path).size == (480, 360) for path, _ in drawn)
    (tmp_path / "mine").mkdir()
    exif = Image.Exif()
    exif[0x010F] = "the camera's maker"
    picture(1, (3000, 1000)).save(tmp_path / "mine" / "large.jpg", exif=exif)
    (tmp_path / "mine" / "notes.txt").write_text("x")
    [(path, question)] = collect_examples(tmp_path / "mine", tmp_path / "b")
    assert Image.open(path).size == (1024, 341) and question.endswith("?")
    assert not Image.open(path).getexif()
    with pytest.raises(ValueError, match="has no images"):
        collect_examples(tmp_path / "nowhere", tmp_path / "c")


# The whole server


@pytest.fixture(scope="module")
def server(make_chat, processor, tmp_path_factory):
    """Its address and folder; and every place outside this machine that the process wanted to reach."""
    pytest.importorskip("gradio", reason="Gradio is not installed (extra `web`)")
    folder = tmp_path_factory.mktemp("web")
    looked_up = []
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def watch_look_up(host, *arguments, **options):
        if host not in ("127.0.0.1", "localhost", "::1", None):
            looked_up.append(host)
        return look_up(host, *arguments, **options)

    def watch_connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            looked_up.append(address)
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", watch_look_up)
        patch.setattr(socket.socket, "connect", watch_connect)
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            patch.delenv(name, raising=False)
        for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
            patch.setenv(name, "")
        sessions = Sessions(make_chat, max_encoded=2)
        examples = collect_examples(None, folder)
        page = build_page(sessions, processor, folder, title="tiny <b>model</b>", examples=examples, limits=LIMITS)
        url = launch(page, folder)
        yield url, folder, looked_up, sessions
        page.close(verbose=False)


@pytest.fixture
def visitor(server):
    return Visitor(server[0])


def test_answers_are_streamed_and_the_conversation_continues(visitor, model, processor):
    image = picture(1)
    assert visitor.choose(png(image))[-1]["success"]
    visitor.sampling[2] = 40
    messages = visitor.ask(QUESTION)
    first = expected(model, processor, QUESTION, image, length=40)
    assert conversation_of(messages) == [("user", QUESTION), ("assistant", first)]
    assert len(generating(messages)) >= 2
    messages = visitor.ask("Why?")
    turns = [user_turn(QUESTION, [image]), assistant_turn(first), user_turn("Why?")]
    second = generated(model, processor, turns, 40)
    assert conversation_of(messages)[2:] == [("user", "Why?"), ("assistant", second)]
    data = messages[-1]["output"]["data"]
    assert data[1] == "" and "40 tokens" in data[2] and "Cut off" in data[2]
    assert conversation_of(visitor.retry())[2:] == [("user", "Why?"), ("assistant", second)]


def test_two_people_at_once_are_apart(server, model, processor):
    visitors = [Visitor(server[0]) for _ in range(2)]
    ends = [None, None]

    def talk(number):
        visitors[number].sampling[2] = 60
        visitors[number].choose(png(picture(number)))
        ends[number] = conversation_of(visitors[number].ask(QUESTION))

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        answer = expected(model, processor, QUESTION, picture(number), length=60)
        assert ends[number] == [("user", QUESTION), ("assistant", answer)]
    assert ends[0] != ends[1]


def test_stop_keeps_what_was_said_and_a_new_beginning_forgets_it(visitor, server, model, processor):
    visitor.choose(png(picture(1)))
    visitor.sampling[2] = 400
    event = visitor.join("ask", "click", visitor.data(QUESTION))
    stream = visitor.messages(event)
    chat = server[3][visitor.session].chat
    while not chat.answering:
        time.sleep(0.01)
    visitor.join("stop", "click", [])
    messages = list(stream)
    (_, question), (_, said) = conversation_of(messages)
    whole = expected(model, processor, QUESTION, picture(1), length=400)
    assert question == QUESTION and whole.startswith(said) and len(said) < len(whole)
    assert chat.conversation.turns == [(QUESTION, said)]
    visitor.press("reset")
    assert chat.conversation.turns == [] and len(chat.conversation.images) == 1
    visitor.sampling[2] = 5
    answer = expected(model, processor, QUESTION, picture(1), length=5)
    assert conversation_of(visitor.ask(QUESTION))[1] == ("assistant", answer)


def test_sampling_controls_count_and_forged_ones_are_held_to_the_limits(visitor):
    visitor.choose(png(picture(1)))
    visitor.sampling = [2.0, 1.0, 8]
    answers = [conversation_of(visitor.ask(QUESTION))[1]] + [conversation_of(visitor.retry())[1] for _ in range(3)]
    assert len(set(answers)) > 1
    visitor.sampling = [0, 1, 10**9]
    messages = visitor.press("ask", "click", visitor.data(QUESTION))
    # Gradio itself refuses what is outside the slider, and the page would cut it.
    assert messages[-1]["success"] is False or "400 tokens" in messages[-1]["output"]["data"][2]


def test_wrong_images_and_questions_are_named_and_the_page_stays_usable(visitor, model, processor):
    messages = visitor.choose(png_header(20_000, 20_000), "a.png")
    assert "has far more than 1.0 million pixels" in warnings_of(messages)[0] and messages[-1]["success"]
    visitor.choose(png(picture(2)))
    for question, message in (("  ", "The question is empty"), ("x" * 501, "has 501 characters; the limit is 500")):
        messages = visitor.ask(question)
        assert message in warnings_of(messages)[0] and conversation_of(messages) == []
    assert "Nothing was asked yet" in warnings_of(visitor.retry())[0]
    assert conversation_of(visitor.ask(QUESTION))[1] == ("assistant", expected(model, processor, QUESTION, picture(2)))


def test_the_page_stays_usable_when_the_model_fails(visitor, server, model, processor):
    visitor.choose(png(picture(2)))

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = model.lm_head.register_forward_pre_hook(fail)
    try:
        *messages, last = visitor.ask(QUESTION)
    finally:
        hook.remove()
    assert last["success"] is False and "Something went wrong" in json.dumps(generating(messages)[-1])
    assert conversation_of(visitor.ask(QUESTION))[1] == ("assistant", expected(model, processor, QUESTION, picture(2)))


def test_a_question_with_its_upload_is_enough_after_the_server_forgot(visitor, server, model, processor):
    visitor.choose(png(picture(3)))
    visitor.session = "another"
    assert conversation_of(visitor.ask(QUESTION))[1] == ("assistant", expected(model, processor, QUESTION, picture(3)))


def test_an_example_is_shown_with_its_question_unless_one_was_typed(visitor, server):
    for number, typed, question in ((0, "", "How many"), (1, " ", "How many"), (0, "Is it red?", "Is it red?")):
        messages = visitor.press("examples", "click", [number, typed])
        shown, asked = messages[-1]["output"]["data"]
        assert os.path.realpath(shown["path"]).startswith(str(server[1]) + os.sep) and asked.startswith(question)


def test_no_file_of_the_machine_is_served(visitor, server, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(picture(4)))
    folder = server[1]
    here = (str(secret), os.path.abspath(__file__), f"{folder}/../{secret.name}", f"{folder}/%2e%2e/{secret.name}")
    for place in (*here, "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:22/"):
        for path in (f"/gradio_api/file={place}", f"/gradio_api/file/{place}", f"/file={place}"):
            with pytest.raises(Refused) as refused:
                visitor.get(path)
            assert refused.value.status in (403, 404), path
    for path in ("/gradio_api/proxy=http://127.0.0.1/", "/monitoring", "/openapi.json"):
        with pytest.raises(Refused):
            visitor.get(path)
    with pytest.raises(Refused, match="403"):
        visitor.get("/config", headers={"Origin": "https://evil.example"})
    with pytest.raises(Refused, match="413"):
        visitor.upload(b"x" * 300_000)
    uploaded = visitor.upload(png(picture(1)))
    assert uploaded.startswith(str(folder)) and visitor.get(f"/gradio_api/file={uploaded}")


@pytest.mark.parametrize("place", ["/etc/passwd", "SECRET", "http://127.0.0.1:9/a.png", "file:///etc/passwd", ""])
def test_a_forged_upload_is_not_read(visitor, server, tmp_path, place):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(picture(4)))
    value = {"path": place.replace("SECRET", str(secret)), "meta": {"_type": "gradio.FileData"}}
    assert not visitor.press("image", "change", [value])[-1]["success"]
    assert not visitor.press("ask", "click", [None, QUESTION, value, *visitor.sampling])[-1]["success"]
    assert server[2] == []  # nor fetched from elsewhere
    assert server[3][visitor.session].chat.conversation.images == []


def test_the_page_asks_for_nothing_elsewhere(visitor, server):
    with visitor.request("/") as response:
        policy = response.headers["Content-Security-Policy"]
        page = response.read().decode()
    assert "default-src 'self'" in policy and "http" not in policy
    for tag in ("<script", "<link", "<img", "<iframe"):
        for part in page.split(tag)[1:]:
            place = part.split(">")[0]
            assert "https://" not in place and "http://" not in place.replace(server[0].rstrip("/"), ""), place
    assert "<b>model</b>" not in page
    theme = visitor.get("/theme.css")
    assert "https://" not in theme and "@import" not in theme


def test_the_server_reached_nothing_outside_this_machine(server):
    """Runs last: everything above has been done by then."""
    assert server[2] == []
