"""A ladder of tiers: where a part of a text comes from, whether that is sooner than to compute it, what was moved."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pagedkv.errors import InvalidOperation, TierError, bad_argument
from pagedkv.tiers.known import chain_of
from pagedkv.tiers.rung import Rung, TierFigures
from pagedkv.tiers.tier import BlockFormat, Rows, Tier, answered
from pagedkv.validate import shown

logger = logging.getLogger("pagedkv")

MOST_STAGED = 2**29
"""Bytes of blocks that are on their way at once, in each direction: what is beyond waits, or is not stored."""

LONGEST_GOODBYE = 10.0
"""Seconds that what is under way has when all is closed; a tier that was opened here finishes it in any case."""


class Load:
    """Blocks ``[first, stop)`` of a text on their way from one tier, for one text that waits or for several.

    Attributes
    ----------
    first, stop : int
    began : float
        When it was asked for, by the monotonic clock.
    rows : uint8 [stop - first, block_bytes]
    good : int or None
        How many of them are there and right, from the first one on; None while they are on their way.
    """

    def __init__(self, rung: Rung, first: int, stop: int, block_bytes: int, let_go: Callable[[int], None]) -> None:
        self.rung, self.first, self.stop, self.began = rung, first, stop, time.monotonic()
        self.rows: Rows = np.empty((stop - first, block_bytes), np.uint8)
        self.good: int | None = None
        self._users, self._let_go = 1, let_go
        self._lock = threading.Lock()

    @property
    def is_done(self) -> bool:
        """Whether all of it has come that will come."""
        return self.good is not None

    def join(self) -> Load:
        """Count one more text that waits for it."""
        with self._lock:
            self._users += 1
        return self

    def leave(self) -> None:
        """Count one text less; rows that nobody waits for are let go when the tier is done with them."""
        with self._lock:
            self._users -= 1
            is_over = self._users == 0 and self.is_done
        if is_over:
            self._let_go(self.rows.nbytes)

    def end(self, good: int) -> None:
        """Note what has come."""
        with self._lock:
            self.good = max(0, min(good, len(self.rows)))
            is_over = self._users == 0
        if is_over:
            self._let_go(self.rows.nbytes)


class Staging:
    """Memory for blocks on their way in one direction, counted in bytes. Any thread may use it.

    Attributes
    ----------
    taken : int
    """

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0
        self._lock = threading.Lock()

    def take(self, num_blocks: int, block_bytes: int, *, at_once: bool = False) -> int:
        """Take memory for so many blocks, or for as many as there is room, and return how many.

        If all of them are wanted `at_once`, it is for all or none; but what is alone on its way has as much as it
        needs, or, where less will do, at least one block.
        """
        with self._lock:
            room = max((self.most - self.taken) // block_bytes, 0 if self.taken else 1)
            granted = min(num_blocks, room)
            if at_once and granted < num_blocks:
                granted = 0 if self.taken else num_blocks
            self.taken += granted * block_bytes
        return granted

    def give_back(self, num_bytes: int) -> None:
        """Count memory as free."""
        with self._lock:
            self.taken -= num_bytes


class _Store(NamedTuple):
    """A text that is being stored: copies of its blocks from `start` on, and the rungs that are not done with them."""

    ids: Any
    cache_salt: str
    chain: list[bytes]
    start: int
    rows: Rows
    under_way: set[Rung]


class Ladder:
    """Tiers in the order in which they are asked, nearest first. None of its calls waits, but for `close`.

    Parameters
    ----------
    tiers : sequence of Tier
        Those with a method ``open`` that are not open yet are opened, and closed with this; others are their owner's.
    block_of : callable
        Returns what the blocks are of: a BlockFormat. It is asked again when all is cleared, as the weights may be
        others then.
    most_staged : int
        Bytes on their way at once, in each direction.

    Raises
    ------
    InvalidOperation
        If something in `tiers` is no tier, or is open for other blocks.
    TierError
        If a medium cannot be had; no tier is open then but those that were before.

    Attributes
    ----------
    rungs : list of Rung
    news : threading.Event
        Set whenever something that was asked for has come.
    on_news : callable
        Called then, in a thread of the tier.
    """

    def __init__(
        self, tiers: Sequence[Tier], block_of: Callable[[], BlockFormat], *, most_staged: int = MOST_STAGED
    ) -> None:
        self.block, self._block_of = block_of(), block_of
        self._opened = open_tiers(tiers, self.block)
        self.rungs = [Rung(tier) for tier in tiers]
        self.news = threading.Event()
        self.on_news: Callable[[], None] = lambda: None
        self._loading, self._storing = Staging(most_staged), Staging(most_staged)
        self._lock = threading.Lock()  # of what several tiers count together

    # Loads.

    def match(self, ids: Any, cache_salt: str) -> list[Future[int]]:
        """Ask every tier how many leading blocks of a text it has; of one that is left alone the answer is none."""
        return [self._ask(rung, ids, cache_salt) if rung.may_be_asked() else answered(0) for rung in self.rungs]

    def _ask(self, rung: Rung, ids: Any, cache_salt: str) -> Future[int]:
        began = time.monotonic()
        future = _asked(rung, lambda tier: tier.match(ids, cache_salt))
        rung.is_far = not future.done()
        if not rung.is_far:
            rung.has_matched(0.0)
            return future
        chain = chain_of(ids, cache_salt, self.block.block_size)

        def end(future: Future[int]) -> None:
            if not future.cancelled() and future.exception() is None:
                rung.has_matched(time.monotonic() - began)
                rung.known.note(chain, min(future.result(), len(chain)))
            self._tell()

        future.add_done_callback(end)
        return future

    def counts(self, asked: Sequence[Future[int]], first: int = 0) -> list[int]:
        """Return what tiers have answered to :meth:`match`, from the `first` one up to one that has not yet.

        One that failed has nothing.
        """
        pairs = zip(self.rungs[first:], asked[first:], strict=True)
        return [_answer(*pair) for pair in itertools.takewhile(lambda pair: pair[1].done(), pairs)]

    def load(
        self, ids: Any, cache_salt: str, counts: Sequence[int], first: int, seconds_per_block: float | None
    ) -> list[Load] | None:
        """Begin to load what tiers have of a text from block `first` on, each what those before it do not have.

        Parameters
        ----------
        ids : int64
            Of whole blocks.
        counts : sequence of int
            How many leading blocks each tier has.
        seconds_per_block : float, optional
            To compute them; what a tier would bring later than that is not asked for.

        Returns
        -------
        list of Load, or None
            One behind the other from `first` on; None as long as too much is on its way.
        """
        loads: list[Load] = []
        for rung, count in zip(self.rungs, counts, strict=True):
            wanted, size = count - first, self.block.block_bytes
            seconds = None if seconds_per_block is None else wanted * seconds_per_block
            if wanted <= 0 or not rung.is_worth(wanted * size, seconds):
                continue
            granted = self._loading.take(wanted, size)
            if not granted and not loads:
                return None
            if granted:
                loads.append(self._begun(rung, ids, cache_salt, first, first + granted))
                first += granted
            if granted < wanted:
                break
        return loads

    def _begun(self, rung: Rung, ids: Any, cache_salt: str, first: int, stop: int) -> Load:
        load = Load(rung, first, stop, self.block.block_bytes, partial(self._let_go, self._loading))
        began, text = time.perf_counter(), ids[: stop * self.block.block_size]

        def end(future: Future[int]) -> None:
            seconds = time.perf_counter() - began
            good = _answer(rung, future)
            load.end(good)
            if good:
                rung.has_loaded()
                rung.rate.note(good * self.block.block_bytes, seconds)
            rung.count(hits=good > 0, loads=good, read_bytes=good * self.block.block_bytes, read_seconds=seconds)
            self._tell()

        _asked(rung, lambda tier: tier.load(text, load.rows, cache_salt)).add_done_callback(end)
        return load

    # Stores.

    def store(self, ids: Any, cache_salt: str, read: Callable[[int], Rows]) -> None:
        """Hand whole blocks of a text to every tier that lacks some; they are copied before this returns.

        A tier that has them all learns that they are in use, so that it gives up others first.

        Parameters
        ----------
        ids : int64
            Of whole blocks.
        read : callable
            Takes the number of a block and returns rows of that one and all behind it.
        """
        count = len(ids) // self.block.block_size
        chain = chain_of(ids, cache_salt, self.block.block_size) if any(rung.is_far for rung in self.rungs) else []
        nothing = np.empty((0, self.block.block_bytes), np.uint8)
        lacking = []
        for rung in self.rungs:
            if getattr(rung.tier, "is_read_only", False):
                continue
            first = min(count, self._has_now(rung, ids, cache_salt, chain))
            if first == count:
                if not rung.is_resting:
                    _asked(rung, lambda tier: tier.store(ids, nothing, cache_salt))
            elif not rung.is_available or (rung.is_resting and rung.num_storing):  # or it would hold all the memory
                rung.count(dropped=1)
            else:
                lacking.append((rung, first))
        lacking = self._with_room(lacking, count)
        if not lacking:
            return
        start = min(first for _, first in lacking)
        store = _Store(ids, cache_salt, chain, start, read(start), {rung for rung, _ in lacking})
        for rung, first in lacking:
            self._hand_over(store, rung, first)

    def _has_now(self, rung: Rung, ids: Any, cache_salt: str, chain: list[bytes]) -> int:
        """Return how many leading blocks of a text a tier has; to wait for one that is far takes longer than a copy."""
        if rung.is_far:
            return rung.known.leading(chain)
        future = self._ask(rung, ids, cache_salt)
        return _answer(rung, future) if future.done() else 0

    def _with_room(self, lacking: list[tuple[Rung, int]], count: int) -> list[tuple[Rung, int]]:
        """Take memory for what tiers lack; where there is too little, those that lack the most go without."""
        while lacking:
            start = min(first for _, first in lacking)
            if self._storing.take(count - start, self.block.block_bytes, at_once=True):
                break
            for rung, first in lacking:
                rung.count(dropped=first == start)
            lacking = [(rung, first) for rung, first in lacking if first > start]
        return lacking

    def _hand_over(self, store: _Store, rung: Rung, first: int) -> None:
        rows, began = store.rows[first - store.start :], time.perf_counter()

        def end(future: Future[int]) -> None:
            has = _answer(rung, future)
            if store.chain:
                rung.known.note(store.chain, min(has, len(store.chain)))
            stored = max(0, has - first)
            seconds, size = time.perf_counter() - began, stored * self.block.block_bytes
            rung.count(stores=stored, written_bytes=size, write_seconds=seconds)
            with self._lock:
                rung.num_storing -= 1
                store.under_way.discard(rung)
                is_over = not store.under_way
            if is_over:
                self._let_go(self._storing, store.rows.nbytes)

        with self._lock:
            rung.num_storing += 1
        _asked(rung, lambda tier: tier.store(store.ids, rows, store.cache_salt)).add_done_callback(end)

    # Both.

    @property
    def staged_bytes(self) -> int:
        """Bytes of blocks that are on their way, in either direction."""
        return self._loading.taken + self._storing.taken

    def _let_go(self, staging: Staging, num_bytes: int) -> None:
        staging.give_back(num_bytes)
        self._tell()

    def _tell(self) -> None:
        self.news.set()
        self.on_news()

    @property
    def figures(self) -> tuple[TierFigures, ...]:
        """What each tier has done, nearest first."""
        return tuple(rung.figures for rung in self.rungs)

    def clear(self) -> None:
        """Let every tier forget everything; they are opened anew if the weights are others by now.

        Raises
        ------
        TierError
            If one refuses; the others have forgotten. A tier that cannot be opened anew is left out from then on.
        """
        faults: list[Exception] = []
        for rung in self.rungs:
            rung.known.clear()
            try:
                rung.tier.clear()
            except Exception as error:
                faults.append(error)
        block = self._block_of()
        if block != self.block:
            self._open_for(block)
        if faults:
            raise TierError(self.rungs[0].tier.medium, f"a tier was not cleared: {faults[0]}") from faults[0]

    def _open_for(self, block: BlockFormat) -> None:
        """Open the tiers that were opened here for other blocks; those that others opened are left out."""
        mine = self._opened
        rungs, self.rungs, self._opened = self.rungs, [], []
        if len(mine) < len(rungs):
            logger.warning("the weights are others now: tiers that were opened for those before are left out")
        close_tiers(mine)
        self.block = block
        self._opened = open_tiers(mine, block)
        self.rungs = [rung for rung in rungs if any(rung.tier is tier for tier in self._opened)]

    def close(self) -> None:
        """Finish what is under way, and close the tiers that were opened here."""
        until = time.monotonic() + LONGEST_GOODBYE
        while self.staged_bytes and time.monotonic() < until:
            self.news.clear()
            self.news.wait(0.05)
        close_tiers(self._opened)


def _asked(rung: Rung, call: Callable[[Tier], Future[int]]) -> Future[int]:
    """Call a tier; what it raises is in the future."""
    try:
        return call(rung.tier)
    except Exception as error:
        failed: Future[int] = Future()
        failed.set_exception(error)
        return failed


def _answer(rung: Rung, future: Future[int]) -> int:
    """Return what a tier has answered: a fault of its own is a miss, and counted."""
    if future.cancelled() or future.exception() is not None:
        rung.count(failed=1)
        return 0
    return int(future.result())


def open_tiers(tiers: Sequence[Tier], block: BlockFormat) -> list[Tier]:
    """Open those that have a method ``open`` and are not open yet, and return them.

    Raises
    ------
    InvalidOperation
        If something in `tiers` is no tier, or is open for other blocks.
    TierError
        If a medium cannot be had; no tier is open then but those that were before.
    """
    opened: list[Tier] = []
    try:
        for tier in tiers:
            if not isinstance(tier, Tier):
                wanted = "tiers: match, load, store, clear, close and a medium"
                raise bad_argument("tiers", wanted, shown(tier), "DiskTier(directory, size) makes one, for instance")
            if getattr(tier, "is_open", False):
                known = getattr(tier, "block", block)
                if known != block:
                    raise InvalidOperation(f"{tier!r} is open for {known}, not for {block}", "tiers")
                continue
            open_tier = getattr(tier, "open", None)
            if open_tier is not None:
                open_tier(block)
                opened.append(tier)
    except BaseException:
        close_tiers(opened)
        raise
    return opened


def close_tiers(tiers: Sequence[Tier]) -> None:
    """Close tiers, all of them; the first fault is raised then."""
    fault: BaseException | None = None
    for tier in tiers:
        try:
            tier.close()
        except BaseException as error:
            fault = fault or error
    if fault is not None:
        raise fault
