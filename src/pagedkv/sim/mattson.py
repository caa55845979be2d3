"""Exact LRU hits at every capacity in one pass (Mattson et al. 1970, "Evaluation techniques for storage hierarchies").

LRU keeps the first C blocks of a stack that is ordered by last use, so a block is a hit for every capacity that reaches
its place in the stack. A request moves its blocks to the top, its head first: an ancestor stands above its descendants.

- So the cached blocks are closed under prefixes at every capacity, and the hits of a request are its blocks whose place
  *before the request* is at most C.
- The blocks that were last used by the same request stand together, and of those a later request takes the upper part.
  So the blocks of a request fall into few **runs**, each last used by one earlier request, each a contiguous piece of
  the stack. One look into a Fenwick tree over *requests* places a whole run; its hits are a range to which 1 is added.

N accesses in r runs take O(N + r log r) instead of O(N log M).

A tree slot belongs to a request that still holds blocks; when the slots run out, those without blocks are squeezed out,
so memory follows the number of distinct blocks and not the length of the trace.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagedkv.jit import compiled
from pagedkv.sim.trace import Trace

__all__ = ["NEVER", "SKIPPED", "stack_gains"]

# Last uses of a block: no request yet, and a block that a sample leaves out.
NEVER, SKIPPED = -1, -2
_END = -3

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

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

    Parameters
    ----------
    trace : Trace
    last_use : int32 [num_distinct]
        NEVER for the blocks to follow, SKIPPED for those to overlook. Is overwritten.
    num_blocks : int
        Blocks to follow.

    Returns
    -------
    gains : int64 [2, num_blocks + 2]
        The running sum of row 0 is the hits that a capacity has more than the one below it, of row 1 the input tokens.
    (accesses, tokens) : int
        Accesses to the blocks that were followed, and the input tokens that they stand for.
    """
    gains = np.zeros((2, num_blocks + 2), np.int64)
    slots = max(_FEWEST_SLOTS, min(trace.num_requests, 2 * num_blocks))
    found = _add_gains(
        np.asarray(trace.ids),
        np.asarray(trace.offsets),
        np.asarray(trace.input_tokens),
        trace.block_tokens,
        last_use,
        np.zeros(slots, np.int32),
        gains[0],
        gains[1],
    )
    return gains, found
