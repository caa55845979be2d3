"""The LRU curve of a trace: its hits at every capacity, exact or from a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.jit import compiled
from pagedkv.sim.trace import Floats, Int32s, Int64s, Trace, require_content
from pagedkv.validate import require_int, require_number

# Hits against capacity, as a step function.


@dataclass(frozen=True, eq=False)
class HitCurve:
    """How many hits a cache of so many blocks has; between two points the count is that of the lower one.

    Attributes
    ----------
    blocks : int64 [points]
        Capacities, ascending; the first is 0.
    hit_blocks, hit_tokens : int64 [points], or float64 where they are estimates
        Blocks found, and input tokens in them. The last point is what a cache without a limit finds.
    accesses, tokens : int
        Blocks touched, and input tokens, of the whole trace.
    """

    blocks: Int64s
    hit_blocks: npt.NDArray[np.integer | np.floating]
    hit_tokens: npt.NDArray[np.integer | np.floating]
    accesses: int
    tokens: int

    @property
    def hit_ratio(self) -> Floats:
        """Blocks found over blocks touched, float64 [points]."""
        return np.asarray(self.hit_blocks / max(1, self.accesses), np.float64)

    @property
    def token_hit_ratio(self) -> Floats:
        """Input tokens found over input tokens, float64 [points]."""
        return np.asarray(self.hit_tokens / max(1, self.tokens), np.float64)

    @property
    def attainable(self) -> float:
        """The block hit ratio of a cache without a limit."""
        return float(self.hit_ratio[-1])

    @property
    def token_attainable(self) -> float:
        """The token hit ratio of a cache without a limit."""
        return float(self.token_hit_ratio[-1])

    @overload
    def at(self, blocks: int, *, tokens: bool = False) -> float: ...
    @overload
    def at(self, blocks: npt.NDArray[np.integer | np.floating], *, tokens: bool = False) -> Floats: ...
    def at(self, blocks: int | npt.NDArray[np.integer | np.floating], *, tokens: bool = False) -> float | Floats:
        """Return the hit ratio of a cache of so many blocks, any number from 0; `tokens` for the token hit ratio."""
        if np.any(np.asarray(blocks) < 0):
            raise bad_argument("blocks", "capacities from 0", f"{blocks}")
        places = np.searchsorted(self.blocks, blocks, side="right") - 1
        hits, whole = (self.hit_tokens, self.tokens) if tokens else (self.hit_blocks, self.accesses)
        ratios = np.asarray(hits[places] / max(1, whole), np.float64)
        return float(ratios) if np.ndim(blocks) == 0 else ratios

    def split(self, *blocks: int, tokens: bool = False) -> Floats:
        """Return the hit ratios of a pool and of the tiers beneath it, float64 [levels], given the blocks of each.

        Exact where every level is LRU, every request is stored in every tier when it ends, and what is loaded stays
        there: each level then holds what a pool of its size would, so a tier finds what the curve gains beyond the
        largest level above it. A restart takes hits away from the pool alone, and the disk has them where it is no
        smaller. Other strategies, writing at another time and exclusive tiers have to be replayed.

        Parameters
        ----------
        *blocks : int
            Capacities from 0, that of the pool first.
        tokens : bool
            Whether token hit ratios are asked for.
        """
        reach = np.maximum.accumulate(self.at(np.array(blocks, np.int64), tokens=tokens))
        return np.diff(reach, prepend=0.0)

    def blocks_for(self, hit_ratio: float, *, tokens: bool = False) -> int | None:
        """Return the fewest blocks that reach this hit ratio, or None where none do; `tokens` for the token ratio."""
        if not hit_ratio >= 0:
            raise bad_argument("hit_ratio", "a number from 0", f"{hit_ratio!r}")
        ratios = self.token_hit_ratio if tokens else self.hit_ratio
        place = int(np.searchsorted(ratios, hit_ratio))
        return int(self.blocks[place]) if place < len(self.blocks) else None


def knee(curve: HitCurve, *, tokens: bool = False) -> int:
    """Return the capacity beyond which doubling the memory pays off less than before: the knee of the curve.

    It is the point farthest above the chord from the first capacity with hits to the last that gains any, capacity on
    a logarithmic scale (the maximum of the difference curve of Satopää et al. 2011, "Finding a 'Kneedle' in a
    haystack", section III, without its smoothing and its sensitivity, so that nothing has to be chosen). A curve that
    never rises above its chord has no knee: its last capacity is returned. 0 for a curve without hits.
    """
    hits = np.asarray(curve.hit_tokens if tokens else curve.hit_blocks, np.float64)
    rising = np.flatnonzero(np.diff(hits, prepend=0.0) > 0)
    if not len(rising):
        return 0
    capacity, gain = curve.blocks[rising], hits[rising]
    if len(rising) == 1:
        return int(capacity[0])
    reach = np.log(capacity)
    across = (reach - reach[0]) / (reach[-1] - reach[0])
    above = (gain - gain[0]) / (gain[-1] - gain[0]) - across
    return int(capacity[len(above) - 1 - np.argmax(above[::-1])])


# Exact LRU hits at every capacity in one pass (Mattson et al. 1970, "Evaluation techniques for storage hierarchies").
#
# LRU keeps the first C blocks of a stack that is ordered by last use, so a block is a hit for every capacity that
# reaches its place in the stack. A request moves its blocks to the top, its head first: an ancestor stands above its
# descendants.
#
# - So the cached blocks are closed under prefixes at every capacity, and the hits of a request are its blocks whose
# place *before the request* is at most C. - The blocks that were last used by the same request stand together, and of
# those a later request takes the upper part. So the blocks of a request fall into few **runs**, each last used by one
# earlier request, each a contiguous piece of the stack. One look into a Fenwick tree over *requests* places a whole
# run; its hits are a range to which 1 is added.
#
# N accesses in r runs take O(N + r log r) instead of O(N log M).
#
# A tree slot belongs to a request that still holds blocks; when the slots run out, those without blocks are squeezed
# out, so memory follows the number of distinct blocks and not the length of the trace.

# Last uses of a block: no request yet, and a block that a sample leaves out.
NEVER, SKIPPED = -1, -2
_END = -3

# At most one slot for each block holds any, so twice as many are squeezed at most every num_blocks requests.
_FEWEST_SLOTS = 4


@compiled
def _add(tree: Int32s, slot: int, blocks: int) -> None:
    place = slot + 1
    while place < len(tree):
        tree[place] += blocks
        place += place & -place


@compiled
def _up_to(tree: Int32s, slot: int) -> int:
    total = 0
    place = slot + 1
    while place > 0:
        total += tree[place]
        place -= place & -place
    return total


@compiled
def _squeeze(tree: Int32s, held: Int32s, last_use: Int32s) -> int:
    """Number the slots that hold blocks anew, in their order; returns how many there are."""
    renamed = np.empty(len(held), np.int32)
    used = 0
    for slot in range(len(held)):
        blocks = held[slot]
        held[slot] = 0
        if blocks > 0:
            renamed[slot] = used
            held[used] = blocks
            used += 1
    for block in range(len(last_use)):
        if last_use[block] >= 0:
            last_use[block] = renamed[last_use[block]]
    tree[:] = 0
    for slot in range(used):
        _add(tree, slot, held[slot])
    return used


@compiled
def _count_run(first: int, blocks: int, tokens: int, block_tokens: int, block_gain: Int64s, token_gain: Int64s) -> None:
    """Count a run that stands at the places ``first … first + blocks − 1``: whole blocks of tokens, then a part."""
    block_gain[first] += 1
    block_gain[first + blocks] -= 1
    part_at = first + tokens // block_tokens
    token_gain[first] += block_tokens
    token_gain[part_at] -= block_tokens
    part = tokens % block_tokens
    if part > 0:
        token_gain[part_at] += part
        token_gain[part_at + 1] -= part


@compiled
def _add_gains(
    ids: Int32s,
    offsets: Int64s,
    input_tokens: Int64s,
    block_tokens: int,
    last_use: Int32s,
    held: Int32s,
    block_gain: Int64s,
    token_gain: Int64s,
) -> tuple[int, int]:
    """Fill the gains, whose running sum is what each capacity finds more than the one below; see `stack_gains`."""
    tree = np.zeros(len(held) + 1, np.int32)
    stacked, slot = 0, 0
    accesses, tokens = 0, 0
    for request in range(len(offsets) - 1):
        if slot == len(held):
            slot = _squeeze(tree, held, last_use)
        start, stop = offsets[request], offsets[request + 1]
        tokens_left = input_tokens[request]
        seen = 0
        run, run_blocks, run_tokens = NEVER, 0, 0
        for i in range(start, stop + 1):
            last = _END
            if i < stop:
                worth = min(tokens_left, block_tokens)
                tokens_left -= worth
                last = last_use[ids[i]]
                if last == SKIPPED:
                    continue
            if last != run:
                if run >= 0:
                    # Above it stand the blocks of later requests, and those that this request already lifted off.
                    above = stacked - _up_to(tree, run) + seen - run_blocks
                    _count_run(above + 1, run_blocks, run_tokens, block_tokens, block_gain, token_gain)
                    _add(tree, run, -run_blocks)
                    held[run] -= run_blocks
                    stacked -= run_blocks
                run, run_blocks, run_tokens = last, 0, 0
            if i < stop:
                last_use[ids[i]] = slot
                seen += 1
                run_blocks += 1
                run_tokens += worth
                tokens += worth
        accesses += seen
        if seen > 0:
            _add(tree, slot, seen)
            held[slot] = seen
            stacked += seen
            slot += 1
    return accesses, tokens


def stack_gains(trace: Trace, last_use: Int32s, num_blocks: int) -> tuple[Int64s, tuple[int, int]]:
    """Find the place in the LRU stack of every block that is used again.

    `last_use` says NEVER for the `num_blocks` blocks to follow, SKIPPED for those to overlook; it is overwritten.
    Returns the gains, int64 [2, num_blocks + 2], and the accesses to the blocks followed with the input tokens that
    they stand for. The running sum of row 0 is the hits that a capacity has more than the one below it, of row 1 the
    input tokens.
    """
    gains = np.zeros((2, num_blocks + 2), np.int64)
    slots = max(_FEWEST_SLOTS, min(trace.num_requests, 2 * num_blocks))
    ids, offsets, tokens = np.asarray(trace.ids), np.asarray(trace.offsets), np.asarray(trace.input_tokens)
    held = np.zeros(slots, np.int32)
    return gains, _add_gains(ids, offsets, tokens, trace.block_tokens, last_use, held, gains[0], gains[1])


# The LRU curve from a sample of the blocks: SHARDS (Waldspurger et al., FAST'15), for traces of billions of accesses.
#
# A block is in the sample when a hash of its id is below a threshold (section 3.1), so all of its accesses are or
# none. Prefixes survive this: an ancestor stands above its descendants in the LRU stack, so a block is a hit by its
# own place alone, and the sampled blocks of a request still form a chain, as the exact pass wants it. A place p in
# the stack of the sample stands for the place 1 + (p − 1) / R in the whole stack, since only the p − 1 blocks above
# were thinned out.
#
# The paper wants a hash that scatters. Ours spreads the sample evenly instead: ids count up in the order of first
# appearance, so neighbours come from the same request and often share its fate, and a sample that takes every 1/R-th
# of them errs less than one that leaves their number to chance.
#
# Two things are known of the whole trace and mend the sample. Its number of distinct blocks gives R as it came out,
# not as it was asked for. And its number of accesses shows how many the sample has too few or too many: the block
# that starts every request is in the sample or not, and with it a hit for every request. The difference belongs to
# blocks that are used all the time, and is put to the smallest capacity (SHARDS-adj).

_HASHES = 2**32
_GOLDEN, _SPREAD = 0x9E3779B9, 0x85EBCA6B


def shards_curve(trace: Trace, rate: float | None = None, *, max_blocks: int | None = None, seed: int = 0) -> HitCurve:
    """Return an estimate of `lru_curve` from a sample of the blocks.

    Mean absolute error of the hit ratio over 200 log-spaced capacities, as the mean and the worst of 20 samples
    (``benchmarks/curves.py``): of 10% of the blocks 0.0017 and 0.005 on an hour of chats (18,279 blocks sampled),
    0.006 and 0.022 on coding agents (4,485); of 8,192 blocks 0.003 and 0.007, and 0.004 and 0.010. A few hundred blocks
    are too few: 1% of the coding agents (448) errs by 0.04, at worst by 0.11.

    Parameters
    ----------
    trace : Trace
    rate : float
        Fixed-rate SHARDS (section 3.2): the part of the blocks to sample, above 0, at most 1 (which is exact).
    max_blocks : int
        Fixed-size SHARDS (section 3.3) instead: how many blocks to sample. The threshold that it would sink to is
        known beforehand here, so the whole trace is sampled with it.
    seed : int
        Picks the sample; 0 … 2³²−1.

    Returns
    -------
    HitCurve
        With hits as float64.

    Raises
    ------
    InvalidOperation
        If the trace carries lengths only, not exactly one of `rate` and `max_blocks` is given, one is out of range, or
        the sample is empty.
    """
    require_content(trace)
    hashes = _hashes(trace.num_distinct, require_int("seed", seed, 0, _HASHES - 1))
    last_use = np.where(hashes < _threshold(hashes, rate, max_blocks), np.int32(NEVER), np.int32(SKIPPED))
    del hashes
    sampled = int(np.count_nonzero(last_use == NEVER))
    if not sampled and trace.num_distinct:
        raise InvalidOperation(f"rate {rate} of {trace.num_distinct} blocks is an empty sample: raise it")
    gains, found = stack_gains(trace, last_use, sampled)
    return _scaled(trace, gains, found, sampled / max(1, trace.num_distinct))


def _hashes(count: int, seed: int) -> npt.NDArray[np.uint32]:
    """Return a hash of every id; those below any threshold are spread evenly over the ids (Fibonacci hashing)."""
    hashes = np.arange(count, dtype=np.uint32)
    hashes *= np.uint32(_GOLDEN)
    hashes += np.uint32((seed + 1) * _SPREAD % _HASHES)
    return hashes


def _threshold(hashes: npt.NDArray[np.uint32], rate: float | None, max_blocks: int | None) -> int:
    """Return the threshold below which the hashes of sampled blocks lie."""
    if (rate is None) == (max_blocks is None):
        raise InvalidOperation(f"expected either rate or max_blocks, got rate={rate!r}, max_blocks={max_blocks!r}")
    if max_blocks is not None:
        size = require_int("max_blocks", max_blocks, 1, _HASHES)
        return int(np.partition(hashes, size)[size]) if size < len(hashes) else _HASHES
    return round(require_number("rate", rate, 0, 1, above=True) * _HASHES)


def _scaled(trace: Trace, gains: Int64s, found: tuple[int, int], rate: float) -> HitCurve:
    """Return the curve of the whole trace, given the gains of the sample, its accesses and its tokens."""
    accesses, tokens = trace.num_accesses, trace.num_tokens
    in_blocks = trace.hit_tokens(np.diff(trace.offsets))
    places = np.flatnonzero(np.cumsum(gains, axis=1, out=gains)[0])
    places = np.union1d(places, [1]) if rate else places  # blocks that are used all the time are found from 1 on
    hits = np.cumsum(gains, axis=1, out=gains)[:, places].astype(np.float64)
    missing = np.array([[accesses * rate - found[0]], [in_blocks * rate - found[1]]])
    hits = np.clip((hits + missing) / rate, 0.0, np.array([[accesses], [in_blocks]]))
    blocks = np.concatenate([[0], np.ceil(1 + (places - 1) / rate).astype(np.int64)])
    hits = np.concatenate([np.zeros((2, 1)), hits], axis=1)
    return HitCurve(blocks, hits[0], hits[1], accesses, tokens)


def lru_curve(trace: Trace) -> HitCurve:
    """Return the hits of LRU at every capacity, exact to the count.

    Leaf LRU, which is what the cache does, and LRU that touches the tail of a request first find the same blocks, also
    where a request is larger than the cache.

    Parameters
    ----------
    trace : Trace

    Returns
    -------
    HitCurve
        A point for every capacity that has more hits than the one below it.

    Raises
    ------
    InvalidOperation
        If the trace carries lengths only.
    """
    require_content(trace)
    count = trace.num_distinct
    gains, _ = stack_gains(trace, np.full(count, NEVER, np.int32), count)
    gains = np.cumsum(gains, axis=1, out=gains)  # of each capacity over the one below it
    points = np.concatenate([[0], np.flatnonzero(gains[0])])
    hits = np.cumsum(gains, axis=1, out=gains)
    return HitCurve(points, hits[0][points], hits[1][points], trace.num_accesses, trace.num_tokens)
