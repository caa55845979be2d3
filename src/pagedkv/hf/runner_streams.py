"""The streaming sequences of a ModelRunner."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.control.arguments import sequence_number
from pagedkv.control.plan import BatchPlan
from pagedkv.errors import InvalidOperation
from pagedkv.hf.pages import ModelKvCache
from pagedkv.hf.rotary_model import RotaryModel
from pagedkv.hf.streamed_keys import StreamedKeys, rebase_limit

__all__ = ["RunnerStreams"]

Ints = npt.NDArray[np.int64]


class RunnerStreams:
    """Sequences that ``cache.apply_streaming_llm()`` has cut, among others that are whole.

    Parameters
    ----------
    model : PreTrainedModel
        It is measured when the first sequence streams: see :class:`RotaryModel`.
    cache : ModelKvCache
    """

    def __init__(self, model: Any, cache: ModelKvCache) -> None:
        self._model, self._cache = model, cache
        self._keys: StreamedKeys | None = None
        self._dropped: dict[int, int] = {}  # of sequences whose blocks were looked at
        self._most_visible = 0  # tokens, for which the model was measured

    def positions(self, plan: BatchPlan) -> Ints:
        """Move keys for the forward pass of a plan and return the rotary position of each query token.

        Raises
        ------
        InvalidOperation
            If the model cannot stream, or the blocks of a sequence are not its own.
        """
        for i in np.flatnonzero(plan.num_dropped).tolist():
            self._check(plan, i)
        assert self._keys is not None  # made by the check of a first sequence
        return self._keys.prepare(plan)

    def refuse_fork(self, src: int) -> None:
        """Refuse to share keys that move."""
        if src in self._dropped:
            raise InvalidOperation(f"src: expected a sequence that has not dropped tokens, got S{sequence_number(src)}")

    def release(self, seq_id: int) -> None:
        """Forget a sequence."""
        if self._dropped.pop(seq_id, None) is not None and self._keys is not None:
            self._keys.forget(seq_id)

    def _check(self, plan: BatchPlan, i: int) -> None:
        seq_id, dropped = int(plan.seq_ids[i]), int(plan.num_dropped[i])
        if dropped < self._dropped.get(seq_id, 0):  # another sequence of the same id
            self.release(seq_id)
        if seq_id not in self._dropped:
            used = -(-int(plan.seq_lens[i] + plan.holes[i, 1] - plan.holes[i, 0]) // self._cache.block_size)
            if not self._cache.are_private(plan.block_tables[i, :used].astype(np.int64)):
                raise InvalidOperation(
                    f"plan: expected S{sequence_number(seq_id)}, which streams, to share no block and to have none in "
                    "the prefix index, as its keys move: allocate it by a count of tokens, and do not fork it"
                )
        self._measure(int(plan.holes[i, 0]), int(plan.seq_lens[i]))
        self._dropped[seq_id] = dropped

    def _measure(self, num_sinks: int, num_visible: int) -> None:
        if num_visible > self._most_visible:
            limit = self._limit(num_sinks, num_visible - num_sinks)
            rotary = RotaryModel(self._model, num_visible, limit)
            if self._keys is None:
                self._keys = StreamedKeys(self._cache, rotary.rope, self._limit)
            self._most_visible = num_visible

    def _limit(self, num_sinks: int, num_window: int) -> int:
        return rebase_limit(num_sinks, num_window, self._cache.storage.dtype)
