"""Would evicting sequences make room? Asked before the first one goes, so that nothing is evicted in vain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from pagedkv.control.state import LIVE, PINNED, State


def written_tails(state: State, rows: Sequence[int], counts: npt.NDArray[np.int64]) -> list[int]:
    """Return the partly filled last blocks that sequences write to when they grow by `counts`, one for each writer."""
    size = int(state.counters[0].block_size)
    growing = [state.sequences[row] for row in rows]
    return [
        int(state.tables[row, record.num_blocks - 1])
        for row, record, count in zip(rows, growing, counts.tolist(), strict=True)
        if count > 0 and (record.num_tokens + record.hole_len) % size
    ]


def fits_after_evicting(
    state: State,
    missing: int,
    spared: frozenset[int],
    matched: Iterable[int],
    tails: Sequence[int],
    kept: Iterable[int],
) -> bool:
    """Tell whether evicting every sequence that may go makes up for `missing` blocks.

    Pinned and `spared` rows stay. Blocks that the call shares (`matched`) are not freed for it, whoever lets go of
    them, nor are those that pins of freed sequences keep (`kept`); a shared tail among `tails` need not be copied once
    only its writers hold it.
    """
    marks = state.sequences["marks"][: int(state.counters[0].rows_used)]
    pinned = np.flatnonzero((marks & (LIVE | PINNED)) == (LIVE | PINNED)).tolist()
    owners: Counter[int] = Counter()
    for row in spared.union(pinned):
        owners.update(state.tables[row, : state.sequences[row].num_blocks].tolist())
    staying = {int(block) for block in chain(matched, kept) if state.blocks[block].ref_count > 0}
    freed = int(state.counters[0].used) - len(owners.keys() | staying)
    return freed + _copies_saved(state, tails, owners) >= missing


def _copies_saved(state: State, tails: Sequence[int], owners: Counter[int]) -> int:
    saved = 0
    for tail, writers in Counter(tails).items():
        block = state.blocks[tail]
        is_copied_anyway = block.pins > 0 or (block.indexed and block.num_children > 0)
        saved += bool(block.ref_count > writers == owners[tail] and not is_copied_anyway)
    return saved
