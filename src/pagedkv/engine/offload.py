"""Offload: what tiers have of a text is loaded while it waits, and what a text has computed is stored when it ends.

A text is looked up in the tiers when it arrives. What they have and the pool has not is loaded into memory of its own,
beside the steps; the text is passed over meanwhile, as one is that waits for another's prefix. When it is admitted,
what has come goes into the pool and its index, as if another sequence had computed it, and is found there. A text waits
for its load no longer than to compute that part would take, and a load that would take longer is not begun.

Each tier answers for itself: what a near one has is on its way while a far one is still asked. One that does not answer
in time is left out, and others are not asked to wait for it for a while (`tiers/ladder.py`).

Whoever gives up its blocks, at its end or for others, is stored before: so a preempted text comes back by the same way.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from pagedkv.engine.batch import Ids, common_prefix, may_share
from pagedkv.engine.request import Sequence, shares_prefixes
from pagedkv.engine.runner import Runner
from pagedkv.errors import OutOfMemory, bad_argument
from pagedkv.tiers.ladder import Ladder, Load
from pagedkv.tiers.moving import place_rows, read_rows
from pagedkv.tiers.rung import Rate
from pagedkv.tiers.tier import Tier, answered
from pagedkv.validate import shown

LEAST_PATIENCE = 0.05
"""Seconds that a text waits for a load at least: a thread may take so long to be heard."""

PATIENCE_UNMEASURED = 10.0
"""Seconds that it waits as long as no prompt was computed, so that nobody knows how long that takes."""

LONGEST_ASK = 0.25
"""Seconds that a text waits at most until tiers say what they have; those that did not by then are left out."""

LONGEST_WAIT = 1.0
FEWEST_MEASURED = 16  # tokens of prompts in a step that tell how fast prompts are computed
MOST_COMPARED = 16  # texts with loads under way that a new one is compared with


logger = logging.getLogger("pagedkv")


def ladder_for(runner: Runner, tiers: Iterable[Tier]) -> Ladder | None:
    """Open tiers for the blocks of a runner; None where there are none, or the model's blocks alone make no prefix.

    Raises
    ------
    InvalidOperation
        If something in `tiers` is no tier, or the runner has no model whose weights could be told from others.
    TierError
        If a medium cannot be had.
    """
    if isinstance(tiers, str) or not isinstance(tiers, Iterable):
        raise bad_argument("tiers", "a sequence of tiers", shown(tiers), "write [tier]")
    tiers = list(tiers)
    if not tiers:
        return None
    if runner.has_states or not shares_prefixes(runner):
        logger.warning("tiers are left alone: prefixes of this model or cache cannot be reused by their blocks alone")
        return None
    model = getattr(runner, "model", None)
    if hasattr(runner, "block_format"):
        return Ladder(tiers, runner.block_format)
    if model is None:
        raise bad_argument("tiers", "a runner with a model, or with a method block_format()", type(runner).__name__)
    from pagedkv.hf.pool import block_format

    cache: Any = runner.cache
    return Ladder(tiers, lambda: block_format(model, cache))


class Arrival:
    """What tiers have of a text that waits, and what of it is on its way.

    Attributes
    ----------
    asked : list of Future
        How many leading blocks each tier has, as long as some have not answered, or their loads have not begun.
    asked_at : float
        When they were asked.
    counts : list of int
        What those have answered that are nearer than any that has not.
    num_begun : int
        Tiers of `counts` whose loads have begun.
    start, stop : int
        Blocks from `start` on were not in the pool when it was looked up; those from `stop` on need not be loaded.
    parts : list of (Load, int)
        Loads, one behind the other, and the block up to which each is of this text.
    behind : list of (Load, int)
        The same of what it was looked up for before, which go on from `stop`.
    since : float or None
        When it was first held up by them, or something has come since then.
    come_by_then : int
        Where that ended which had come.
    """

    __slots__ = (
        "sequence",
        "asked",
        "asked_at",
        "counts",
        "num_begun",
        "start",
        "stop",
        "parts",
        "behind",
        "since",
        "come_by_then",
    )

    def __init__(self, sequence: Sequence, start: int) -> None:
        self.sequence, self.start = sequence, start
        self.parts: list[tuple[Load, int]] = []
        self.behind: list[tuple[Load, int]] = []
        self.ask([], start)

    def ask(self, asked: list[Future[int]], num_blocks: int) -> None:
        """Begin to wait for what tiers answer; what has come of its blocks, or is on its way, need not come again."""
        self.behind = self.all_parts
        self.stop = self.start if self.behind else num_blocks
        self.asked, self.asked_at = asked, time.monotonic()
        self.counts: list[int] = []
        self.num_begun, self.parts = 0, []
        self.since: float | None = None
        self.come_by_then = 0

    def no_more(self) -> None:
        """Wait for no answers any longer."""
        self.asked, self.counts, self.num_begun = [], [], 0

    @property
    def all_parts(self) -> list[tuple[Load, int]]:
        """All that has come or is on its way, one behind the other."""
        return self.parts + self.behind

    @property
    def is_asking(self) -> bool:
        """Whether a tier has not answered yet."""
        return not all(future.done() for future in self.asked)

    @property
    def is_settled(self) -> bool:
        """Whether all has come that will come."""
        return not self.asked and all(load.is_done for load, _ in self.all_parts)

    def come(self) -> tuple[int, int]:
        """Return the blocks [first, stop) that have come."""
        parts = self.all_parts
        first = stop = parts[0][0].first if parts else self.start
        for load, upto in parts:
            if load.first > stop:
                break
            stop = max(stop, min(load.first + (load.good or 0), upto))
        return first, stop

    def leave(self) -> None:
        """Let go of all loads."""
        for load, _ in self.all_parts:
            load.leave()
        self.parts, self.behind = [], []

    def leave_late(self) -> None:
        """Let go of the loads that have not come."""
        for load, _ in self.all_parts:
            if not load.is_done:
                load.leave()
        self.parts = [part for part in self.parts if part[0].is_done]
        self.behind = [part for part in self.behind if part[0].is_done]


class Offload:
    """Between one pool and the tiers of an engine. Of one thread, that of the steps.

    Parameters
    ----------
    cache : PagedKvCache
    ladder : Ladder
    seq_ids : iterator of int
        Ids that no sequence of the cache has.
    """

    def __init__(self, cache: Any, ladder: Ladder, seq_ids: Iterator[int]) -> None:
        self.cache, self.ladder = cache, ladder
        self._size: int = cache.block_size
        self.prefill = Rate()
        self._seq_ids = seq_ids
        self._arrivals: dict[Sequence, Arrival] = {}
        self._asking: dict[Sequence, Arrival] = {}  # of these, those of which no load has begun yet
        self._loading: dict[Sequence, Arrival] = {}  # and those that have loads, for others to share

    # Loads.

    def look(self, sequence: Sequence) -> None:
        """Find out what tiers have of a text that waits, and begin to load it."""
        if not may_share(sequence) or sequence.request.beams is not None:
            return
        ids = self._text(sequence)
        arrival = self._arrivals.get(sequence)
        if arrival is None:
            arrival = self._arrivals[sequence] = Arrival(sequence, self._held(sequence))
        asked = self.ladder.match(ids, sequence.request.cache_salt) if len(ids) else []
        arrival.ask(asked, len(ids) // self._size)
        if asked:
            self._asking[sequence] = arrival
            self._begin(arrival)

    def poll(self) -> None:
        """Begin the loads of those whose tiers have answered meanwhile."""
        self.ladder.news.clear()
        for arrival in list(self._asking.values()):
            self._begin(arrival)

    def awaits(self, sequence: Sequence) -> bool:
        """Tell whether a text that could be admitted is still to wait for what tiers have of it."""
        arrival = self._arrivals.get(sequence)
        if arrival is None or (arrival.is_settled and 0 < arrival.start > self._held(sequence)):
            # It was never looked up since it waits, or the pool has lost what it had: there may be more to load.
            self.look(sequence)
            arrival = self._arrivals.get(sequence)
        if arrival is None or arrival.is_settled:
            return False
        now, come = time.monotonic(), arrival.come()[1]
        if arrival.since is None or come > arrival.come_by_then:
            arrival.since, arrival.come_by_then = now, come
        if now - arrival.since < self._patience(arrival):
            return True
        if arrival.is_asking:
            self._leave_out(arrival)
            return not arrival.is_settled
        self._give_up(arrival)
        return False

    def staged(self, sequence: Sequence) -> int:
        """Return how many leading tokens of a text are in the pool once it is admitted, by what has come for it."""
        arrival = self._arrivals.get(sequence)
        return arrival.come()[1] * self._size if arrival is not None else 0

    def bring(self, sequence: Sequence) -> None:
        """Put what has come for a text into the pool, findable; the text is about to be admitted."""
        arrival = self._arrivals.get(sequence)
        if arrival is None:
            return
        first, stop = arrival.come()
        ids = self._text(sequence)[: stop * self._size]
        if stop > first and first <= self._held(sequence) < stop:
            parts = [
                (load.first, load.rows[: max(0, min(stop, upto) - load.first)]) for load, upto in arrival.all_parts
            ]
            with contextlib.suppress(OutOfMemory):  # then it is computed
                place_rows(self.cache, next(self._seq_ids), ids, parts, sequence.request.cache_salt)
        self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Let go of what tiers have of a text that waits no longer."""
        arrival = self._arrivals.pop(sequence, None)
        if arrival is not None:
            self._asking.pop(sequence, None)
            self._loading.pop(sequence, None)
            arrival.leave()

    def patience(self) -> float:
        """Return how many seconds until a text goes on without its load; 0 where one came since :meth:`poll`."""
        begun = [arrival for arrival in self._loading.values() if not arrival.is_settled]
        awaited = [*begun, *self._asking.values()]
        if self.ladder.news.is_set() or not awaited:
            return 0.0
        now = time.monotonic()
        waits = [arrival.since + self._patience(arrival) - now for arrival in awaited if arrival.since is not None]
        return max(0.0, min(waits, default=LONGEST_WAIT))

    def _text(self, sequence: Sequence) -> Ids:
        """Return the whole blocks of a text: of one that ends with its last token all other tokens can be shared."""
        return sequence.ids[: sequence.length // self._size * self._size]

    def _held(self, sequence: Sequence) -> int:
        """Return how many leading blocks of a text the pool has, and if only one with its last token lacks, all."""
        tokens: int = self.cache.match_blocks(sequence.ids, sequence.request.cache_salt)
        return (tokens + self._size) // self._size if sequence.length == tokens + self._size else tokens // self._size

    def _begin(self, arrival: Arrival) -> None:
        """Begin to load what tiers have and the pool has not, of those that have answered, if there is memory for it.

        A tier waits for the answers of those that are nearer: of what they have nothing comes from it.
        """
        arrival.counts += self.ladder.counts(arrival.asked, len(arrival.counts))
        if arrival.num_begun == len(arrival.counts):
            return
        sequence, stop = arrival.sequence, arrival.stop
        held = self._held(sequence)
        start = arrival.parts[-1][1] if arrival.parts else held
        counts = [0] * len(arrival.asked)
        for i in range(arrival.num_begun, len(arrival.counts)):
            counts[i] = min(arrival.counts[i], stop)
        parts: list[tuple[Load, int]] = []
        if max(counts) > start:
            parts, start = self._shared(arrival, start, stop)
        if max(counts) > start:
            text, salt = self._text(sequence), sequence.request.cache_salt
            loads = self.ladder.load(text, salt, counts, start, self._compute_seconds(1))
            if loads is None:  # there is no memory now; what it could share is asked for again, too
                for load, _ in parts:
                    load.leave()
                return
            parts += [(load, load.stop) for load in loads]
        if not arrival.parts:
            arrival.start = held
        arrival.parts += parts
        arrival.num_begun = len(arrival.counts)
        if arrival.num_begun == len(arrival.asked):
            arrival.no_more()
            del self._asking[sequence]
        if arrival.parts or arrival.behind:
            self._loading[sequence] = arrival

    def _shared(self, arrival: Arrival, start: int, stop: int) -> tuple[list[tuple[Load, int]], int]:
        """Join the loads of other texts that begin alike, from block `start` on; returns them, and where they end."""
        mine = arrival.sequence
        parts: list[tuple[Load, int]] = []
        for other in itertools.islice(reversed(self._loading.values()), MOST_COMPARED):
            if other is arrival or other.sequence.request.cache_salt != mine.request.cache_salt:
                continue
            common = min(stop, common_prefix(self._text(mine), self._text(other.sequence)) // self._size)
            for load, upto in other.all_parts:
                end = min(common, upto)
                if load.first <= start < end:
                    parts.append((load.join(), end))
                    start = end
        return parts, start

    def _patience(self, arrival: Arrival) -> float:
        """Return how many seconds a text waits: as long as it would take to compute what it waits for."""
        parts = arrival.all_parts
        stop = arrival.stop if arrival.asked or not parts else max(upto for _, upto in parts)
        seconds = self._compute_seconds(max(1, stop - arrival.come()[1]))
        seconds = PATIENCE_UNMEASURED if seconds is None else max(seconds, LEAST_PATIENCE)
        return min(seconds, LONGEST_ASK) if arrival.is_asking else seconds

    def _compute_seconds(self, num_blocks: int) -> float | None:
        """Return how long it takes to compute blocks of a prompt; None where no prompt was computed yet."""
        rate = self.prefill.per_second
        return None if rate is None else num_blocks * self._size / rate

    def _leave_out(self, arrival: Arrival) -> None:
        """Go on without the tiers that have not said what they have: the others may have some of it."""
        for i, rung in enumerate(self.ladder.rungs):
            if not arrival.asked[i].done():
                rung.no_match(arrival.asked_at)
                arrival.asked[i] = answered(0)
        arrival.since = None
        self._begin(arrival)

    def _give_up(self, arrival: Arrival) -> None:
        """Let a text be computed without what has not come."""
        late = {load.rung: load.began for load, _ in arrival.all_parts if not load.is_done}
        for rung, began in late.items():
            rung.no_load(began)
        if arrival.asked and not late:  # there was no memory for it
            for rung in self.ladder.rungs:
                rung.count(late=1)
        arrival.no_more()
        self._asking.pop(arrival.sequence, None)
        arrival.leave_late()

    # Stores.

    def measure(self, num_prompt_tokens: int, seconds: float) -> None:
        """Note how long a step took that computed so many tokens of prompts."""
        if num_prompt_tokens >= FEWEST_MEASURED:
            self.prefill.note(num_prompt_tokens, seconds)

    def keep(self, sequence: Sequence) -> None:
        """Store what a running text has written; it is about to give up its blocks."""
        request = sequence.request
        if not may_share(sequence) or sequence.dropped:
            return
        if request.beams is not None and sum(each.is_running for each in request.sequences) > 1:
            return
        info = self.cache.get_sequence(sequence.seq_id)
        written = min(info.num_committed_tokens, sequence.length)
        if request.beams is not None:  # most of what beams write is thrown away
            written = min(written, request.num_prompt_tokens)
        count = written // self._size
        if count:
            storage, table = self.cache.storage, info.block_table
            ids = sequence.ids[: count * self._size]
            self.ladder.store(ids, request.cache_salt, lambda first: read_rows(storage, table[first:count]))

    # All of it.

    def clear(self) -> None:
        """Forget what is on its way, and all that tiers hold."""
        self._forget_all()
        self.ladder.clear()

    def close(self) -> None:
        """Finish what is under way and close the tiers."""
        self._forget_all()
        self.ladder.close()

    def _forget_all(self) -> None:
        for sequence in list(self._arrivals):
            self.forget(sequence)
