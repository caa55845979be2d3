"""Ids, tokens and salts that somebody chose so that they collide: never wrong, and never slow."""

from __future__ import annotations

import numpy as np
import pytest

from pagedkv import BlockManager
from pagedkv.control.sequence_table import find_row

STEP = 0x9E3779B97F4A7C15
BACK = pow(STEP, -1, 2**64)

FLOODS = {
    "high bits only": [n << 48 for n in range(4000)],
    "one slot of a multiplication without a seed": [n * BACK % 2**64 for n in range(4000)],
    "in a row": list(range(4000)),
    "in strides": list(range(0, 4000 * 4096, 4096)),
}


def steps_to_find(manager, ids):
    """The places of the table that searching for all these ids looks at, by reading the table."""
    state = manager._state
    size, total = len(state.seq_table), 0
    places = {int(link) - 1: place for place, link in enumerate(state.seq_table) if link}
    for seq_id in ids:
        # An id lies behind its home without a gap: drop it and see where the search for it would have begun.
        total += 1
        place = places[int(find_row(state.packed, np.array([seq_id], np.uint64).view(np.int64)[0]))]
        total += run_before(state.seq_table, place, size)
    return total


def run_before(table, place, size):
    length = 0
    while table[(place - length - 1) % size] and length < size:
        length += 1
    return length


@pytest.mark.parametrize("ids", FLOODS.values(), ids=FLOODS)
@pytest.mark.parametrize("factor", [0x9E3779B97F4A7C15 // 2 * 2 + 1 - 2**63, 1234567890123456789, 3**39])
def test_no_sequence_ids_lie_in_one_run(ids, factor):
    """Before a place that is taken lie few others in a row, so a search is short whichever ids were chosen."""
    manager = BlockManager(4, 4)
    manager._state.counters[0].factor = factor
    for seq_id in ids:
        manager.allocate(seq_id, 0)
    assert steps_to_find(manager, ids) < 8 * len(ids)
    manager.check()
    for seq_id in ids[::2]:
        manager.free(seq_id)
    assert all((seq_id in manager) == bool(place % 2) for place, seq_id in enumerate(ids[:500]))
    manager.check()


@pytest.mark.parametrize("guess", [1, STEP, 0xBF58476D1CE4E5B9])
def test_sequence_ids_that_fit_another_factor_than_the_secret_one_lie_apart(guess):
    """Whoever knows how ids are mixed, but not the factor of this cache, cannot choose ids of one place."""
    mixed = [n * pow(guess, -1, 2**64) % 2**64 for n in range(1000)]
    ids = [(each ^ each >> 32) * BACK % 2**64 for each in mixed]
    manager = BlockManager(4, 4)
    manager._state.counters[0].factor = 3**39
    for seq_id in ids:
        manager.allocate(seq_id, 0)
    assert steps_to_find(manager, ids) < 8 * len(ids)


@pytest.mark.parametrize(
    ("first", "second"), [(1 << 62, 1 << 62 | 1 << 31), (1 << 62 | 1 << 31 | 1, 1 << 62)], ids=["plain", "folded"]
)
def test_token_ids_with_their_highest_bits_set_do_not_cancel_out(first, second):
    """Two blocks of which one has bit 62 set in a token and what that becomes undone in the next."""
    collisions, other = 0, [5 ^ first, 6 ^ second]
    for _ in range(64):
        manager = BlockManager(64, 2)
        for seq_id, ids in enumerate([[5, 6], other]):
            manager.allocate(seq_id, ids)
            manager.commit(seq_id)
        collisions += np.count_nonzero(manager._state.buckets) < 2
        assert manager.match_prefix([5, 6, 7]) == 2 == manager.match_prefix([*other, 7])
    assert collisions < 12  # of 64: half of them before, one in a hundred by chance


@pytest.mark.parametrize("size", [1, 2, 4, 5, 8, 16])
def test_every_token_of_a_block_is_compared(size):
    """Also where every key lies in one bucket."""
    manager = BlockManager(64, size)
    manager._state = manager._state._replace(buckets=np.zeros(1, np.int32))
    stored = list(range(100, 100 + size))
    manager.allocate(1, stored)
    manager.commit(1)
    assert manager.match_prefix([*stored, 7]) == size
    for place in range(size):
        other = stored.copy()
        other[place] = 7
        assert manager.match_prefix([*other, 7]) == place
        info = manager.allocate(2 + place, [*other, 7])
        assert info.num_cached_tokens == place and info.block_ids[0] != manager.get_sequence(1).block_ids[0]
    manager.check()


ALIKE = ["x" * 40, "x" * 40 + "a", "x" * 40 + "b", "x" * 5000 + "a", "x" * 5000 + "b", "a" + "x" * 60, "b" + "x" * 60]


def test_salts_that_begin_alike_share_nothing():
    manager = BlockManager(64, 2)
    stored = []
    manager.subscribe(lambda event: stored.append(event.cache_salt))
    for seq_id, salt in enumerate(ALIKE):
        assert manager.match_prefix([1, 2, 3], salt) == 0
        assert manager.allocate(seq_id, [1, 2, 3], cache_salt=salt).num_cached_tokens == 0
        manager.commit(seq_id)
    assert stored == ALIKE and manager.stats.prefix_hits == 0
    for salt in ALIKE:
        assert manager.match_prefix([1, 2, 3], salt) == 2
    assert len({int(name) for name in manager._state.roots[: len(ALIKE), 3]}) == len(ALIKE)


@pytest.mark.parametrize("left", [1, 3, 4, 6])
def test_a_sequence_that_streamed_is_never_findable_again(left):
    """Not even when it is taken back to its sinks and goes on with tokens that are known."""
    manager = BlockManager(64, 4)
    ids = list(range(20))
    manager.allocate(1, ids)
    manager.apply_streaming_llm(1, 6, 4)
    manager.truncate(1, left)
    manager.fork(1, 2)
    for seq_id in (1, 2):
        manager.append(seq_id, [50 + token for token in range(9)])
        manager.commit(seq_id)
    assert manager.match_prefix([*ids[:left], *range(50, 59)]) == 0
    assert not manager.snapshot().indexed.any()
    manager.check()
