"""RespTier: blocks on a server that several processes and machines share, found by what they are of."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import xxhash

from pagedkv.control.prefix import checked_salt
from pagedkv.errors import InvalidOperation, TierError, bad_argument
from pagedkv.tiers.book_tier import TierStats
from pagedkv.tiers.calls import first_block, not_open, whole_blocks
from pagedkv.tiers.resp_client import Connections, ServerRefusal, Wire, command
from pagedkv.tiers.tier import BlockFormat, Rows
from pagedkv.tiers.transfers import Ints
from pagedkv.typing import TokenIds
from pagedkv.validate import require_int, require_number, shown

VERSION = 1
"""Raised when keys or values are made in another way: blocks of two versions do not meet."""

THREADS = 4
_DIGEST_BYTES = 20
_CHECKSUM_BYTES = 8
# What is asked for at once: enough that a round trip does not count, and little enough that a slow server keeps up.
_MOST_KEYS, _MOST_BYTES = 256, 4 * 2**20
_LONGEST_TTL = 10 * 365 * 86_400

_Work = Callable[[Wire, float], Iterator[int]]


class _Chain(NamedTuple):
    """The blocks of a text as a server knows them: each key, and what a value has to begin with."""

    keys: list[bytes]
    headers: list[bytes]


class RespTier:
    """Blocks on a server that speaks RESP (Valkey, Redis), shared by all processes that run the same model.

    A key is a digest (BLAKE2b) of the block's tokens and of all before them, the salt and the fingerprint of the model.
    A value has the digest before it, the token ids and a checksum (xxh3), which are compared whenever it is read. Who
    is given up when memory is short is the server's affair: give it ``maxmemory`` and ``maxmemory-policy allkeys-lru``.

    A server that is gone, slow or full is a miss within `timeout`, and is then left alone for 0.1 s, twice as long
    after each failure, half a minute at most. Many threads may use one tier.

    Parameters
    ----------
    url : str
        ``valkey://[user:password@]host:6379/0``, ``redis://``, with TLS ``valkeys://`` or ``rediss://``, or
        ``unix:///path``. One server, no cluster.
    namespace : str
        Keys begin with it: letters, digits, ``_``, ``.`` and ``-``. Two of them share nothing.
    ttl : int, optional
        Seconds that a block stays after it was stored or last looked up; None: until the server gives it up.
    timeout : float
        The most seconds that a match, a load or a store takes. What has come by then counts.

    Raises
    ------
    InvalidOperation
        If an argument is out of range.
    MissingExtra
        Without the package `valkey`, which the extra ``[resp]`` brings.

    Examples
    --------
    >>> tier = RespTier("valkey://10.0.0.7:6379/0", ttl=86_400)  # doctest: +SKIP
    """

    medium = "REMOTE"

    def __init__(self, url: str, *, namespace: str = "pagedkv", ttl: int | None = None, timeout: float = 2.0) -> None:
        if not isinstance(url, str) or not url:
            raise bad_argument("url", "an address such as valkey://host:6379/0", shown(url))
        if not isinstance(namespace, str) or not re.fullmatch(r"[\w.-]{1,200}", namespace, re.ASCII):
            raise bad_argument("namespace", "letters, digits, _, . and -", shown(namespace))
        self._url, self._namespace = url, namespace
        self._ttl = None if ttl is None else require_int("ttl", ttl, 1, _LONGEST_TTL)
        self._timeout = require_number("timeout", timeout, 0, 3600, above=True)
        self._connections = Connections(url, self._timeout)
        self._block = BlockFormat("none", 1, 1)
        self._prefix = b""
        self._threads: ThreadPoolExecutor | None = None
        self._storing: set[Future[int]] = set()
        self._clears = 0
        self._stats = TierStats()
        self._lock = threading.Lock()

    def open(self, block: BlockFormat) -> RespTier:
        """Get ready to hold such blocks; returns the tier. A server that is not there is a miss until it is.

        Raises
        ------
        InvalidOperation
            If it is open already.
        """
        with self._lock:
            if self._threads is not None:
                raise InvalidOperation("the tier is open already")
            model = _digest(repr((VERSION, block.fingerprint, block.block_size, block.block_bytes)).encode())
            self._block, self._prefix = block, f"{self._namespace}:{model.hex()}:".encode()
            self._connections = Connections(self._url, self._timeout)
            self._stats, self._storing = TierStats(), set()
            self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="pagedkv-tier")
        self._submit(_nothing).result()  # who cannot be reached is in the log from the start
        return self

    @property
    def is_open(self) -> bool:
        """Whether it can be used."""
        return self._threads is not None

    @property
    def is_available(self) -> bool:
        """Whether the server is asked at all: not while it is left alone after a failure."""
        return not self._connections.are_paused

    @property
    def block(self) -> BlockFormat:
        """What it was opened for."""
        return self._block

    @property
    def place(self) -> str:
        """Where the server is, without names and passwords."""
        return self._connections.place

    @property
    def stats(self) -> TierStats:
        """What it has done since it was opened."""
        return self._stats

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.place})"

    def __enter__(self) -> RespTier:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def match(self, token_ids: TokenIds, cache_salt: str = "") -> Future[int]:
        """Answer how many leading blocks the server has, up to the first that it lacks: see :meth:`Tier.match`.

        They count as used.
        """
        ids, salt = self._text(token_ids, cache_salt)
        return self._submit(lambda wire, until: self._match(self._chain(ids, salt), wire, until))

    def load(self, token_ids: TokenIds, rows: Rows, cache_salt: str = "") -> Future[int]:
        """Fill `rows` with the last blocks of a text: see :meth:`Tier.load`.

        A value that is not what it should be is deleted, so that the next store writes it anew.
        """
        ids, salt = self._text(token_ids, cache_salt)
        first = first_block(ids, rows, self._block, is_filled=True)
        return self._submit(lambda wire, until: self._load(self._chain(ids, salt), first, rows, wire, until))

    def store(self, token_ids: TokenIds, rows: Rows, cache_salt: str = "") -> Future[int]:
        """Keep the last blocks of a text: see :meth:`Tier.store`."""
        ids, salt = self._text(token_ids, cache_salt)
        first = first_block(ids, rows, self._block)
        with self._lock:
            clears = self._clears
            stored = self._begin(
                lambda wire, until: self._store(self._chain(ids, salt), first, rows, clears, wire, until)
            )
            self._storing.add(stored)
        stored.add_done_callback(self._end_of_store)
        return stored

    def _end_of_store(self, stored: Future[int]) -> None:
        with self._lock:
            self._storing.discard(stored)

    def clear(self) -> None:
        """Delete all blocks of this model and namespace, for everybody who shares them: see :meth:`Tier.clear`."""
        with self._lock:
            self._require_open()
            self._clears += 1
            under_way = list(self._storing)
        wait(under_way)
        wire: Wire | None = None
        try:
            wire = self._connections.take(time.monotonic() + self._timeout)
            self._delete_all(wire)
        except (OSError, ServerRefusal) as error:
            fault = error if isinstance(error, OSError) else ConnectionError(str(error))
            self._connections.failed(wire, fault)
            raise TierError(self.place, f"what it holds could not be deleted: {error}") from error
        self._connections.give_back(wire)

    def close(self) -> None:
        """Finish what is under way and let go of the server. A second call does nothing; it can be opened again."""
        with self._lock:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown()
        self._connections.close()

    # What calls are made of.

    def _require_open(self) -> ThreadPoolExecutor:
        if self._threads is None:
            raise not_open()
        return self._threads

    def _text(self, token_ids: TokenIds, cache_salt: str) -> tuple[Ints, str]:
        """Return a copy of the ids of the whole blocks, and the salt."""
        return np.array(whole_blocks(token_ids, self._block)), checked_salt(cache_salt)

    def _chain(self, ids: Ints, salt: str) -> _Chain:
        """Return how a server knows the blocks of a text."""
        size = self._block.block_size
        before = _digest(self._prefix + repr(salt).encode(errors="surrogatepass"))
        keys, headers = [], []
        tokens = ids.astype("<i4").tobytes()
        for start in range(0, len(tokens), 4 * size):
            header = before + tokens[start : start + 4 * size]
            before = _digest(header)
            keys.append(self._prefix + before.hex().encode())
            headers.append(header)
        return _Chain(keys, headers)

    def _submit(self, work: _Work) -> Future[int]:
        with self._lock:
            return self._begin(work)

    def _begin(self, work: _Work) -> Future[int]:
        future = self._require_open().submit(self._run, work, time.monotonic() + self._timeout)
        # So that nobody can cancel it while its rows are in use.
        answer: Future[int] = Future()
        answer.set_running_or_notify_cancel()
        future.add_done_callback(lambda done: _pass_on(done, answer))
        return answer

    def _run(self, work: _Work, until: float) -> int:
        """Return the last number that work yields, by its end or by the end of its time."""
        count, wire = 0, None
        try:
            wire = self._connections.take(until)
            for sofar in work(wire, until):
                count = sofar
        except OSError as error:
            self._connections.failed(wire, error)
            self._count(unanswered=1)
        except BaseException:
            if wire is not None:
                wire.close()
            raise
        else:
            self._connections.give_back(wire)
        return count

    def _match(self, chain: _Chain, wire: Wire, until: float) -> Iterator[int]:
        for start in range(0, len(chain.keys), _MOST_KEYS):
            there = self._use(chain.keys[start : start + _MOST_KEYS], wire, until)
            yield start + (there.index(False) if False in there else len(there))
            if False in there:
                return

    def _use(self, keys: list[bytes], wire: Wire, until: float) -> list[bool]:
        """Tell which keys are there, and let the server count them as used."""
        wire.send((command(b"TOUCH", key) for key in keys), until)
        if self._ttl is not None:
            wire.send((command(b"EXPIRE", key, b"%d" % self._ttl) for key in keys), until)
        there = [_granted(wire.reply(until)) == 1 for _ in keys]
        if self._ttl is not None:
            for _ in keys:
                wire.reply(until)  # a server that may be read only, too, has what it has
        return there

    def _load(self, chain: _Chain, first: int, rows: Rows, wire: Wire, until: float) -> Iterator[int]:
        began, count = time.perf_counter(), 0
        step = max(1, min(_MOST_KEYS, _MOST_BYTES // self._block.block_bytes))
        try:
            for start in range(0, len(rows), step):
                places = range(start, min(start + step, len(rows)))
                wire.send((command(b"GET", chain.keys[first + i]) for i in places), until)
                are_right, wrong = [], []
                for i in places:
                    found = self._read(chain.headers[first + i], rows[i], wire, until)
                    are_right.append(found is True)
                    if found is False:
                        wrong.append(chain.keys[first + i])
                    if all(are_right):
                        count += 1
                        yield count
                if wrong:
                    self._count(corrupt=len(wrong))
                    wire.send([command(b"UNLINK", *wrong)], until)
                    wire.reply(until)
                if not all(are_right):
                    return
        finally:
            size = count * self._block.block_bytes
            self._count(loaded=count, read_bytes=size, read_seconds=time.perf_counter() - began)

    def _read(self, header: bytes, row: Rows, wire: Wire, until: float) -> bool | None:
        """Read one value into a row; tells whether it is what it should be, None where there is none."""
        head = bytearray(len(header) + _CHECKSUM_BYTES)
        size = wire.value_into((memoryview(head), row.data), until)
        if isinstance(size, ServerRefusal):
            if str(size).startswith("WRONGTYPE"):
                return False
            raise ConnectionError(str(size))
        if size is None:
            return None
        is_whole = size == len(head) + len(row)
        return is_whole and head[: len(header)] == header and head[len(header) :] == _checksum(row)

    def _store(self, chain: _Chain, first: int, rows: Rows, clears: int, wire: Wire, until: float) -> Iterator[int]:
        there: list[bool] = []
        for start in range(0, len(chain.keys), _MOST_KEYS):
            there += self._use(chain.keys[start : start + _MOST_KEYS], wire, until)
            if False in there[:first]:
                break
        count = there.index(False) if False in there else len(there)
        yield count
        if count < first:
            return
        missing = [i for i in range(first, len(there)) if not there[i]]
        yield from self._write(chain, first, rows, missing, there, clears, wire, until)

    def _write(
        self,
        chain: _Chain,
        first: int,
        rows: Rows,
        missing: list[int],
        there: list[bool],
        clears: int,
        wire: Wire,
        until: float,
    ) -> Iterator[int]:
        """Write missing blocks in their order, up to the first that the server refuses."""
        began, written, were_there = time.perf_counter(), 0, len(rows) - len(missing)
        ending = (b"NX",) if self._ttl is None else (b"NX", b"EX", b"%d" % self._ttl)
        step = max(1, min(_MOST_KEYS, _MOST_BYTES // self._block.block_bytes))
        left = list(missing)
        try:
            while left and False not in there[: left[0]]:
                some, left = left[:step], left[step:]
                if clears == self._clears:
                    wire.send(self._requests(chain, first, rows, some, ending), until)
                    for i in some:
                        reply = wire.reply(until)
                        there[i] = not isinstance(reply, ServerRefusal)
                        written += reply == b"OK"
                        were_there += reply is None
                if clears != self._clears:  # what is cleared meanwhile goes, too
                    wire.send([command(b"UNLINK", *(chain.keys[i] for i in missing))], until)
                    wire.reply(until)
                    yield 0
                    return
                yield there.index(False) if False in there else len(there)
        finally:
            self._count(
                stored=written,
                skipped=were_there,
                failed=len(rows) - were_there - written,
                written_bytes=written * self._block.block_bytes,
                write_seconds=time.perf_counter() - began,
            )

    def _requests(
        self, chain: _Chain, first: int, rows: Rows, places: list[int], ending: tuple[bytes, ...]
    ) -> Iterator[bytes | memoryview]:
        """Yield the bytes of SET requests, payloads as they lie in memory."""
        rest = b"\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in ending)
        for i in places:
            key, row = chain.keys[i], rows[i - first]
            head = chain.headers[i] + _checksum(row)
            size = len(head) + len(row)
            yield b"*%d\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (3 + len(ending), len(key), key, size) + head
            yield row.data
            yield rest

    def _delete_all(self, wire: Wire) -> None:
        cursor = b"0"
        while True:
            until = time.monotonic() + self._timeout
            wire.send([command(b"SCAN", cursor, b"MATCH", self._prefix + b"*", b"COUNT", b"1000")], until)
            match _granted(wire.reply(until)):
                case [bytes(cursor), list(keys)]:
                    pass
                case _:
                    raise ConnectionError("SCAN: expected a cursor and keys")
            if keys:
                wire.send([command(b"UNLINK", *keys)], until)
                _granted(wire.reply(until))
            if cursor == b"0":
                return

    def _count(self, **changes: float) -> None:
        with self._lock:
            sums = {name: getattr(self._stats, name) + change for name, change in changes.items()}
            self._stats = replace(self._stats, **sums)


def _nothing(wire: Wire, until: float) -> Iterator[int]:
    """Only be connected."""
    yield 0


def _pass_on(done: Future[int], answer: Future[int]) -> None:
    error = done.exception()
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(done.result())


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _checksum(row: Rows) -> bytes:
    return xxhash.xxh3_64_intdigest(row.data).to_bytes(_CHECKSUM_BYTES, "little")


def _granted(reply: object) -> object:
    """Return a reply; an error of the server's as one that ends the call."""
    if isinstance(reply, ServerRefusal):
        raise ConnectionError(str(reply))
    return reply
