"""KV events over ZMQ, as vLLM publishes them, and in a file that ``pagedkv replay`` reads."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any, cast

from pagedkv.engine import AsyncEngine
from pagedkv.engine.kv_events import END_OF_REPLAY, SNAPSHOT, KvEventLog, append_event_batch, batch_bytes
from pagedkv.errors import InvalidOperation, MissingExtra, bad_argument
from pagedkv.server.background import in_background
from pagedkv.server.config import ServerConfig
from pagedkv.server.engines import ReplicatedEngine
from pagedkv.server.state import ServerState

logger = logging.getLogger("pagedkv")

SECONDS_BETWEEN_BATCHES = 0.05
MAX_KEPT_BATCHES = 10_000
MAX_KEPT_BYTES = 64 * 2**20
HIGH_WATER_MARK = 100_000


def replay_endpoint_of(endpoint: str) -> str:
    """Return where batches are replayed: the next port, or the same address with ``-replay`` behind it."""
    match = re.fullmatch(r"(tcp://.+:)(\d+)", endpoint)
    if match is None:
        return endpoint if endpoint.endswith(":*") else f"{endpoint}-replay"
    port = int(match[2]) + 1 if int(match[2]) else 0
    return f"{match[1]}{port}"


def stays_here(endpoint: str) -> bool:
    """Whether only this machine reaches an endpoint of ZMQ: what is no TCP, and the loopback."""
    if not endpoint.startswith("tcp://"):
        return endpoint.startswith(("ipc://", "inproc://"))
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "lo")


def without_token_ids(batch: list[Any]) -> list[Any]:
    """Return a batch of events that tells which blocks there are, by their hashes, and not what is in them."""
    events = [{**event, "token_ids": []} if "token_ids" in event else event for event in batch[1]]
    return [batch[0], events, *batch[2:]]


class EventPublisher:
    """Publishes batches and replays the last ones; use it as an asynchronous context manager.

    A message is (topic, sequence number of 8 bytes big-endian, msgpack batch). A client that missed some sends (empty,
    number from which on it wants them) to the replay endpoint and gets (empty, number, batch) for each and (empty, −1,
    empty) at the end. One that missed more sends (empty, −2) and gets (empty, number of the last batch, snapshot), then
    the end: a batch that names every block, as of that number or later.

    Parameters
    ----------
    endpoint : str
        Where a PUB socket is bound: ``tcp://127.0.0.1:5557``, ``ipc:///run/kv-events``.
    replay_endpoint : str, optional
        Where a ROUTER socket is bound; see `replay_endpoint_of`.
    topic : str

    Attributes
    ----------
    address, replay_address : str
        What was bound in the end; tells the port where it was left open.
    snapshot : callable or None
        Returns the snapshot, a batch; without it nobody gets one.

    Raises
    ------
    MissingExtra
        Without pyzmq.
    InvalidOperation
        An endpoint cannot be bound.
    """

    def __init__(self, endpoint: str, replay_endpoint: str | None = None, topic: str = "") -> None:
        try:
            import zmq.asyncio
        except ModuleNotFoundError as error:
            raise MissingExtra("pyzmq", "events") from error
        self._zmq = zmq
        self._endpoints = (endpoint, replay_endpoint or replay_endpoint_of(endpoint))
        self._topic = topic.encode()
        self._kept: deque[tuple[int, bytes]] = deque()
        self._kept_bytes = self._next = 0
        self.snapshot: Callable[[], list[Any]] | None = None
        self.address = self.replay_address = ""

    async def __aenter__(self) -> EventPublisher:
        """Bind the sockets."""
        zmq = self._zmq
        self._context: Any = zmq.asyncio.Context()
        self._publisher, self._router = self._context.socket(zmq.PUB), self._context.socket(zmq.ROUTER)
        self._publisher.set_hwm(HIGH_WATER_MARK)
        try:
            for socket, endpoint in zip((self._publisher, self._router), self._endpoints, strict=True):
                socket.setsockopt(zmq.LINGER, 0)
                self._bind(socket, endpoint)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self.address = self._publisher.getsockopt_string(zmq.LAST_ENDPOINT)
        self.replay_address = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._task = asyncio.create_task(self._answer())
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Close the sockets; what was sent is still delivered for a moment."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._context.destroy(linger=200)

    async def publish(self, payload: bytes) -> None:
        """Send a batch to all subscribers, without waiting for any."""
        number = self._next
        self._next += 1
        self._kept.append((number, payload))
        self._kept_bytes += len(payload)
        while len(self._kept) > MAX_KEPT_BATCHES or self._kept_bytes > MAX_KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popleft()[1])
        await self._publisher.send_multipart((self._topic, number.to_bytes(8, "big"), payload))

    def _bind(self, socket: Any, endpoint: str) -> None:
        try:
            socket.bind(endpoint)
        except self._zmq.ZMQError as error:
            raise bad_argument("events_endpoint", "an address that is free", f"{endpoint}: {error}") from None

    async def _answer(self) -> None:
        while True:
            frames = await self._router.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                logger.warning("a replay request of %d frames was ignored", len(frames))
                continue
            client = frames[0]
            for number, payload in self._asked_for(frames[2]):
                await self._router.send_multipart((client, b"", number.to_bytes(8, "big", signed=True), payload))
            await self._router.send_multipart((client, b"", END_OF_REPLAY, b""))

    def _asked_for(self, what: bytes) -> list[tuple[int, bytes]]:
        if what == SNAPSHOT:
            return [] if self.snapshot is None else [(self._next - 1, batch_bytes(self.snapshot()))]
        start = int.from_bytes(what, "big")
        return [(number, payload) for number, payload in self._kept if number >= start]


class EventRecorder:
    """Appends batches to a file; a disk that is full ends the recording, never the server.

    Parameters
    ----------
    path : Path
        A file of former batches is continued.

    Raises
    ------
    OSError
        The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "ab")  # noqa: SIM115

    def record(self, payload: bytes) -> None:
        """Append a batch and hand it to the system."""
        if self._file.closed:
            return
        try:
            append_event_batch(self._file, payload)
            self._file.flush()
        except (OSError, ValueError) as error:
            logger.error("recording KV events to %s ends: %s", self._path, error)
            self.close()

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            self._file.close()


def require_events(config: ServerConfig) -> None:
    """See that KV events can be recorded and published as a config says, before a model is loaded.

    Raises
    ------
    InvalidOperation
        The file cannot be written, or an endpoint cannot be bound.
    MissingExtra
        Without pyzmq.
    """
    if config.record_events is not None:
        try:
            open(config.record_events, "ab").close()
        except OSError as error:
            reason = f"record_events: cannot write {config.record_events}: {error.strerror}"
            raise InvalidOperation(reason, "record_events") from None
    if config.events_endpoint is not None:

        async def bind() -> None:
            async with EventPublisher(str(config.events_endpoint)):
                pass

        asyncio.run(bind())


@asynccontextmanager
async def kv_events(state: ServerState) -> AsyncIterator[None]:
    """Publish and record the events of the engine's cache and tiers, where the operator wants them."""
    config = state.config
    if config.events_endpoint is None and config.record_events is None:
        yield
        return
    if isinstance(state.engine, ReplicatedEngine):
        raise bad_argument("events_endpoint", "one engine", "several, each of which publishes its own")
    async with publishing(cast(AsyncEngine, state.engine), config):
        yield


@asynccontextmanager
async def publishing(engine: AsyncEngine, config: ServerConfig) -> AsyncIterator[EventPublisher | None]:
    """Publish and record the events of an engine's cache and tiers as a config says; gives the publisher, if any."""
    async with AsyncExitStack() as stack:
        takers: list[Callable[[list[Any]], Any]] = []
        publisher: EventPublisher | None = None
        if config.record_events is not None:
            recorder = EventRecorder(config.record_events)
            stack.callback(recorder.close)
            takers.append(lambda batch: recorder.record(batch_bytes(batch)))
        if config.events_endpoint is not None:
            published = publisher = await stack.enter_async_context(EventPublisher(config.events_endpoint))
            logger.info("KV events at %s, replayed at %s", publisher.address, publisher.replay_address)
            tells_all = config.events_token_ids or stays_here(config.events_endpoint)
            if not tells_all:
                logger.warning("KV events leave this machine without token ids; --events-token-ids sends them, too")
            told = (lambda batch: batch) if tells_all else without_token_ids
            takers.append(lambda batch: published.publish(batch_bytes(told(batch))))
        log = KvEventLog(engine, engine.tiers)
        stack.callback(log.close)
        if publisher is not None:
            publisher.snapshot = log.snapshot
        try:
            async with in_background(_pass_on(log, takers)):
                yield publisher
        finally:
            await _hand_out(log, takers)


async def _pass_on(log: KvEventLog, takers: list[Callable[[list[Any]], Any]]) -> None:
    while True:
        await _hand_out(log, takers)
        await asyncio.sleep(SECONDS_BETWEEN_BATCHES)


async def _hand_out(log: KvEventLog, takers: list[Callable[[list[Any]], Any]]) -> None:
    batch = log.take()
    if batch is None:
        return
    for take in takers:
        if asyncio.iscoroutine(sent := take(batch)):
            await sent
