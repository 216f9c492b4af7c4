"""
The web server's filter in front of Gradio.

Gradio serves far more than a chat needs (an API with its description, a proxy for URLs, recordings, monitoring), fetches
"uploads" that are URLs, and answers whatever Host and Origin say. Only what the page uses passes.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any


logger = logging.getLogger(__name__)

_API = "/gradio_api/"
PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
GET_EXACT = {*PAGES, *(_API + name for name in ("queue/data", "upload_progress", "startup-events", "theme.css"))}
GET_BELOW = ("/assets/", "/static/", "/svelte/", _API + "heartbeat/")
POST_EXACT = {_API + name for name in ("queue/join", "upload", "cancel", "reset")}
FILE = _API + "file="
UPLOAD = _API + "upload"
MAX_MESSAGE_BYTES = 2**20
"""Of a request that is not an upload."""
MAX_REFUSALS_LOGGED = 200
"""Each once, so that a scan does not fill the terminal."""

# The page loads nothing from other hosts, whatever an answer's Markdown says. Gradio's page has inline scripts.
POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    ]
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """
    ASGI middleware that passes on what the page needs, refuses the rest, and forbids the page to load from other hosts.

    Args:
        app: The application behind it.
        folder (`str`): The only folder from which files are served: uploads and examples.
        max_upload_bytes (`int`): Of one upload.
        hosts (`Iterable[str]`, *optional*): Names that a request's Host may have (against DNS rebinding). `None`: any.
        proxied (`Iterable[str]`, *optional*): Names under which a proxy serves the page, allowed as Host and as Origin.
        root_path (`str`, *optional*): The path at which the proxy serves the page; requests may contain it or not.
    """

    def __init__(self, app, folder: str, max_upload_bytes: int, hosts=None, proxied: Iterable[str] = (), root_path=""):
        self.app, self.max_upload_bytes, self.root_path = app, max_upload_bytes, root_path
        self.folder = os.path.realpath(folder)
        self.proxied = {host.lower() for host in proxied}
        self.hosts = None if hosts is None else {host.lower() for host in hosts} | self.proxied
        self.told: set[str] = set()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        if self.root_path and scope["path"].startswith(f"{self.root_path}/"):
            path = scope["path"].removeprefix(self.root_path)
            scope = {**scope, "path": path, "raw_path": path.encode()}
        refusal = self._refusal(scope)
        if refusal is None and scope["method"] == "POST" and scope["path"] != UPLOAD:
            receive, refusal = await self._read(receive)
        if refusal is not None:
            told = f"{scope['method']} {scope['path']!r:.80} was refused: {refusal[1]}"
            if told not in self.told and len(self.told) < MAX_REFUSALS_LOGGED:
                self.told.add(told)
                logger.warning(told)
            return await _refuse(send, *refusal)
        started = False

        async def send_with_headers(message):
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                names = {name for name, _ in HEADERS}
                own = [(name, value) for name, value in message.get("headers", []) if name.lower() not in names]
                message = {**message, "headers": [*own, *HEADERS]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception as error:  # Gradio's, for a forged request: a line on the terminal, not a traceback
            what = " ".join(str(error).split())[:200]
            logger.warning("%s %.80r failed: %s: %s", scope["method"], scope["path"], type(error).__name__, what)
            if started:
                await send({"type": "http.response.body", "body": b""})
            else:
                await _refuse(send, 400, "Bad request.")

    def _refusal(self, scope) -> tuple[int, str] | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self.hosts is not None and (name := host_name(host)) not in self.hosts:
            return 403, f"unknown host {name!r:.80}. If a proxy serves the page under it: --allow-host {name:.80}"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            if (name := host_name(origin)) not in self.proxied:
                return 403, f"page of another site, {origin!r:.80}. If a proxy serves it: --allow-host {name:.80}"
        path, method = scope["path"], scope["method"]
        if method in ("GET", "HEAD"):
            if path.startswith(FILE):
                return None if self._may_serve(path[len(FILE) :]) else (403, "File not served.")
            known = path in GET_EXACT or path.startswith(GET_BELOW)
            return None if known and ".." not in path else (404, "Not found.")
        if method != "POST" or path not in POST_EXACT:
            return 404, "Not found."
        length, limit = headers.get("content-length"), MAX_MESSAGE_BYTES
        if path == UPLOAD:
            limit = self.max_upload_bytes + 2**16  # the form around it
        if length is None or not length.isdigit():
            return 411, "Content-Length is required."
        return None if int(length) <= limit else (413, f"The limit is {limit / 2**20:.0f} MiB.")

    async def _read(self, receive) -> tuple[Any, tuple[int, str] | None]:
        """Reads a message; returns it as a `receive`, and why it is refused. Gradio would fetch an "upload" that is a URL."""
        body, more = b"", True
        while more:
            part = await receive()
            if part["type"] != "http.request":
                return receive, (400, "Incomplete.")
            body, more = body + part.get("body", b""), part.get("more_body", False)
            if len(body) > MAX_MESSAGE_BYTES:
                return receive, (413, "Too long.")
        try:
            paths = list(_paths(json.loads(body or b"null")))
        except (ValueError, RecursionError):
            return receive, (400, "Not JSON.")
        if not all(isinstance(path, str) and self._may_serve(path) for path in paths):
            return receive, (403, "That file was not uploaded here.")
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again():
            return messages.pop() if messages else await receive()

        return receive_again, None

    def _may_serve(self, name: str) -> bool:
        """Whether it is in the folder, with symbolic links resolved."""
        if not os.path.isabs(name) or "\0" in name:
            return False
        return os.path.realpath(name).startswith(self.folder + os.sep)


async def _refuse(send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def _paths(value: Any) -> Iterator[Any]:
    """Every `path` in a message, Gradio's field of a file."""
    if isinstance(value, dict):
        if value.get("path") is not None:
            yield value["path"]
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from _paths(item)


def host_name(host: str) -> str:
    """The name in `localhost:7860`, `[::1]:7860` or `https://demo.example.org/llava`, in lower case."""
    host = re.sub(r"[^\w.:\[\]-]", "?", host.rpartition("://")[2].partition("/")[0])  # it is printed
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


__all__ = ["Guard", "host_name"]
