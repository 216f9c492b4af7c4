"""The page: an image on the left, the conversation on the right."""

import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...constants import is_older
from ...processing_llava import num_image_tokens
from ..chat import Chat
from .guard import Guard, host_name
from .sessions import Sessions


OLDEST_GRADIO = "6.24"
"""The first with `run_history=False`. setup.py says the same."""
REDRAW_SECONDS = 0.05
NO_IMAGE = "No image: questions are answered from text alone."
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.DOTALL)
_CSS = """
footer {display: none !important}
.gradio-container {width: 100%; max-width: 1200px !important; margin: auto}
.gradio-container > main {width: 100%; min-width: 0}
#status, #caution {padding: 0 4px}
#status *, #caution * {font-size: 13px; color: var(--body-text-color-subdued)}
"""


@dataclass(frozen=True)
class Limits:
    """Of the server: an image's bytes and pixels (50 million take 150 MB), an answer's tokens, visitors answered and queued."""

    upload_bytes: int = 20 * 2**20
    pixels: int = 50_000_000
    question_characters: int = 8_000
    new_tokens: int = 1024
    answers_at_once: int = 4
    waiting: int = 32


def build_page(
    sessions: Sessions,
    processor,
    folder: str | os.PathLike,
    *,
    title: str,
    examples: list[tuple[str, str]] | None = None,
    limits: Limits | None = None,
):
    """
    The Gradio application, for [`launch`].

    Args:
        folder (`str` or `os.PathLike`): The folder of uploads and examples; no other file is served.
        title (`str`): The model's name.
        examples (`list[tuple[str, str]]`, *optional*): Image paths, each with a question.

    Raises:
        ImportError: Gradio is not installed.
    """
    gr = import_gradio(folder)
    limits, examples = limits or Limits(), examples or []
    folder = Path(folder).resolve()

    def buttons(*active: bool) -> list[Any]:
        """Ask, stop, retry."""
        return [gr.Button(interactive=one) for one in active]

    def idle(chat: Chat) -> list[Any]:
        return buttons(True, False, bool(chat.conversation.turns))

    def choose(number: int, question: str) -> tuple[str, str]:
        """An example, with its question unless the visitor has typed one."""
        path, suggested = examples[number]
        own = question.strip() and question not in [suggestion for _, suggestion in examples]
        return path, question if own else suggested

    def look(upload, request: gr.Request):
        tab = sessions[request.session_hash]
        try:
            if not tab.look(upload and Path(upload), limits.pixels):
                return [gr.skip()] * 5
        except ValueError as error:
            gr.Warning(str(error), title="This image cannot be read")
            return [[], "No image: the one above cannot be read.", *idle(tab.chat)]
        return [[], about(tab.chat), *idle(tab.chat)]

    def about(chat: Chat) -> str:
        if not chat.conversation.images:
            return NO_IMAGE
        return f"{num_image_tokens(processor)} image tokens, computed once for all questions."

    # Gradio passes `request` for its annotation.
    def answer(again, question, upload, temperature, top_p, new_tokens, request: gr.Request) -> Iterator[list[Any]]:
        """Yields messages, the question's box, the status line, and the three buttons."""
        tab = sessions[request.session_hash]
        chat = tab.chat
        try:
            tab.look(upload and Path(upload), limits.pixels)  # a restarted server does not know it
            if len(question) > limits.question_characters:
                most = limits.question_characters
                raise ValueError(f"The question has {len(question):,} characters; the limit is {most:,}.")
            settings = {"max_new_tokens": new_tokens}
            if temperature > 0:
                settings |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
            conversation = chat.conversation
            pieces = chat.retry(**settings) if again else chat.ask(question, **settings)
            asked, box = (conversation.turns[-1][0], question) if again else (question, "")
            before = [*_messages(conversation.turns[:-1] if again else conversation.turns), _message("user", asked)]
            said, drawn = "", 0.0
            yield [[*before, _message("assistant", "…")], box, "Looking …", *buttons(False, True, False)]
            for piece in pieces:
                said += piece
                if chat.conversation is not conversation:  # another image, or a new chat
                    break
                if time.monotonic() - drawn > REDRAW_SECONDS:
                    drawn = time.monotonic()
                    yield [[*before, _message("assistant", said)], box, "Writing …", *buttons(False, True, False)]
            pieces.close()
            if chat.conversation is conversation:
                yield [_messages(conversation.turns), box, _line(chat), *idle(chat)]
            else:
                yield [gr.skip(), gr.skip(), gr.skip(), *idle(chat)]
        except ValueError as error:
            gr.Warning(str(error), title="No answer")
            yield [_messages(chat.conversation.turns), question, about(chat), *idle(chat)]
        except Exception:  # of the model: Gradio shows it as an error, and on the terminal; the page stays usable
            status = "Something went wrong; the server's terminal says what."
            yield [_messages(chat.conversation.turns), question, status, *idle(chat)]
            raise

    def stop(request: gr.Request) -> None:
        if request.session_hash in sessions:
            sessions[request.session_hash].chat.stop()

    def reset(request: gr.Request):
        tab = sessions[request.session_hash]
        tab.reset()
        return [[], "", about(tab.chat), *idle(tab.chat)]

    async def uploaded(path: str) -> str:
        """Gradio would fetch an "upload" that is a URL."""
        if folder not in Path(path).resolve().parents:
            raise gr.Error("That image was not uploaded here. Upload it again.")
        return path

    page = gr.Blocks(title=f"{title} · LLaVA", analytics_enabled=False, delete_cache=(3600, 86400))
    with page:
        gr.Markdown(f"## {_plain(title)}")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                sources = ["upload", "clipboard"]
                image = gr.Image(label="Image", type="filepath", sources=sources, height=300, elem_id="image")
                # Gradio would decode an upload before its size is checked.
                image.preprocess = lambda payload: payload and payload.path
                image.async_move_resource_to_block_cache = uploaded
                gallery = gr.Dataset(
                    label="Or one of these", components=["image"], samples=[[path] for path, _ in examples],
                    type="index", samples_per_page=len(examples) or 1, visible=bool(examples), elem_id="examples",
                )  # fmt: skip
                with gr.Accordion("Generation settings", open=False, elem_id="sampling"):
                    most = limits.new_tokens
                    temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: greedy")
                    top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
                    new_tokens = gr.Slider(1, most, min(512, most), step=1, precision=0, label="Maximum new tokens")
            with gr.Column(scale=3, min_width=320):
                chatbot = gr.Chatbot(
                    label="Conversation", show_label=False, height="max(320px, 100vh - 300px)", latex_delimiters=[],
                    buttons=["copy_all"], elem_id="chat", placeholder="Choose an image and ask about it.",
                )  # fmt: skip
                status = gr.Markdown(NO_IMAGE, elem_id="status")
                question = gr.Textbox(
                    label="Question", show_label=False, placeholder="What is in the image?", lines=1, max_lines=8,
                    autofocus=True, max_length=limits.question_characters, container=False, elem_id="question",
                )  # fmt: skip
                with gr.Row():
                    look_alike: dict[str, Any] = {"size": "md", "min_width": 90}
                    ask_button = gr.Button("Ask", variant="primary", elem_id="ask", **look_alike)
                    stop_button = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", **look_alike)
                    retry_button = gr.Button("Retry", interactive=False, elem_id="retry", **look_alike)
                    reset_button = gr.Button("New chat", elem_id="reset", **look_alike)
                gr.Markdown("The model can be wrong, and sound certain.", elem_id="caution")

        inputs = [question, image, temperature, top_p, new_tokens]
        again, first = gr.State(True), gr.State(False)
        outputs = [chatbot, question, status, ask_button, stop_button, retry_button]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        gallery.click(choose, [gallery, question], [image, question], **private)
        image.change(look, image, [chatbot, *outputs[2:]], **private)
        gr.on([question.submit, ask_button.click], answer, [first, *inputs], outputs, **private)
        retry_button.click(answer, [again, *inputs], outputs, **private)
        stop_button.click(stop, None, None, concurrency_limit=None, **private)
        gr.on([reset_button.click, chatbot.clear], reset, None, outputs, concurrency_limit=None, **private)
        page.unload(stop)
    page.queue(api_open=False, max_size=limits.waiting, default_concurrency_limit=limits.answers_at_once)
    page.llava_limits = limits
    return page


def launch(
    page,
    folder: str | os.PathLike,
    host: str = "127.0.0.1",
    port: int | None = None,
    browser: bool = False,
    root_path: str | None = None,
    allow_hosts: Iterable[str] = (),
) -> str:
    """
    Starts the server of [`build_page`] in threads of its own, behind [`Guard`]; returns its address.

    Args:
        browser (`bool`): Open the page on this machine.
        root_path (`str`, *optional*): The path, or the whole URL, at which a proxy serves the page.
        allow_hosts (`Iterable[str]`, *optional*): Names that a proxy passes on.

    Raises:
        OSError: the port is taken.
    """
    gr = import_gradio(folder)
    from starlette.middleware import Middleware

    loopback = {"127.0.0.1", "localhost", "::1"}
    proxied = {host_name(name) for name in allow_hosts}
    if root_path and "://" in root_path:
        proxied.add(host_name(root_path))
    elif root_path:
        root_path = f"/{root_path.strip('/')}"
    guard = Middleware(
        Guard,
        max_bytes=page.llava_limits.upload_bytes + 2**16,  # the form around it
        hosts=loopback | {host} if proxied or host in loopback else None,
        proxied=proxied,
        root_path=urlsplit(root_path or "").path.rstrip("/"),
    )
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}  # none from elsewhere
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        root_path=root_path,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=page.llava_limits.upload_bytes,
        theme=gr.themes.Soft(primary_hue="indigo", **fonts),
        css=_CSS,
        app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None, "openapi_url": None},
    )
    return url


def import_gradio(folder: str | os.PathLike):
    """
    The package, set to keep its files in `folder` and to send no analytics.

    Raises:
        ImportError: it is not installed, or too old.
    """
    # Gradio reads these at import, and when it makes a component.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(Path(folder).resolve())
    try:
        import gradio
    except ImportError:
        raise ImportError("llava web requires Gradio: pip install 'modeling-llava[web]'.") from None
    if is_older(found := gradio.__version__, OLDEST_GRADIO):
        fix = "pip install --upgrade gradio"
        raise ImportError(f"llava web requires gradio ≥ {OLDEST_GRADIO}, {found} is installed: {fix}.")
    return gradio


def _messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [_message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn)]


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": _plain(text)}


def _plain(text: str) -> str:
    """Markdown with `<` escaped outside of code: tags are shown as text."""
    parts = _CODE.split(text)
    return "".join(part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(parts))


def _line(chat: Chat) -> str:
    statistics = chat.statistics
    ends = {"length": " Cut off at the maximum new tokens.", "broken off": " Stopped."}
    return (
        f"{statistics.num_tokens} tokens, {statistics.tokens_per_second:.1f} per second, the first after "
        f"{statistics.first_token_seconds:.1f} s.{ends.get(statistics.finish_reason, '')}"
    )
