"""A conversation about images: against `generate` on the whole conversation, stopped, asked again, saved, read back."""

import functools
import http.server
import threading

import pytest
from tiny_predictor import assistant_turn, generated, picture, user_turn

from modeling_llava.cli.chat_terminal import are_images, split_references
from modeling_llava.data import load_conversations
from modeling_llava.inference import LlavaPredictor
from modeling_llava.inference.chat import Chat, NamedImage, read_named_image, save_transcript


QUESTIONS = ["What is this?", "Why is it so?", "And the one on the left?"]


@pytest.fixture
def chat(model, processor):
    chat = Chat(LlavaPredictor(model, processor), max_new_tokens=10)
    chat.show([NamedImage("a.png", picture(1))])
    return chat


def expected(model, processor, turns, question, images, length=10):
    messages = []
    for number, (earlier, answer) in enumerate([*turns, (question, None)]):
        messages.append(user_turn(earlier, images if number == 0 else []))
        if answer is not None:
            messages.append(assistant_turn(answer))
    return generated(model, processor, messages, length)


def test_answers_are_those_of_generate_on_the_whole_conversation(chat, model, processor):
    for question in QUESTIONS:
        turns = list(chat.conversation.turns)
        answer = expected(model, processor, turns, question, [picture(1)])
        pieces = list(chat.ask(question))
        assert "".join(pieces) == answer and len(pieces) > 3
        assert chat.conversation.turns == [*turns, (question, answer)]
    assert chat.statistics.num_tokens == 10 and chat.statistics.finish_reason == "length"
    assert chat.statistics.first_token_seconds > 0
    assert chat.statistics.tokens_per_second > 0


def test_stopped_answer_is_kept_as_far_as_it_went(chat, model, processor):
    stream = chat.ask(QUESTIONS[0])
    shown = next(stream) + next(stream)
    stream.close()
    assert chat.conversation.turns == [(QUESTIONS[0], shown)]
    assert chat.statistics.finish_reason == "broken off" and 0 < chat.statistics.num_tokens < 10
    answer = expected(model, processor, chat.conversation.turns, QUESTIONS[1], [picture(1)])
    assert "".join(chat.ask(QUESTIONS[1])) == answer

    stream = chat.ask(QUESTIONS[2])
    shown = next(stream)
    chat.stop()
    assert list(stream) == []
    assert chat.conversation.turns[-1] == (QUESTIONS[2], shown)
    assert "".join(chat.ask(QUESTIONS[2]))  # the wish to stop was for that answer only


def test_retry_replaces_the_answer_and_sampling_gives_another(model, processor):
    def answers(seed):
        chat = Chat(LlavaPredictor(model, processor), seed=seed, do_sample=True, temperature=3.0, max_new_tokens=8)
        chat.show([NamedImage("a.png", picture(1))])
        first = "".join(chat.ask(QUESTIONS[0]))
        second = "".join(chat.retry())
        assert chat.conversation.turns == [(QUESTIONS[0], second)]
        return first, second

    assert answers(1) == answers(1) != answers(2)
    first, second = answers(1)
    assert first != second


def test_retry_that_yields_nothing_leaves_the_answer_before(chat):
    answer = "".join(chat.ask(QUESTIONS[0]))
    chat.retry().close()
    assert chat.conversation.turns == [(QUESTIONS[0], answer)]
    assert "".join(chat.retry()) == answer  # greedy
    chat.reset()
    with pytest.raises(ValueError, match="Nothing was asked"):
        chat.retry()


def test_an_answer_ends_with_its_conversation(chat):
    """Also where the stop came before the answer had begun, which forgets it: as two threads of a tab can have it."""
    stream = chat.ask(QUESTIONS[0])
    said = next(stream)
    chat.reset()
    assert list(stream) == [] and chat.conversation.turns == [] and said


def test_reset_keeps_the_picture_and_show_takes_another(chat, model, processor):
    first = "".join(chat.ask(QUESTIONS[0]))
    chat.reset()
    assert chat.conversation.turns == [] and "".join(chat.ask(QUESTIONS[0])) == first
    chat.show([NamedImage("b.png", picture(2)), NamedImage("c.png", picture(3))])
    both = expected(model, processor, [], QUESTIONS[0], [picture(2), picture(3)])
    assert "".join(chat.ask(QUESTIONS[0])) == both != first
    chat.show([])
    assert "".join(chat.ask(QUESTIONS[0])) == expected(model, processor, [], QUESTIONS[0], [])


def test_images_are_encoded_once_and_again_after_a_release(chat, passes):
    answers = ["".join(chat.ask(question)) for question in QUESTIONS]
    assert passes.images == []
    chat.release()
    chat.reset()
    assert ["".join(chat.ask(question)) for question in QUESTIONS] == answers
    assert passes.images == [1]


def test_one_question_at_a_time_and_none_that_is_empty(chat):
    stream = chat.ask(QUESTIONS[0])
    next(stream)
    with pytest.raises(ValueError, match="One question at a time"):
        next(chat.ask(QUESTIONS[1]))
    list(stream)
    with pytest.raises(ValueError, match="empty"):
        chat.ask("  ")


def test_conversation_longer_than_the_model_is_refused_and_answers_end_before(chat):
    chat.settings["max_new_tokens"] = 1000
    list(chat.ask(QUESTIONS[0]))
    statistics = chat.statistics
    assert statistics.prompt_tokens + statistics.num_tokens == chat.max_length == 512
    with pytest.raises(ValueError, match=r"tokens long, and the model takes 512"):
        list(chat.ask(QUESTIONS[1]))
    assert len(chat.conversation.turns) == 1
    chat.reset()
    chat.settings["max_new_tokens"] = 4
    assert list(chat.ask(QUESTIONS[1]))


# Transcripts


def test_transcript_in_json_is_training_data(chat, tmp_path):
    picture(1).save(tmp_path / "a.png")
    chat.show([read_named_image(str(tmp_path / "a.png"))])
    answers = ["".join(chat.ask(question)) for question in QUESTIONS[:2]]
    first = chat.conversation
    chat.show([])
    text_only = "".join(chat.ask(QUESTIONS[2]))
    second = chat.conversation
    url = "https://example.org/a.jpg"
    chat.show([NamedImage(url, picture(1))])
    of_url = "".join(chat.ask(QUESTIONS[2]))
    path = save_transcript([first, second, chat.conversation], tmp_path / "chat.json", "tiny")
    rows = load_conversations(str(path))
    assert [row["images"] for row in rows] == [[str(tmp_path / "a.png")], [], [url]]
    texts = [[message["content"][-1]["text"] for message in row["messages"]] for row in rows]
    said = [QUESTIONS[0], answers[0], QUESTIONS[1], answers[1]]
    assert texts == [said, [QUESTIONS[2], text_only], [QUESTIONS[2], of_url]]
    assert rows[0]["messages"][0]["content"][0] == {"type": "image"}


def test_transcript_in_markdown_and_nothing_half_written(chat, tmp_path):
    with pytest.raises(ValueError, match="Nothing was said"):
        save_transcript([chat.conversation], tmp_path / "chat.md")
    answer = "".join(chat.ask("Two\nlines?"))
    path = save_transcript([chat.conversation], tmp_path / "chat.md", "tiny")
    assert path.read_text() == f"# A conversation with tiny\n\n## About `a.png`\n\n> Two\n> lines?\n\n{answer}\n"
    with pytest.raises(OSError):
        save_transcript([chat.conversation], tmp_path / "nowhere" / "chat.md")
    assert [file.name for file in tmp_path.iterdir()] == ["chat.md"]


# What a person types where a picture is asked for


@pytest.mark.parametrize(
    "line, references",
    [
        ("cat.jpg", ["cat.jpg"]),
        ("'my cat.jpg'", ["my cat.jpg"]),
        ('"my cat.jpg" dog.png', ["my cat.jpg", "dog.png"]),
        (r"/a/my\ cat\ \(1\).jpg /b.png", ["/a/my cat (1).jpg", "/b.png"]),
        ("file:///a/my%20cat.jpg", ["/a/my cat.jpg"]),
        ("file:///C:/Users/me/cat.jpg", ["C:/Users/me/cat.jpg"]),
        (r"& 'C:\Users\me\my cat.jpg'", [r"C:\Users\me\my cat.jpg"]),
        (r"C:\Users\me\cat.jpg", [r"C:\Users\me\cat.jpg"]),
        ("  https://example.org/a.jpg  ", ["https://example.org/a.jpg"]),
        ("it's.jpg", ["it's.jpg"]),
        ("", []),
    ],
)
def test_references_in_the_spelling_of_every_terminal(line, references):
    assert split_references(line, windows=False) == references


def test_references_on_windows_at_home_and_that_exist(tmp_path, monkeypatch):
    assert split_references(r"a\b c\d.jpg", windows=True) == [r"a\b", r"c\d.jpg"]
    assert split_references(r'"C:\my pictures\a.jpg"', windows=True) == [r"C:\my pictures\a.jpg"]
    monkeypatch.setenv("HOME", "/home/me")
    assert split_references("~/a.jpg") == ["/home/me/a.jpg"]
    monkeypatch.chdir(tmp_path)
    for name in ("two words.png", "it's a 'cat'.png"):
        picture(1).save(name)
        assert split_references(name) == [name] and are_images(name)


def test_what_is_a_picture_and_what_a_question(tmp_path):
    picture(1).save(tmp_path / "a.png")
    for line in (f"{tmp_path}/a.png", f"'{tmp_path}/a.png'", "/not/there.jpg", "https://example.org/x", r"C:\a\b.JPG"):
        assert are_images(line), line
    for line in (
        "What is a.png?",
        "cat.jpg",
        "a cat",
        "/reset",
        "What is at https://example.org/x",
        "",
        "/etc/passwd",
    ):
        assert not are_images(line), line


class Site(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A web server over a folder, on this machine."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "site").mkdir()
    handler = functools.partial(Site, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "site", f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_pictures_by_url(site, monkeypatch):
    folder, url = site
    picture(5).save(folder / "eine Straße.png")
    read = read_named_image(f"{url}/eine Straße.png")
    assert read.name == f"{url}/eine Straße.png" and read.image.tobytes() == picture(5).tobytes()
    (folder / "page.jpg").write_text("<!doctype html>")
    with pytest.raises(ValueError, match="page.jpg is not an image: .* looks like a web page"):
        read_named_image(f"{url}/page.jpg")
    with pytest.raises(ValueError, match="absent.jpg cannot be downloaded: the server says 404"):
        read_named_image(f"{url}/absent.jpg")
    monkeypatch.setattr("modeling_llava.io.images.MAX_DOWNLOAD_BYTES", 100)
    with pytest.raises(ValueError, match="is larger than"):
        read_named_image(f"{url}/eine Straße.png")
    with pytest.raises(ValueError, match="cannot be downloaded"):
        read_named_image("http://127.0.0.1:1/a.jpg")
    with pytest.raises(ValueError, match="cannot be downloaded"):
        read_named_image("http://[bad/a.jpg")
