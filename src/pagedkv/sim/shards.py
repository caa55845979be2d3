"""The LRU curve from a sample of the blocks: SHARDS (Waldspurger et al., FAST'15), for traces of billions of accesses.

A block is in the sample when a hash of its id is below a threshold (section 3.1), so all of its accesses are or none.
Prefixes survive this: an ancestor stands above its descendants in the LRU stack, so a block is a hit by its own place
alone, and the sampled blocks of a request still form a chain, as the exact pass wants it. A place p in the stack of the
sample stands for the place 1 + (p − 1) / R in the whole stack, since only the p − 1 blocks above were thinned out.

The paper wants a hash that scatters. Ours spreads the sample evenly instead: ids count up in the order of first
appearance, so neighbours come from the same request and often share its fate, and a sample that takes every 1/R-th of
them errs less than one that leaves their number to chance.

Two things are known of the whole trace and mend the sample. Its number of distinct blocks gives R as it came out, not
as it was asked for. And its number of accesses shows how many the sample has too few or too many: the block that starts
every request is in the sample or not, and with it a hit for every request. The difference belongs to blocks that are
used all the time, and is put to the smallest capacity (SHARDS-adj).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagedkv.errors import InvalidOperation
from pagedkv.sim.hit_curve import HitCurve, require_content
from pagedkv.sim.mattson import NEVER, SKIPPED, stack_gains
from pagedkv.sim.trace import Trace
from pagedkv.spec import require_int

__all__ = ["shards_curve"]

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
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.number)) or not 0 < rate <= 1:
        raise InvalidOperation(f"rate expects a number above 0, at most 1, got {rate!r}")
    return round(float(rate) * _HASHES)


def _scaled(trace: Trace, gains: npt.NDArray[np.int64], found: tuple[int, int], rate: float) -> HitCurve:
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
