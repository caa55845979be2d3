"""What each replica of a fleet has cached, from the KV events that it publishes.

A batch of events has a number, one more than that of the batch before it. A batch that comes too early waits for those
before it; meanwhile the replica is *behind*, and what is told of it may be out of date, which costs time and never an
answer. A snapshot, one batch that names every block, puts the view right again, whatever was lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from pagedkv.control.events import block_hash
from pagedkv.errors import bad_argument
from pagedkv.validate import require_int, shown

MEDIA = ("GPU", "CPU", "DISK")
"""What events call the tiers, the fastest first."""

MAX_WAITING = 1024
"""Batches that a replica keeps back for one that is missing; of more, the oldest are dropped."""

BlockHash = int | bytes


def prefix_hashes(token_ids: Sequence[int], block_size: int, cache_salt: str = "") -> list[BlockHash]:
    """Return what the events of pagedkv call the whole blocks of a prompt, the first one first."""
    hashes: list[BlockHash] = []
    parent = None
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = block_hash(token_ids[start : start + block_size], parent, cache_salt)
        hashes.append(parent)
    return hashes


class FleetView:
    """Follows the events of several replicas.

    Parameters
    ----------
    block_size : int
        Tokens a block of all replicas.
    media : sequence of str
        The tiers to follow as events call them, the fastest first; events of others are left out.

    Notes
    -----
    A replica that starts anew counts from 0 again. Its batches are told from old ones that come late by their time; who
    knows that it has gone calls `forget`.

    Examples
    --------
    >>> view.hear("a", number, batch)  # doctest: +SKIP
    >>> for replica in view.behind:  # doctest: +SKIP
    ...     view.restore(replica, *snapshot_of(replica))
    >>> view.matched(prefix_hashes(token_ids, 16), ["a", "b"])  # doctest: +SKIP
    """

    def __init__(self, block_size: int, media: Sequence[str] = MEDIA) -> None:
        self._block_size = require_int("block_size", block_size, 1)
        self._media = {name: place for place, name in enumerate(media)}
        self._replicas: dict[str, _Replica] = {}

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self._block_size

    @property
    def replicas(self) -> tuple[str, ...]:
        """Those that were heard of."""
        return tuple(self._replicas)

    @property
    def behind(self) -> tuple[str, ...]:
        """Those of which something is missing: each needs a snapshot, unless the missing batches still come."""
        return tuple(name for name, replica in list(self._replicas.items()) if replica.is_behind)

    def hear(self, replica: str, number: int, batch: Any) -> bool:
        """Take in a batch; one that was heard before changes nothing.

        Parameters
        ----------
        replica : str
        number : int
            Of the batch.
        batch : bytes or sequence
            ``[ts, events, …]`` as msgpack or decoded; events are maps with a ``type``, or positional.

        Returns
        -------
        bool
            Whether the view of this replica is up to date.

        Raises
        ------
        InvalidOperation
            If that is no batch. It counts as not heard.
        """
        return self._of(replica).hear(require_int("number", number), *self._read(batch))

    def restore(self, replica: str, number: int, batch: Any) -> bool:
        """Take in a snapshot: a batch that names every block after all batches up to `number`.

        It may be newer than `number` says, as events that it holds already change nothing.

        Parameters
        ----------
        replica : str
        number : int
            Of the last batch before it, −1 if there was none.
        batch : bytes or sequence
            As for `hear`.

        Returns
        -------
        bool
            Whether the view of this replica is up to date; False if later batches are missing, too.

        Raises
        ------
        InvalidOperation
            If that is no batch; nothing has changed then.
        """
        return self._of(replica).restore(require_int("number", number, -1), *self._read(batch))

    def next_number(self, replica: str) -> int:
        """Return the number of the batch that is waited for; 0 for a replica that was never heard of."""
        known = self._replicas.get(replica)
        return known.next if known else 0

    def forget(self, replica: str) -> None:
        """Drop all that is known of a replica, which is gone or begins anew."""
        self._replicas.pop(replica, None)

    def matched(self, hashes: Sequence[BlockHash], replicas: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the leading tokens of a prompt that replicas have, by tier, as `Candidates` wants them.

        Parameters
        ----------
        hashes : sequence of int or bytes
            The whole blocks of the prompt: `prefix_hashes`, or what else publishes the events calls them.
        replicas : sequence of str
            One that was never heard of has nothing.

        Returns
        -------
        int64 [replicas, media]
        """
        found = np.zeros((len(replicas), len(self._media)), np.int64)
        for row, name in zip(found, replicas, strict=True):
            known = self._replicas.get(name)
            held = known.held if known else {}
            for block in hashes:
                media = held.get(block, 0)
                if not media:
                    break
                row[_fastest(media)] += self._block_size
        return found

    def _of(self, replica: str) -> _Replica:
        return self._replicas.setdefault(replica, _Replica())

    def _read(self, batch: Any) -> tuple[float, list[_Change]]:
        try:
            decoded = msgspec.msgpack.decode(batch) if isinstance(batch, bytes | bytearray | memoryview) else batch
            changes = [change for event in decoded[1] if (change := self._change(event)) is not None]
            return float(decoded[0]), changes
        except (msgspec.MsgspecError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise bad_argument("batch", "[ts, events, …] of KV events", f"{shown(batch)}: {error}") from None

    def _change(self, event: Any) -> _Change | None:
        """Return what an event does to the view; None where it is of no tier or kind that is followed."""
        told = event if isinstance(event, dict) else dict(zip(_FIELDS.get(event[0], ("type",)), event, strict=False))
        kind, medium = told["type"], told.get("medium")
        if kind == CLEARED:
            return kind, 0, []
        place = 0 if medium is None else self._media.get(medium)
        if kind not in _FIELDS or place is None:
            return None
        hashes = list(told["block_hashes"])
        if not all(isinstance(block, int | bytes) for block in hashes):
            raise TypeError("block hashes are numbers or bytes")
        if kind == STORED and told.get("block_size", self._block_size) != self._block_size:
            raise ValueError(f"blocks of {told['block_size']} tokens, not of {self._block_size}")
        return kind, place, hashes


STORED, REMOVED, CLEARED = "BlockStored", "BlockRemoved", "AllBlocksCleared"

_FIELDS = {
    STORED: ("type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium"),
    REMOVED: ("type", "block_hashes", "medium"),
}
"""What stands where in a positional event."""

_Change = tuple[str, int, list[BlockHash]]  # the kind of event, the place of its tier, its blocks


def _fastest(media: int) -> int:
    """Return the place of the lowest bit."""
    return (media & -media).bit_length() - 1


class _Replica:
    """The blocks of one replica, and the batches that wait for one that is missing."""

    def __init__(self) -> None:
        self.held: dict[BlockHash, int] = {}  # the tiers that have a block, a bit each
        self.next = 0
        self._time = -np.inf
        self._waiting: dict[int, tuple[float, list[_Change]]] = {}
        self._is_restarted = False

    @property
    def is_behind(self) -> bool:
        return bool(self._waiting) or self._is_restarted

    def hear(self, number: int, time: float, changes: list[_Change]) -> bool:
        if number < self.next and time <= self._time:
            return not self.is_behind  # it comes late, or twice
        if number < self.next and not self._is_restarted:  # a new process, which counts anew
            self._is_restarted = True
            self._waiting = {other: batch for other, batch in self._waiting.items() if batch[0] >= time}
        self._waiting[number] = (time, changes)
        self._catch_up()
        if len(self._waiting) > MAX_WAITING:
            del self._waiting[min(self._waiting)]
        return not self.is_behind

    def restore(self, number: int, time: float, changes: list[_Change]) -> bool:
        if time < self._time and not self.is_behind:
            return True  # taken before what is known
        self.held = {}  # a new one, as another thread may look into the old one
        self._apply(changes)
        self.next, self._time, self._is_restarted = number + 1, time, False
        self._waiting = {other: batch for other, batch in self._waiting.items() if other > number}
        self._catch_up()
        return not self.is_behind

    def _catch_up(self) -> None:
        while not self._is_restarted and self.next in self._waiting:
            self._time, changes = self._waiting.pop(self.next)
            self.next += 1
            self._apply(changes)

    def _apply(self, changes: list[_Change]) -> None:
        held = self.held
        for kind, place, hashes in changes:
            bit = 1 << place
            if kind == CLEARED:
                held.clear()
            elif kind == STORED:
                for block in hashes:
                    held[block] = held.get(block, 0) | bit
            else:
                for block in hashes:
                    left = held.pop(block, 0) & ~bit
                    if left:
                        held[block] = left
