"""Clients of every kind, at random: those who ask, who leave, who send nonsense or too much, who do not read."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

WORDS = ["import os\n", "def main():\n    ", "class A(B):\n", "x = [1, 2, 3]\n", "for i in range(10):\n    ", "β → ü\n"]
PATHS = ("/v1/completions", "/v1/chat/completions")


class Soak:
    """Sends `count` requests from `clients` clients at a time and counts the answers by kind and status."""

    def __init__(self, url: str, *, seed: int, keys: tuple[str, ...] = ()) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        self._random = random.Random(seed)
        self._keys = keys
        self.seen: Counter[str] = Counter()

    async def run(self, count: int, clients: int = 16) -> None:
        numbers = iter(range(count))

        async def client() -> None:
            for _ in numbers:
                await asyncio.wait_for(self._one(), 120)

        await asyncio.gather(*(client() for _ in range(clients)))

    async def _one(self) -> None:
        kinds = {self._ask: 6, self._leave: 3, self._nonsense: 2, self._too_much: 1, self._read_slowly: 1}
        kind = self._random.choices(list(kinds), list(kinds.values()))[0]
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            status = await kind(reader, writer)
        except ConnectionError:
            status = "cut"
        finally:
            writer.transport.abort()
        self.seen[f"{kind.__name__.strip('_')} {status}"] += 1

    def _body(self, **more: Any) -> dict[str, Any]:
        draw = self._random
        text = "".join(draw.choices(WORDS, k=draw.randint(1, 40)))
        asked = {"messages": [{"role": "user", "content": text}], "prompt": text, "n": draw.choice([1, 1, 1, 2])}
        asked |= {"max_tokens": draw.randint(1, 12), "stream": draw.random() < 0.5, "temperature": draw.choice([0, 1])}
        if draw.random() < 0.2:
            asked |= {"logprobs": None, "priority": draw.randint(0, 3), "stop": ["\n\n"], "seed": 3}
        return asked | more

    async def _send(self, writer: asyncio.StreamWriter, body: bytes, path: str | None = None) -> None:
        key = f"Authorization: Bearer {self._random.choice(self._keys)}\r\n" if self._keys else ""
        head = (
            f"POST {path or self._random.choice(PATHS)} HTTP/1.1\r\nHost: localhost\r\n{key}Connection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        body = self._body()
        await self._send(writer, json.dumps(body).encode())
        answer = await reader.read()
        status = _status(answer)
        if status == "200":
            assert b"[DONE]" in answer if body["stream"] else b'"usage"' in answer, answer[-500:]
        return status

    async def _leave(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        streams = self._random.random() < 0.5
        body = self._body(max_tokens=800, ignore_eos=True, stream=streams)
        await self._send(writer, json.dumps(body).encode())
        if streams:
            await reader.readuntil(b"\r\n")
        else:
            await asyncio.sleep(self._random.random() * 0.1)
        return "left"

    async def _nonsense(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        body = json.dumps(self._body()).encode()
        broken = [
            body[: self._random.randint(0, len(body) - 1)],
            body.replace(b'"max_tokens": ', b'"max_tokens": -'),
            body.replace(b'"n": ', b'"n": NaN, "x": '),
            b"[" * self._random.randint(1, 20_000),
            self._random.randbytes(200),
        ]
        await self._send(writer, self._random.choice(broken))
        return _status(await reader.read())

    async def _too_much(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        size = self._random.choice([30_000, 100_000, 2_000_000])
        await self._send(
            writer, json.dumps(self._body(prompt="word " * (size // 5)) | {"messages": 1}).encode(), PATHS[0]
        )
        return _status(await reader.read())

    async def _read_slowly(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        await self._send(writer, json.dumps(self._body(stream=True, max_tokens=60, logprobs=None)).encode())
        answer = b""
        while piece := await reader.read(64):
            answer += piece
            await asyncio.sleep(0.001)
        return _status(answer)


def _status(answer: bytes) -> str:
    return answer[9:12].decode() or "nothing"
