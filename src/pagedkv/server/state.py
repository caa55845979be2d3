"""Server state that the routes share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Annotated, Any, Protocol

from fastapi import Depends, Request

from pagedkv.engine import RequestOutput
from pagedkv.server.admission import Admission, Turns
from pagedkv.server.config import ServerConfig
from pagedkv.server.engines import ServedEngine
from pagedkv.server.errors import ApiError
from pagedkv.server.fair_store import FairStore
from pagedkv.server.model import ServedModel, TokenText
from pagedkv.server.pins import Pins


class RequestIds:
    """Hands out the ids of answers as ids for the engine, each to one request at a time.

    An id is the client's to choose (the header x-request-id), so it may come twice. What is appended here cannot be
    part of such an id: ``~2`` where it is in use already, ``/0``, ``/1`` … where a request has several prompts.
    """

    def __init__(self) -> None:
        self._used: set[str] = set()

    @contextmanager
    def taken(self, request_id: str, prompts: int) -> Iterator[list[str]]:
        """Hold an id for each prompt of a request for as long as the body runs."""
        candidates = (request_id if turn == 1 else f"{request_id}~{turn}" for turn in count(1))
        chosen = next(candidate for candidate in candidates if candidate not in self._used)
        self._used.add(chosen)
        try:
            yield [chosen] if prompts == 1 else [f"{chosen}/{place}" for place in range(prompts)]
        finally:
            self._used.discard(chosen)


class Observer(Protocol):
    """Watches the requests of a server; its methods are called in the event loop and must be quick."""

    def updated(self, output: RequestOutput) -> None:
        """Take an output of the engine: cumulative, and only the newest one where several came at once."""

    def ended(self, output: RequestOutput | None, reason: str) -> None:
        """Take the end of a request of the engine.

        Parameters
        ----------
        output : RequestOutput, optional
            The last one; None if there was none.
        reason : {"finished", "aborted", "timeout", "error"}
        """


@dataclass(eq=False, kw_only=True)
class ServerState:
    """What the routes of one server share; routes take it as a parameter of type ``Server``.

    Attributes
    ----------
    engine : ServedEngine
    config : ServerConfig
    model : ServedModel
        Tokenizer, limits and name of the model.
    admission : Admission
        Counts the sequences that are under way.
    large_bodies : Turns
        Those that are parsed, one at a time.
    request_ids : RequestIds
        Those in use in the engine.
    observers : list of Observer
    responses : FairStore
        Those that later requests may go on from, by whose they are.
    pins : Pins
        Beginnings of prompts that clients keep in the pool.
    tokens : TokenText
        Shows single tokens.
    draining : bool
        Whether SIGTERM came: what streams without an end must end now.
    started : float
        Seconds of ``time.time``.
    """

    engine: ServedEngine
    config: ServerConfig
    model: ServedModel
    admission: Admission
    large_bodies: Turns = field(default_factory=lambda: Turns(1, 1))
    request_ids: RequestIds = field(default_factory=RequestIds)
    observers: list[Observer] = field(default_factory=list)
    draining: bool = False
    tokens: TokenText = field(init=False)
    responses: FairStore[Any] = field(init=False)
    pins: Pins = field(init=False)
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.tokens = TokenText(self.model.tokenizer)
        self.responses = FairStore(self.config.max_responses)
        self.pins = Pins(self.engine)

    def check_prompts(self, count: int) -> None:
        """See that a request may have so many prompts; ApiError if not."""
        most = self.config.max_prompts
        if count > most:
            message = f"prompt: expected at most {most} prompts in one request, got {count}"
            raise ApiError(400, message, param="prompt", code="too_many_prompts")


async def _state_of(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


Server = Annotated[ServerState, Depends(_state_of)]
