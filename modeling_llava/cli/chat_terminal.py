"""The terminal side of `llava chat`: reading lines, commands, streaming answers; or a script on stdin."""

import contextlib
import os
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from ..inference.chat import Chat, Conversation, save_transcript
from ..inference.image_references import NamedImage, are_images, read_image, split_references


HISTORY = "~/.llava_history"
COMMANDS: dict[str, tuple[str, str]] = {
    "/image": (
        "PATH …",
        "talk about this image (or these); without PATH: which one it is; `none`: about no image",
    ),
    "/reset": ("", "forget what was said, keep the image"),
    "/retry": ("", "answer the last question again"),
    "/save": ("FILE", "write the conversation: .json as training data, any other name as Markdown"),
    "/help": ("", "this list"),
    "/quit": ("", "leave (also Ctrl-D)"),
}


class Terminal:
    """
    Runs a chat over stdin and stdout.

    At a terminal: prompt, history, completion, statistics. With stdin or stdout redirected: a line in, an answer out;
    all else goes to stderr, and the exit code is 1 if a line failed.

    Args:
        chat ([`Chat`]): What answers.
        name (`str`): The model's, for transcripts.
        remember (`bool`, *optional*, defaults to `True`): Keep the history of questions in `~/.llava_history`.
    """

    def __init__(self, chat: Chat, name: str, remember: bool = True):
        self.chat, self.name = chat, name
        self.interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        self.conversations: list[Conversation] = [chat.conversation]
        self.saved: set[Path] = set()
        self.failed = False
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if hasattr(
                stream, "reconfigure"
            ):  # an answer may hold what the terminal's encoding has not, a question anything
                stream.reconfigure(errors="replace")
        self.read_line = _line_reader(remember) if self.interactive else None
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
                    if not self.handle(line.strip()):
                        break
            except BrokenPipeError:  # whoever read the answers has left; Python would complain once more as it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 1
            return 1 if self.failed else 0
        with contextlib.suppress(EOFError, KeyboardInterrupt):  # Ctrl-C twice, or while the first is being answered
            interrupted = False
            while True:
                line = None
                try:
                    line = self.read_line().strip()
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
        elif rest == "none":
            self.show([])
        else:
            try:
                self.show([read_image(reference) for reference in split_references(rest)])
            except ValueError as error:
                raise ValueError(f"{error} {self.about('Still about')}") from None

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
        if not images:
            return f"{begin} no image."
        sizes = (f"{_printable(image.name)} ({image.image.width}×{image.image.height})" for image in images)
        return f"{begin} {', '.join(sizes)}."

    def save(self, rest: str) -> None:
        names = split_references(rest)
        if len(names) != 1:
            raise ValueError("Where to? /save FILE, such as /save chat.md or /save chat.json.")
        path = Path(names[0]).expanduser()
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

    def note(self, text: str) -> None:
        """What is not an answer: dimmed, on stderr."""
        print(f"\033[2m{text}\033[0m" if self.colour else text, file=sys.stderr, flush=True)

    def complain(self, text: str) -> None:
        self.failed = True
        text = _printable(text)
        print(f"\033[31m{text}\033[0m" if self.colour else text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _first_ctrl_c(action: Callable[[], None]) -> Iterator[list[bool]]:
    """
    The first Ctrl-C calls `action` and is kept in the list that is yielded; a second one interrupts whatever is going on.

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


def _line_reader(remember: bool) -> Callable[[], str]:
    """A function that reads a line: with prompt_toolkit if it is installed, else as Python's own prompt does."""
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        return _plain_reader()
    from prompt_toolkit.completion import Completer, PathCompleter, WordCompleter
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Completion(Completer):
        """Commands, and paths after those that take one."""

        paths, commands = PathCompleter(expanduser=True), WordCompleter(list(COMMANDS), sentence=True)

        def get_completions(self, document, event):
            command, space, rest = document.text_before_cursor.partition(" ")
            if space and command in ("/image", "/save"):
                yield from self.paths.get_completions(Document(rest), event)
            elif command.startswith("/"):
                yield from self.commands.get_completions(document, event)

    history = InMemoryHistory()
    if remember:
        path = Path(HISTORY).expanduser()
        try:
            path.touch(0o600)
            history = FileHistory(str(path))
        except OSError:  # a home that cannot be written to: remembered until the end
            pass
    session = PromptSession("› ", history=history, completer=Completion(), complete_while_typing=False)

    def read_line() -> str:
        # Until it holds the terminal, Ctrl-C is a signal: raised inside of the event loop's beginnings, it is a traceback.
        with _first_ctrl_c(lambda: None) as pressed:
            line = session.prompt(pre_run=lambda: pressed and session.app.exit(exception=KeyboardInterrupt))
        if pressed:
            raise KeyboardInterrupt
        return line

    return read_line


def _plain_reader() -> Callable[[], str]:
    import importlib.util

    if importlib.util.find_spec("readline"):
        import readline  # noqa: F401  arrow keys and history of this session
    return lambda: input("› ")


__all__ = ["Terminal"]
