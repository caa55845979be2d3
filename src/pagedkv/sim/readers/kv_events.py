"""KV cache events of vLLM, SGLang and others, recorded to a file.

A batch is ``[ts, events, data_parallel_rank]`` or a map with these names; an event is positional (``["BlockStored",
block_hashes, parent_block_hash, token_ids, block_size, lora_id, medium, lora_name, extra_keys, group_idx]``) or a map
with a ``type``; what follows at the end may be missing; hashes are numbers or bytes.

What an engine stores of one request becomes a request for its whole chain, from the root to its last block:

- Events of one batch, each of which goes on where the one before it ended, are one request, as an engine may store a
  prompt block by block.
- A single block that a batch adds to the chain stored just before it belongs to that request too: the next block of
  an answer, or of a prompt that is computed in pieces.

Anything else begins another request: more blocks behind the same chain in a later batch are the next turn of a
conversation. What this cannot show:

- A request that found every block stored nothing: **pure hits are invisible**. Hit ratios from events are not those of
  the traffic; the set of blocks, their order of appearance and what was stored again after it had been evicted are.
- Where requests run side by side, the blocks of their answers alternate. Each is a request of its own here, its prefix
  a hit; so is a later turn of one block that follows at once a part of the turn before.

A chain whose beginning was not recorded begins at the first hash known. After ``AllBlocksCleared`` nothing is equal to
what was before. Removals are the engine's own business: another cache would have kept the block. Events of other tiers
than the GPU's, and of other groups than the first of a hybrid model, repeat blocks and are left out.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from pagedkv.control.events import BIN_32, MAX_BATCH_BYTES
from pagedkv.jit import compiled
from pagedkv.sim.collect import LIMIT, Collector
from pagedkv.sim.readers.base import Reader
from pagedkv.sim.source import BAD_RECORD, BadRecord, Source, reason_of

# Where a msgpack value ends, found without decoding it: what a stream of values needs to be cut, and to be trusted.
#
# A header may promise billions of elements; here every element must be there before anything is decoded.
# msgpack.Unpacker, which reads streams too, makes room for as many as each header promises, however few there are.

INCOMPLETE, INVALID = -1, -2
NEVER_USED = 0xC1

Array = npt.NDArray[Any]

# Of every first byte: how wide the length field behind it is, and what one unit of that length stands for. Where there
# is no field, the length is part of the first byte.
_WIDTH = np.zeros(256, np.int64)
_FIXED = np.zeros(256, np.int64)  # the length where there is no field; bytes that follow anyway where there is one
_BYTES = np.zeros(256, np.int64)  # bytes a unit
_VALUES = np.zeros(256, np.int64)  # values a unit


def _fill() -> None:
    for first in range(256):
        if 0x80 <= first < 0xA0:  # short maps and arrays
            _FIXED[first], _VALUES[first] = first & 15, 2 if first < 0x90 else 1
        elif 0xA0 <= first < 0xC0:  # short strings
            _FIXED[first], _BYTES[first] = first & 31, 1
    for first, size in zip(range(0xCA, 0xD4), (4, 8, 1, 2, 4, 8, 1, 2, 4, 8), strict=True):  # numbers
        _FIXED[first], _BYTES[first] = size, 1
    for first, size in zip(range(0xD4, 0xD9), (2, 3, 5, 9, 17), strict=True):  # extensions of a fixed size
        _FIXED[first], _BYTES[first] = size, 1
    for begin in (0xC4, 0xC7, 0xD9):  # bin, ext, str
        for first, width in zip(range(begin, begin + 3), (1, 2, 4), strict=True):
            _WIDTH[first], _BYTES[first], _FIXED[first] = width, 1, int(begin == 0xC7)
    for begin, values in ((0xDC, 1), (0xDE, 2)):  # arrays, maps
        for first, width in zip(range(begin, begin + 2), (2, 4), strict=True):
            _WIDTH[first], _VALUES[first] = width, values


_fill()


@compiled
def _extent(data: Array, width: Array, fixed: Array, size: Array, values: Array) -> int:
    place = 0
    waiting = 1
    while waiting > 0:
        if place >= len(data):
            return INCOMPLETE
        first = data[place]
        if first == NEVER_USED:
            return INVALID
        place += 1
        length = fixed[first]
        if width[first] > 0:
            if place + width[first] > len(data):
                return INCOMPLETE
            field = np.int64(0)
            for _ in range(width[first]):
                field = field * 256 + np.int64(data[place])
                place += 1
            length += field
        place += length * size[first]
        waiting += length * values[first] - 1
        if waiting > len(data) - place:  # a value takes a byte at least
            return INCOMPLETE
    return place


def extent(data: npt.NDArray[np.uint8]) -> int:
    """Return how many bytes the first msgpack value takes, or `INCOMPLETE`, or `INVALID` where none begins."""
    return int(_extent(data, _WIDTH, _FIXED, _BYTES, _VALUES))


# KV cache events in a file: batches as engines publish them, one behind the other.
#
# Written is a stream of msgpack ``bin`` values, each holding one batch: the header of the ``bin`` is the frame, and
# any msgpack library reads the file. Read are these, batches that follow each other bare, and batches behind a length
# of four bytes, big-endian, as far as they stay below 16 MiB.

BIN_8, BIN_16 = 0xC4, 0xC5
_BIN_FIELDS = {BIN_8: 1, BIN_16: 2, BIN_32: 4}
_LENGTH_FIELD = 4


def read_event_batches(pieces: Iterable[bytes]) -> Iterator[memoryview | BadRecord]:
    """Cut a stream into batches; every one is a complete msgpack value, and what is not is yielded as an error.

    A batch is valid until the next one is asked for. After an error inside a frame the next frame follows; after an
    error in a bare stream nothing can follow.
    """
    pieces = iter(pieces)
    buffer, place, is_all = b"", 0, False
    while True:
        size, header = _next_size(memoryview(buffer)[place:])
        if size == INCOMPLETE:
            if is_all or len(buffer) - place > MAX_BATCH_BYTES:
                break
            # Twice as much each time, so that a long batch is not looked at again for every piece.
            more = _take(pieces, max(1, len(buffer) - place))
            buffer, place, is_all = buffer[place:] + more, 0, not more
            continue
        if size == INVALID:
            yield BadRecord("neither a batch nor a frame begins here")
            return
        payload = memoryview(buffer)[place + header : place + size]
        place += size
        yield _checked(payload, is_framed=header > 0)
    if len(buffer) - place > MAX_BATCH_BYTES:
        yield _too_long()
    elif place < len(buffer):
        yield BadRecord("the file ends within a batch")


def _checked(payload: memoryview, is_framed: bool) -> memoryview | BadRecord:
    if len(payload) > MAX_BATCH_BYTES:
        return _too_long()
    if is_framed and extent(np.frombuffer(payload, np.uint8)) != len(payload):
        return BadRecord("the frame does not hold one msgpack value")
    return payload


def _too_long() -> BadRecord:
    return BadRecord(f"longer than {MAX_BATCH_BYTES} bytes")


def _next_size(data: memoryview) -> tuple[int, int]:
    """Return (bytes of the next batch with its frame, bytes of the frame)."""
    if not data:
        return INCOMPLETE, 0
    if data[0] == 0:
        width, first = _LENGTH_FIELD, 0
    elif data[0] in _BIN_FIELDS:
        width, first = _BIN_FIELDS[data[0]], 1
    elif 0x80 <= data[0] <= 0x9F or 0xDC <= data[0] <= 0xDF:  # an array or a map
        return extent(np.frombuffer(data, np.uint8)), 0
    else:
        return INVALID, 0
    header = first + width
    if len(data) < header:
        return INCOMPLETE, 0
    size = header + int.from_bytes(data[first:header], "big")
    return (size if size <= len(data) else INCOMPLETE), header


def _take(pieces: Iterator[bytes], size: int) -> bytes:
    taken = bytearray()
    while len(taken) < size and (piece := next(pieces, None)) is not None:
        taken += piece
    return bytes(taken)


PIECE_BYTES = 2**20
# Where a positional event has what is read of it.
FIELDS = {"block_hashes": 1, "parent_block_hash": 2, "block_size": 4, "medium": 6, "group_idx": 9}
NO_NODE = -1
MAX_ACCESSES = 2**31 - 1
"""Blocks of all requests together: each repeats its chain, so a small file can stand for a trace without end."""


@compiled
def _write_chain(node: int, parents: Array, numbers: Array, chain: Array) -> None:
    for place in range(len(chain) - 1, -1, -1):
        chain[place] = numbers[node]
        node = parents[node]


@dataclass(slots=True)
class _Run:
    """Blocks of one chain that were stored one behind the other: a request, or what a request goes on with."""

    time: float
    parent: int  # the node before the first of them
    last: int  # the node of the last of them
    num_blocks: int


class KvEventsReader(Reader):
    """A recorded stream of cache events, times in seconds."""

    name = "kv-events"

    def __init__(self, collector: Collector, block_tokens: int | None = None) -> None:
        super().__init__(collector, block_tokens)
        self._num_clears = 0
        self._num_accesses = 0
        self._request: _Run | None = None  # the last one, which may go on
        self._run: _Run | None = None  # of the batch that is read
        self._forget()

    def _forget(self) -> None:
        """Begin with an empty forest: a node is a block behind its prefix."""
        self._nodes: dict[tuple[int, int], int] = {}  # (parent node, number of the hash)
        self._latest: dict[int, int] = {}  # number of the hash: where it was stored last
        self._parents, self._numbers, self._depths = array("q"), array("q"), array("q")

    def read(self, source: Source) -> None:
        """Read batch by batch."""
        for number, payload in enumerate(read_event_batches(source.pieces(PIECE_BYTES)), start=1):
            try:
                if isinstance(payload, BadRecord):
                    raise payload
                self._add_batch(payload)
            except BAD_RECORD as error:
                source.bad(number, reason_of(error), "batch")
        self._add_request()

    def _add_batch(self, payload: memoryview) -> None:
        time, events = _opened(payload)
        try:
            for event in events:
                kind, fields = _fields(event)
                if kind == "AllBlocksCleared":
                    self._end_run()
                    self._add_request()
                    self._num_clears += 1
                    self._forget()
                elif kind == "BlockStored" and _is_first_tier(fields):
                    self._store(time, fields)
        finally:
            self._end_run()

    def _store(self, time: float, fields: dict[str, Any]) -> None:
        hashes, parent, size = (fields.get(name) for name in ("block_hashes", "parent_block_hash", "block_size"))
        if not isinstance(hashes, list) or not hashes or not all(map(_is_hash, hashes)):
            raise BadRecord("block_hashes: expected a list of numbers or bytes")
        if parent is not None and not _is_hash(parent):
            raise BadRecord("parent_block_hash: expected a number, bytes or null")
        if type(size) is not int:
            raise BadRecord("block_size: expected a number")
        self._file_says(size)
        node = NO_NODE
        if parent is not None:
            number = self._collector.number(parent)
            node = self._latest.get(number, NO_NODE)
            if node == NO_NODE:
                node = self._node(NO_NODE, number)
        if self._run is None or self._run.last != node or node == NO_NODE:
            self._end_run()
            self._run = _Run(time, node, node, 0)
        for block in hashes:
            node = self._node(node, self._collector.number(block))
        self._run.last = node
        self._run.num_blocks += len(hashes)

    def _end_run(self) -> None:
        """Let the last request go on with what was just stored, or begin another one with it."""
        run, self._run = self._run, None
        if run is None:
            return
        request = self._request
        goes_on = request is not None and run.num_blocks == 1 and run.parent == request.last
        self._num_accesses += 1 if goes_on else self._depths[run.last]
        if self._num_accesses > MAX_ACCESSES:
            raise BadRecord(f"the chains of all requests have more than {MAX_ACCESSES} blocks in all")
        if request is not None and goes_on:
            request.last = run.last
        else:
            self._add_request()
            self._request = run

    def _add_request(self) -> None:
        """Hand the last request on."""
        request, self._request = self._request, None
        if request is not None:
            chain = self._chain(request.last)
            self._collector.add(request.time, len(chain) * self.block_tokens, 0, None, chain, -1 - self._num_clears)

    def _node(self, parent: int, number: int) -> int:
        node = self._nodes.setdefault((parent, number), len(self._parents))
        if node == len(self._parents):
            self._parents.append(parent)
            self._numbers.append(number)
            self._depths.append(1 if parent == NO_NODE else self._depths[parent] + 1)
        self._latest[number] = node
        return node

    def _chain(self, node: int) -> npt.NDArray[np.int64]:
        """Return the numbers of the blocks from the root to a node."""
        chain = np.empty(self._depths[node], np.int64)
        _write_chain(node, np.frombuffer(self._parents, np.int64), np.frombuffer(self._numbers, np.int64), chain)
        return chain


def _opened(payload: memoryview) -> tuple[float, list[Any]]:
    """Return the time and the events of a batch."""
    try:
        batch = msgspec.msgpack.decode(payload)
    except (TypeError, ValueError) as error:  # a map with keys that cannot be keys, a date beyond the calendar
        raise BadRecord(reason_of(error)) from None
    if isinstance(batch, dict):
        batch = [batch.get("ts"), batch.get("events")]
    if not isinstance(batch, list) or len(batch) < 2:
        raise BadRecord("batch: expected [ts, events, …]")
    time, events = batch[:2]
    if type(time) not in (int, float) or not isinstance(events, list):
        raise BadRecord("batch: expected [ts, events, …] with a number and a list")
    if not -LIMIT < time < LIMIT:
        raise BadRecord(f"timestamp: expected a finite number below 2**53, got {time}")
    return float(time), events


def _fields(event: Any) -> tuple[Any, dict[str, Any]]:
    """Return the kind of an event and what is known of its fields, by name."""
    if isinstance(event, dict):
        return event.get("type"), event
    if not isinstance(event, list) or not event:
        raise BadRecord("event: expected a map with a type, or a list that begins with it")
    return event[0], {name: event[place] for name, place in FIELDS.items() if place < len(event)}


def _is_first_tier(fields: dict[str, Any]) -> bool:
    medium, group = fields.get("medium"), fields.get("group_idx")
    return (medium is None or str(medium).upper() == "GPU") and group in (None, 0)


def _is_hash(value: Hashable) -> bool:
    return type(value) in (int, bytes, str)
