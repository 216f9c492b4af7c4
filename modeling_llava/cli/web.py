"""`llava web MODEL`: talk to a model in the browser."""

import argparse
import os


EPILOG = """\
examples:
  llava web llava-hf/llava-1.5-7b-hf --load-in-4bit
  llava web runs/my-adapter --examples my-images
  llava web runs/my-adapter --root-path /llava --allow-host demo.example.org    behind a proxy
Only this machine reaches the page, unless --host is given. Nothing is sent to other hosts.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .chat import add_loading_arguments

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("model", help="folder or Hub name of a full or merged model, an adapter, or a projector")
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only; 0.0.0.0: all)")
    add("--port", type=int, help="default: the first free one from 7860")
    add("--root-path", metavar="PATH", help="behind a proxy: the path of the page, such as /llava, or the whole URL")
    hosts = {"action": "append", "default": [], "metavar": "NAME"}
    add("--allow-host", **hosts, help="behind a proxy: its host name, such as demo.example.org (repeatable)")
    add("--open", action="store_true", help="open the page in this machine's browser")
    add("--examples", metavar="FOLDER", help="images to choose from (default: two drawn ones)")
    add("--system", metavar="TEXT", help="system message in place of the template's")
    add("--max-new-tokens", type=int, default=1024, metavar="N", help="upper limit of the answer length")
    add("--max-upload-mb", type=float, default=20, metavar="MB", help="limit of one image (default: 20)")
    add("--people", type=int, default=4, metavar="N", help="visitors answered at the same time (default: 4)")
    add_loading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import signal
    import sys
    import tempfile
    import threading

    from ..inference import LlavaPredictor
    from ..inference.chat import Chat
    from ..inference.web.examples import collect_examples
    from ..inference.web.page import Limits, build_page, import_gradio, launch
    from ..inference.web.sessions import Sessions
    from .chat import load_from_arguments

    if args.max_new_tokens < 1 or args.people < 1 or not 0 < args.max_upload_mb < 1e6:
        raise ValueError("--max-new-tokens, --people and --max-upload-mb must be above 0 (and an image below a TB).")
    require_address(args.host, args.port)
    upload = int(args.max_upload_mb * 2**20)
    limits = Limits(upload_bytes=upload, new_tokens=args.max_new_tokens, answers_at_once=args.people)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the folder is removed
    with tempfile.TemporaryDirectory(prefix="llava-web-") as folder:  # readable by this user only
        examples = collect_examples(args.examples, folder)
        import_gradio(folder)  # raises before minutes of loading
        model, processor = load_from_arguments(args)
        predictor = {"system": args.system, "max_cached_images": 1}
        sessions = Sessions(lambda: Chat(LlavaPredictor(model, processor, **predictor)), args.people)
        page = build_page(sessions, processor, folder, title=_title(args.model), examples=examples, limits=limits)
        url = launch(page, folder, args.host, args.port, args.open, args.root_path, args.allow_host)
        if args.host not in ("127.0.0.1", "localhost", "::1"):
            everyone = "Everyone who can reach this machine can use the page: it has no password and no encryption."
            print(everyone, file=sys.stderr)
        print(f"Open {url} (Ctrl-C ends).", flush=True)
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)
    return 0


def require_address(host: str, port: int | None) -> None:
    """Raises ValueError if the server cannot listen there, before the model is loaded and Gradio tries a hundred ports."""
    import socket

    if port is not None and not 0 < port < 65536:
        raise ValueError(f"--port must be 1 to 65535, got {port}.")
    try:
        socket.create_server((host, port or 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        at = f"--host {host}" + (f" --port {port}" if port else "")
        fix = "Choose another port, or leave --port out for the first free one." if port else "Is it this machine's?"
        raise ValueError(f"{at}: {error.strerror or error}. {fix}") from None


def _title(model: str) -> str:
    """What visitors read: a Hub name, or the last part of a folder's path."""
    return os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model
