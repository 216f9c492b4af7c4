"""The terminal side of `llava chat`: reading lines, commands, streaming answers; or a script on stdin."""

import contextlib
import glob
import os
import re
import shlex
import signal
import sys
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

from ..inference.chat import IMAGE_SUFFIXES, Chat, Conversation, NamedImage, is_url, read_named_image, save_transcript


HISTORY = "~/.llava_history"
COMMANDS: dict[str, tuple[str, str]] = {
    "/image": ("PATH …", "talk about this image (or these); without PATH: which one it is; `none`: about no image"),
    "/reset": ("", "forget what was said, keep the image"),
    "/retry": ("", "answer the last question again"),
    "/save": ("FILE", "write the conversation: .json as training data, any other name as Markdown"),
    "/help": ("", "this list"),
    "/quit": ("", "leave (also Ctrl-D)"),
}
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


class Terminal:
    """
    Runs a chat over stdin and stdout.

    At a terminal: prompt, history, completion, statistics. With stdin or stdout redirected: a line in, an answer out;
    all else goes to stderr, and the exit code is 1 if a line failed.

    Args:
        name (`str`): The model's, for transcripts.
        remember (`bool`, *optional*, defaults to `True`): Keep the history of questions in `~/.llava_history`.
    """

    def __init__(self, chat: Chat, name: str, remember: bool = True):
        self.chat, self.name = chat, name
        self.interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        self.conversations: list[Conversation] = [chat.conversation]
        self.saved: set[Path] = set()
        self.failed = False
        for stream in (sys.stdin, sys.stdout, sys.stderr):  # characters that the terminal's encoding does not have
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        if self.interactive:
            _use_readline(remember)
        self.colour = self.interactive and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def run(self, images: list[NamedImage]) -> int:
        """Until the person leaves. Returns the exit code."""
        if not images:
            self.chat.show([])
            if self.interactive:
                self.note("Paste an image's path or URL, or ask without one. /help tells the rest.")
        elif not self.guarded(lambda: self.show(images)):
            return 1
        if not self.interactive:
            try:
                for line in sys.stdin or ():
                    if not self.handle(line.removeprefix("\ufeff").strip()):  # of Windows' editors
                        break
            except BrokenPipeError:  # the reader has left; Python would complain again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 1
            return 1 if self.failed else 0
        with contextlib.suppress(EOFError, KeyboardInterrupt):  # Ctrl-C twice, or while the first is being answered
            interrupted = False
            while True:
                line = None
                try:
                    line = input("› ").strip()
                    if not self.handle(line):
                        break
                    interrupted = False
                except KeyboardInterrupt:
                    if interrupted and line is None:
                        break
                    interrupted = True
                    self.note(f"{'Stopped. ' if line else ''}Ctrl-C once more, or /quit, leaves.")
        return 0

    def handle(self, line: str) -> bool:
        """One line: a command, images, or a question. Returns whether the chat continues."""
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit", "/q"):
            return False
        actions: dict[str, Callable[[str], None]] = {
            "/image": self.image,
            "/reset": lambda rest: self.reset(),
            "/retry": lambda rest: self.answer(self.chat.retry()),
            "/save": self.save,
            "/help": lambda rest: self.help(),
        }
        if command in actions:
            self.guarded(lambda: actions[command](rest.strip()))
        elif are_images(line):
            self.guarded(lambda: self.image(line))
        elif line.startswith("/") and "/" not in command[1:]:
            self.complain(f"There is no command {command}. /help lists them.")
        elif line:
            self.guarded(lambda: self.answer(self.chat.ask(line)))
        return True

    def guarded(self, action: Callable[[], None]) -> bool:
        """Runs an action; a mistake is one line, and the chat continues."""
        try:
            action()
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            self.complain(" ".join(str(error).split()))
            return False
        return True

    # commands

    def image(self, rest: str) -> None:
        if not rest:
            self.note(self.about())
            return
        try:
            images = [] if rest == "none" else [read_named_image(name) for name in split_references(rest)]
        except ValueError as error:
            raise ValueError(f"{error} {self.about('Still about')}") from None
        self.show(images)

    def show(self, images: list[NamedImage]) -> None:
        self.chat.show(images)
        self.began()
        self.note(self.about())

    def reset(self) -> None:
        self.chat.reset()
        self.began()
        self.note(f"A new conversation. {self.about()}")

    def began(self) -> None:
        self.conversations = [conversation for conversation in self.conversations if conversation.turns]
        self.conversations.append(self.chat.conversation)

    def about(self, begin: str = "About") -> str:
        images = self.chat.conversation.images
        sizes = (f"{_printable(image.name)} ({image.image.width}×{image.image.height})" for image in images)
        return f"{begin} {', '.join(sizes) or 'no image'}."

    def save(self, rest: str) -> None:
        names = split_references(rest)
        if len(names) != 1:
            raise ValueError("Where to? /save FILE, such as /save chat.md or /save chat.json.")
        path = Path(names[0])
        if path.exists() and path.resolve() not in self.saved:
            raise ValueError(f"{path} exists and is not of this chat. Choose another name.")
        try:
            save_transcript(self.conversations, path, self.name)
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror or error}.") from None
        self.saved.add(path.resolve())
        self.note(f"Written: {path}")

    def help(self) -> None:
        width = max(len(f"{name} {what}") for name, (what, _) in COMMANDS.items())
        for name, (what, text) in COMMANDS.items():
            self.note(f"  {f'{name} {what}':<{width}}  {text}")
        self.note("Anything else is a question. Ctrl-C stops an answer.")

    # output

    def answer(self, pieces) -> None:
        try:
            with _first_ctrl_c(self.chat.stop) if self.interactive else contextlib.nullcontext() as pressed:
                for piece in pieces:
                    sys.stdout.write(_printable(piece) if self.interactive else piece)
                    sys.stdout.flush()
            if pressed:
                raise KeyboardInterrupt
        except BaseException:
            if self.interactive or self.chat.conversation.turns:
                print(flush=True)
            raise
        finally:
            pieces.close()
        print(flush=True)
        statistics = self.chat.statistics
        cut = " · cut: --max-new-tokens" if statistics.finish_reason == "length" else ""
        context = f" · {statistics.prompt_tokens + statistics.num_tokens:,} of {self.chat.max_length:,} tokens used"
        self.note(
            f"{statistics.num_tokens} tokens · {statistics.tokens_per_second:.1f} per second · first after "
            f"{statistics.first_token_seconds:.1f} s{context if self.chat.max_length else ''}{cut}\n"
        )

    def note(self, text: str, colour: int = 2) -> None:
        """What is not an answer: dimmed, on stderr."""
        print(f"\033[{colour}m{text}\033[0m" if self.colour else text, file=sys.stderr, flush=True)

    def complain(self, text: str) -> None:
        self.failed = True
        self.note(_printable(text), colour=31)


def split_references(text: str, windows: bool = os.name == "nt") -> list[str]:
    r"""
    The paths and URLs of a line, as terminals and file managers write them when a file is dragged or pasted: in quotes, with
    `\ ` for a space, as `file://` URLs, behind PowerShell's `&`. On `windows` every backslash separates folders. A line that
    is the path of a file as it stands is one path, whatever it holds.
    """
    text = text.strip().removeprefix("& ").strip()
    if os.path.isfile(_local(text)):
        return [_local(text)]
    words = shlex.shlex(text, posix=True)
    words.whitespace_split, words.commenters = True, ""
    if windows or re.search(r"(?<![^\s'\"])[A-Za-z]:\\", text):
        words.escape = ""
    try:
        return [_local(word) for word in words]
    except ValueError:  # an apostrophe in a name
        return [_local(word) for word in text.split()]


def are_images(text: str) -> bool:
    """Whether a line holds nothing but images: URLs, files with an image's ending, paths (with a folder) that end so."""
    names = [] if "\n" in text.strip() else split_references(text)
    return bool(names) and all(
        is_url(name)
        or name.lower().endswith(IMAGE_SUFFIXES)
        and (os.path.isfile(name) or os.path.dirname(name) or _DRIVE.match(name))
        for name in names
    )


def _local(word: str) -> str:
    if word.lower().startswith("file://"):
        path = urllib.parse.unquote(urllib.parse.urlsplit(word.replace("\\", "/")).path)
        word = path[1:] if re.match(r"/[A-Za-z]:", path) else path
    word = os.path.expanduser(word)
    if os.name != "nt" and _DRIVE.match(word) and os.path.isdir(f"/mnt/{word[0].lower()}"):  # Linux under Windows
        word = f"/mnt/{word[0].lower()}/" + word[3:].replace("\\", "/")
    return word


@contextlib.contextmanager
def _first_ctrl_c(action: Callable[[], None]) -> Iterator[list[bool]]:
    """
    The first Ctrl-C calls `action` and is kept in the list that is yielded; a second one interrupts whatever runs.

    Python raises `KeyboardInterrupt` wherever it is: in a finalizer or a callback, while a token is computed, it would be
    lost, and the answer would continue.
    """
    pressed: list[bool] = []
    before = signal.getsignal(signal.SIGINT) or signal.default_int_handler

    def handle(number, frame):
        signal.signal(signal.SIGINT, before)
        pressed.append(True)
        action()

    signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _printable(text: str) -> str:
    """Without control characters: a model's answer must not steer the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _use_readline(remember: bool) -> None:
    """Arrow keys, history and completion of `input`, where Python has readline (not on Windows)."""
    try:
        import readline
    except ImportError:
        return
    import atexit

    def complete(word: str, number: int) -> str | None:
        names = [name for name in COMMANDS if name.startswith(word)] if readline.get_begidx() == 0 else []
        names += [name + "/" * os.path.isdir(name) for name in glob.glob(glob.escape(os.path.expanduser(word)) + "*")]
        return names[number] if number < len(names) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    path = Path(HISTORY).expanduser()
    with contextlib.suppress(OSError):  # a home that cannot be written to: remembered until the end
        if remember:
            path.touch(0o600)
            if path.stat().st_size:
                readline.read_history_file(path)
            readline.set_history_length(1000)
            atexit.register(readline.write_history_file, path)
