"""The runner protocol: what the engine needs of a model over a cache."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pagedkv.control.manager import BlockManager
from pagedkv.control.plan import BatchPlan


class Runner(Protocol):
    """One model over one cache; :class:`pagedkv.hf.runner.ModelRunner` is the one that serves.

    Attributes
    ----------
    cache : PagedKvCache
    vocab_size : int
    max_positions : int or None
        The longest text.
    reuses_prefixes : bool
        Whether what the model keeps of a text holds for longer texts too.
    has_states : bool
        Whether it keeps a state of each text besides K and V, in a slot of the cache: then a prefix is reused up to a
        snapshot, which is kept where a step ends at a block boundary, and tokens cannot be taken back.
    window : int or None
        How many tokens a token sees at most, itself included, where no layer sees more.
    chunkable : bool
        Whether a text may be computed in pieces of any length. If not, a prompt goes through the model in one step, and
        every token behind it in a step of its own; no prefixes are reused then.
    restarts_beyond : int or None
        A text that grows beyond so many tokens has to be computed anew, so many and one in one step.
    """

    @property
    def cache(self) -> BlockManager:
        """The cache."""

    @property
    def vocab_size(self) -> int:
        """Elements of a row of logits."""

    @property
    def max_positions(self) -> int | None:
        """The longest text, in tokens."""

    @property
    def reuses_prefixes(self) -> bool:
        """Whether what the model keeps of a text holds for longer texts too."""

    @property
    def has_states(self) -> bool:
        """Whether the model keeps a state of each text besides K and V."""

    @property
    def window(self) -> int | None:
        """How many tokens a token sees at most, itself included."""

    @property
    def chunkable(self) -> bool:
        """Whether a text may be computed in pieces of any length."""

    @property
    def restarts_beyond(self) -> int | None:
        """How long a text may become before it is computed anew."""

    def forward(self, plan: BatchPlan, token_ids: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]) -> Any:
        """Compute K and V of the query tokens and return the logits of those wanted, float32 ``[k, vocab_size]``."""

    def require_streaming(self, sink_tokens: int, window_tokens: int) -> None:
        """Raise InvalidOperation if the model cannot keep only so many first and last tokens of a text."""

    def fork(self, src: int, dst: int) -> None:
        """Follow a fork of the cache."""

    def release(self, seq_id: int) -> None:
        """Follow a free of the cache."""
