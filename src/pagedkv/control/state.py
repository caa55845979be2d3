"""The arrays that hold all control state, in one place.

Block and sequence records are NumPy records, so that compiled code and plain Python read the same
``blocks[i].ref_count``. A reference to a block inside these arrays is ``block_id + 1``, and 0 means none:
fresh memory from the operating system is all zeros, so a pool of any size is created without touching it.

=================  ====================================================================================================
``kernels``        what the strategy in force does: the one part that is no array
``blocks``         one record per block, as long as a cache line
``contents``       the token ids of every block, ``block_size`` per block, flat
``buckets``        the prefix table: the first block of each hash chain
``siblings``       per block: first child, next sibling, previous sibling, and the bucket of its hash chain
``roots``          per namespace: number of children, first child, number of live sequences, what the salt hashes to
``heap``           cached leaves in the order in which they are evicted, one heap for each of two queues or orders
``free_stack``     blocks that were used before and hold nothing now; never used ones lie above ``fresh``
``sequences``      one record per live sequence, as long as two
``tables``         the block tables of all sequences, a segment of it each (`block_tables`)
``seq_table``      open addressing: sequence id to row
``log``            blocks stored (+id+1) and removed (-id-1) by one call, 0 for all removed, while somebody listens
``copies``         blocks (source, destination) whose K and V are still to be copied
``orders``         what was decided to make room, as (what, row or block, score): carried out by the call that needs it
``states``         one record per slot for a recurrent state (`recurrent`); this and the next three may be empty
``block_states``   the slot of the snapshot of every block
``sequence_states``  the slot of every sequence
``state_copies``   slots (source, destination) whose states are still to be copied; one to itself is to be emptied
``memory``         one record of scalars that the strategy in force remembers
``prefix_hashes``  per block a hash of its content and of all before it, where the strategy asks for it (`ghosts`)
``ghosts``         the last blocks that S3-FIFO evicted from probation
``ghost_heads``    their hash chains
``notes``          what the adaptive strategy remembers of each block and ghost (`learner`)
``expected``       and the places of cached leaves in its second order (`reclaim`)
``learner``        what it has learned; all three are empty while another strategy is in force
``counters``       one record of scalars
=================  ====================================================================================================
"""

from __future__ import annotations

import secrets
from collections import namedtuple
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.errors import OutOfMemory
from pagedkv.jit import packed


def record(**fields: str) -> np.dtype[Any]:
    """Return the dtype of records with these fields."""
    return np.dtype((np.record, list(fields.items())))


# What strategies remember beyond the records of blocks.

POLICY = record(
    clock="i8",  # S3-FIFO, SIEVE: blocks stored so far
    lap="i8",  # SIEVE: of the hand, and where in it the hand is
    hand="i8",
    inflation="i8",  # GDSF: what was evicted last was worth
    ticks="i8",  # TTL: its parameter
    evicted="i8",  # blocks that were remembered as ghosts so far
)

GHOST = record(prefix_hash="i8", next="i8")
"""An evicted block, in a ring and in a hash chain: ``next`` is 1 + place in the ring."""

# The records of the adaptive strategy: a note on every block and ghost, and all that it has learned.
#
# The clock counts stored blocks, that is misses: an age in this unit compares with the capacity, whatever the speed of
# the traffic. The time, of turns, is that of the world outside (`turns`).

# What is known of a block: how often it was used (1, 2, 3, 4, 5-7, 8+), and whether it was released as a leaf.
CLASSES = 12

# Ages fall into buckets, four to an octave: the last begins at half a billion stored blocks.
AGES = 112

# What may rule the order of the cached blocks. Each has a shadow cache, whose entries fall into groups.
RECENCY, EXPIRY, TURNS = range(3)
ORDERS = 3
GROUPS = 64

GHOSTS_PER_BLOCK = 3
GHOST_SET = 4

# Numbers from which it is expected how long a session waits (`turns`).
KNOWN = 4

# A shadow cache has half to all of so many blocks, or all blocks of a smaller pool.
SHADOW_ROOM = 1024
SHADOW_HEADS = 4 * SHADOW_ROOM

NOTE = record(
    released="i8",  # when its last user had gone, in stored blocks
    mark="u4",  # a part of its prefix hash
    gap="u2",  # of a block: a code of how long the turns waited in the mean, 0 in a first turn
    uses="u1",  # before it was last evicted, too
    kind="i1",  # 1 + its class while it is cached or a ghost, else 0
)

WAIT = record(
    time="u4",  # when a block was released, the low 32 bits
    output="u2",  # a code of how many tokens the turn wrote, 0 where that is not known
    expected="u2",  # a code of how long the block is expected to wait, 0 where that is beyond all others
)

EXPECTED = record(
    score="i8",  # the later a cached leaf is expected, the lower
    heap_pos="i8",
)

GAP = record(
    mark="u4",  # of the note on the block
    time="u4",  # when it was released, the low 32 bits
    gap="u2",
    output="u2",
    is_known="u2",
)
"""What is kept of an evicted block whose gap is not that of the block before it: for one that is evicted as a whole,
the first block of a session."""

LEARNER = record(
    clock="i8",  # blocks stored so far
    accesses="i8",  # blocks released so far
    next_lesson="i8",  # by the clock
    next_duel="i8",  # by the accesses
    lessons="i8",
    rules="i8",  # RECENCY, EXPIRY or TURNS
    newest="i8",  # 1 + the block stored last
    time="i8",  # in parts of a second; in stored blocks while nobody tells it
    is_told="i8",  # whether somebody does
    output="i8",  # a code of how many tokens the turn wrote whose blocks are released now, 0 where that is not known
    expects="i8",  # 1 + the gap of those of its blocks that were released last, or 0,
    expected="i8",  # and how long they are expected to wait
    pauses="i8",  # learned from so far
    is_over="i8",  # whether the present request ended a pause,
    pause="i8",  # how long that was,
    pause_gap="i8",  # and what was known before it
    pause_output="i8",
    share="i8",  # of the requests whose blocks have the long times to live, out of SHARES
    sample_mask="i8",
    room="i8",  # of a shadow cache
    entries="i8",  # of the shadows that were ever used
    free_entry="i8",
    shadow_size="i8",  # of each shadow cache
    began="i8",  # the present request, by the accesses
    stores="f8",  # of late: blocks stored, blocks released, requests
    releases="f8",
    requests="f8",
    seen="f8",  # sampled accesses of the present request,
    found="f8",  # and how many of them hit the shadow by recency
)

DUEL = record(
    is_won="i8",  # by this order, against recency
    seen="f8",  # sampled accesses of late,
    found="f8",  # how many of them hit the shadow by recency,
    lead="f8",  # of the shadow of this order, in hits,
    request_lead="f8",  # in this request,
    variance="f8",  # the sum of the squares of that,
    gain="f8",  # and its sum without bounds, by which both orders are compared
)

CLASS = record(
    released="f8",  # blocks released of late
    short="i8",  # time to live; of a share of the requests the blocks have the long one
    long="i8",
    trial="i8",
)

AGE = record(
    reused="f8",  # so many blocks at this age,
    censored="f8",  # ghosts forgotten before that,
    waiting="f8",  # blocks not reused so far
    hazard="f8",  # chance of a reuse; of all classes together in the row behind the last
    hits="f8",  # what a block brings and takes up to this age
    space="f8",
)

SHADOW = record(
    prefix_hash="i8",
    released="i8",  # when it was used last, by the clock,
    access="i8",  # by the accesses,
    time="u4",  # and by the time
    next="i4",  # of its hash chain, or the next free entry
    expected="u2",  # to wait for so long
)

PLACE = record(
    group="i4",  # 1 + that of an entry in a shadow cache, or 0
    older="i4",  # neighbours in it
    newer="i4",
)

END = record(
    oldest="i4",  # of a group
    newest="i4",
    free="i4",  # the newest one that the request has not used which used the newest
)

PICK = record(
    end="i8",  # 1 + 2 * group of the entry that went last, + 1 if it was the newest of it; 0 if another may go by now
    score="i8",
)


class Learner(NamedTuple):
    """All that the adaptive strategy has learned. References between entries are 1 + entry; 0 means none."""

    totals: npt.NDArray[np.void]  # one record of scalars
    classes: npt.NDArray[np.void]
    ages: npt.NDArray[np.void]  # by class and age
    duels: npt.NDArray[np.void]  # of each order against recency
    waits: npt.NDArray[np.void]  # by block: since when it waits, and for how long that is expected
    gaps: npt.NDArray[np.void]  # of evicted blocks, one for each set of ghosts
    shadows: npt.NDArray[np.void]  # entries of the three shadow caches
    heads: npt.NDArray[np.int64]  # of hash chains over them
    places: npt.NDArray[np.void]  # of the entries, by order
    ends: npt.NDArray[np.void]  # of the groups, by order
    picks: npt.NDArray[np.void]  # of what goes, by order
    factors: npt.NDArray[np.float64]  # by which pauses are expected, one for each thing known
    doubts: npt.NDArray[np.float64]  # how they may be wrong together, row by row
    gains: npt.NDArray[np.float64]  # and what the last pause told of each


def new_learner(num_blocks: int, exists: bool, ghost_sets: int = 0) -> Learner:
    """Return a learner that knows nothing, or the empty stand-in that other strategies need."""
    size = int(exists)
    entries = size * (ORDERS * SHADOW_ROOM + 1)
    return Learner(
        totals=np.zeros(size, LEARNER),
        classes=np.zeros(size * CLASSES, CLASS),
        ages=np.zeros((size * (CLASSES + 1), AGES + 1), AGE),
        duels=np.zeros(size * ORDERS, DUEL),
        waits=np.zeros(size * num_blocks, WAIT),
        gaps=np.zeros(ghost_sets, GAP),
        shadows=np.zeros(entries, SHADOW),
        heads=np.zeros(size * SHADOW_HEADS, np.int64),
        places=np.zeros((ORDERS * size, entries), PLACE),
        ends=np.zeros((ORDERS * size, GROUPS), END),
        picks=np.zeros(ORDERS * size, PICK),
        factors=np.zeros(size * KNOWN),
        doubts=np.zeros(size * KNOWN * KNOWN),
        gains=np.zeros(size * KNOWN),
    )


BLOCK = record(
    score="i8",
    last_access="i8",
    created="i8",
    ref_count="i4",
    num_tokens="i4",
    parent="i4",  # a block id, or -1 - namespace for the first block of a prefix
    num_children="i4",
    depth="i4",
    access_count="i4",
    priority="i4",
    heap_pos="i4",
    hash_next="i4",
    pins="u2",
    indexed="i1",  # while the block is a node of the prefix trie: 1 + the queue it waits in
    recent_hits="u1",  # since it was stored or given a second chance, at most 255
)

SEQUENCE = record(
    seq_id="i8",
    num_tokens="i8",  # visible tokens
    num_dropped="i8",  # tokens that streaming dropped
    last_access="i8",
    access_count="i8",
    created="i8",
    epoch="i8",  # plans of earlier ticks are stale
    stamp="i8",  # the last batch that named this sequence
    ranked="i8",  # the valid entry in the eviction order
    table="i8",  # where its segment of the block tables begins
    room="i4",  # and how many blocks it has room for
    num_blocks="i4",
    num_indexed="i4",  # leading blocks that are trie nodes, each the parent of the next
    num_committed="i4",  # leading visible tokens whose K and V are written
    num_known="i4",  # leading visible tokens whose ids are known
    num_cached="i4",
    priority="i4",
    namespace="i4",
    hole_start="i4",  # in slots of the table: [hole_start, hole_start + hole_len) is dropped
    hole_len="i4",
    pinned_blocks="i4",
    marks="i2",
    num_outputs="u2",  # tokens that were appended after the prompt, at most 65,535
)

STATE_SLOT = record(
    last_access="i8",  # tick of the last use of a snapshot
    block="i4",  # 1 + the block whose snapshot it holds
    writer="i4",  # 1 + the row of the sequence that the snapshot moves on with
    next="i4",  # the next free slot, of a free one
)

LIVE, OPAQUE, PINNED, DIRTY, TRUNCATED = 1, 2, 4, 8, 16
"""Sequence marks. An OPAQUE sequence is never committed to the index: its K and V depend on more than its token ids."""

MAIN, PROBATION = 0, 1
"""The queues of cached blocks: strategies that tell newcomers from proven blocks let them wait apart."""

EVICT, RECLAIM, RESCORE = range(3)
"""Kinds of orders: a sequence goes if need be, a cached leaf goes, a cached leaf stays at another score."""

MAX_PINS = MAX_OUTPUTS = np.iinfo(np.uint16).max

COUNTERS = record(
    **dict.fromkeys(
        "num_blocks block_size prefix_caching whole_hits seed factor tick stamp changes newest_epoch "
        "fresh free_top used cached pinned heap_size probation_heap_size by_turns probation "
        "num_sequences rows_used free_row num_dirty tables_top tables_left "
        "logging log_len num_copies num_orders was_cleared "
        "free_state states_used states_cached states_stored states_reclaimed num_state_copies "
        "allocations frees evictions forks peak queries hits hit_tokens partial_tokens reclaimed copied".split(),
        "i8",
    )
)


Kernel = Callable[["State", int], int]


class PolicyKernels(NamedTuple):
    """What the strategy in force does, chosen once: a kernel for each event that it does not leave alone.

    Each is called with the state and a block, as `pagedkv.jit.pointed` says.
    """

    score: Kernel | None = None  # how much a block is worth keeping, when it becomes reclaimable; else its last access
    on_store: Kernel | None = None  # it becomes findable; returns its queue, else MAIN
    on_hit: Kernel | None = None  # it was cached and is used again
    on_release: Kernel | None = None  # its last user has gone, it is cached from now on
    second_chance: Kernel | None = None  # it comes first; returns whether it was moved elsewhere in the order
    on_evict: Kernel | None = None  # it is about to be evicted
    after_evict: Kernel | None = None  # one was evicted, and this one comes first now, or -1
    on_request_end: Kernel | None = None  # a request has ended; its last argument says nothing


class _State(NamedTuple):
    kernels: PolicyKernels
    blocks: npt.NDArray[np.void]
    contents: npt.NDArray[np.int64]
    buckets: npt.NDArray[np.int32]
    siblings: npt.NDArray[np.int32]
    roots: npt.NDArray[np.int32]
    heap: npt.NDArray[np.int32]
    free_stack: npt.NDArray[np.int32]
    sequences: npt.NDArray[np.void]
    tables: npt.NDArray[np.int32]
    seq_table: npt.NDArray[np.int32]
    dirty: npt.NDArray[np.int32]
    log: npt.NDArray[np.int32]
    copies: npt.NDArray[np.int32]
    orders: npt.NDArray[np.int64]
    states: npt.NDArray[np.void]
    block_states: npt.NDArray[np.int32]
    sequence_states: npt.NDArray[np.int32]
    state_copies: npt.NDArray[np.int32]
    memory: npt.NDArray[np.void]
    prefix_hashes: npt.NDArray[np.int64]
    ghosts: npt.NDArray[np.void]
    ghost_heads: npt.NDArray[np.int64]
    notes: npt.NDArray[np.void]
    expected: npt.NDArray[np.void]
    learner: Learner
    counters: npt.NDArray[np.void]


# A field of a record takes Python 1.6 µs to read, a field of a column or of a tuple a tenth of that.
_Sequence: Any = namedtuple("_Sequence", SEQUENCE.names or ())  # type: ignore[misc]


class State(_State):
    """All control state; passed as one argument to every compiled function."""

    @cached_property
    def packed(self) -> State:
        """What Python passes to compiled functions in its place, for speed; the state itself must be kept meanwhile."""
        return packed(self)

    def copied(self) -> State:
        """Return a copy of the books for a trial; what a built-in strategy has learned is shared."""
        return State._make(part.copy() if isinstance(part, np.ndarray) else part for part in self)

    def counter(self, name: str) -> int:
        """Return one of the counters, for Python."""
        return self.counters[name].item()  # type: ignore[no-any-return]

    def table(self, row: int) -> npt.NDArray[np.int32]:
        """Return the block table of a sequence, for Python: a view."""
        start = self.sequences["table"].item(row)
        return self.tables[start : start + self.sequences["num_blocks"].item(row)]

    def sequence(self, row: int) -> Any:
        """Return a copy of the record of a sequence, for Python: a tuple of ints by name."""
        return _Sequence._make(self.sequences.item(row))


FEWEST_ENTRIES = 4096
"""The block tables are never shorter together."""


def power_of_two(at_least: int) -> int:
    """Return the smallest power of two that is not less than `at_least`."""
    return 1 << max(0, at_least - 1).bit_length()


def new_state(num_blocks: int, block_size: int, prefix_caching: bool, num_states: int = 0, rows: int = 64) -> State:
    """Make the state of an empty pool; memory is committed only as blocks are used.

    It is OutOfMemory if even the addresses for so many blocks and tokens cannot be had.
    """
    try:
        return _empty_state(num_blocks, block_size, prefix_caching, num_states, rows)
    except (MemoryError, ValueError) as error:  # the latter is NumPy's for a size beyond all addresses
        hint = f"the books of {num_blocks} blocks of {block_size} tokens do not fit into memory"
        raise OutOfMemory(num_blocks, 0, hint) from error


def _empty_state(num_blocks: int, block_size: int, prefix_caching: bool, num_states: int, rows: int) -> State:
    counters = np.zeros(1, COUNTERS)
    counters["num_blocks"] = num_blocks
    counters["block_size"] = block_size
    counters["prefix_caching"] = prefix_caching
    counters["free_state"] = num_states > 0
    states = np.zeros(num_states, STATE_SLOT)
    states["next"][:-1] = np.arange(2, num_states + 1)
    # A secret seed: chains of chosen collisions would be slow (never wrong), so nobody may choose them.
    counters["seed"] = secrets.randbits(62)
    counters["factor"] = secrets.randbits(62) * 2 + 1
    return State(
        kernels=PolicyKernels(),
        blocks=np.zeros(num_blocks, BLOCK),
        contents=np.zeros(num_blocks * block_size, np.int64),
        buckets=np.zeros(power_of_two(3 * num_blocks), np.int32),
        siblings=np.zeros((num_blocks, 4), np.int32),
        roots=np.zeros((16, 4), np.int32),
        heap=np.zeros(2 * num_blocks, np.int32),
        free_stack=np.zeros(num_blocks, np.int32),
        sequences=np.zeros(rows, SEQUENCE),
        tables=np.zeros(FEWEST_ENTRIES, np.int32),
        seq_table=np.zeros(power_of_two(2 * rows), np.int32),
        dirty=np.zeros(rows, np.int32),
        log=np.zeros(1, np.int32),
        copies=np.zeros((num_blocks + 1, 2), np.int32),
        orders=np.zeros((2, 3), np.int64),
        states=states,
        block_states=np.zeros(num_blocks if num_states else 0, np.int32),
        sequence_states=np.zeros(rows if num_states else 0, np.int32),
        state_copies=np.zeros((num_states, 2), np.int32),
        memory=np.zeros(1, POLICY),
        prefix_hashes=np.zeros(0, np.int64),
        ghosts=np.zeros(0, GHOST),
        ghost_heads=np.zeros(0, np.int64),
        notes=np.zeros(0, NOTE),
        expected=np.zeros(0, EXPECTED),
        learner=new_learner(num_blocks, exists=False),
        counters=counters,
    )


def with_roots(state: State, count: int) -> State:
    """Return the state with room for at least `count` namespaces."""
    roots = np.zeros((power_of_two(count), 4), np.int32)
    roots[: len(state.roots)] = state.roots
    return state._replace(roots=roots)


def with_orders(state: State, orders: Sequence[tuple[int, int, int]]) -> State:
    """Return the state with these orders; they are given once ``num_orders`` says so."""
    if len(orders) > len(state.orders):
        state = state._replace(orders=np.zeros((power_of_two(len(orders)), 3), np.int64))
    for place, order in enumerate(orders):
        state.orders[place] = order
    return state


def with_log(state: State) -> State:
    """Return the state with a log that holds everything one call can store and remove."""
    return state._replace(log=np.zeros(2 * len(state.blocks) + 2, np.int32))
