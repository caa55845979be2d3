"""How attention on the CPU is cut into items of work, once for all layers of a step.

Query tokens of a sequence are cut into *pieces*, keys into *splits* at fixed positions; an item is the work of one or
more pieces over the positions of one split. A piece of a split leaves a partial softmax; see ``cpu_kernels``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.data.simd import LANES, ROWS
from pagedkv.jit import compiled, inlined

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

TILE = 32
"""Positions whose scores are held at a time."""
SPLIT = 512
"""Positions of a work item: 2 MB of bfloat16 keys and values at 8 heads of 128."""
PIECE = 32
"""Query tokens that are worked on together."""


class Shape(NamedTuple):
    """Sizes of the pool and the heads."""

    block_size: int
    num_kv_heads: int
    group: int
    head_dim: int
    v_head_dim: int
    item_bytes: int


class Rules(NamedTuple):
    """What happens to a score, and which keys a query sees."""

    scale: np.float32
    cap: np.float32
    causal: bool
    window: int


class Plan(NamedTuple):
    """What there is to do; of int64.

    Attributes
    ----------
    items : [num_items, 5]
        First of its members, number of members, first and last (exclusive) position, and the item that has to be done
        before, which comes earlier, or -1.
    members : [num_members]
        Pieces, item by item.
    pieces : [num_pieces, 9]
        Sequence, first query token of the batch, number of query tokens, position of the first one, end of the keys,
        first of its partials, number of its splits, the first split, number of its items.
    num_counters, num_partials, most_quads, num_positions : int
        Counters and partial softmaxes of four rows (``partial_size`` floats each) that a call needs; the most fours of
        rows that an item has of a head; positions over all items.
    """

    items: Ints
    members: Ints
    pieces: Ints
    num_counters: int
    num_partials: int
    most_quads: int
    num_positions: int


@compiled
def padded(dim: int) -> int:
    """Return a row's length in whole lanes."""
    return (dim + LANES - 1) // LANES * LANES


@compiled
def partial_size(v_head_dim: int) -> int:
    """Return the floats that four rows leave behind: maximum and sum by lane, then the weighted values."""
    return 2 * LANES + ROWS * padded(v_head_dim)


@inlined
def _count_pieces(cu_seqlens_q: Array, most_queries: int) -> int:
    count = 0
    for i in range(len(cu_seqlens_q) - 1):
        num_queries = int(cu_seqlens_q[i + 1] - cu_seqlens_q[i])
        if num_queries <= most_queries:
            count += (num_queries + PIECE - 1) // PIECE
    return count


@compiled
def plan_items(
    block_tables: Array,
    seq_lens: Array,
    cu_seqlens_q: Array,
    holes: Array,
    most_queries: int,
    rules: Rules,
    shape: Shape,
) -> Plan:
    """Cut the sequences of at most ``most_queries`` query tokens into pieces and items."""
    pieces = np.empty((_count_pieces(cu_seqlens_q, most_queries), 9), np.int64)
    piece, num_items, num_partials, most_quads, num_positions = 0, 0, 0, 0, 0
    for i in range(len(seq_lens)):
        first, last, seq_len = int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]), int(seq_lens[i])
        if last - first > most_queries:
            continue
        for query in range(first, last, PIECE):
            num_queries = min(PIECE, last - query)
            position = seq_len - last + query
            end = position + num_queries if rules.causal else seq_len
            # At a tile's edge, so that the tiles of a query do not depend on the queries beside it.
            low = max(0, position - rules.window + 1) // TILE * TILE
            num_splits = (end - 1) // SPLIT - low // SPLIT + 1
            quads = (num_queries * shape.group + ROWS - 1) // ROWS
            pieces[piece, 0], pieces[piece, 1], pieces[piece, 2] = i, query, num_queries
            pieces[piece, 3], pieces[piece, 4], pieces[piece, 5] = position, end, num_partials
            pieces[piece, 6], pieces[piece, 7], pieces[piece, 8] = num_splits, low // SPLIT, num_splits
            piece += 1
            num_items += num_splits
            num_partials += num_splits * quads * shape.num_kv_heads
            most_quads = max(most_quads, quads)
            num_positions += end - low
    items, members = np.empty((num_items, 5), np.int64), np.empty(num_items, np.int64)
    item = 0
    for piece in range(len(pieces)):
        position, end = pieces[piece, 3], pieces[piece, 4]
        low = max(0, position - rules.window + 1) // TILE * TILE
        for split in range(pieces[piece, 7], pieces[piece, 7] + pieces[piece, 6]):
            items[item, 0], items[item, 1] = item, 1
            items[item, 2], items[item, 3] = max(low, split * SPLIT), min(end, (split + 1) * SPLIT)
            items[item, 4] = -1
            members[item] = piece
            item += 1
    num_counters = 1 + len(pieces) + len(items)
    return Plan(items, members, pieces, num_counters, num_partials, most_quads, num_positions)
