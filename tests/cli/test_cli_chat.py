"""`llava chat`: from a script on stdin, and at a real (pseudo) terminal."""

import functools
import gc
import io
import json
import os
import signal
import subprocess
import sys

import pytest
from tiny_predictor import assistant_turn, generated, picture, published_llava, tiny_llava, tiny_processor, user_turn

from modeling_llava.cli.chat_terminal import Terminal, _use_readline
from modeling_llava.cli.main import main
from modeling_llava.inference.chat import Conversation


ASK = ["--max-new-tokens", "8"]


@pytest.fixture(scope="module", params=["ours", "llava-hf"])
def model_and_processor(request):
    if request.param == "llava-hf":
        return published_llava(max_position_embeddings=4096)
    processor = tiny_processor()
    return tiny_llava(processor, max_position_embeddings=4096), processor


@pytest.fixture(scope="module")
def folder(model_and_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    for part in model_and_processor:
        part.save_pretrained(folder)
    for number in (1, 2):
        picture(number).save(folder.parent / f"{number}.png")
    return folder


@pytest.fixture
def script(monkeypatch, capsys):
    """`script(lines, arguments)` runs the command with lines on stdin; returns exit code, stdout's lines, stderr."""

    def run(lines, arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        capsys.readouterr()
        code = main(["chat", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err

    return run


def answer(model_and_processor, question, images, earlier=(), length=8):
    return generated(*model_and_processor, [*earlier, user_turn(question, images)], length)


def test_a_script_gets_answers_on_stdout_and_all_else_on_stderr(script, folder, model_and_processor):
    first, second = folder.parent / "1.png", folder.parent / "2.png"
    lines = ["What is it?", "Why?", f"/image {second}", "What is it?", f"'{first}' {second}", "Both?"]
    code, out, err = script(lines, [folder, "--image", first, *ASK])
    a = answer(model_and_processor, "What is it?", [picture(1)])
    earlier = [user_turn("What is it?", [picture(1)]), assistant_turn(a)]
    b = generated(*model_and_processor, [*earlier, user_turn("Why?")], 8)
    c = answer(model_and_processor, "What is it?", [picture(2)])
    d = answer(model_and_processor, "Both?", [picture(1), picture(2)])
    assert code == 0 and out == [a, b, c, d]
    assert "8 tokens" in err and "per second" in err and f"About {first} (40×30)." in err
    assert "Loading" in err and "Ready" in err


def test_commands(script, folder, tmp_path, model_and_processor):
    image = folder.parent / "1.png"
    lines = ["What is it?", "/retry", "/reset", "What is it?", "/image", "/image none", "What is it?", "/help"]
    names = ("chat.json", "chat.md", "chat.json", f"../{tmp_path.name}/chat.md")
    lines += [f"/save {tmp_path}/{name}" for name in names]
    lines += ["/quit now", "never asked"]
    code, out, err = script(["\ufeff/reset", *lines], [folder, "--image", image, *ASK])
    a = answer(model_and_processor, "What is it?", [picture(1)])
    assert code == 0 and out == [a, a, a, answer(model_and_processor, "What is it?", [])]
    assert "A new conversation. About" in err and "About no image." in err and "/save FILE" in err
    assert err.count("Written: ") == 4
    rows = json.loads((tmp_path / "chat.json").read_text())
    assert [len(row["messages"]) for row in rows] == [2, 2, 2]
    assert [row["images"] for row in rows] == [[str(image)], [str(image)], []]


def test_mistakes_are_one_line_each_and_the_chat_continues(script, folder, tmp_path, model_and_processor):
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    (tmp_path / "precious.md").write_text("mine")
    image = folder.parent / "1.png"
    lines = ["/image nowhere.png", f"{tmp_path}/cut.jpg", "/nonsense", "/save", f"/save {tmp_path}/precious.md"]
    lines += ["/retry", "/image ftp://example.org/a.png"]
    after = [f"/save {tmp_path}/nowhere/chat.md"]
    code, out, err = script([*lines, "What is it?", *after], [folder, "--image", image, *ASK])
    assert code == 1 and out == [answer(model_and_processor, "What is it?", [picture(1)])]
    mistakes = [line for line in err.splitlines() if not line.startswith(("Loading", "Ready", "About", "8 tokens"))]
    begins = ["nowhere.png is not there", f"{tmp_path}/cut.jpg ", "There is no command /nonsense", "Where to?"]
    begins += [f"{tmp_path}/precious.md exists", "Nothing was asked yet", "ftp://example.org/a.png is a URL"]
    begins += [f"{tmp_path}/nowhere/chat.md cannot be written: No such"]
    mistakes = [line for line in mistakes if line and "Loading weights" not in line]
    assert [line[: len(begin)] for line, begin in zip(mistakes, begins)] == begins and len(mistakes) == len(begins)
    assert f"Still about {image}" in mistakes[0]
    assert (tmp_path / "precious.md").read_text() == "mine"


@pytest.mark.parametrize("model_and_processor", ["llava-hf"], indirect=True)
def test_questions_of_any_bytes_no_questions_and_a_reader_who_leaves(folder, monkeypatch, capsys):
    """As `printf '\\xff' | llava chat`, `llava chat <&-` and `… | head -1` are."""
    stdin = io.TextIOWrapper(io.BytesIO(b"What \xff is it?\n" * 3), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["chat", str(folder), *ASK]) == 0 and len(capsys.readouterr().out.splitlines()) == 3
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", str(folder), *ASK]) == 0
    chat = f"{sys.executable} -m modeling_llava.cli.main chat {folder} {' '.join(ASK)}"
    command = f"yes 'What?' | head -40 | {chat} | head -1"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert len(ended.stdout.splitlines()) == 1 and "roken" not in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["/nowhere/model"], "neither a folder nor the name"),
        (["MODEL", "--image", "nowhere.png"], "nowhere.png is not there"),
        (["MODEL", "--temperature", "-1"], "--temperature must be 0 or more"),
        (["MODEL", "--temperature", "nan"], "--temperature must be 0 or more"),
        (["MODEL", "--device", "gpu"], "finds no device 'gpu'"),
        (["MODEL", "--top-p", "0.9"], "--temperature above 0"),
        (["MODEL", "--temperature", "1", "--top-p", "3"], "top_p must be"),
        (["MODEL", "--max-new-tokens", "0"], "at least 1, got 0"),
        (["MODEL", "--adapter", "/nowhere"], "/nowhere"),
    ],
)
def test_a_wrong_argument_is_one_line(script, folder, arguments, message):
    code, out, err = script([], [str(folder) if word == "MODEL" else word for word in arguments])
    assert code == 2 and out == []
    assert err.splitlines()[-1].startswith("llava chat: error:") and message in err.splitlines()[-1]


def test_sampling_is_repeatable_by_its_seed(script, folder):
    arguments = [folder, "--image", folder.parent / "1.png", *ASK, "--temperature", "3"]
    first = script(["What is it?", "/retry"], [*arguments, "--seed", "1"])[1]
    assert script(["What is it?", "/retry"], [*arguments, "--seed", "1"])[1] == first
    assert first[0] != first[1]
    assert script(["What is it?", "/retry"], [*arguments, "--seed", "7"])[1] != first


# At a terminal


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent")
def test_ctrl_c_stops_an_answer_wherever_python_is(capsys):
    """In a finalizer, a KeyboardInterrupt would be printed and lost."""

    class Chat:
        conversation = Conversation(turns=[("What?", "…")])
        stopped = False

        def stop(self):
            self.stopped = True

        def pieces(self):
            for number in range(3):
                if not self.stopped:
                    Finalized()
                    gc.collect()
                    yield str(number)

    class Finalized:
        def __init__(self):
            self.itself = self

        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    terminal = Terminal(Chat(), name="tiny")
    terminal.interactive = True
    with pytest.raises(KeyboardInterrupt):
        terminal.answer(terminal.chat.pieces())
    assert capsys.readouterr().out == "0\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_twice_or_the_end_of_input_leaves(monkeypatch, capsys):
    class Chat:
        conversation = Conversation()

        def show(self, images):
            pass

    monkeypatch.setitem(sys.modules, "readline", None)  # as on Windows
    _use_readline(remember=False)
    for ending in (EOFError, KeyboardInterrupt):
        typed = iter([KeyboardInterrupt, "/help", KeyboardInterrupt, ending])

        def type_line(prompt, typed=typed):
            line = next(typed)
            return line if isinstance(line, str) else (_ for _ in ()).throw(line)

        monkeypatch.setattr("builtins.input", type_line)
        terminal = Terminal(Chat(), name="tiny")
        terminal.interactive = True
        assert terminal.run([]) == 0 and next(typed, None) is None
        assert capsys.readouterr().err.count("Ctrl-C once more") == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo terminal is needed")
@pytest.mark.parametrize("model_and_processor", ["llava-hf"], indirect=True)
def test_at_a_terminal(folder, tmp_path, model_and_processor, request):
    pexpect = pytest.importorskip("pexpect", reason="pexpect is not installed")
    image = folder.parent / "1.png"
    environment = {**os.environ, "HOME": str(tmp_path), "TERM": "xterm", "COLUMNS": "100"}
    words = ["-m", "modeling_llava.cli.main", "chat", str(folder), "--max-new-tokens", "3000"]
    interruptible = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job ignores it
    options = {"env": environment, "encoding": "utf-8", "timeout": None, "preexec_fn": interruptible}
    terminal = pexpect.spawn(sys.executable, words, logfile=io.StringIO(), **options)
    request.addfinalizer(terminal.close)
    terminal.expect_exact("/help tells the rest")
    terminal.send(f"{image.parent}/1\t\r")  # completed
    terminal.expect_exact("(40×30)")
    terminal.send(f"'{image}'\r")  # as a terminal pastes a dragged file
    terminal.expect_exact("(40×30)")
    terminal.send("What is it?\r")
    whole = answer(model_and_processor, "What is it?", [picture(1)], length=60)
    begin = whole[:8]
    terminal.expect_exact(begin)
    terminal.send("\x03")
    terminal.expect_exact("Stopped.")
    terminal.send(f"/save {tmp_path}/chat.md\r")
    terminal.expect_exact("Written")
    said = (tmp_path / "chat.md").read_text().split("> What is it?\n\n")[1].strip()
    assert said and (said.startswith(whole) or whole.startswith(said))
    terminal.send("/reset\r")
    terminal.expect_exact("A new conversation")
    terminal.send("\x1b[A" * 3 + "\r")  # the third line before: asked again, from the history
    terminal.expect_exact("What is it?")
    terminal.expect_exact(begin)  # not before it answers: until then, Ctrl-C means another thing
    terminal.send("\x03")
    terminal.expect_exact("Stopped.")
    terminal.send("/quit\r")
    terminal.expect(pexpect.EOF)
    assert terminal.wait() == 0
    history = tmp_path / ".llava_history"
    assert "What is it?" in history.read_text() and history.stat().st_mode & 0o077 == 0
    assert "Traceback" not in terminal.logfile.getvalue()
