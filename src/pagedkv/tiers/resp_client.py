"""A client of a RESP server (Valkey, Redis) for large values: every wait has an end, and values arrive in place.

The package `valkey` opens the connections: addresses, TLS, names and passwords. Requests and replies go over them from
here, as a time limit there holds for each piece that arrives and not for all of them, and as every value is copied
there: 0.65 GB/s instead of 1.3 over the loopback (blocks of 360 KiB and 2 MiB), for three times the processor's time.
"""

from __future__ import annotations

import importlib
import logging
import select
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pagedkv.errors import MissingExtra, bad_argument

logger = logging.getLogger("pagedkv")

Reply = int | bytes | list[Any] | None

LEAST_PAUSE, LONGEST_PAUSE = 0.1, 30.0
"""Seconds that a server is left alone after a failure, doubled with each one that follows."""

_BUFFER = 1 << 16
_LONGEST_LINE = 1 << 12


class ServerRefusal(Exception):
    """What a server answered instead: an error of its own."""


class Unavailable(ConnectionError):
    """The server is left alone for a while."""


def command(*words: bytes) -> bytes:
    """Return a request as the protocol writes it."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


class Wire:
    """One connection; of one thread at a time. After any OSError it is of no use.

    Parameters
    ----------
    connection : valkey.connection.AbstractConnection
        Connected.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._socket = connection._sock  # its public calls copy each value, and wait anew for each piece
        self._buffer = bytearray(_BUFFER)
        self._start = self._stop = 0
        self.has_answered = False

    def close(self) -> None:
        """Let go of it."""
        self._connection.disconnect()

    def is_idle(self) -> bool:
        """Tell whether it is still open, with nothing to be read."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def send(self, parts: Iterable[bytes | memoryview], until: float) -> None:
        """Send all parts, small ones together."""
        small = bytearray()
        for part in parts:
            if len(part) < _BUFFER:
                small += part
            if len(small) >= _BUFFER or len(part) >= _BUFFER:
                self._send(small, until)
                small = bytearray()
            if len(part) >= _BUFFER:
                self._send(part, until)
        self._send(small, until)

    def _send(self, data: bytes | bytearray | memoryview, until: float) -> None:
        if data:
            self._limit(until)
            self._socket.sendall(data)

    def reply(self, until: float) -> Reply | ServerRefusal:
        """Read one reply; an error of the server is returned, not raised."""
        line = self._line(until)
        kind, rest = line[:1], line[1:]
        if kind == b"$":
            size = _number(rest)
            return None if size < 0 else self._value(size, until)
        return self._short(kind, rest, until)

    def value_into(self, parts: Sequence[memoryview], until: float) -> int | None | ServerRefusal:
        """Read a value into parts, one behind the other; one of another length is skipped.

        Returns
        -------
        int, None or ServerRefusal
            Its length; None where there is none.
        """
        line = self._line(until)
        if line[:1] != b"$":
            reply = self._short(line[:1], line[1:], until)
            return reply if isinstance(reply, ServerRefusal) else None
        size = _number(line[1:])
        if size < 0:
            return None
        if size == sum(map(len, parts)):
            for part in parts:
                self._fill(part, until)
        else:
            self._skip(size, until)
        self._skip(2, until)
        return size

    def _short(self, kind: bytes, rest: bytes, until: float) -> Reply | ServerRefusal:
        if kind == b"+":
            return rest
        if kind == b"-":
            return ServerRefusal(rest.decode(errors="replace"))
        if kind == b":":
            return _number(rest)
        if kind == b"_":
            return None
        if kind == b"*":
            return [self.reply(until) for _ in range(_number(rest))]
        raise ConnectionError(f"no reply of RESP begins with {kind!r}")

    def _value(self, size: int, until: float) -> bytes:
        if size > _BUFFER:
            raise ConnectionError(f"a reply of {size} bytes where a short one was expected")
        value = bytearray(size)
        self._fill(memoryview(value), until)
        self._skip(2, until)
        return bytes(value)

    def _line(self, until: float) -> bytes:
        while True:
            end = self._buffer.find(b"\r\n", self._start, self._stop)
            if end >= 0:
                line = bytes(self._buffer[self._start : end])
                self._start, self.has_answered = end + 2, True
                return line
            if self._stop - self._start > _LONGEST_LINE:
                raise ConnectionError("a reply without an end of line")
            self._receive(until)

    def _fill(self, part: memoryview, until: float) -> None:
        have = min(self._stop - self._start, len(part))
        part[:have] = self._buffer[self._start : self._start + have]
        self._start += have
        while len(part) - have >= _BUFFER // 4:
            self._limit(until)
            have += _some(self._socket.recv_into(part[have:]))
        while have < len(part):
            self._receive(until)
            more = min(self._stop - self._start, len(part) - have)
            part[have : have + more] = self._buffer[self._start : self._start + more]
            self._start += more
            have += more

    def _skip(self, count: int, until: float) -> None:
        while count:
            if self._start == self._stop:
                self._receive(until)
            some = min(count, self._stop - self._start)
            self._start += some
            count -= some

    def _receive(self, until: float) -> None:
        """Read what comes into the buffer, behind what is there."""
        left = self._stop - self._start
        if self._start and left:
            self._buffer[:left] = self._buffer[self._start : self._stop]
        self._start, self._stop = 0, left
        self._limit(until)
        self._stop += _some(self._socket.recv_into(memoryview(self._buffer)[left:]))

    def _limit(self, until: float) -> None:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer in time")
        self._socket.settimeout(left)


def _number(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConnectionError(f"no number of RESP: {text[:40]!r}") from None


def _some(received: int) -> int:
    if not received:
        raise ConnectionError("the server closed the connection")
    return received


class Connections:
    """Connections to one server, which is left alone for a while when it fails. Any thread may use them.

    Parameters
    ----------
    url : str
    timeout : float
        Seconds to connect.

    Raises
    ------
    InvalidOperation
        If it is no such address.
    MissingExtra
        If the package `valkey` is not there.
    """

    def __init__(self, url: str, timeout: float) -> None:
        try:
            valkey: Any = importlib.import_module("valkey")
        except ModuleNotFoundError as error:
            raise MissingExtra("valkey", "resp") from error
        try:
            self._pool = valkey.ConnectionPool.from_url(url, socket_timeout=timeout, socket_connect_timeout=timeout)
        except ValueError:  # its message may have a password in it
            wanted = "an address such as valkey://host:6379/0, rediss://… or unix:///path"
            raise bad_argument("url", wanted, "one that valkey does not understand") from None
        self._error: type[Exception] = valkey.ValkeyError
        self._idle: list[Wire] = []
        self._failures, self._back_at = 0, 0.0
        self._is_closed = False
        self._lock = threading.Lock()
        # Names are looked up without a limit of time, so that is done where nobody has to wait for it.
        self._connector = ThreadPoolExecutor(1, thread_name_prefix="pagedkv-resp")

    @property
    def place(self) -> str:
        """The address, without names and passwords."""
        known = self._pool.connection_kwargs
        return str(known.get("path") or f"{known.get('host', 'localhost')}:{known.get('port', 6379)}")

    @property
    def are_paused(self) -> bool:
        """Whether the server is left alone for a while."""
        with self._lock:
            return not self._idle and time.monotonic() < self._back_at

    def take(self, until: float) -> Wire:
        """Return a connection, for this caller alone.

        Raises
        ------
        OSError
            If there is none in time; Unavailable without any wait while the server is left alone.
        """
        while True:
            with self._lock:
                if not self._idle:
                    if time.monotonic() < self._back_at:
                        raise Unavailable(f"{self.place} is left alone for a while")
                    if self._failures:
                        self._back_at = until  # one tries, and the others need not wait for it
                    break
                wire = self._idle.pop()
            if wire.is_idle():
                wire.has_answered = False
                return wire
            wire.close()
        made = self._connector.submit(self._connect)
        try:
            return made.result(max(0.0, until - time.monotonic()))
        except TimeoutError:
            made.add_done_callback(self._keep_late)
            raise TimeoutError("no connection in time") from None

    def _connect(self) -> Wire:
        connection = self._pool.connection_class(**self._pool.connection_kwargs)
        try:
            connection.connect()
        except (self._error, ValueError) as error:
            raise ConnectionError(str(error)) from error
        return Wire(connection)

    def _keep_late(self, made: Future[Wire]) -> None:
        if not made.cancelled() and made.exception() is None:
            self._keep(made.result())

    def _keep(self, wire: Wire) -> None:
        with self._lock:
            if not self._is_closed:
                self._idle.append(wire)
                return
        wire.close()

    def give_back(self, wire: Wire) -> None:
        """Take one back that has answered all that it was asked."""
        with self._lock:
            was_down, self._failures, self._back_at = self._failures > 0, 0, 0.0
        if was_down:
            logger.info("the server %s answers again", self.place)
        self._keep(wire)

    def failed(self, wire: Wire | None, error: OSError) -> None:
        """Let go of one that failed; a server that did not answer at all is left alone for a while."""
        if wire is not None:
            wire.close()
        if isinstance(error, Unavailable) or (isinstance(error, TimeoutError) and wire and wire.has_answered):
            return  # asked already, or slow: not gone
        with self._lock:
            self._failures += 1
            pause = min(LONGEST_PAUSE, LEAST_PAUSE * 2 ** min(self._failures - 1, 20))
            self._back_at = time.monotonic() + pause
            is_first, idle, self._idle = self._failures == 1, self._idle, []
        for each in idle:
            each.close()
        if is_first:
            logger.warning("the server %s fails, what it has is computed instead: %s", self.place, error)

    def close(self) -> None:
        """Let go of all."""
        with self._lock:
            self._is_closed, idle, self._idle = True, self._idle, []
        for wire in idle:
            wire.close()
        self._connector.shutdown(wait=False, cancel_futures=True)
