"""The forward pass of a decoder as one compiled call: a list of operations, worked off by all threads together.

Activations are rows of buffers in two flat arrays: float32 sums in ``floats``, and what is multiplied next, narrowed to
what products take, in ``acts``. An operation is a record that says where its rows come from, where they go, and by
which weights. Operations that do not need each other's results form a phase. The items of a phase are cut into runs,
one for each thread, which takes them in order by an atomic counter and then those of others: the weights of a run are
read as one stream. A thread that finds none left waits until those that have begun are through, so no thread waits for
one that never came. An item is computed by one thread in one order, and an element of a row depends on that row alone:
how many rows and threads there are changes no bit.

A call may be several passes, each of which computes the likeliest tokens of the one before it: between two of them no
thread leaves the call.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.data.cpu_kernels import Bases, Rows, aligned
from pagedkv.data.cpu_plan import Rules, Shape, see_one_more
from pagedkv.data.cpu_tiles import Strides
from pagedkv.data.forward_products import (
    ADDED,
    BLOCK,
    COLUMN_BLOCK,
    FEW_ROWS,
    FEW_ROWS_COLUMNS,
    NOWHERE,
    SUMS,
    TO_ACTS,
    TO_FLOATS,
    Tile,
    copy_size,
    gate_of,
    matrix_of,
    multiply,
    num_blocks,
    tile_of,
)
from pagedkv.data.simd import (
    add,
    any_greater,
    fetch_add,
    fma,
    load,
    load_count,
    load_part,
    maximum,
    mul,
    prefetch,
    put,
    sigmoid,
    splat,
    store,
    store_narrowed,
    sub,
    take,
    take_widened,
    tanh,
    zeros,
)
from pagedkv.data.simd_llvm import CACHE_LINE, LANES
from pagedkv.data.simd_products import PANEL, copied_as
from pagedkv.data.team import wait_until
from pagedkv.jit import borrowed, called, compiled, enter, inlined, stretch

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

EMBED, NORM, LINEAR, HEADS, ATTEND, ROUTE, EXPERTS, COMBINE, CAP, NEXT, GATHER = range(11)
"""What an operation does."""
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "swiglu_oai")
SILU, GELU, GELU_TANH, QUICK_GELU, RELU, RELU2, SWIGLU_OAI = range(len(ACTIVATIONS))
_WHOLES = (
    "code", "rows", "source", "source_width", "target", "target_width", "size_in", "size_out", "goes", "function",
    "weight", "row_stride", "bias", "factor", "packed", "unit", "columns", "picked", "is_centred", "positions",
    "position_offset",
    "num_q_heads", "num_kv_heads", "head_dim", "v_head_dim", "query_norm", "query_bias", "key_norm", "key_bias",
    "norm_size", "rope",
    "rope_width", "is_interleaved", "key_base", "key_block", "key", "key_head", "value_base", "value_block", "value",
    "value_head", "layer", "set", "window", "sinks", "num_sinks", "num_experts", "top_k", "is_renormalised",
    "weights", "biases", "factors", "by_pair", "learned",
    "is_activated", "has_gate", "gate", "gate_bias", "gate_factor", "gates", "gate_biases", "gate_factors",
)  # fmt: skip
_NUMBERS = ("scale", "eps", "softcap")
OPERATION = np.dtype([(name, np.int64) for name in _WHOLES] + [(name, np.float32) for name in _NUMBERS])
"""One operation. Places are in elements: ``source`` and ``target`` of row 0, ``weight`` and the bases of K and V from
the first element of the array that stands for all of their kind, ``bias``, ``factor``, norms and sinks in
``constants`` (-1 where there is none), ``rope`` in ``angles``; ``learned`` positions are in ``constants``, too.
``rows`` says which rows take part, and ``picked`` is 1 where the source is read at the places of the picked ones.
The first ``packed`` rows of the weights, or of embeddings, are panels; for ``unit`` see `unit_of`. ``columns`` is the
outputs of an item of few rows. ``weights``, ``biases`` and ``factors`` are where the places of each expert's begin in
``places``. Where it ``is_activated`` the outputs go to ``acts`` by way of the ``function``, times those of a gate."""
ALL, PICKED, PAIRS = range(3)
"""Which rows take part: those of all tokens, of tokens whose logits are wanted, or one for each token and expert."""

LINE = 8
"""Counters of a cache line. A phase has a line of its own, which counts the threads that began and those that are
through, and behind it one for each run, which counts the items taken."""
THROUGH = 1
MOST_RUNS = 16
"""More threads share runs."""
LINES_OF_LOOK = 4
"""How many are asked for between two looks at what a thread waits for."""
ROWS_OF_ITEM = 8
"""Rows of an item that is no product."""


@inlined
def _num_rows(operation: Any, num_rows: int, num_picked: int) -> int:
    if operation.rows == PICKED:
        return num_picked
    return int(num_rows * operation.top_k) if operation.rows == PAIRS else num_rows


@inlined
def _num_items(operation: Any, rows: int, routes: Ints) -> int:
    if operation.code == LINEAR:
        return num_blocks(operation, rows)
    if operation.code == EXPERTS:
        count = 0
        for expert in range(operation.num_experts):
            count += num_blocks(operation, routes[expert + 1] - routes[expert])
        return count
    if operation.code in (ROUTE, GATHER):
        return 1
    return (rows + ROWS_OF_ITEM - 1) // ROWS_OF_ITEM


@compiled
def run_program(
    counters: Ints,
    num_runs: int,
    num_passes: int,
    phases: Ints,
    operations: Array,
    num_rows: int,
    ids: Ints,
    ends: Ints,
    positions: Ints,
    slots: Ints,
    picked: Ints,
    weights: Array,
    constants: Floats,
    angles: Floats,
    floats: Floats,
    acts: Array,
    queries: Rows,
    attended: Rows,
    like: Array,
    memory: Array,
    attend: Any,
    logits: int,
    sets: Any,
    num_parts: int,
    set_counters: Ints,
    partials: Floats,
    block_tables: Array,
    holes: Array,
    block_size: int,
    places: Ints,
    routes: Ints,
    shares: Floats | None,
) -> None:
    """Work on the operations, phase by phase, until all are done. Runs in every thread.

    Parameters
    ----------
    counters : int64 [num_passes * phases * (1 + num_runs) * LINE]
        Zeros.
    num_runs : int
        Into how many runs the items of a phase are cut.
    num_passes : int
        In each one after the first every row is the likeliest token after that of the pass before, which all rows want
        the logits of, in the next slot; see `room_for_passes`.
    phases : int64 [phases + 1]
        The first operation of each phase; the last phase ends a pass that is followed by another one.
    operations : OPERATION [n]
    num_rows : int
    ids : int64 [num_passes * num_rows]
        Token ids of the first pass; those of the others are found, negative ones from where no pass follows.
    ends : int64 [any]
        Tokens after which no pass follows.
    positions, slots : int64 [num_rows]
        Positions, and the slots of K and V.
    picked : int64 [k]
        The rows whose logits are wanted.
    weights, constants, angles : arrays
        All weights as one array, float32 [any], float32 cosines and sines.
    floats, acts : float32 and float32 or uint16 arrays
        The activations.
    queries, attended : Rows
        The same two for attention, which reads the first and writes the second.
    like : array
        Any array of what attention multiplies.
    memory : array
        K and V of all layers as one array.
    attend : entry
        That of `attend_items` for arguments of these types.
    logits : int
        Where the logits of the first picked row go, from the first element of `floats`; those of a pass follow each
        other, and the passes.
    sets : tuple of Plan
        What attention has to do, for each kind of layers. Plans of several passes grow.
    places : int64 [any]
        Of the weights, biases and factors of experts.
    routes, shares : int64 array, float32 array or None
        Room for what `_route` finds; None without experts, whose code is then not compiled.
    """
    counters = borrowed(counters)
    phases = borrowed(phases)
    operations = borrowed(operations)
    ids = borrowed(ids)
    ends = borrowed(ends)
    positions = borrowed(positions)
    slots = borrowed(slots)
    picked = borrowed(picked)
    weights = borrowed(weights)
    constants = borrowed(constants)
    angles = borrowed(angles)
    floats = borrowed(floats)
    acts = borrowed(acts)
    queries = borrowed(queries)
    attended = borrowed(attended)
    like = borrowed(like)
    memory = borrowed(memory)
    set_counters = borrowed(set_counters)
    partials = borrowed(partials)
    block_tables = borrowed(block_tables)
    holes = borrowed(holes)
    places = borrowed(places)
    routes = borrowed(routes)
    block, sums = aligned(2 * BLOCK, floats), aligned(SUMS, floats)
    copies, copied = aligned(2 * copy_size(operations), copied_as(weights, acts)), np.full(2, NOWHERE)
    lines, num_phases = LINE * (1 + num_runs), len(phases) - 1
    num_layers = len(set_counters) // num_passes
    num_logits = len(picked) * operations[phases[num_phases - 1]].source_width
    # A thread takes its first item of the next phase before it waits for the end of this one, so that it knows what it
    # will read; it counts as one that began by then, so nobody leaves that phase before the item is done.
    run = fetch_add(counters, 0, 1) % num_runs
    item = -1
    for turn in range(num_passes * num_phases - 1):
        step, phase = turn // num_phases, turn % num_phases
        line = turn * lines
        if phase == 0 and _has_ended(ids, step * num_rows, num_rows):
            return
        first, last = phases[phase], phases[phase + 1]
        if operations[first].code == ATTEND:
            operation = operations[first]
            enter(
                attend,
                set_counters[step * num_layers + operation.layer],
                num_parts,
                sets[operation.set],
                partials,
                queries,
                memory,
                memory,
                None,
                None,
                attended,
                like,
                stretch(constants, operation.sinks, operation.num_sinks),
                block_tables,
                holes,
                _bases(operation),
                _shape(operation, block_size, memory),
                _strides(operation),
                _rules(operation),
            )
        else:
            # Where one is through no item is left, and ``routes`` may be those of another phase already.
            count = 0
            if load_count(counters, line + THROUGH) == 0:
                count = _items_of_phase(operations, first, last, num_rows, len(picked), routes)
            if item < 0:
                item = _take(counters, line, run, num_runs, count)
            while item >= 0:
                at, place = first, item
                while True:
                    some = _num_items(operations[at], _num_rows(operations[at], num_rows, len(picked)), routes)
                    if place < some:
                        break
                    place -= some
                    at += 1
                operation = operations[at]
                rows = _num_rows(operation, num_rows, len(picked))
                if operation.code in (LINEAR, EXPERTS):
                    first_row, expert = 0, -1
                    if shares is not None:  # an `if` of its own is one that Numba leaves out where it is None
                        if operation.code == EXPERTS:
                            expert, place = _expert_of(operation, place, routes)
                            first_row, rows = routes[expert], routes[expert + 1] - routes[expert]
                    tile = tile_of(operation, place, first_row, rows)
                    up = matrix_of(operation, expert, places)
                    following, _ = _weights_of(operations, first, last, item + 1, num_rows, len(picked))
                    target, apart, out = operation.target, operation.target_width, floats
                    if operation.is_activated:
                        apart = COLUMN_BLOCK if rows > FEW_ROWS else FEW_ROWS_COLUMNS
                        target, out = -(tile.first_row * apart + tile.first_column), block
                    elif target < 0:
                        target = logits + step * num_logits
                    gate, ahead = up, following
                    if operation.has_gate:
                        gate = gate_of(operation, expert, places)
                        ahead = gate.weight + tile.first_column * operation.row_stride
                    for number in range(1 + operation.has_gate):
                        multiply(
                            operation,
                            tile,
                            gate if number else up,
                            following if number else ahead,
                            target + number * BLOCK,
                            apart,
                            acts,
                            weights,
                            constants,
                            out,
                            routes,
                            sums,
                            copies,
                            copied,
                            number,
                        )
                    if operation.is_activated:
                        _activate(operation, tile, block, apart, acts)
                elif operation.code == ROUTE:
                    if shares is not None:
                        _route(operation, rows, floats, routes, shares)
                elif operation.code == GATHER:
                    _gather(operation, picked, floats, acts)
                else:
                    begin = place * ROWS_OF_ITEM
                    end = min(rows, begin + ROWS_OF_ITEM)
                    if operation.code == NORM:
                        _norm(operation, begin, end, picked, floats, constants, acts)
                    elif operation.code == HEADS:
                        _heads(
                            operation, begin, end, step, positions, slots, floats, constants, angles, memory, block_size
                        )
                    elif operation.code == CAP:
                        _cap(operation, begin, end, floats, logits + step * num_logits)
                    elif operation.code == NEXT:
                        _choose_next(
                            operation,
                            begin,
                            end,
                            floats,
                            logits + step * num_logits,
                            ids,
                            (step + 1) * num_rows,
                            ends,
                            sets,
                        )
                    elif operation.code == COMBINE:
                        if shares is not None:
                            _combine(operation, begin, end, floats, routes, shares)
                    else:
                        _embed(operation, begin, end, step, num_rows, ids, positions, weights, constants, floats)
                item = _take(counters, line, run, num_runs, count)
        begin, end = NOWHERE, NOWHERE
        item = -1
        if turn + 2 < num_passes * num_phases:
            fetch_add(counters, line + lines, 1)
            if phase + 1 < num_phases and operations[last].code == LINEAR:
                after = phases[phase + 2]
                count = _items_of_phase(operations, last, after, num_rows, len(picked), routes)
                item = _take(counters, line + lines, run, num_runs, count)
                begin, end = _weights_of(operations, last, after, item, num_rows, len(picked))
        fetch_add(counters, line + THROUGH, 1)
        _wait(counters, line + THROUGH, fetch_add(counters, line, 0), weights, begin, end)


@inlined
def _items_of_phase(operations: Array, first: int, last: int, num_rows: int, num_picked: int, routes: Ints) -> int:
    count = 0
    for at in range(first, last):
        count += _num_items(operations[at], _num_rows(operations[at], num_rows, num_picked), routes)
    return count


@inlined
def _first_of_run(run: int, num_runs: int, count: int) -> int:
    return (run * count + num_runs - 1) // num_runs


@inlined
def _take(counters: Ints, line: int, run: int, num_runs: int, count: int) -> int:
    """Return an item of a phase that nobody has taken, of this run before others; -1 if there is none."""
    for turn in range(num_runs):
        each = (run + turn) % num_runs
        first, last = _first_of_run(each, num_runs, count), _first_of_run(each + 1, num_runs, count)
        index = line + LINE * (1 + each)
        if load_count(counters, index) < last - first:
            item = first + fetch_add(counters, index, 1)
            if item < last:
                return int(item)
    return -1


@inlined
def _wait(counters: Ints, index: int, value: int, weights: Array, begin: int, end: int) -> None:
    """Do as `wait_until`, and ask for the weights begin … end meanwhile."""
    while begin < end and load_count(counters, index) < value:
        for _ in range(LINES_OF_LOOK):
            prefetch(weights, begin)
            begin += CACHE_LINE // weights.itemsize
    wait_until(counters, index, value)


@called
def _weights_of(operations: Array, first: int, last: int, item: int, num_rows: int, num_picked: int) -> tuple[int, int]:
    """Return where the weights of an item of a phase begin and end; `NOWHERE` if it is no product, or an expert's."""
    operations = borrowed(operations)
    for at in range(first, last):
        operation = operations[at]
        if operation.code != LINEAR or item < 0:
            break
        rows = _num_rows(operation, num_rows, num_picked)
        count = num_blocks(operation, rows)
        if item < count:
            tile = tile_of(operation, item, 0, rows)
            begin = operation.weight + tile.first_column * operation.row_stride
            return begin, operation.weight + tile.last_column * operation.row_stride
        item -= count
    return NOWHERE, NOWHERE


@inlined
def _bases(operation: Any) -> Bases:
    return Bases(operation.source, operation.key_base, operation.value_base, 0, 0, operation.target)


@inlined
def _shape(operation: Any, block_size: int, memory: Array) -> Shape:
    group = operation.num_q_heads // operation.num_kv_heads
    sizes = operation.head_dim, operation.v_head_dim
    return Shape(block_size, operation.num_kv_heads, group, sizes[0], sizes[1], memory.itemsize)


@inlined
def _strides(operation: Any) -> Strides:
    return Strides(
        operation.source_width,
        operation.head_dim,
        operation.key_block,
        operation.key,
        operation.key_head,
        operation.value_block,
        operation.value,
        operation.value_head,
        operation.target_width,
        operation.v_head_dim,
        0,
        0,
        0,
    )


@inlined
def _rules(operation: Any) -> Rules:
    return Rules(operation.scale, operation.softcap, True, operation.window)


@called
def _embed(
    operation: Any,
    begin: int,
    end: int,
    step: int,
    num_rows: int,
    ids: Ints,
    positions: Ints,
    weights: Array,
    constants: Floats,
    floats: Floats,
) -> None:
    """Write the embeddings of tokens, scaled, and add learned positions."""
    ids = borrowed(ids)
    positions = borrowed(positions)
    weights = borrowed(weights)
    constants = borrowed(constants)
    floats = borrowed(floats)
    size = operation.size_out
    for row in range(begin, end):
        to, token = operation.target + row * operation.target_width, ids[step * num_rows + row]
        if token < operation.packed:
            _take_packed(operation, token, weights, floats, to)
        factor = operation.scale
        if operation.factor >= 0:
            factor *= constants[operation.factor + token]
        at = operation.weight + token * operation.row_stride
        for i in range(0, size, LANES):
            if token < operation.packed:
                number = load(floats, to + i)
            else:
                number = load(weights, at + i) if i + LANES <= size else load_part(weights, at + i, size - i)
            number = mul(number, splat(factor))
            if operation.learned >= 0:
                place = operation.learned + (positions[row] + step + operation.position_offset) * size + i
                number = add(number, load(constants, place))
            store(floats, to + i, number)


@called
def _take_packed(operation: Any, row: int, weights: Array, floats: Floats, to: int) -> None:
    """Write a row of panels to ``floats[to:]``."""
    weights = borrowed(weights)
    floats = borrowed(floats)
    unit, size = operation.unit, operation.size_out
    panel, lane = operation.weight + row // PANEL * PANEL * operation.row_stride, row % PANEL
    for i in range(size):
        at = i * PANEL + lane
        if unit == 2:
            at = i // 2 * 2 * PANEL + lane * 2 + i % 2
        elif unit == 4:
            at = i // 4 * 4 * PANEL + lane // 4 * 16 + i % 4 // 2 * 8 + lane % 4 * 2 + i % 2
        put(floats, to + i, take_widened(weights, panel + at))


@inlined
def _lane_sum(number: Any) -> Any:
    some = np.empty(LANES, np.float32)
    store(some, 0, number)
    for half in (8, 4, 2, 1):
        for i in range(half):
            some[i] += some[i + half]
    return some[0]


@inlined
def _moments(floats: Floats, at: int, size: int, is_centred: int, eps: float) -> tuple[Any, Any]:
    """Return the mean that is to be taken off, and what is to be multiplied by."""
    mean = np.float32(0)
    if is_centred:
        total = zeros()
        for i in range(0, size, LANES):
            total = add(total, load(floats, at + i) if i + LANES <= size else load_part(floats, at + i, size - i))
        mean = _lane_sum(total) / np.float32(size)
    squares, middle = zeros(), splat(mean)
    for i in range(0, size // LANES * LANES, LANES):
        number = sub(load(floats, at + i), middle)
        squares = fma(number, number, squares)
    rest = np.float32(0)
    for i in range(size // LANES * LANES, size):
        rest += (floats[at + i] - mean) * (floats[at + i] - mean)
    variance = (_lane_sum(squares) + rest) / np.float32(size)
    return mean, np.float32(1) / np.sqrt(variance + np.float32(eps))


@called
def _norm(operation: Any, begin: int, end: int, picked: Ints, floats: Floats, constants: Floats, acts: Array) -> None:
    """Normalise rows, or only hand them on where the operation has no function."""
    picked = borrowed(picked)
    floats = borrowed(floats)
    constants = borrowed(constants)
    acts = borrowed(acts)
    size = operation.size_out
    for row in range(begin, end):
        at = operation.source + (picked[row] if operation.picked else row) * operation.source_width
        to = operation.target + row * operation.target_width
        mean, factor = np.float32(0), np.float32(1)
        if operation.function:
            mean, factor = _moments(floats, at, size, operation.is_centred, operation.eps)
        middle, by, scale = splat(mean), splat(factor), splat(operation.scale)
        for i in range(0, size, LANES):
            # Buffers are as long as whole lanes; what stands behind a row is never multiplied.
            number = mul(sub(load(floats, at + i), middle), by)
            if operation.factor >= 0:
                number = mul(number, load(constants, operation.factor + i))
            if operation.bias >= 0:
                number = add(number, load(constants, operation.bias + i))
            if operation.goes == TO_ACTS:
                store_narrowed(acts, to + i, number)
            elif operation.goes == TO_FLOATS:
                store(floats, to + i, number)
            else:
                store(floats, to + i, fma(number, scale, load(floats, to + i)))


@called
def _gather(operation: Any, picked: Ints, floats: Floats, acts: Array) -> None:
    """Move the picked rows of a buffer of ``floats`` and of one of ``acts`` to the front of each."""
    picked = borrowed(picked)
    floats = borrowed(floats)
    acts = borrowed(acts)
    for row in range(len(picked)):
        if picked[row] == row:
            continue
        first, width = operation.source, operation.source_width
        for i in range(first, first + operation.size_in):
            floats[i + row * width] = floats[i + picked[row] * width]
        first, width = operation.target, operation.target_width
        for i in range(first, first + operation.size_out):
            acts[i + row * width] = acts[i + picked[row] * width]


@called
def _cap(operation: Any, begin: int, end: int, floats: Floats, logits: int) -> None:
    """Soft-cap logits."""
    floats = borrowed(floats)
    for row in range(begin, end):
        at = logits + row * operation.target_width
        for i in range(operation.size_out):
            number = take(floats, at + i) / operation.softcap
            put(floats, at + i, operation.softcap * np.float32(math.tanh(number)))


@called
def _choose_next(
    operation: Any, begin: int, end: int, floats: Floats, logits: int, ids: Ints, next_ids: int, ends: Ints, sets: Any
) -> None:
    """Write the likeliest tokens of rows to ``ids[next_ids:]``, and let attention see one position more."""
    floats = borrowed(floats)
    ids = borrowed(ids)
    ends = borrowed(ends)
    for row in range(begin, end):
        token = _likeliest(floats, logits + row * operation.source_width, operation.size_out)
        for i in range(len(ends)):
            if token == ends[i]:
                token = -1
        ids[next_ids + row] = token
        for each in range(operation.set):
            see_one_more(sets[each], row)


@inlined
def _has_ended(ids: Ints, first: int, count: int) -> bool:
    for i in range(first, first + count):
        if ids[i] < 0:
            return True
    return False


@inlined
def _likeliest(floats: Floats, at: int, size: int) -> int:
    """Return the first of some numbers that no other one exceeds."""
    highest, place, whole = np.float32(-np.inf), 0, size // LANES * LANES
    for i in range(0, size, LANES):
        if i == whole or any_greater(load(floats, at + i), splat(highest)):
            for j in range(i, min(i + LANES, size)):
                if take(floats, at + j) > highest:
                    highest, place = take(floats, at + j), j
    return place


# A mixture of experts: pairs of a token and an expert, sorted by expert, so that each expert's weights are read once.
#
# ``routes`` holds the first pair of each expert and their number, then the token of each pair, then the pairs of each
# token in the order in which its experts were chosen.


@inlined
def _expert_of(operation: Any, item: int, routes: Ints) -> tuple[int, int]:
    """Return the expert of an item, and which of its items that is."""
    expert = 0
    count = num_blocks(operation, routes[1] - routes[0])
    while item >= count:
        item -= count
        expert += 1
        count = num_blocks(operation, routes[expert + 1] - routes[expert])
    return expert, item


@called
def _route(operation: Any, rows: int, floats: Floats, routes: Ints, shares: Floats) -> None:
    """Choose the experts of all tokens; ``shares`` are the weights of the pairs of each token."""
    floats = borrowed(floats)
    routes = borrowed(routes)
    shares = borrowed(shares)
    num_experts, top_k = operation.num_experts, operation.top_k
    by_token = num_experts + 1 + rows * top_k
    routes[: num_experts + 1] = 0
    for row in range(rows):
        at = operation.source + row * operation.source_width
        top, total = floats[at], np.float32(0)
        for expert in range(num_experts):
            top = max(top, floats[at + expert])
        for expert in range(num_experts):
            total += np.exp(floats[at + expert] - top)
        chosen = np.float32(0)
        for k in range(top_k):
            best = -1
            for expert in range(num_experts):
                is_free = True
                for before in range(k):
                    is_free = is_free and routes[by_token + row * top_k + before] != expert
                if is_free and (best < 0 or floats[at + expert] > floats[at + best]):
                    best = expert
            routes[by_token + row * top_k + k] = best
            routes[best + 1] += 1
            share = np.exp(floats[at + best] - top) / total
            shares[row * top_k + k] = share
            chosen += share
        if operation.is_renormalised:
            for k in range(top_k):
                shares[row * top_k + k] /= chosen
    for expert in range(num_experts):
        routes[expert + 1] += routes[expert]
    # Each expert's first pair moves on as its pairs are dealt out; afterwards all move back by one expert.
    for row in range(rows):
        for k in range(top_k):
            expert = routes[by_token + row * top_k + k]
            pair = routes[expert]
            routes[expert] += 1
            routes[num_experts + 1 + pair] = row
            routes[by_token + row * top_k + k] = pair
    for expert in range(num_experts, 0, -1):
        routes[expert] = routes[expert - 1]
    routes[0] = 0


@called
def _combine(operation: Any, begin: int, end: int, floats: Floats, routes: Ints, shares: Floats) -> None:
    """Sum up what the experts of each token gave."""
    floats = borrowed(floats)
    routes = borrowed(routes)
    shares = borrowed(shares)
    top_k, size = operation.top_k, operation.size_out
    num_pairs = routes[operation.num_experts]
    for row in range(begin, end):
        to = operation.target + row * operation.target_width
        for i in range(0, size, LANES):
            number = zeros()
            for k in range(top_k):
                pair = routes[operation.num_experts + 1 + num_pairs + row * top_k + k]
                at = operation.source + pair * operation.source_width + i
                number = fma(load(floats, at), splat(shares[row * top_k + k]), number)
            if operation.goes == ADDED:
                number = fma(number, splat(operation.scale), load(floats, to + i))
            store(floats, to + i, number)


@called
def _normalised(floats: Floats, at: int, size: int, norm: int, bias: int, operation: Any, constants: Floats) -> None:
    """Normalise the elements of one head, or of all heads of a token, in their place."""
    floats = borrowed(floats)
    constants = borrowed(constants)
    mean, factor = _moments(floats, at, size, operation.is_centred, operation.eps)
    for i in range(size):
        more = constants[bias + i] if bias >= 0 else np.float32(0)
        floats[at + i] = (floats[at + i] - mean) * factor * constants[norm + i] + more


@inlined
def _turned(floats: Floats, at: int, operation: Any, position: int, angles: Floats) -> None:
    half = operation.rope_width // 2
    cosines = operation.rope + position * operation.rope_width
    sines = cosines + half
    if half % LANES == 0 and not operation.is_interleaved:
        for i in range(0, half, LANES):
            left, right = load(floats, at + i), load(floats, at + half + i)
            cos, sin = load(angles, cosines + i), load(angles, sines + i)
            store(floats, at + i, sub(mul(left, cos), mul(right, sin)))
            store(floats, at + half + i, add(mul(right, cos), mul(left, sin)))
        return
    apart, step = (1, 2) if operation.is_interleaved else (half, 1)
    for i in range(half):
        x, y = floats[at + i * step], floats[at + i * step + apart]
        cosine, sine = angles[cosines + i], angles[sines + i]
        floats[at + i * step] = x * cosine - y * sine
        floats[at + i * step + apart] = y * cosine + x * sine


@called
def _heads(
    operation: Any,
    begin: int,
    end: int,
    step: int,
    positions: Ints,
    slots: Ints,
    floats: Floats,
    constants: Floats,
    angles: Floats,
    memory: Array,
    block_size: int,
) -> None:
    """Normalise and turn queries and keys in their place, and write keys and values to their slots."""
    positions = borrowed(positions)
    slots = borrowed(slots)
    floats = borrowed(floats)
    constants = borrowed(constants)
    angles = borrowed(angles)
    memory = borrowed(memory)
    dim, v_dim = operation.head_dim, operation.v_head_dim
    query_size, key_size = operation.num_q_heads * dim, operation.num_kv_heads * dim
    for row in range(begin, end):
        query = operation.source + row * operation.source_width
        key = query + query_size
        value = key + key_size
        if operation.query_norm >= 0:
            length = operation.norm_size if operation.norm_size else query_size
            for head in range(query, key, length):
                _normalised(floats, head, length, operation.query_norm, operation.query_bias, operation, constants)
        if operation.key_norm >= 0:
            length = operation.norm_size if operation.norm_size else key_size
            for head in range(key, value, length):
                _normalised(floats, head, length, operation.key_norm, operation.key_bias, operation, constants)
        if operation.rope >= 0:
            for head in range(query, value, dim):
                _turned(floats, head, operation, positions[row] + step, angles)
        block, offset = (slots[row] + step) // block_size, (slots[row] + step) % block_size
        for head in range(operation.num_kv_heads):
            to = operation.key_base + block * operation.key_block + offset * operation.key + head * operation.key_head
            _write(floats, key + head * dim, dim, memory, to)
            to = operation.value_base + block * operation.value_block + offset * operation.value
            _write(floats, value + head * v_dim, v_dim, memory, to + head * operation.value_head)


@inlined
def _write(floats: Floats, at: int, count: int, memory: Array, to: int) -> None:
    """Write numbers to the pool, as what it holds."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        store_narrowed(memory, to + i, load(floats, at + i))
    for i in range(whole, count):
        put(memory, to + i, floats[at + i])


@inlined
def _gelu(x: Any) -> Any:
    some = np.empty(LANES, np.float32)
    store(some, 0, x)
    for i in range(LANES):
        some[i] = np.float32(0.5) * some[i] * np.float32(1 + math.erf(some[i] * 0.7071067811865476))
    return load(some, 0)


@inlined
def _activated(function: int, x: Any) -> Any:
    if function == SILU:
        return mul(x, sigmoid(x))
    if function == GELU_TANH:
        cube = mul(mul(x, x), mul(x, splat(np.float32(0.044715))))
        inner = mul(add(x, cube), splat(np.float32(0.7978845608028654)))
        return mul(mul(x, splat(np.float32(0.5))), add(tanh(inner), splat(np.float32(1))))
    if function == GELU:
        return _gelu(x)
    if function == QUICK_GELU:
        return mul(x, sigmoid(mul(x, splat(np.float32(1.702)))))
    x = maximum(x, zeros())
    return mul(x, x) if function == RELU2 else x


@inlined
def _minimum(x: Any, bound: float) -> Any:
    return sub(zeros(), maximum(sub(zeros(), x), splat(np.float32(-bound))))


@called
def _activate(operation: Any, tile: Tile, block: Floats, apart: int, acts: Array) -> None:
    """Apply the activation to a block of outputs, whose rows are so far `apart`; with a gate, whose block is the second
    one, multiply by it.
    """
    block = borrowed(block)
    acts = borrowed(acts)
    for row in range(tile.first_row, tile.last_row):
        at = (row - tile.first_row) * apart
        to = operation.target + row * operation.target_width + tile.first_column
        for i in range(0, tile.last_column - tile.first_column, LANES):
            number = load(block, at + i)
            if not operation.has_gate:
                number = _activated(operation.function, number)
            elif operation.function == SWIGLU_OAI:
                left = _minimum(load(block, BLOCK + at + i), 7.0)
                right = maximum(_minimum(number, 7.0), splat(np.float32(-7)))
                left = mul(left, sigmoid(mul(left, splat(np.float32(1.702)))))
                number = mul(left, add(right, splat(np.float32(1))))
            else:
                number = mul(_activated(operation.function, load(block, BLOCK + at + i)), number)
            store_narrowed(acts, to + i, number)
