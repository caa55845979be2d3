"""Moving blocks between a pool and a tier: to demote is to store, to promote is somebody else computing the prefix."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagedkv.cache import PagedKvCache
from pagedkv.control.arguments import parse_ids
from pagedkv.data.storage import KvStorage
from pagedkv.errors import bad_argument
from pagedkv.tiers.tier import Rows, Tier
from pagedkv.typing import TokenIds


def read_rows(storage: KvStorage, blocks: Any) -> Rows:
    """Return copies of blocks as rows, uint8 ``[n, block_memory_bytes]``: K and V of all layers, scales with them."""
    parts = [_as_bytes(part.movedim(2, 0)) for part in storage.read_blocks(blocks)]
    rows: Rows = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).cpu().numpy()
    return rows


def write_rows(storage: KvStorage, blocks: Any, rows: Rows) -> None:
    """Write rows as :func:`read_rows` returns them into blocks."""
    shapes = storage.read_blocks(np.zeros(0, np.int64))
    data, start, contents = torch.from_numpy(rows), 0, []
    for shape in shapes:
        (layers, sides, _, width), size = shape.shape, shape.element_size()
        stop = start + layers * sides * width * size
        part = data[:, start:stop]
        if (data.data_ptr() + start) % size or data.stride(0) % size:
            part = part.contiguous()  # where it could not be seen as elements
        part = part.view(shape.dtype).view(len(rows), layers, sides, width)
        contents.append(part.movedim(0, 2).to(storage.device))
        start = stop
    storage.write_blocks(blocks, contents)


def _as_bytes(part: Tensor) -> Tensor:
    return part.flatten(1).view(torch.uint8)


def demote(cache: PagedKvCache, tier: Tier, seq_id: int, token_ids: TokenIds, cache_salt: str = "") -> Future[int]:
    """Store what a live sequence has written; to be called before it is freed.

    The rows are copied before this returns, so the sequence may go on, or end, at once.

    Parameters
    ----------
    cache : PagedKvCache
    tier : Tier
    seq_id : int
    token_ids : sequence of int
        All tokens of the sequence, in order.
    cache_salt : str
        That of the sequence.

    Returns
    -------
    Future of int
        How many leading blocks the tier has.

    Raises
    ------
    SequenceNotFound
    InvalidOperation
        If the sequence has streamed, or has other tokens than so many.
    """
    ids, info = _ids(token_ids), cache.get_sequence(seq_id)
    if info.num_dropped_tokens:
        raise bad_argument("seq_id", "a sequence that has all its tokens", f"{info.seq_id}, which streamed")
    if len(ids) != info.num_tokens:
        raise bad_argument("token_ids", f"{info.num_tokens}, the tokens of {info.seq_id}", f"{len(ids)}")
    count = info.num_committed_tokens // cache.block_size
    ids = ids[: count * cache.block_size]
    first = min(count, tier.match(ids, cache_salt).result())
    return tier.store(ids, read_rows(cache.storage, info.block_table[first:count]), cache_salt)


def promote(cache: PagedKvCache, tier: Tier, seq_id: int, token_ids: TokenIds, cache_salt: str = "") -> int:
    """Make findable in the pool what a tier has of a text, as if a sequence `seq_id` had computed it and was freed.

    It waits for the tier. What the tier cannot give, or gives late or wrong, is not findable; nothing else changes.

    Parameters
    ----------
    cache : PagedKvCache
    tier : Tier
    seq_id : int
        Of no live sequence.
    token_ids : sequence of int
    cache_salt : str

    Returns
    -------
    int
        How many leading tokens are in whole blocks of the pool now.

    Raises
    ------
    InvalidOperation
        If the sequence exists, or the cache has recurrent states, which no tier keeps.
    OutOfMemory
        If the pool has no room for what the tier has.
    """
    if cache.total_states:
        raise bad_argument("cache", "a cache without recurrent states, which no tier keeps", repr(cache))
    ids, size = _ids(token_ids), cache.block_size
    held = cache.match_blocks(ids, cache_salt) // size
    count = tier.match(ids, cache_salt).result()
    if count <= held:
        return held * size
    rows = np.empty((count - held, cache.block_memory_bytes), np.uint8)
    good = held + tier.load(ids[: count * size], rows, cache_salt).result()
    if good > held:
        place_rows(cache, seq_id, ids[: good * size], [(held, rows[: good - held])], cache_salt)
    return good * size


def place_rows(
    cache: PagedKvCache, seq_id: int, token_ids: Any, parts: Sequence[tuple[int, Rows]], cache_salt: str = ""
) -> None:
    """Make the whole blocks of a text findable, as if a sequence `seq_id` had computed them and was freed.

    Parameters
    ----------
    parts : sequence of (int, uint8 [n, block_memory_bytes])
        Blocks of the text, each part with the number of its first one; together all that are not in the pool.

    Raises
    ------
    InvalidOperation
        If the sequence exists, or blocks are missing.
    OutOfMemory
        If the pool has no room; it is as before.
    """
    info, size = cache.allocate(seq_id, token_ids, cache_salt=cache_salt), cache.block_size
    try:
        place = info.num_cached_tokens // size
        for first, rows in parts:
            stop = first + len(rows)
            if first <= place < stop:
                write_rows(cache.storage, info.block_table[place:stop], rows[place - first :])
                place = stop
        if place * size < info.num_tokens:
            raise bad_argument("parts", f"{info.num_tokens // size} blocks", f"{place}")
        cache.commit(seq_id)
    finally:
        cache.free(seq_id)


def _ids(token_ids: Any) -> Any:
    ids = parse_ids("token_ids", token_ids)
    return ids
