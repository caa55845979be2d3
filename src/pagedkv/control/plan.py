"""BatchPlan: slot mapping, block tables and lengths of one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.errors import InvalidOperation, MissingExtra
from pagedkv.typing import Device

if TYPE_CHECKING:
    from torch import Tensor


class TensorPlan(NamedTuple):
    """The arrays of a `BatchPlan` as tensors of the same names, shapes and dtypes, on one device."""

    seq_ids: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    positions: Tensor
    holes: Tensor
    num_dropped: Tensor
    copies: Tensor


def stale_plan(seq_id: int) -> InvalidOperation:
    """Return the error for a plan that a sequence has left behind."""
    reason = f"the plan is stale: S{seq_id} has changed since it was made"
    return InvalidOperation(reason, "plan", f"make a new one: plan([{seq_id}])")


@dataclass(slots=True, eq=False)
class BatchPlan:
    """Where each new token goes and what each sequence sees. ``n`` sequences, ``total_tokens`` query tokens.

    A plan lives as long as its tokens are where it says: until one of its sequences ends, streams, or has other tokens
    in their place. From then on ``write`` and ``commit`` refuse it. ``write`` also refuses it when they lie in other
    blocks by now: copied because a fork shared them, or given back because the index held equal ones.

    Attributes
    ----------
    seq_ids : int64 [n]
        The sequences, in the order of the batch (ids from 2⁶³ on show as negative numbers).
    slot_mapping : int64 [total_tokens]
        ``block_id * block_size + offset`` of each query token: K and V go there.
    block_tables : int32 [n, max_blocks]
        The blocks of each sequence; a row's places behind its last block mean nothing.
    seq_lens : int32 [n]
        Visible tokens of each sequence, the query tokens included.
    cu_seqlens_q : int32 [n + 1]
        Sequence ``i`` owns the query tokens ``[cu_seqlens_q[i], cu_seqlens_q[i + 1])``, its last ones.
    positions : int64 [total_tokens]
        Position of each query token inside the cache: 0 … ``seq_lens[i]`` − 1.
    holes : int32 [n, 2]
        Slots ``[start, end)`` of a sequence's table that hold nothing visible (StreamingLLM); empty when equal.
    num_dropped : int64 [n]
        Tokens that streaming dropped; ``positions + num_dropped`` are the positions in the original text.
    copies : int32 [k, 2]
        Blocks (source, destination) to be copied before anything is written: read all sources, then write. They are
        handed out once: copy even if the plan is then not used. A ``PagedKvCache`` has done it already and tells of it.
    tick : int
        When the plan was made.
    """

    seq_ids: npt.NDArray[np.int64]
    slot_mapping: npt.NDArray[np.int64]
    block_tables: npt.NDArray[np.int32]
    seq_lens: npt.NDArray[np.int32]
    cu_seqlens_q: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int64]
    holes: npt.NDArray[np.int32]
    num_dropped: npt.NDArray[np.int64]
    copies: npt.NDArray[np.int32]
    tick: int

    @property
    def num_sequences(self) -> int:
        """How many sequences the batch has."""
        return len(self.seq_ids)

    @property
    def total_tokens(self) -> int:
        """How many query tokens the batch has."""
        return len(self.slot_mapping)

    @property
    def num_query_tokens(self) -> npt.NDArray[np.int32]:
        """Query tokens of each sequence, int32 [n]."""
        return np.diff(self.cu_seqlens_q)

    @property
    def text_positions(self) -> npt.NDArray[np.int64]:
        """Position of each query token in the original text, dropped tokens counted: int64 [total_tokens]."""
        return self.positions + np.repeat(self.num_dropped, self.num_query_tokens)

    def torch(self, device: Device | None = None) -> TensorPlan:
        """Return the same fields as tensors: copies, so that either side may be written to.

        Parameters
        ----------
        device : torch.device or str, optional
            Where the tensors are to be; by default on the CPU.

        Raises
        ------
        MissingExtra
            If torch is not installed.
        """
        try:
            import torch
        except ModuleNotFoundError as error:
            raise MissingExtra("torch", "torch") from error
        return TensorPlan(*(torch.from_numpy(getattr(self, name).copy()).to(device) for name in TensorPlan._fields))


def _with_copies(noted: dict[int, int], copies: npt.NDArray[np.int32]) -> dict[int, int]:
    """Return the copies (destination: source) that do at once what those noted and then these do."""
    both = dict(noted)
    for source, destination in copies.tolist():
        source = both.get(source, source)
        both.pop(destination, None)
        both[destination] = source
    return both


NO_COPIES = np.empty((0, 2), np.int32)


class UntoldCopies:
    """Copies of blocks that no plan has told of: the next one does, once."""

    def __init__(self) -> None:
        self.noted: tuple[int, dict[int, int]] = (0, {})  # at which change; destination: source

    def has_heard(self, changes: int) -> bool:
        """Tell whether the copies of this change of the books are noted already."""
        return self.noted[0] == changes

    def note(self, changes: int, copies: npt.NDArray[np.int32]) -> None:
        """Note the copies that this change of the books asks for."""
        self.noted = (changes, _with_copies(self.noted[1], copies))

    def tell(self, make: Callable[[npt.NDArray[np.int32]], BatchPlan]) -> BatchPlan:
        """Return the plan that is made with these copies; if it is not made, they are still to be told of."""
        noted_at, noted = self.noted
        copies = np.array([(source, destination) for destination, source in noted.items()], np.int32)
        try:
            self.noted = (noted_at, {})
            return make(copies)
        except BaseException:
            self.noted = (noted_at, noted)  # nobody has seen them
            raise
