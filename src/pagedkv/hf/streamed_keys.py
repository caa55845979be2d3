"""Keys of streaming sequences that move: rotary positions count inside the cache.

Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks". Attention under RoPE depends on
distances only. So the window's keys stay as they were written, and only the few sinks move to where the window now
begins: their keys are kept unrotated in float32 and turned afresh from there, so no error builds up, however coarse the
dtype of the blocks is. What that dtype costs when a sink is first written is in the kept keys for good.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.cache import PagedKvCache
from pagedkv.control.plan import BatchPlan
from pagedkv.hf.pages import visible_slots
from pagedkv.hf.rope import Rope

__all__ = ["StreamedKeys", "rebase_limit"]

HALF_REBASE_AT = 4096  # angles are good to 0.0002 radians there, cosines in bfloat16 to 0.002

Ints = npt.NDArray[np.int64]


def rebase_limit(sink_tokens: int, window_tokens: int, dtype: torch.dtype | str) -> int:
    """Return the position that streaming with sinks and window should stay below.

    It is the least for float32, where small positions mean exact angles, else higher, as each key that is turned back
    is rounded anew.
    """
    least = sink_tokens + 2 * window_tokens + 1
    return least if "float32" in str(dtype) else max(HALF_REBASE_AT, least)


@dataclass(slots=True)
class _Stream:
    """The unrotated keys of the sinks [layers, sinks, heads, head_dim], and where things stand."""

    sinks: Tensor
    base: int = 0  # how many dropped tokens rotary positions leave out
    offset: int = -1  # of the sinks' positions; -1 before they are placed


class StreamedKeys:
    """Puts the keys of streaming sequences where the next forward pass must find them.

    Parameters
    ----------
    cache : PagedKvCache
        The blocks of a sink may belong to one sequence only, as its keys change.
    rope : Rope
    limit : callable
        Given the sink and the window tokens of a sequence, the position that it should stay below.
    """

    def __init__(self, cache: PagedKvCache, rope: Rope, limit: Callable[[int, int], int]) -> None:
        self._cache, self._rope, self._limit = cache, rope, limit
        self._streams: dict[int, _Stream] = {}

    def base(self, seq_id: int) -> int:
        """Return how many dropped tokens the rotary positions of a sequence leave out."""
        stream = self._streams.get(seq_id)
        return 0 if stream is None else stream.base

    def forget(self, seq_id: int) -> None:
        """Forget a sequence."""
        self._streams.pop(seq_id, None)

    def prepare(self, plan: BatchPlan) -> Ints:
        """Move keys for the forward pass of a plan.

        Returns
        -------
        int64 [total_tokens]
            The rotary position of each query token.
        """
        streaming = np.flatnonzero(plan.num_dropped)
        positions = plan.text_positions
        moved = []
        for i in streaming.tolist():
            first, last = plan.cu_seqlens_q[i : i + 2].tolist()
            if first == last:
                continue
            slots = visible_slots(plan, self._cache.block_size, slice(i, i + 1))
            stream, is_moved = self._turn(plan, i, slots, int(positions[last - 1]), last - first)
            positions[first:last] -= stream.base
            if is_moved and stream.sinks.shape[1]:
                moved.append((stream, slots[: stream.sinks.shape[1]]))
        if moved:
            self._place(moved)
        return positions

    def _turn(self, plan: BatchPlan, i: int, slots: Ints, last: int, num_new: int) -> tuple[_Stream, bool]:
        """Return the stream of a sequence, rebased if it is time, and whether its sinks have to move."""
        seq_id, dropped, num_sinks = int(plan.seq_ids[i]), int(plan.num_dropped[i]), int(plan.holes[i, 0])
        stream = self._streams.get(seq_id)
        if stream is None:
            # Its first drop: the sinks still stand at their own positions.
            keys = self._rope.turn(self._read(slots[:num_sinks]), -torch.arange(num_sinks))
            stream = self._streams[seq_id] = _Stream(keys)
        num_held = len(slots) - num_new
        if last - stream.base >= self._limit(num_sinks, num_held - num_sinks):
            self._rebase(stream, dropped, slots[num_sinks:num_held])
        before, stream.offset = stream.offset, dropped - stream.base
        return stream, before != stream.offset

    def _rebase(self, stream: _Stream, dropped: int, window: Ints) -> None:
        """Start again from small positions.

        A model takes angles in float32, and position times frequency is off by up to 2⁻²⁴ of itself: 0.0002 radians at
        position 4096, 0.06 at a million. So positions must not grow with the text. When they reach the limit, all of
        the window's keys are turned back by one angle, taken in float64. A key lives for ``window_tokens`` tokens and
        rebases are further apart than that, so it is turned back at most once.
        """
        steps = torch.full((len(window),), stream.base - dropped)
        self._write(self._rope.turn(self._read(window), steps), window)
        stream.base = dropped

    def _place(self, moved: list[tuple[_Stream, Ints]]) -> None:
        """Turn sinks to where their windows begin: each dropped token has moved it one further."""
        steps = [torch.arange(stream.sinks.shape[1]) + stream.offset for stream, _ in moved]
        keys = self._rope.turn(torch.cat([stream.sinks for stream, _ in moved], 1), torch.cat(steps))
        self._write(keys, np.concatenate([slots for _, slots in moved]))

    def _read(self, slots: Ints) -> Tensor:
        storage = self._cache.storage
        index = storage.slot_index(slots)
        return torch.stack([storage.gather(layer, index)[0] for layer in range(storage.num_layers)])

    def _write(self, keys: Tensor, slots: Ints) -> None:
        index = self._cache.storage.slot_index(slots)
        for layer, layer_keys in enumerate(keys):
            self._cache.storage.write_keys(layer, layer_keys, index)
