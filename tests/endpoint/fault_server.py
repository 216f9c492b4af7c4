"""A local OpenAI-compatible server that injects faults, counts what it was asked and bills each request key once.

`with FaultServer(latency=0.01, faults={"500": 0.1}) as server: … server.url … server.paid`
"""

import asyncio
import hashlib
import json
import random
import threading
from collections import Counter


NOUNS = (
    "barn bell boat bowl brush candle cart chair clock cloud coat cup desk drum fence flag flute fork garden gate glove hat "
    "hill horse kettle kite ladder lamp leaf mirror nest oven pail path pencil plate pond purse rope saddle shell shovel "
    "sled spoon stove table tent tower train tree trunk vase wagon wall well wheel window"
).split()


def answer(messages):
    """A valid reply in the form that the messages ask for; different, in every question, for different contexts."""
    # A retry tells what was wrong with the last reply; what it is about stands before.
    query = [m["content"] for m in messages if m["role"] == "user" and "last reply" not in m["content"]][-1]
    digest = hashlib.sha256(query.encode()).digest()
    words = [NOUNS[byte % len(NOUNS)] for byte in digest] + [
        f"{NOUNS[a % len(NOUNS)]}{a}{b}" for a, b in zip(digest, digest[1:])
    ]
    scene = query.split("\n", 1)[0].rstrip(".").lower()
    system = messages[0]["content"].lower()
    if "conversation" in system:
        return (
            f"Question:\nIs a {words[40]} {words[41]} {words[42]} near?\n===\nAnswer:\nNo, one sees {scene} and nothing "
            f"more.\n===\nQuestion:\nHow far are {words[43]} and {words[44]} {words[45]}?\n===\nAnswer:\nNot far; next to it "
            f"one sees {scene}."
        )
    if "question" in system:
        return (
            f"Question:\nWhy would {words[46]} {words[47]} need {words[48]} {words[49]} {words[50]}?\n===\nAnswer:\nBecause of "
            f"{scene}, one would tidy up first: it is late in the day, the light fades, the {words[0]} is wet and rain is near."
        )
    return (
        f"One sees {scene}. The light is soft and the air looks calm. A {words[0]} and a {words[1]} stand at the side, and a "
        f"{words[2]} leads on to the {words[3]} at the back."
    )


class FaultServer:
    """The server, in a thread of its own.

    Args:
        latency: Seconds from a whole request to its reply.
        faults: Probability per request of "429", "500", "cut" (inside the reply), "drop" (before anything is done),
            "malformed" (no JSON), "shape" (JSON without choices), "hang" (no answer for a minute); `seed` draws them.
        honours_keys: Whether the same `Idempotency-Key` is billed once and answered with the first reply.
        reply: `messages -> text`, or `messages -> (status, body)`.
        retry_after: What a 429 says.
    """

    def __init__(self, *, latency=0.0, faults=None, honours_keys=True, reply=answer, seed=0, retry_after="0.05"):
        self.latency, self.faults, self.honours_keys = latency, dict(faults or {}), honours_keys
        self.reply, self.retry_after = reply, retry_after
        self.random = random.Random(seed)
        self.paid = Counter()  # request key → times billed
        self.asked = Counter()  # request key → times received whole
        self.injected = Counter()
        self.bodies, self.headers = [], []  # the last hundred
        self.answered = {}
        self.connections = set()
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._server = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.open()
        return self

    def __exit__(self, *exc):
        self.die()
        asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def open(self):
        """Starts listening; after `die`, on the same port again."""
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    def die(self):
        """Stops listening and cuts every connection, as a crashed server does."""
        asyncio.run_coroutine_threadsafe(self._die(), self._loop).result()

    async def _open(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _die(self):
        self._server.close()
        for writer in list(self.connections):
            writer.transport.abort()
        self.connections.clear()

    async def _cancel(self):
        """Ends what is under way: left pending, it would be reported in the log of some later test."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _serve(self, reader, writer):
        self.connections.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.decode("latin-1").split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if not await self._respond(lines[0].split()[1], headers, body, writer):
                    writer.transport.abort()
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.connections.discard(writer)
            writer.close()

    async def _respond(self, path, headers, raw, writer):
        if not path.endswith("/chat/completions"):
            await self._send(writer, 404, b'{"error": {"message": "no such path"}}')
            return True
        body = json.loads(raw)
        key = headers.get("idempotency-key") or hashlib.sha256(raw).hexdigest()
        self.asked[key] += 1
        self.bodies = [*self.bodies[-99:], body]
        self.headers = [*self.headers[-99:], headers]
        fault = self._draw()
        if fault:
            self.injected[fault] += 1
        if fault == "429":
            await self._send(
                writer, 429, b'{"error": {"message": "slow down"}}', f"Retry-After: {self.retry_after}\r\n"
            )
            return True
        if fault == "500":
            await self._send(writer, 500, b'{"error": {"message": "oops"}}')
            return True
        if fault == "drop":
            return False
        await asyncio.sleep(60 if fault == "hang" else self.latency)
        if not (self.honours_keys and key in self.answered):
            self.paid[key] += 1
            text = self.reply(body["messages"])
            status, reply = text if isinstance(text, tuple) else (200, self._completion(body, text))
            self.answered[key] = (status, json.dumps(reply).encode())
        status, payload = self.answered[key]
        if fault == "cut":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + payload[:40])
            await writer.drain()
            return False
        if fault == "malformed":
            payload = payload[: len(payload) // 2]
        if fault == "shape":
            payload = b'{"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": []}'
        await self._send(writer, status, payload)
        return True

    def _draw(self):
        draw = self.random.random()
        for fault, probability in self.faults.items():
            if draw < probability:
                return fault
            draw -= probability
        return None

    @staticmethod
    def _completion(body, text):
        prompt = sum(len(message["content"]) for message in body["messages"]) // 4
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": prompt, "completion_tokens": max(1, len(text) // 4)}
        return {"model": body["model"] + "-2026", "choices": [choice], "usage": usage}

    async def _send(self, writer, status, payload, extra=""):
        head = (
            f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n{extra}\r\n"
        )
        writer.write(head.encode() + payload)
        await writer.drain()
