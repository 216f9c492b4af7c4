"""
The web server's filter in front of Gradio, which answers whatever Host and Origin say and fetches files from other servers.
"""

import re
from collections.abc import Iterable

from transformers.utils import logging


logger = logging.get_logger(__name__)

# The page loads nothing from other hosts, whatever an answer's Markdown says. Gradio's page has inline scripts.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """
    ASGI middleware that refuses requests by other names, of other sites' pages, for other servers' files and above a size,
    and forbids the page to load from other hosts.

    Args:
        app: The application behind it.
        max_bytes (`int`): Of one request.
        hosts (`Iterable[str]`, *optional*): Names that a request's Host may have (against DNS rebinding). `None`: any.
        proxied (`Iterable[str]`, *optional*): Names under which a proxy serves the page, allowed as Host and as Origin.
        root_path (`str`, *optional*): The path at which the proxy serves the page; requests may contain it or not.
    """

    def __init__(self, app, max_bytes: int, hosts=None, proxied: Iterable[str] = (), root_path=""):
        self.app, self.max_bytes, self.root_path = app, max_bytes, root_path
        self.proxied = {host.lower() for host in proxied}
        self.hosts = None if hosts is None else {host.lower() for host in hosts} | self.proxied

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                names = {name for name, _ in HEADERS}
                own = [(name, value) for name, value in message.get("headers", []) if name.lower() not in names]
                message = {**message, "headers": [*own, *HEADERS]}
            await send(message)

        if self.root_path and scope["path"].startswith(f"{self.root_path}/"):
            path = scope["path"].removeprefix(self.root_path)
            scope = {**scope, "path": path, "raw_path": path.encode()}
        if (refusal := self._refusal(scope)) is None:
            return await self.app(scope, receive, send_with_headers)
        status, text = refusal
        logger.warning_once(f"{scope['method']} {scope['path']!r:.80} was refused: {text}")
        plain = [(b"content-type", b"text/plain; charset=utf-8")]
        await send_with_headers({"type": "http.response.start", "status": status, "headers": plain})
        await send({"type": "http.response.body", "body": text.encode()})

    def _refusal(self, scope) -> tuple[int, str] | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self.hosts is not None and (name := host_name(host)) not in self.hosts:
            return 403, f"unknown host {name!r:.80}. If a proxy serves the page under it: --allow-host {name:.80}"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            if (name := host_name(origin)) not in self.proxied:
                return 403, f"page of another site, {origin!r:.80}. If a proxy serves it: --allow-host {name:.80}"
        if "://" in scope["path"]:
            return 403, "a file of another server."
        if scope["method"] in ("GET", "HEAD"):
            return None
        length = headers.get("content-length", "")
        if not length.isdigit():
            return 411, "Content-Length is required."
        return None if int(length) <= self.max_bytes else (413, f"the limit is {self.max_bytes / 2**20:.1f} MiB.")


def host_name(host: str) -> str:
    """The name in `localhost:7860`, `[::1]:7860` or `https://demo.example.org/llava`, in lower case."""
    host = re.sub(r"[^\w.:\[\]-]", "?", host.rpartition("://")[2].partition("/")[0])  # it is printed
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
