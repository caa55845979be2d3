"""Subscribes to the KV events of replicas over ZMQ and keeps a view of them right, whatever is lost on the way."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from pagedkv.control.events import END_OF_REPLAY, SNAPSHOT
from pagedkv.errors import InvalidOperation, MissingExtra, bad_argument
from pagedkv.fleet.view import FleetView
from pagedkv.validate import require_number

logger = logging.getLogger("pagedkv")

HIGH_WATER_MARK = 100_000
WAKE_SECONDS = 0.05
GRACE_SECONDS = 0.2
"""How long a missing batch may still come by itself before a snapshot is asked for."""


class FleetSubscriber:
    """Hears the events of replicas in a thread of its own and feeds them to a view.

    A replica that is new to it is asked for a snapshot. Then its batches are heard as they come; every `check_seconds`
    it is asked for those after the last one that was heard, so that none is missing for longer, and if one still is, it
    is asked for a snapshot; one that gives none, as vLLM, for all that it has kept. The view forgets a replica that is
    silent for `patience` seconds.

    Parameters
    ----------
    view : FleetView
        Changed by this thread only; others may read it at any time.
    topic : str
        Of the events, as the replicas publish them.
    check_seconds, patience : float
        In seconds, above 0.

    Raises
    ------
    MissingExtra
        Without pyzmq.

    Examples
    --------
    >>> with FleetSubscriber(view) as subscriber:  # doctest: +SKIP
    ...     subscriber.follow("a", "tcp://10.0.0.1:5557", "tcp://10.0.0.1:5558")
    """

    def __init__(self, view: FleetView, *, topic: str = "", check_seconds: float = 1.0, patience: float = 5.0) -> None:
        try:
            import zmq
        except ModuleNotFoundError as error:
            raise MissingExtra("pyzmq", "events") from error
        self._zmq: Any = zmq
        self._view, self._topic = view, topic.encode()
        self._check_seconds = require_number("check_seconds", check_seconds, 0, above=True)
        self._patience = require_number("patience", patience, 0, above=True)
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._links: dict[str, _Link] = {}
        self._owners: dict[Any, str] = {}  # by socket
        self._context: Any = zmq.Context()
        self._poller: Any = zmq.Poller()
        self._thread = threading.Thread(target=self._run, name="pagedkv-fleet-events", daemon=True)
        self._thread.start()

    def __enter__(self) -> FleetSubscriber:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop."""
        self.close()

    @property
    def silent(self) -> tuple[str, ...]:
        """The replicas that do not answer; what they have is unknown."""
        return tuple(name for name, link in self._links.copy().items() if link.is_silent)

    def follow(self, replica: str, endpoint: str, replay_endpoint: str) -> None:
        """Begin to hear a replica; one that was followed before is followed anew.

        Parameters
        ----------
        replica : str
        endpoint, replay_endpoint : str
            Where it publishes events and where it is asked for those of before, as ``tcp://10.0.0.1:5557``.

        Raises
        ------
        InvalidOperation
            If that is no address, or this is closed.
        """
        if not self._thread.is_alive():
            raise InvalidOperation("the subscriber is closed")
        link = _Link(self._zmq, self._context, endpoint, replay_endpoint, self._topic)

        def take_up() -> None:
            self._drop(replica)
            self._links[replica] = link
            self._listen(replica, link.heard)
            self._listen(replica, link.asks)
            link.ask(SNAPSHOT)

        self._calls.put(take_up)

    def unfollow(self, replica: str) -> None:
        """Stop to hear a replica, and forget what it has."""

        def leave() -> None:
            self._drop(replica)
            self._view.forget(replica)

        self._calls.put(leave)

    def close(self) -> None:
        """Stop to hear all; the view stays as it is."""
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._took_calls():
                for socket, _ in self._poller.poll(int(WAKE_SECONDS * 1000)):
                    name = self._owners[socket]
                    self._take(name, self._links[name], socket)
                behind = {*self._view.behind}
                for name, link in self._links.items():
                    self._look_after(name, link, name in behind or name not in self._view.replicas)
        finally:
            for name in list(self._links):
                self._drop(name)
            self._context.destroy(linger=0)

    def _took_calls(self) -> bool:
        with suppress(queue.Empty):
            while True:
                call = self._calls.get_nowait()
                if call is None:
                    return False
                call()
        return True

    def _listen(self, name: str, socket: Any) -> None:
        self._owners[socket] = name
        self._poller.register(socket, self._zmq.POLLIN)

    def _let_go(self, socket: Any) -> None:
        del self._owners[socket]
        self._poller.unregister(socket)
        socket.close(0)

    def _drop(self, name: str) -> None:
        if link := self._links.pop(name, None):
            self._let_go(link.heard)
            self._let_go(link.asks)

    def _ask_anew(self, name: str, link: _Link) -> None:
        """Ask for a snapshot by a new socket, so that no answer to what was asked before is taken for it."""
        self._let_go(link.asks)
        link.asks = link.connected(self._zmq.DEALER, link.replay_endpoint)
        self._listen(name, link.asks)
        link.ask(SNAPSHOT)

    def _take(self, name: str, link: _Link, socket: Any) -> None:
        for number, batch, is_snapshot in link.received(socket):
            try:
                take = self._view.restore if is_snapshot else self._view.hear
                take(name, number, batch)
            except InvalidOperation as error:
                logger.warning("replica %s: %s", name, error)

    def _look_after(self, name: str, link: _Link, is_behind: bool) -> None:
        """Ask for what is missing; forget a replica that does not answer."""
        now = time.monotonic()
        if link.asked_at is not None:
            if now - link.asked_at > self._patience:
                if not link.is_silent:
                    logger.warning("replica %s does not answer at %s", name, link.replay_endpoint)
                    self._view.forget(name)
                link.is_silent = True
                self._ask_anew(name, link)
        elif is_behind and link.gives_snapshots:
            if now - link.answered_at > GRACE_SECONDS:
                link.ask(SNAPSHOT)
        elif now - link.answered_at > self._check_seconds:
            link.ask(self._view.next_number(name).to_bytes(8, "big"))


class _Link:
    """The sockets of one replica: one hears what it publishes, one asks it for what is missing."""

    def __init__(self, zmq: Any, context: Any, endpoint: str, replay_endpoint: str, topic: bytes) -> None:
        self._zmq, self._context = zmq, context
        self.replay_endpoint = replay_endpoint
        self.heard = self.connected(zmq.SUB, endpoint)
        self.heard.setsockopt(zmq.SUBSCRIBE, topic)
        try:
            self.asks = self.connected(zmq.DEALER, replay_endpoint)
        except InvalidOperation:
            self.heard.close(0)
            raise
        self.asked_at: float | None = None  # None while no answer is waited for
        self.answered_at = 0.0
        self.is_silent = False
        self.gives_snapshots = True
        self._wants_snapshot, self._answers = False, 0

    def connected(self, kind: int, endpoint: str) -> Any:
        """Return a socket that is connected to an address; `InvalidOperation` if that is none."""
        socket = self._context.socket(kind)
        socket.set_hwm(HIGH_WATER_MARK)
        socket.setsockopt(self._zmq.LINGER, 0)
        try:
            socket.connect(endpoint)
        except (self._zmq.ZMQError, TypeError) as error:
            socket.close(0)
            raise bad_argument("endpoint", "an address of ZMQ, tcp://10.0.0.1:5557", f"{endpoint!r}: {error}") from None
        return socket

    def ask(self, what: bytes) -> None:
        """Ask for a snapshot or for the batches from a number on."""
        self.asked_at, self._wants_snapshot = time.monotonic(), what == SNAPSHOT
        self._answers = 0
        with suppress(self._zmq.ZMQError):  # nobody is there to take it
            self.asks.send_multipart((b"", what), self._zmq.NOBLOCK)

    def received(self, socket: Any) -> Iterator[tuple[int, bytes, bool]]:
        """Yield the number and content of every batch that has come, and whether it is a snapshot."""
        with suppress(self._zmq.Again):  # no more
            while True:
                frames = socket.recv_multipart(self._zmq.NOBLOCK)
                if len(frames) != 3 or len(frames[1]) != 8:
                    logger.warning("%d frames from %s are no batch of events", len(frames), self.replay_endpoint)
                elif socket is self.asks and frames[1:] == [END_OF_REPLAY, b""]:
                    self.asked_at, self.answered_at, self.is_silent = None, time.monotonic(), False
                    if self._wants_snapshot:
                        self.gives_snapshots = self._answers > 0
                else:
                    self._answers += socket is self.asks
                    is_snapshot = socket is self.asks and self._wants_snapshot
                    yield int.from_bytes(frames[1], "big", signed=True), frames[2], is_snapshot
