"""KV cache events of vLLM, SGLang and their kin, recorded to a file (see `pagedkv.sim.event_file`).

A batch is ``[ts, events, data_parallel_rank]`` or a map with these names; an event is positional (``["BlockStored",
block_hashes, parent_block_hash, token_ids, block_size, lora_id, medium, lora_name, extra_keys, group_idx]``) or a map
with a ``type``; what follows at the end may be missing; hashes are numbers or bytes.

Every ``BlockStored`` becomes a request for its whole chain, from the root to its last block. What this cannot show:

- A request that found every block stored nothing: **pure hits are invisible**. Hit ratios from events are not those of
  the traffic; the set of blocks, their order of appearance and what was stored again after it had been given up are.
- An engine also stores a block for every few tokens of an answer. Each is a request of its own here, its prefix a hit.

A chain whose beginning was not recorded begins at the first hash known. After ``AllBlocksCleared`` nothing is equal to
what was before. Removals are the engine's own business: another cache would have kept the block. Events of other tiers
than the GPU's, and of other groups than the first of a hybrid model, repeat blocks and are left out.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import msgspec

from pagedkv.sim.collect import Collector
from pagedkv.sim.event_file import read_event_batches
from pagedkv.sim.readers.base import Reader
from pagedkv.sim.source import BAD_RECORD, BadRecord, Source, reason_of

__all__ = ["KvEventsReader"]

PIECE_BYTES = 2**20
BLOCK_HASHES, PARENT, _, BLOCK_SIZE, _, MEDIUM, _, _, GROUP = range(1, 10)
FIELDS = {
    "block_hashes": BLOCK_HASHES,
    "parent_block_hash": PARENT,
    "block_size": BLOCK_SIZE,
    "medium": MEDIUM,
    "group_idx": GROUP,
}
NO_NODE = -1


class KvEventsReader(Reader):
    """A recorded stream of cache events, times in seconds."""

    name = "kv-events"

    def __init__(self, collector: Collector, block_tokens: int | None = None) -> None:
        super().__init__(collector, block_tokens)
        self._num_clears = 0
        self._forget()

    def _forget(self) -> None:
        """Begin with an empty forest: a node is a block behind its prefix."""
        self._nodes: dict[tuple[int, int], int] = {}  # (parent node, number of the hash)
        self._latest: dict[int, int] = {}  # number of the hash: where it was stored last
        self._parents: list[int] = []
        self._numbers: list[int] = []

    def read(self, source: Source) -> None:
        """Read batch by batch."""
        for number, payload in enumerate(read_event_batches(source.pieces(PIECE_BYTES)), start=1):
            try:
                if isinstance(payload, BadRecord):
                    raise payload
                self._add_batch(payload)
            except BAD_RECORD as error:
                source.bad(number, reason_of(error), "batch")

    def _add_batch(self, payload: memoryview) -> None:
        time, events = _opened(payload)
        for event in events:
            kind, fields = _fields(event)
            if kind == "AllBlocksCleared":
                self._num_clears += 1
                self._forget()
            elif kind == "BlockStored" and _is_first_tier(fields):
                self._store(time, fields)

    def _store(self, time: float, fields: dict[str, Any]) -> None:
        hashes, parent, size = (fields.get(name) for name in ("block_hashes", "parent_block_hash", "block_size"))
        if not isinstance(hashes, list) or not hashes or not all(map(_is_hash, hashes)):
            raise BadRecord("block_hashes must be a list of numbers or bytes")
        if parent is not None and not _is_hash(parent):
            raise BadRecord("parent_block_hash must be a number, bytes or null")
        if type(size) is not int:
            raise BadRecord("block_size must be a number")
        self._file_says(size)
        node = NO_NODE
        if parent is not None:
            number = self._collector.number(parent)
            node = self._latest.get(number, NO_NODE)
            if node == NO_NODE:
                node = self._node(NO_NODE, number)
        for block in hashes:
            node = self._node(node, self._collector.number(block))
        chain = self._chain(node)
        self._collector.add(time, len(chain) * self.block_tokens, 0, None, chain, -1 - self._num_clears)

    def _node(self, parent: int, number: int) -> int:
        node = self._nodes.setdefault((parent, number), len(self._parents))
        if node == len(self._parents):
            self._parents.append(parent)
            self._numbers.append(number)
        self._latest[number] = node
        return node

    def _chain(self, node: int) -> list[int]:
        chain = []
        while node != NO_NODE:
            chain.append(self._numbers[node])
            node = self._parents[node]
        chain.reverse()
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
        raise BadRecord("a batch must be [ts, events, …]")
    time, events = batch[:2]
    if type(time) not in (int, float) or not isinstance(events, list):
        raise BadRecord("a batch must be [ts, events, …] with a number and a list")
    return float(time), events


def _fields(event: Any) -> tuple[Any, dict[str, Any]]:
    """Return the kind of an event and what is known of its fields, by name."""
    if isinstance(event, dict):
        return event.get("type"), event
    if not isinstance(event, list) or not event:
        raise BadRecord("an event must be a map with a type, or a list that begins with it")
    return event[0], {name: event[place] for name, place in FIELDS.items() if place < len(event)}


def _is_first_tier(fields: dict[str, Any]) -> bool:
    medium, group = fields.get("medium"), fields.get("group_idx")
    return (medium is None or str(medium).upper() == "GPU") and group in (None, 0)


def _is_hash(value: Hashable) -> bool:
    return type(value) in (int, bytes, str)
