"""The entry point: one table of commands, one line per mistake."""

import subprocess
import sys
import warnings
from unittest import mock

import pytest

from modeling_llava import __version__
from modeling_llava.cli.main import COMMANDS, main


def test_help_lists_every_command_and_the_version_is_told(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    for name, summary in COMMANDS.items():
        assert name in printed and summary.split(",")[0][:18] in printed
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert __version__ in capsys.readouterr().out


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
    monkeypatch.setattr("modeling_llava.cli.doctor.run", mock.Mock(side_effect=KeyboardInterrupt))
    assert main(["doctor"]) == 130
    assert "stopped" in capsys.readouterr().err


def test_warnings_for_other_packages_programmers_are_not_passed_on(monkeypatch, recwarn):
    monkeypatch.setattr("modeling_llava.cli.doctor.run", lambda args: warnings.warn("is old", FutureWarning))
    main(["doctor"])
    assert not recwarn.list


@pytest.mark.parametrize(
    "words, said",
    [
        ("chat model --imgae a.jpg", "llava chat: error: there is no option --imgae. Did you mean --image?"),
        ("data check my.json --imagefolder x", "llava data: error: there is no option --imagefolder. Did you mean --image-folder?"),
        ("train qlora --learning_rate 3", "llava train: error: there is no option --learning_rate. Settings are given as key=value: learning_rate=…"),
        ("publish model me/my llava", "llava publish: error: 'llava' is one word too many. Put a path with spaces in quotes;"),
        ("doctor --frobnicate", "llava doctor: error: there is no option --frobnicate. llava doctor --help lists them."),
    ],
)  # fmt: skip
def test_a_word_that_nothing_takes_is_answered_by_what_was_meant(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(words.split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith(said) and len(err.splitlines()) == 1


def test_a_reader_that_leaves_ends_a_command_without_a_word(tmp_path):
    """`llava estimate … | head -1`"""
    done = subprocess.run(
        [sys.executable, "-c", "import sys\nfrom modeling_llava.cli import doctor, main\n"
         "def run(args):\n    for _ in range(100_000):\n        print('line', flush=True)\n"
         "doctor.run = run\nsys.exit(main.main(['doctor']))"],
        stdout=(pipe := subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)).stdin,
        stderr=subprocess.PIPE, text=True, timeout=500,
    )  # fmt: skip
    pipe.stdin.close()
    pipe.wait()
    assert done.returncode == 1 and done.stderr == ""
