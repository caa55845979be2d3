"""Replicas in this process, which can be lost, for the engine of a fleet's door."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from typing import Any

from pagedkv.errors import ReplicaLost
from pagedkv.replicas.messages import Asked, Told
from pagedkv.replicas.replica import Replica


class LocalLink:
    """One after the other gets a request, unless it is lost or to be avoided."""

    def __init__(self, **engines: Any) -> None:
        self.replicas = {name: Replica(name, engine, "inproc://none") for name, engine in engines.items()}
        self.lost: set[str] = set()
        self.asked: list[tuple[str, Asked]] = []
        self.left: list[str] = []  # of whom a stream was closed before its end
        self.loses_after: dict[str, int] = {}  # how often a replica that will be lost tells of a request, at most
        self.closed = 0

    @property
    def ready(self) -> tuple[str, ...]:
        return tuple(name for name in self.replicas if name not in self.lost)

    @property
    def wanted(self) -> int:
        return len(self.replicas)

    @property
    def most(self) -> int:
        return len(self.replicas)

    async def generate(self, asked: Asked, avoid: Collection[str]) -> AsyncGenerator[tuple[str, Told], None]:
        names = [name for name in self.ready if name not in avoid]
        if not names:
            raise ReplicaLost("", "none is ready")
        name = names[len(self.asked) % len(names)]
        self.asked.append((name, asked))
        is_over = False
        try:
            async with aclosing(self.replicas[name].generate(asked)) as news:
                number = 0
                async for told in news:
                    if name in self.loses_after and (number == self.loses_after[name] or told.finished):
                        self.lost.add(name)
                        is_over = True
                        raise ReplicaLost(name, "it was killed")
                    number += 1
                    is_over = told.finished or told.error is not None
                    yield name, told
        finally:
            if not is_over:
                self.left.append(name)

    async def everywhere(self, call: str, *arguments: object) -> dict[str, object]:
        answers: dict[str, object] = {}
        for name in self.ready:
            answer = getattr(self.replicas[name], call)(*arguments)
            answers[name] = await answer if asyncio.iscoroutine(answer) else answer
        return answers

    async def close(self) -> None:
        self.closed += 1
