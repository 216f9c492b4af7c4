"""The entry point: one table of commands, one line per mistake."""

import subprocess
import sys

import pytest

from modeling_llava import __version__
from modeling_llava.cli.main import COMMANDS, main


def llava(*words):
    return subprocess.run(
        [sys.executable, "-m", "modeling_llava.cli.main", *words], capture_output=True, text=True, timeout=120
    )


def test_help_lists_every_command():
    done = llava("--help")
    assert done.returncode == 0
    for name, summary in COMMANDS.items():
        assert name in done.stdout and summary.split(",")[0][:18] in done.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and __version__ in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["fly"]])
def test_no_command_and_an_unknown_one_end_with_2_and_say_what_there_is(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and "COMMAND" in capsys.readouterr().err


def test_a_users_mistake_is_one_line_and_a_traceback_only_when_asked_for(tmp_path, monkeypatch, capsys):
    words = ["merge", str(tmp_path / "nowhere"), str(tmp_path / "out")]
    assert main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("llava merge: error:") and "Traceback" not in "".join(error)
    monkeypatch.setenv("LLAVA_DEBUG", "1")
    with pytest.raises((OSError, ValueError)):
        main(words)


def test_ctrl_c_ends_with_130(monkeypatch, capsys):
    import modeling_llava.cli.doctor as doctor

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupted)
    assert main(["doctor"]) == 130
    assert "stopped" in capsys.readouterr().err
