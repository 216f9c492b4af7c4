"""The client of OpenAI-compatible endpoints: OpenAI, vLLM, `transformers serve`, Ollama, llama.cpp's server, …"""

import asyncio
import json
import logging
import os
from typing import Any

from .chat import EndpointFault, FatalFault, Message, PassingFault, Reply, RequestFault, Usage


logger = logging.getLogger(__name__)

LENGTH_PARAMETERS = ("max_tokens", "max_completion_tokens")


class OpenAIModel:
    """A `ChatModel` behind an OpenAI-compatible endpoint, by the `openai` client.

    One call is one HTTP request: the client's own retries are off, because retries, waiting and limits have one place
    (`run_tasks`), where they are counted and written to the ledger.

    Args:
        name: The model's name at the endpoint.
        base_url: Address of the endpoint with its version (`http://localhost:8000/v1`). Default: `OPENAI_BASE_URL`, or
            OpenAI.
        api_key: Key. Default: `OPENAI_API_KEY`; local servers take any.
        timeout: Longest time for one whole reply, in seconds.
        length_parameter: `"max_tokens"`, which every server knows, or `"max_completion_tokens"`, which OpenAI's
            reasoning models demand.
        extra_body: Further fields of the request (`{"top_p": 0.9}`).

    Raises:
        ImportError: the `openai` client is absent.
        ValueError: no key is given for OpenAI, or an argument is not of its form.
    """

    def __init__(
        self,
        name: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        length_parameter: str = "max_tokens",
        extra_body: dict[str, Any] | None = None,
    ):
        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or None
        api_key = api_key or os.environ.get("OPENAI_API_KEY") or None
        if length_parameter not in LENGTH_PARAMETERS:
            raise ValueError(f"length_parameter is {length_parameter!r}; it is one of {', '.join(LENGTH_PARAMETERS)}.")
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise ValueError(f"The endpoint's address is {base_url!r}; it begins with http:// or https://.")
        if api_key is None and base_url is None:
            raise ValueError("No key for OpenAI: set OPENAI_API_KEY, or give another endpoint by --base-url.")
        self.name = name
        self.base_url = base_url
        self.timeout = timeout
        self.length_parameter = length_parameter
        self.extra_body = dict(extra_body or {})
        self._api_key = api_key or "none"
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        _import_openai()

    def _connect(self) -> Any:
        """The client of the running event loop (its connections belong to one loop)."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            openai = _import_openai()
            # How many requests are in flight is decided by the run. The client's own pool keeps 100 connections and
            # would open the others anew for each request.
            limits = type(openai.DEFAULT_CONNECTION_LIMITS)(max_connections=None, max_keepalive_connections=None)
            self._client = openai.AsyncOpenAI(
                base_url=self.base_url,
                api_key=self._api_key,
                max_retries=0,
                timeout=self.timeout,
                http_client=openai.DefaultAsyncHttpxClient(limits=limits),
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
        return {**body, **self.extra_body}

    async def complete(
        self,
        messages: list[Message],
        *,
        max_tokens: int,
        temperature: float | None = None,
        seed: int | None = None,
        request_id: str | None = None,
    ) -> Reply:
        """See `ChatModel.complete`. `temperature=None` leaves the endpoint's own."""
        body = self.body(messages, max_tokens=max_tokens, temperature=temperature, seed=seed)
        headers = {"Idempotency-Key": request_id, "X-Client-Request-Id": request_id} if request_id else {}
        # `post` with text in return, not `chat.completions.create`: the latter walks every message of the few-shot
        # examples and builds a pydantic model per reply, which costs as much again as the request itself.
        request = self._connect().post("/chat/completions", cast_to=str, body=body, options={"headers": headers})
        try:
            text = await asyncio.wait_for(request, self.timeout)
        except asyncio.TimeoutError:
            raise PassingFault("timeout", f"no whole reply within {self.timeout:g} s", maybe_paid=True) from None
        except _import_openai().OpenAIError as error:
            raise translate_error(error) from error
        try:
            return parse_completion(json.loads(text))
        except json.JSONDecodeError as error:
            raise PassingFault("malformed", f"the reply is no JSON: {error}", maybe_paid=True) from None

    async def close(self) -> None:
        """Closes the connections."""
        if self._client is not None and self._loop is asyncio.get_running_loop():
            await self._client.close()
            self._client = None


def _import_openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ImportError("Endpoints need the `openai` client: pip install 'modeling-llava[engine]'") from error
    return openai


def parse_completion(body: Any) -> Reply:
    """A `Reply` from the JSON body of a chat completion.

    Raises:
        PassingFault: the body has no choice with a message (kind `"malformed"`).
    """
    try:
        choice = body["choices"][0]
        message, usage = choice["message"], body.get("usage")
        text, finish = message.get("content"), choice.get("finish_reason") or "stop"
        if text is None:
            # Content filters and OpenAI's `refusal` leave the content empty.
            text = message.get("refusal") or ""
        if not isinstance(text, str):
            raise TypeError(f"content is {type(text).__name__}")
        used = Usage(int(usage["prompt_tokens"]), int(usage.get("completion_tokens") or 0)) if usage else None
        return Reply(text, finish, used, str(body.get("model") or ""))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise PassingFault("malformed", f"the reply is no chat completion ({what})", maybe_paid=True) from None


def translate_error(error: Exception) -> EndpointFault:
    """The fault that an exception of the `openai` client stands for."""
    openai = _import_openai()
    if isinstance(error, openai.APITimeoutError):
        connecting = type(error.__cause__).__name__ in {"ConnectTimeout", "PoolTimeout"}
        return PassingFault("timeout", "timed out", maybe_paid=not connecting)
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__
        message = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
        if type(cause).__name__ in {"UnsupportedProtocol", "InvalidURL", "LocalProtocolError"}:
            return FatalFault("address", message)
        return PassingFault("connection", message, maybe_paid=type(cause).__name__ != "ConnectError")
    if isinstance(error, openai.APIStatusError):
        return translate_status(error.status_code, _message(error), error.response.headers, getattr(error, "code", ""))
    return PassingFault("malformed", str(error), maybe_paid=True)


def translate_status(status: int, message: str, headers: Any = None, code: str | None = "") -> EndpointFault:
    """The fault that an HTTP status stands for."""
    kind = str(status)
    if status == 429 and code in {"insufficient_quota", "billing_hard_limit_reached"}:
        return FatalFault("quota", message)
    if status in {408, 409, 425, 429} or status >= 500:
        return PassingFault(kind, message, retry_after=parse_retry_after(headers or {}))
    if status in {401, 402, 403, 404, 405}:
        return FatalFault(kind, message)
    return RequestFault(kind, message)


def _message(error: Any) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    return " ".join(str(body.get("message") or error.message or error).split())[:500]


def parse_retry_after(headers: Any) -> float | None:
    """Seconds of a `Retry-After` (seconds or a date) or `retry-after-ms` header; `None` without one."""
    from email.utils import parsedate_to_datetime
    from time import time

    try:
        if headers.get("retry-after-ms"):
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after")
        if not value:
            return None
        try:
            return max(0.0, float(value))
        except ValueError:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except (TypeError, ValueError):
        logger.info("Retry-After is not understood: %r", headers.get("retry-after"))
        return None
