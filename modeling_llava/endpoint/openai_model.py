"""The client of OpenAI-compatible endpoints: OpenAI, vLLM, `transformers serve`, Ollama, llama.cpp's server, …"""

import asyncio
import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from .chat import EndpointFault, FatalFault, Message, PassingFault, Reply, RequestFault, Usage, remove_thoughts


logger = logging.getLogger(__name__)

ERROR_STATUSES = frozenset(map(str, range(400, 600)))
_REFUSES_LENGTH = re.compile(
    r"max_completion_tokens|(?=.*\bmax_tokens\b).*(?:unsupported|not supported|not permitted|unrecogni[sz]ed|unknown|unexpected)",
    re.IGNORECASE | re.DOTALL,
)
CUT = "the reply was cut at its maximum length while the model was thinking and has no text; raise --max-reply-tokens"


class OpenAIModel:
    """A `ChatModel` behind an OpenAI-compatible endpoint, by the `openai` client. One call is one HTTP request.

    Args:
        base_url: Address with its version (`http://localhost:8000/v1`). Default: `OPENAI_BASE_URL`, or OpenAI.
        api_key: Default: `OPENAI_API_KEY`; local servers accept any.
        timeout: Maximum seconds for a complete reply.
        length_parameter: `"max_tokens"`, or `"max_completion_tokens"`, to which the client switches when the endpoint
            asks for it, as OpenAI does for reasoning models.
        optional: Parameters (`"temperature"`, `"seed"`) that are left out when the endpoint does not support them.
    """

    def __init__(
        self,
        name: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        length_parameter: str = "max_tokens",
        optional: Iterable[str] = (),
    ):
        base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or "").strip() or None
        api_key = (api_key or os.environ.get("OPENAI_API_KEY") or "").strip() or None
        if base_url is not None:
            try:
                address = urlsplit(base_url)
                is_address = address.scheme in ("http", "https") and address.hostname and address.port != 0
            except ValueError:  # a port that is not a number, a bracket that is not closed
                is_address = False
            if not is_address:
                raise ValueError(f"The endpoint's address is {base_url!r}; it must be like http://localhost:8000/v1.")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("The key (OPENAI_API_KEY) has a line break or an invalid character; copy it again.")
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout:g} s; it must be positive.")
        if api_key is None and base_url is None:
            raise ValueError("No key for OpenAI: set OPENAI_API_KEY, or give another endpoint by --base-url.")
        _import_openai()
        self.name = name
        self.base_url = base_url
        self.timeout = timeout
        self.length_parameter = length_parameter
        self.optional = frozenset(optional)
        self.left_out: tuple[str, ...] = ()
        self._api_key = api_key or "none"
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def _connect(self) -> Any:
        """The client of the running event loop, to which its connections belong. It is over aiohttp, which takes half the
        time per request of the default transport, httpx."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            openai = _import_openai()
            # The run limits the requests in flight; 0 lifts aiohttp's limit of 100.
            limits = type(openai.DEFAULT_CONNECTION_LIMITS)(max_connections=0)
            self._client = openai.AsyncOpenAI(
                base_url=self.base_url,
                api_key=self._api_key,
                max_retries=0,
                timeout=self.timeout,
                http_client=openai.DefaultAioHttpClient(limits=limits),
            )
            self._loop = loop
        return self._client

    def body(self, messages: list[Message], *, max_tokens: int, temperature: float | None, seed: int | None) -> dict:
        """The request's JSON body; the same for a live request and for a line of a batch file."""
        body: dict[str, Any] = {"model": self.name, "messages": messages, self.length_parameter: max_tokens}
        if temperature is not None:
            body["temperature"] = temperature
        if seed is not None:
            body["seed"] = seed
        return {key: value for key, value in body.items() if key not in self.left_out}

    def adapt(self, body: dict, said: str) -> None:
        """Adapts further requests to the refusal of `body`: `max_completion_tokens` in place of `max_tokens`, or without an
        `optional` parameter. Tasks keep their ids."""
        named = [name for name in self.optional.difference(self.left_out) if name in body and name in said]
        if self.length_parameter == "max_tokens" and _REFUSES_LENGTH.search(said):
            self.length_parameter, what = "max_completion_tokens", "max_completion_tokens in place of max_tokens"
        elif named:
            self.left_out, what = tuple(sorted({*self.left_out, *named})), f"no {' and no '.join(sorted(named))}"
        else:
            return
        logger.warning("%s refuses a parameter (%s). From now on requests have %s.", self.name, said, what)

    async def complete(
        self,
        messages: list[Message],
        *,
        max_tokens: int,
        temperature: float | None = None,
        seed: int | None = None,
        request_id: str | None = None,
    ) -> Reply:
        """See `ChatModel.complete`. `temperature=None`: the endpoint's default."""
        asked = {"messages": messages, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        while True:
            body, left_out = self.body(**asked), self.left_out
            # With the same id, an endpoint that honours ids would repeat the first body's refusal.
            changed = "".join(f"-{key}" for key in (*left_out, self.length_parameter) if key != "max_tokens")
            try:
                reply = await self._post(body, request_id and request_id + changed)
            except RequestFault as fault:
                if fault.kind not in {"400", "422"}:
                    raise
                self.adapt(body, str(fault))
                if self.body(**asked) == body:
                    raise
            else:
                return replace(reply, left_out=left_out)

    async def _post(self, body: dict, request_id: str | None) -> Reply:
        import aiohttp

        headers = {"Idempotency-Key": request_id, "X-Client-Request-Id": request_id} if request_id else {}
        # `chat.completions.create` walks every message and builds a pydantic model, at twice the time per request.
        request = self._connect().post("/chat/completions", cast_to=str, body=body, options={"headers": headers})
        try:
            return parse_completion(json.loads(await asyncio.wait_for(request, self.timeout)))
        except asyncio.TimeoutError:
            raise PassingFault("timeout", f"no complete reply within {self.timeout:g} s", maybe_paid=True) from None
        except (_import_openai().OpenAIError, aiohttp.ClientError) as error:
            raise translate_error(error) from error
        except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
            raise PassingFault("malformed", f"the reply is not JSON: {error}", maybe_paid=True) from None

    async def close(self) -> None:
        """Closes the connections."""
        if self._client is not None and self._loop is asyncio.get_running_loop():
            await self._client.close()
            self._client = None


def _import_openai() -> Any:
    try:
        import aiohttp  # noqa: F401  the client's transport
        import openai
    except ImportError as error:
        raise ImportError("Endpoints need the `openai` client: pip install 'modeling-llava[engine]'") from error
    return openai


def parse_completion(body: Any) -> Reply:
    """A `Reply` from the JSON body of a chat completion. An `EndpointFault` is raised where it has none, where it was cut before its
    text, and for an error, which some routers send with status 200."""
    error = body.get("error") if isinstance(body, dict) and not body.get("choices") else None
    if isinstance(error, dict) and str(error.get("code")) in ERROR_STATUSES:
        raise translate_status(int(error["code"]), error_words(error))
    try:
        choice = body["choices"][0]
        message = choice["message"]
        text, finish = message.get("content"), str(choice.get("finish_reason") or "stop")
        if text is None:  # content filters and OpenAI's `refusal` leave the content empty
            text = message.get("refusal") or ""
        if isinstance(text, list):  # parts, as some servers give them; thoughts are parts of another type
            parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in text]
            text = "".join(part["text"] for part in parts if part["type"] == "text")
        if not isinstance(text, str):
            raise TypeError(f"content is {type(text).__name__}")
        # A lone surrogate, which JSON can escape, cannot be written as text.
        text = remove_thoughts(text.encode("utf-8", "replace").decode())
        if finish.lower() in {"error", "abort"}:  # after the status was sent; the text may end anywhere
            said = error_words(choice.get("error")) or f"finish_reason {finish!r}"
            raise PassingFault("malformed", f"the reply was broken off: {said}", maybe_paid=True)
        finish = "length" if finish.lower() in {"length", "max_tokens", "model_length"} else finish
        reply = Reply(text, finish, _usage(body.get("usage")), str(body.get("model") or ""))
    except (KeyError, IndexError, TypeError, AttributeError) as malformed:
        what = error_words(error) or f"{type(malformed).__name__}: {malformed}"
        raise PassingFault("malformed", f"the reply is not a chat completion ({what})", maybe_paid=True) from None
    if finish == "length" and not text.strip():
        raise RequestFault("cut", CUT, maybe_paid=True)
    return reply


def _usage(usage: Any) -> Usage | None:
    """The usage that the endpoint reports; `None` without one that is understood."""
    try:
        used = Usage(int(usage["prompt_tokens"]), int(usage.get("completion_tokens") or 0))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        return None
    return used if min(used.prompt_tokens, used.completion_tokens) >= 0 else None


def translate_error(error: Exception) -> EndpointFault:
    """The fault of an exception of the `openai` client."""
    import aiohttp

    openai = _import_openai()
    if isinstance(error, openai.APIStatusError):
        words = error_words(error.body) or error.message
        code = getattr(error, "code", None) or getattr(error, "type", None)
        return translate_status(error.status_code, words, error.response.headers, code)
    # The cause says more: the client reports a cut connection as one that was never made.
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, aiohttp.ClientError):
        cause = cause.__cause__
    said = cause or error.__cause__ or error
    message = f"{type(said).__name__}: {said}"
    if isinstance(cause, aiohttp.ClientConnectorCertificateError):
        return FatalFault("certificate", message)
    if isinstance(cause, aiohttp.ServerTimeoutError):
        return PassingFault("timeout", message, maybe_paid=not isinstance(cause, aiohttp.ConnectionTimeoutError))
    if isinstance(cause, (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)):
        return PassingFault("connection", message, maybe_paid=not isinstance(cause, aiohttp.ClientConnectorError))
    kind = "connection" if cause is None and isinstance(error, openai.APIConnectionError) else "malformed"
    return PassingFault(kind, message, maybe_paid=True)


def translate_status(status: int, message: str, headers: Any = None, code: str | None = "") -> EndpointFault:
    """The fault of an HTTP status."""
    kind = str(status)
    if status == 429 and code in {"insufficient_quota", "billing_hard_limit_reached"}:
        return FatalFault("quota", message)
    if status in {408, 409, 425, 429} or status >= 500:
        return PassingFault(kind, message, retry_after=parse_retry_after(headers or {}))
    if status in {401, 402, 404, 405} or 300 <= status < 400:
        return FatalFault(kind, message)
    return RequestFault(kind, message)  # 403 too: routers answer so when their filter rejects the prompt


def error_words(error: Any) -> str:
    """The message in the body of an error, or the body itself; empty if there is none."""
    said = error.get("message") or error if isinstance(error, dict) else error
    if not said:
        return ""
    text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    if isinstance(error, dict) and str(error.get("param") or "") not in text:
        text += f" ({error['param']})"
    if text.lstrip().startswith("<"):  # a proxy's page
        text = re.sub(r"<[^>]*>", " ", text[:5000])
    return " ".join(text.split())[:500]


def parse_retry_after(headers: Any) -> float | None:
    """Seconds of a `retry-after-ms` or `retry-after` header; `None` without one, and where it is a date."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            return max(0.0, float(headers[name]) / unit)
        except (KeyError, ValueError):
            continue
    return None
