"""How attention on the CPU is cut into items of work, once for all layers of a step.

Query tokens of a sequence are cut into *pieces*, keys into *splits* at fixed positions; an item is the work of one or
more pieces over positions of one split, or that of one piece over all of them. What an item leaves behind is a partial
softmax for each piece, see ``cpu_kernels``, and it may go on from that of another item that ended within the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.data.simd_llvm import LANES, ROWS
from pagedkv.jit import called, compiled, inlined

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

TILE = 64
"""Positions whose scores are held at a time."""
SPLIT = 512
"""Positions of a work item: 2 MB of bfloat16 keys and values at 8 heads of 128."""
MOST_QUERIES = 32
"""Query tokens of a piece."""
SHARED_QUADS = 8
"""Fours of rows of a head, at most, for which an item reads what several sequences have in common."""
LEAST_SAVED = 128
"""Positions, over all members, that a group must save."""


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


class ItemColumns(NamedTuple):
    """Columns of ``Plan.items``: positions start … end of one split, or of all splits where ``is_whole``.

    ``first_before`` and ``num_before`` name earlier items that have to be done first.
    """

    first_member: int
    num_members: int
    start: int
    end: int
    first_before: int
    num_before: int
    is_whole: int


class PieceColumns(NamedTuple):
    """Columns of ``Plan.pieces``.

    ``first_query`` counts in the batch; it stands at ``position`` of its sequence. Nothing outside of ``low``, a tile's
    edge, to ``end`` is seen. Items with other pieces have done all before ``own``, and are ``first_before`` and
    ``num_before`` of an item that goes on within the same split.
    """

    sequence: int
    first_query: int
    num_queries: int
    position: int
    low: int
    end: int
    first_partial: int
    is_whole: int
    num_items: int
    own: int
    first_before: int
    num_before: int


ITEM, PIECE = ItemColumns(*range(7)), PieceColumns(*range(12))


class Plan(NamedTuple):
    """What there is to do.

    Attributes
    ----------
    items : int64 [num_items, 7]
        Columns as in :class:`ItemColumns`.
    members : int64 [num_members]
        Pieces, item by item.
    pieces : int64 [num_pieces, 12]
        Columns as in :class:`PieceColumns`.
    num_counters, num_partials, most_quads, num_positions : int
        Counters and partial softmaxes of four rows (``partial_size`` floats each) that a call needs; the most fours of
        rows that an item has of a head; positions over all pieces.
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
def quads_of(num_queries: int, shape: Shape) -> int:
    """Return how many fours of rows some query tokens have of one kv head."""
    return (num_queries * shape.group + ROWS - 1) // ROWS


@compiled
def plan_items(
    block_tables: Array,
    seq_lens: Array,
    cu_seqlens_q: Array,
    holes: Array,
    rules: Rules,
    shape: Shape,
) -> Plan:
    """Plan for all sequences.

    A sequence that is cut into pieces has work enough for all threads: each of them is one item, without partials. Else
    each split of a sequence is an item; and where sequences begin with the same blocks, their rows are scored against
    them together.
    """
    pieces, num_partials = _cut(seq_lens, cu_seqlens_q, rules, shape)
    most_items, most_quads, num_positions = 0, 0, 0
    for p in range(len(pieces)):
        # At most one for each tile.
        most_items += 1 if pieces[p, PIECE.is_whole] else (pieces[p, PIECE.end] - pieces[p, PIECE.low]) // TILE + 1
        most_quads = max(most_quads, quads_of(pieces[p, PIECE.num_queries], shape))
        num_positions += pieces[p, PIECE.end] - pieces[p, PIECE.low]
    items, members = np.empty((most_items, len(ITEM)), np.int64), np.empty(most_items, np.int64)
    num_items, num_members = _share(pieces, block_tables, holes, shape, items, members)
    if num_items:
        most_quads = max(most_quads, SHARED_QUADS)
    for p in range(len(pieces) - 1, -1, -1):  # those with the most keys first
        if pieces[p, PIECE.is_whole]:
            members[num_members] = p
            _put(items, num_items, num_members, 1, pieces[p, PIECE.low], pieces[p, PIECE.end], 0, 0, 1)
            num_items, num_members = num_items + 1, num_members + 1
            pieces[p, PIECE.num_items] += 1
    for waits in range(2):  # those that wait for nobody first
        for p in range(len(pieces)):
            start, end = pieces[p, PIECE.own], pieces[p, PIECE.end]
            if pieces[p, PIECE.is_whole]:
                continue
            while start < end:
                stop = min(end, (start // SPLIT + 1) * SPLIT)
                before = pieces[p, PIECE.num_before] if start == pieces[p, PIECE.own] and start % SPLIT else 0
                if (before > 0) == (waits == 1):
                    members[num_members] = p
                    _put(items, num_items, num_members, 1, start, stop, pieces[p, PIECE.first_before], before, 0)
                    num_items, num_members = num_items + 1, num_members + 1
                    pieces[p, PIECE.num_items] += 1
                start = stop
    num_counters = 1 + len(pieces) + num_items
    return Plan(items[:num_items], members[:num_members], pieces, num_counters, num_partials, most_quads, num_positions)


@called
def _put(
    items: Ints,
    item: int,
    first_member: int,
    num_members: int,
    start: int,
    end: int,
    first_before: int,
    num_before: int,
    is_whole: int,
) -> None:
    items[item, ITEM.first_member], items[item, ITEM.num_members] = first_member, num_members
    items[item, ITEM.start], items[item, ITEM.end] = start, end
    items[item, ITEM.first_before], items[item, ITEM.num_before] = first_before, num_before
    items[item, ITEM.is_whole] = is_whole


@called
def _cut(seq_lens: Array, cu_seqlens_q: Array, rules: Rules, shape: Shape) -> tuple[Ints, int]:
    """Return the pieces of all sequences, nothing shared as yet, and how many partials they need."""
    count = 0
    for i in range(len(seq_lens)):
        num_queries = int(cu_seqlens_q[i + 1] - cu_seqlens_q[i])
        count += (num_queries + MOST_QUERIES - 1) // MOST_QUERIES
    pieces, num_partials, p = np.zeros((count, len(PIECE)), np.int64), 0, 0
    for i in range(len(seq_lens)):
        first, last, seq_len = int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]), int(seq_lens[i])
        for query in range(first, last, MOST_QUERIES):
            num_queries, position = min(MOST_QUERIES, last - query), seq_len - last + query
            end = position + num_queries if rules.causal else seq_len
            # At a tile's edge, so that the tiles of a query do not depend on the queries beside it.
            low = max(0, position - rules.window + 1) // TILE * TILE
            pieces[p, PIECE.sequence], pieces[p, PIECE.position] = i, position
            pieces[p, PIECE.first_query], pieces[p, PIECE.num_queries] = query, num_queries
            pieces[p, PIECE.low], pieces[p, PIECE.end], pieces[p, PIECE.own] = low, end, low
            pieces[p, PIECE.first_partial] = num_partials
            pieces[p, PIECE.is_whole] = last - first > MOST_QUERIES
            if last - first <= MOST_QUERIES:
                num_splits = (end - 1) // SPLIT - low // SPLIT + 1
                num_partials += num_splits * quads_of(num_queries, shape) * shape.num_kv_heads
            p += 1
    return pieces, num_partials


# Passes that follow each other: each row is one token, and sees one position more in each.


def room_for_passes(positions: Ints, slots: Ints, block_size: int, windows: Sequence[int]) -> int:
    """Return how many passes follow by one plan, whose sequences have a query token each: as long as it needs no other
    block, and begins and ends within the same tiles.

    Parameters
    ----------
    positions, slots : int64 [n]
        Of the tokens, where nothing was dropped.
    block_size : int
    windows : sequence of int
        Of the kinds of layers.
    """
    room = min(int((block_size - 1 - slots % block_size).min()), int((TILE - 1 - positions % TILE).min()))
    for window in windows:
        room = min(room, int((TILE - 1 - (positions - window + 1) % TILE).min()))
    return room


@inlined
def see_one_more(plan: Plan, query: int) -> None:
    """Let a query token, the only one of its sequence, stand one position further on, and see that, too."""
    items, pieces = plan.items, plan.pieces
    for p in range(len(pieces)):
        if pieces[p, PIECE.first_query] != query:
            continue
        end = pieces[p, PIECE.end]
        for i in range(len(items)):  # of those of several pieces none ends within a tile
            is_its_last = plan.members[items[i, ITEM.first_member]] == p and items[i, ITEM.end] == end
            if is_its_last and items[i, ITEM.num_members] == 1:
                items[i, ITEM.end] = end + 1
        pieces[p, PIECE.end] = end + 1
        pieces[p, PIECE.position] += 1


# What sequences have in common. Their tables are walked as the paths of a tree: members that have one block after
# another in common, and from the first column in which they differ on, each part of them for itself.


@called
def _share(
    pieces: Ints, block_tables: Array, holes: Array, shape: Shape, items: Ints, members: Ints
) -> tuple[int, int]:
    """Plan the items of several pieces; return how many items and members there are."""
    count, num_items, num_members = 0, 0, 0
    order, limits = np.empty(len(pieces), np.int64), np.empty(len(pieces), np.int64)
    for p in range(len(pieces)):
        limits[p] = _shareable(pieces[p], holes, shape)
        if limits[p] > 0:
            order[count] = p
            count += 1
    if count < 2:
        return 0, 0
    # Part of `order` from, to; the column, before which they are alike; the position up to which that is planned; the
    # items that did the last of it, from, how many.
    stack = np.empty((count + 1, 6), np.int64)
    stack[0] = 0
    stack[0, 1] = count
    depth = 1
    while depth:
        depth -= 1
        first, last, column, done = stack[depth, 0], stack[depth, 1], stack[depth, 2], stack[depth, 3]
        first_before, num_before = stack[depth, 4], stack[depth, 5]
        while first < last - 1:
            middle = _bring_together(order, first, last, column, limits, pieces, block_tables, shape)
            if middle == first:
                break  # all that are left end here
            if middle == first + 1:
                first = middle
                continue
            columns, limit = _common(order, first, middle, column, limits, pieces, block_tables, shape)
            end = min(limit, columns * shape.block_size) // TILE * TILE
            stack[depth, 0], stack[depth, 1], stack[depth, 2] = first, middle, columns
            stack[depth, 3], stack[depth, 4], stack[depth, 5] = done, first_before, num_before
            if (middle - first - 1) * (end - done) >= LEAST_SAVED:
                begin, before, waits = done, first_before, num_before
                while begin < end:
                    stop, item = min(end, (begin // SPLIT + 1) * SPLIT), num_items
                    if begin % SPLIT == 0:
                        waits = 0
                    num_items, num_members = _add_group(
                        order,
                        first,
                        middle,
                        begin,
                        stop,
                        before,
                        waits,
                        pieces,
                        shape,
                        items,
                        num_items,
                        members,
                        num_members,
                    )
                    begin, before, waits = stop, item, num_items - item
                for i in range(first, middle):
                    piece = order[i]
                    pieces[piece, PIECE.own] = end
                    pieces[piece, PIECE.first_before], pieces[piece, PIECE.num_before] = before, waits
                stack[depth, 3], stack[depth, 4], stack[depth, 5] = end, before, waits
            depth += 1
            first = middle
    return num_items, num_members


@inlined
def _shareable(piece: Ints, holes: Array, shape: Shape) -> int:
    """Return before which position, in whole tiles, a piece may share; 0 where it has rows enough or begins later."""
    if piece[PIECE.is_whole] or piece[PIECE.low] > 0 or 2 * quads_of(piece[PIECE.num_queries], shape) > SHARED_QUADS:
        return 0
    hole = holes[piece[PIECE.sequence]]
    end = piece[PIECE.end] if hole[0] == hole[1] else min(piece[PIECE.end], np.int64(hole[0]))
    return int(end) // TILE * TILE


@called
def _bring_together(
    order: Ints, first: int, last: int, column: int, limits: Ints, pieces: Ints, block_tables: Array, shape: Shape
) -> int:
    """Put those with the same next block in front, leave those that end before it; return where the others begin."""
    block, middle = np.int64(-1), first
    for i in range(first, last):
        piece = order[i]
        if limits[piece] <= column * shape.block_size:
            continue
        other = np.int64(block_tables[pieces[piece, PIECE.sequence], column])
        if block < 0 or other == block:
            block = other
            order[i], order[middle] = order[middle], piece
            middle += 1
    return middle


@called
def _common(
    order: Ints, first: int, last: int, column: int, limits: Ints, pieces: Ints, block_tables: Array, shape: Shape
) -> tuple[int, int]:
    """Return how many columns are alike, and before which position all may share."""
    limit = limits[order[first]]
    for i in range(first, last):
        limit = min(limit, limits[order[i]])
    column += 1
    while column * shape.block_size < limit:
        block = block_tables[pieces[order[first], PIECE.sequence], column]
        for i in range(first + 1, last):
            if block_tables[pieces[order[i], PIECE.sequence], column] != block:
                return column, limit
        column += 1
    return column, limit


@called
def _add_group(
    order: Ints,
    first: int,
    last: int,
    start: int,
    end: int,
    first_before: int,
    num_before: int,
    pieces: Ints,
    shape: Shape,
    items: Ints,
    num_items: int,
    members: Ints,
    num_members: int,
) -> tuple[int, int]:
    """Add items of all members over the positions start … end; return how many items and members there are then."""
    total = 0
    for i in range(first, last):
        total += quads_of(pieces[order[i], PIECE.num_queries], shape)
    num_parts = (total + SHARED_QUADS - 1) // SHARED_QUADS
    most = (total + num_parts - 1) // num_parts
    i = first
    while i < last:
        first_member, quads = num_members, 0
        while i < last:
            piece = order[i]
            quads += quads_of(pieces[piece, PIECE.num_queries], shape)
            if quads > most:
                break
            members[num_members] = piece
            pieces[piece, PIECE.num_items] += 1
            num_members += 1
            i += 1
        num = num_members - first_member
        _put(items, num_items, first_member, num, start, end, first_before, num_before, 0)
        num_items += 1
    return num_items, num_members
