"""The scheduler's half: asks the tiers, lets verified blocks be placed, and hands over what was computed."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from pagedkv.tiers.calls import MAX_TOKEN
from pagedkv.tiers.host import HostTier
from pagedkv.tiers.ladder import LONGEST_GOODBYE, close_tiers, open_tiers
from pagedkv.tiers.tier import BlockFormat, Tier, answered
from pagedkv.tiers.transfers import Ints
from pagedkv.vllm.messages import Copy, Done, Plan
from pagedkv.vllm.staging import Runs, Staging

logger = logging.getLogger("pagedkv")

_IDLE_WAIT = 0.005  # seconds that a step without work waits for news, as vLLM asks again at once


class EngineRequest(Protocol):
    """What is read of a request of vLLM's."""

    request_id: str
    num_tokens: int
    num_computed_tokens: int
    cache_salt: str | None
    skip_reading_prefix_cache: bool

    @property
    def all_token_ids(self) -> Sequence[int]:
        """Its prompt and what was written so far."""
        ...


class _Load:
    """Blocks ``[first, stop)`` of a text on their way from a tier into rows."""

    def __init__(self, tier: Tier, ticket: int, row: int, first: int, stop: int, coming: Future[int]) -> None:
        self.tier, self.ticket, self.row, self.first, self.stop = tier, ticket, row, first, stop
        self.coming = coming
        self.is_used = False  # the worker copies it, or waits to

    @property
    def good_stop(self) -> int:
        """Where the blocks end that have come and are right."""
        return self.first + min(_answer(self.coming), self.stop - self.first) if self.coming.done() else self.first


@dataclass
class _Store:
    """Blocks ``[first, stop)`` of a text on their way from the pool into rows, and on to the tiers."""

    ticket: int
    row: int
    ids: Ints
    salt: str
    first: int
    stop: int
    before: Future[int] | None
    clears: int
    is_copied: bool = False
    end: Future[int] = field(default_factory=Future)


@dataclass
class _Text:
    """What is known of the text of a request."""

    request: EngineRequest
    num_tokens: int
    asked: list[Future[int]]
    until: float | None = None  # how long it waits, from its turn on
    first: int = 0
    loads: list[_Load] | None = None
    is_placed: bool = False
    kept: int | None = None  # blocks that are in every tier, or on their way there


@dataclass
class ConnectorFigures:
    """What was moved, in blocks unless said otherwise.

    Attributes
    ----------
    loaded, stored : int
        Placed in the pool, and handed over to the tiers.
    short : int
        Loads that brought less than was promised: damaged, gone, or too late. What was missing is computed.
    dropped : int
        Texts of which something was not stored, as the staging memory was full.
    """

    loaded: int = 0
    stored: int = 0
    short: int = 0
    dropped: int = 0


class SchedulerHalf:
    """Says what the tiers have of a request, and plans what the workers copy. One thread calls it.

    vLLM hears of a block only when it was read into the staging memory and verified. So whatever happens to a tier is
    a miss, and nothing has to be taken back.

    Parameters
    ----------
    tiers : sequence of Tier
        Nearest first. Those that are not open yet are opened, and closed with this.
    block : BlockFormat
        One block of vLLM's, the parts of all workers behind each other.
    staging_bytes : int
    num_workers : int
    patience : float
        Seconds that a request waits for all tiers, when its turn has come.
    reads, writes : bool
        Whether blocks are loaded, and stored.

    Raises
    ------
    TierError
        If a medium or the staging memory cannot be had.

    Attributes
    ----------
    figures : ConnectorFigures
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        block: BlockFormat,
        staging_bytes: int,
        *,
        num_workers: int = 1,
        patience: float = 5.0,
        reads: bool = True,
        writes: bool = True,
    ) -> None:
        self.figures = ConnectorFigures()
        self._staging = Staging.create(staging_bytes, block.block_bytes)
        try:
            self._tiers, self._opened = list(tiers), open_tiers(tiers, block)
        except BaseException:
            self._staging.unlink()
            raise
        _compile(block.block_size)
        self._size, self._num_workers, self._patience = block.block_size, num_workers, patience
        self._reads, self._writes = reads, writes
        num_rows = len(self._staging.rows)
        self._loading, self._storing = Runs(0, num_rows // 2), Runs(num_rows // 2, num_rows)
        self._texts: dict[str, _Text] = {}
        self._tickets = itertools.count(1)
        self._loads: dict[int, _Load] = {}  # all whose rows are taken, by ticket
        self._stores: dict[int, _Store] = {}
        self._sources: dict[str, dict[str, int]] = {}
        self._planned: tuple[list[Copy], list[Copy]] = ([], [])
        self._acks = Done()
        self._forgiven: list[int] = []
        self._clears = 0
        self._news = threading.Event()

    # Loads.

    def arrived(self, request: EngineRequest) -> None:
        """Ask the tiers what they have of a request."""
        if _has_plain_tokens(request):
            self._texts[request.request_id] = self._asked(request)

    def found(self, request: EngineRequest, num_computed: int) -> int | None:
        """Answer how many tokens behind those computed are in the staging memory; None while they are on their way."""
        self._reap()
        first = num_computed // self._size
        last = (request.num_tokens - 1) // self._size  # the last token is always computed
        if not self._reads or request.skip_reading_prefix_cache or not _has_plain_tokens(request) or first >= last:
            return 0
        text = self._texts.get(request.request_id)
        if text is None or text.is_placed or text.num_tokens != request.num_tokens:  # one that was preempted
            kept = text.kept if text is not None else None
            text = self._texts[request.request_id] = self._asked(request)
            text.kept = kept
        if text.loads is not None and text.first > first:
            text.loads = None  # blocks before them have left the pool since
        text.until = text.until or time.monotonic() + self._patience
        is_late = time.monotonic() > text.until
        if text.loads is None:
            if is_late:
                return 0
            if not all(each.done() for each in text.asked) or not self._begin_loads(text, first, last):
                return None
        return self._come(text, first, last, is_late)

    def _asked(self, request: EngineRequest) -> _Text:
        ids, salt = self._ids(request, request.num_tokens // self._size), request.cache_salt or ""
        asked = [self._call(tier, partial(tier.match, ids, salt)) for tier in self._tiers]
        return _Text(request, request.num_tokens, asked)

    def _ids(self, request: EngineRequest, num_blocks: int) -> Ints:
        return np.array(request.all_token_ids[: num_blocks * self._size], np.int64)

    def _call(self, tier: Tier, call: Callable[[], Future[int]]) -> Future[int]:
        """Call a tier; what it raises is an answer of nothing."""
        try:
            future = call()
        except Exception as error:
            logger.warning("tier %r: %s", tier, error)
            return answered(0)
        future.add_done_callback(lambda _: self._news.set())
        return future

    def _begin_loads(self, text: _Text, first: int, last: int) -> bool:
        """Ask each tier for what those before it do not have; False where no row is free for any of it."""
        loads: list[_Load] = []
        salt = text.request.cache_salt or ""
        text.first = at = first
        for tier, asked in zip(self._tiers, text.asked, strict=True):
            stop = min(_answer(asked), last)
            if stop <= at:
                continue
            row, count = self._loading.take(stop - at)
            if not count:
                if not loads:
                    return False
                break
            ticket, rows = next(self._tickets), self._staging.rows[row : row + count]
            self._staging.tickets[row : row + count] = ticket
            coming = self._call(tier, partial(tier.load, self._ids(text.request, at + count), rows, salt))
            loads.append(_Load(tier, ticket, row, at, at + count, coming))
            self._loads[ticket] = loads[-1]
            at += count
            if at < stop:
                break
        text.loads = loads
        return True

    def _come(self, text: _Text, first: int, last: int, is_late: bool) -> int | None:
        """Answer what has come, once all of it has or its time is over."""
        loads = text.loads or []
        if not is_late and not all(load.coming.done() for load in loads):
            return None
        stop = text.first
        for load in loads:
            stop = load.good_stop
            if stop < load.stop:
                break
        return max(0, min(stop, last) - first) * self._size

    def placed(self, request: EngineRequest, block_ids: Sequence[int], num_computed: int, num_loaded: int) -> None:
        """Plan the copies of what :meth:`found` has answered, into the blocks of a request's table.

        Parameters
        ----------
        request : EngineRequest
        block_ids : sequence of int
            All blocks of the request.
        num_computed : int
            Tokens that the pool had.
        num_loaded : int
            Tokens behind them that come from the staging memory; 0 for none.
        """
        text = self._texts.get(request.request_id)
        if text is None:
            return
        first, sources = num_computed // self._size, dict[str, int]()
        stop = first + num_loaded // self._size
        for load in text.loads or []:
            start, end = max(first, load.first), min(stop, load.stop)
            if start < end:
                load.is_used = True
                row = load.row + start - load.first
                self._planned[0].append(Copy(load.ticket, row, tuple(block_ids[start:end])))
                medium = load.tier.medium
                sources[medium] = sources.get(medium, 0) + (end - start) * self._size
            if load.good_stop < load.stop:
                self.figures.short += 1
                text.asked[self._tiers.index(load.tier)] = answered(load.good_stop)
        self._sources[request.request_id] = sources
        self.figures.loaded += stop - first
        text.loads, text.is_placed = [], True

    def sources(self, request_id: str) -> dict[str, int]:
        """Return how many tokens of the last load of a request came from which medium."""
        return self._sources.get(request_id, {})

    # Stores.

    def plan(self, num_scheduled: Mapping[str, int], block_ids: Callable[[str], Sequence[int]]) -> Plan:
        """Return what the workers copy in this step.

        Parameters
        ----------
        num_scheduled : mapping of str to int
            The tokens that this step computes of each request.
        block_ids : callable
            Returns all blocks of a request.
        """
        self._reap()
        if self._writes:
            for request_id, count in num_scheduled.items():
                text = self._texts.get(request_id)
                if text is not None:
                    self._plan_stores(text, count, block_ids)
        if not num_scheduled and any(not text.is_placed for text in self._texts.values()):
            self._news.wait(_IDLE_WAIT)
            self._news.clear()
        (loads, stores), self._planned = self._planned, ([], [])
        forgiven, self._forgiven = self._forgiven, []
        return Plan(self._staging.path, len(self._staging.rows), tuple(loads), tuple(stores), tuple(forgiven))

    def _plan_stores(self, text: _Text, count: int, block_ids: Callable[[str], Sequence[int]]) -> None:
        request = text.request
        # Tokens that are known, and whose keys and values are there when the step is over.
        full = min(request.num_computed_tokens + count, request.num_tokens) // self._size
        if text.kept is not None and full <= text.kept:
            return
        ids, salt = self._ids(request, full), request.cache_salt or ""
        if text.kept is None:
            text.kept = min(self._held(text, ids, salt))
            if full <= text.kept:
                return
        first, before = self._under_way(ids, salt, text.kept)
        text.kept = first
        if first >= full:
            return
        row, length = self._storing.take(full - first)
        if not length:
            self.figures.dropped += 1
            return
        text.kept = stop = first + length
        store = _Store(next(self._tickets), row, ids[: stop * self._size], salt, first, stop, before, self._clears)
        self._stores[store.ticket] = store
        self._staging.tickets[row : row + length] = store.ticket
        self._planned[1].append(Copy(store.ticket, row, tuple(block_ids(request.request_id)[first:stop])))

    def _held(self, text: _Text, ids: Ints, salt: str) -> list[int]:
        """Return how many leading blocks each tier has, as it says at once or has said; those count as used."""
        held, nothing = [], np.empty((0, self._staging.rows.shape[1]), np.uint8)
        for tier, earlier in zip(self._tiers, text.asked, strict=True):
            now = self._call(tier, partial(tier.match, ids, salt))
            answer = now if now.done() else earlier
            held.append(_answer(answer) if answer.done() else 0)
            if held[-1]:
                self._call(tier, partial(tier.store, ids[: held[-1] * self._size], nothing, salt))
        return held

    def _under_way(self, ids: Ints, salt: str, first: int) -> tuple[int, Future[int] | None]:
        """Return from where on blocks are neither in the tiers nor on their way, and what they have to wait for."""
        before = None
        for store in self._stores.values():
            if store.salt != salt or store.end.done() or store.clears != self._clears:
                continue
            length = min(len(ids), len(store.ids))
            is_same = (ids[:length] == store.ids[:length]).reshape(-1, self._size).all(axis=1)
            common = len(is_same) if is_same.all() else int(is_same.argmin())
            if common >= first and common > store.first:
                first, before = common, store.end
        return first, before

    def finished(self, request_id: str) -> None:
        """Forget a request."""
        self._texts.pop(request_id, None)
        self._sources.pop(request_id, None)

    def copied(self, done: Done) -> None:
        """Take note of what workers have done."""
        self._staging.unlink()  # they all have it open
        self._acks = self._acks.aggregate(done)
        for ticket in list(self._acks.copied | self._acks.failed):
            num_failed = self._acks.failed[ticket]
            if self._acks.copied[ticket] + num_failed < self._num_workers:
                continue
            del self._acks.copied[ticket], self._acks.failed[ticket]
            if ticket in self._loads:
                self._loads[ticket].is_used = False
                self._forgiven += [ticket] * bool(num_failed)
            elif num_failed:
                self._stores[ticket].end.set_result(0)
            else:
                self._copied(self._stores[ticket])

    def _copied(self, store: _Store) -> None:
        store.is_copied = True
        if store.before is None:
            self._hand_over(store)
        else:
            store.before.add_done_callback(lambda _: self._hand_over(store))

    def _hand_over(self, store: _Store) -> None:
        """Give copied blocks to the tiers. A thread of a tier may call it."""
        if store.clears != self._clears:
            store.end.set_result(0)
            return
        rows = self._staging.rows[store.row : store.row + store.stop - store.first]
        left, lock = [len(self._tiers)], threading.Lock()

        def note(_: Future[int]) -> None:
            with lock:
                left[0] -= 1
                is_last = not left[0]
            if is_last:
                store.end.set_result(store.stop)

        for tier in self._tiers:
            self._call(tier, partial(tier.store, store.ids, rows, store.salt)).add_done_callback(note)

    def _reap(self) -> None:
        """Take back rows that nobody needs any more."""
        for ticket, store in list(self._stores.items()):
            if store.end.done():
                del self._stores[ticket]
                self.figures.stored += max(0, store.end.result() - store.first)
                self._storing.give_back(store.row, store.stop - store.first)
        if not self._loads:
            return
        wanted = {load.ticket for text in self._texts.values() for load in text.loads or ()}
        for ticket, load in list(self._loads.items()):
            if ticket not in wanted and not load.is_used and load.coming.done():
                del self._loads[ticket]
                self._loading.give_back(load.row, load.stop - load.first)

    # All of it.

    def clear(self) -> bool:
        """Let every tier forget everything; tells whether all have."""
        self._clears += 1
        is_cleared = True
        for text in self._texts.values():
            text.asked, text.loads = [answered(0) for _ in self._tiers], []
        for tier in self._tiers:
            try:
                tier.clear()
            except Exception as error:
                logger.warning("tier %r was not cleared: %s", tier, error)
                is_cleared = False
        return is_cleared

    def close(self) -> None:
        """Let what is under way end, and close the tiers."""
        until = time.monotonic() + LONGEST_GOODBYE
        while any(store.is_copied and not store.end.done() for store in self._stores.values()):
            if time.monotonic() > until:
                break
            time.sleep(0.01)
        self._reap()
        self._staging.unlink()
        opened, self._opened = self._opened, []
        close_tiers(opened)


def _has_plain_tokens(request: EngineRequest) -> bool:
    """Tell whether keys and values follow from token ids and the model alone."""
    others = ("lora_request", "mm_features", "prompt_embeds", "prompt_is_token_ids", "pooling_params", "resumable")
    return not any(_is_set(getattr(request, name, None)) for name in others)


def _is_set(value: object) -> bool:
    return value is not None and value is not False and not (isinstance(value, (list, tuple)) and not value)


def _answer(future: Future[int]) -> int:
    """Return the blocks that a tier has answered with; a fault of its own is none."""
    return 0 if future.cancelled() or future.exception() is not None else int(future.result())


def _compile(block_size: int) -> None:
    """Compile what books of a tier call, before a request waits for it."""
    with HostTier(4 * 8, pinned=False) as tier:
        tier.open(BlockFormat("compiled", block_size, 8))
        ids, rows = np.arange(2 * block_size), np.zeros((2, 8), np.uint8)
        tier.store(ids % MAX_TOKEN, rows).result()
        tier.match(ids).result()
        tier.load(ids, rows).result()
        tier.clear()
