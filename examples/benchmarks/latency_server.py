"""
An OpenAI-compatible server that answers every request after a fixed time, at little cost of its own.

    python examples/benchmarks/latency_server.py --latency 0.2

prints its URL and serves until its stdin closes. The reply is made while the time passes and written when it is over,
counted from the request's last byte: the server's own work is a part of the latency, not added to it.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "endpoint"))

from fault_server import answer  # noqa: E402  a valid reply, different for each context


class Answering(asyncio.Protocol):
    """One connection: requests one after the other, as a client that waits for each reply sends them."""

    latency = 0.2

    def connection_made(self, transport):
        self.transport, self.received = transport, b""

    def data_received(self, data):
        self.received += data
        head, found, body = self.received.partition(b"\r\n\r\n")
        if not found:
            return
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        if len(body) < length:
            return
        self.received = b""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.latency
        loop.call_at(until, self.transport.write, self.reply(json.loads(body)))

    @staticmethod
    def reply(request):
        """The whole HTTP response."""
        text = answer(request["messages"])
        usage = {"prompt_tokens": 700, "completion_tokens": 120, "total_tokens": 820}
        message = {"role": "assistant", "content": text}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        reply = {"id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": request["model"]}
        body = json.dumps({**reply, "choices": choices, "usage": usage}).encode()
        return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.2)
    Answering.latency = parser.parse_args().latency
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Answering, "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
