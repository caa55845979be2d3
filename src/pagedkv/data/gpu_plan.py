"""The arrays of a batch on the device: copied once for all layers, or into buffers that a CUDA graph has seen."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.data.call import AttentionCall, first_fault
from pagedkv.data.gpu_device import checked_device, is_capturing, require_slots
from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.spec import MAX_COUNT
from pagedkv.validate import require_int

__all__ = ["DeviceBatch", "DevicePlan", "uploaded"]

Int32Array = npt.NDArray[np.int32]
_NOWHERE = -1
"""The slot of a token that is none; nothing is written there."""


@dataclass(slots=True, eq=False)
class DeviceBatch:
    """What the attention kernels need to know of a batch.

    ``longest`` bounds the keys that a sequence sees and ``query_counts`` holds the query tokens of each: both are known
    to the host, grids depend on them. Where the arrays may change behind the host's back, the one count is a bound.
    """

    block_tables: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    holes: Tensor
    total_tokens: int
    longest: int
    query_counts: Int32Array
    is_static: bool = False

    @property
    def num_sequences(self) -> int:
        """How many sequences there is room for."""
        return len(self.seq_lens)

    def most_up_to(self, few: int) -> int:
        """Return the most query tokens of a sequence that has no more than ``few``; 0 where there is none."""
        if self.is_static:
            return min(few, int(self.query_counts[0]))
        return int(self.query_counts[self.query_counts <= few].max(initial=0))

    def has_more_than(self, few: int) -> bool:
        """Tell whether a sequence may have more query tokens than ``few``."""
        return bool((self.query_counts > few).any())


class DevicePlan:
    """Buffers on the device for one :class:`BatchPlan` after the other, for kernels that run inside CUDA graphs.

    The buffers stay where they are and so do the shapes: what is in a graph reads the plan that was loaded last.
    Sequences and tokens that a plan lacks are there and empty: nothing is written for them, and attention gives zeros.

    Parameters
    ----------
    max_seqs, max_blocks, max_tokens : int
        Room for sequences, for blocks of one sequence and for query tokens of all of them.
    block_size, num_blocks : int
        Of the pool that the plans are for.
    max_query_tokens : int, optional
        The most query tokens of one sequence, 1 for pure decoding; ``max_tokens`` by default.
    device : str or torch.device

    Attributes
    ----------
    slot_mapping : int64 [max_tokens]
        -1 behind the tokens of the plan.
    positions : int64 [max_tokens]
        0 behind the tokens of the plan.
    batch : DeviceBatch
        Block tables, lengths and holes.

    Raises
    ------
    InvalidOperation
        An argument is out of range, or torch has no such device here.
    """

    def __init__(
        self,
        max_seqs: int,
        max_blocks: int,
        max_tokens: int,
        *,
        block_size: int,
        num_blocks: int,
        max_query_tokens: int | None = None,
        device: str | torch.device = "cuda",
    ) -> None:
        self.max_seqs = require_int("max_seqs", max_seqs, 1, MAX_COUNT - 1)
        self.max_blocks = require_int("max_blocks", max_blocks, 1, MAX_COUNT)
        self.max_tokens = require_int("max_tokens", max_tokens, 1, MAX_COUNT)
        self.block_size = require_int("block_size", block_size, 1, MAX_COUNT)
        self.num_blocks = require_int("num_blocks", num_blocks, 0, MAX_COUNT)
        most = self.max_tokens if max_query_tokens is None else max_query_tokens
        self.max_query_tokens = require_int("max_query_tokens", most, 1, self.max_tokens)
        self.device = checked_device(device)
        shapes = _shapes(self.max_tokens, self.max_seqs, self.max_blocks)
        self._shapes = shapes
        self._buffer = torch.zeros(_words(shapes), dtype=torch.int32, device=self.device)
        views = _views(self._buffer, shapes)
        self.slot_mapping: Tensor = views[0].fill_(_NOWHERE)
        self.positions: Tensor = views[1]
        bound = np.array([self.max_query_tokens], np.int32)
        longest = min(self.max_blocks * self.block_size, MAX_COUNT)
        tables, lens, cuts, holes = views[2:]
        self.batch = DeviceBatch(tables, lens, cuts, holes, self.max_tokens, longest, bound, is_static=True)

    @property
    def total_tokens(self) -> int:
        """Query tokens that are written and attend, those that are none included: ``max_tokens``."""
        return self.max_tokens

    def load(self, plan: Any) -> Self:
        """Copy a plan into the buffers, in one piece and without waiting for the device.

        Parameters
        ----------
        plan : BatchPlan

        Raises
        ------
        InvalidOperation
            The plan does not fit into the buffers, or names blocks or slots outside of the pool, or a CUDA graph is
            being captured. The buffers keep what they had.
        """
        if is_capturing(self.device):
            raise bad_argument("plan", "to be loaded before a CUDA graph is captured or replayed")
        tables, lens, cuts = plan.block_tables, plan.seq_lens, plan.cu_seqlens_q
        count, total = len(lens), len(plan.slot_mapping)
        _require_room("sequences", count, self.max_seqs)
        _require_room("query tokens", total, self.max_tokens)
        _require_room("query tokens of one sequence", int(np.diff(cuts).max(initial=0)), self.max_query_tokens)
        needed = lens.astype(np.int64) + np.where(plan.holes[:, 0] < lens, plan.holes[:, 1] - plan.holes[:, 0], 0)
        _require_room("blocks of one sequence", int((-(-needed // self.block_size)).max(initial=0)), self.max_blocks)
        fault = first_fault(tables, lens, cuts, plan.holes, self.block_size, self.num_blocks, total)
        if fault:
            raise InvalidOperation(fault)
        require_slots(plan.slot_mapping, self.num_blocks * self.block_size)

        staging = torch.zeros(len(self._buffer), dtype=torch.int32, pin_memory=self.device.type == "cuda")
        slots, positions, *rest = (view.numpy() for view in _views(staging, self._shapes))
        slots[:total], slots[total:] = plan.slot_mapping, _NOWHERE
        positions[:total] = plan.positions
        block_tables, seq_lens, cu_seqlens_q, holes = rest
        width = min(tables.shape[1], self.max_blocks)
        block_tables[:count, :width] = tables[:, :width]
        seq_lens[:count] = lens
        cu_seqlens_q[: count + 1], cu_seqlens_q[count + 1 :] = cuts, cuts[-1]
        holes[:count] = plan.holes
        # torch keeps pinned memory until the copies from it are done.
        self._buffer.copy_(staging, non_blocking=True)
        return self

    def check_device_arrays(self) -> None:
        """Check what is in the buffers, waiting for the device.

        Raises
        ------
        InvalidOperation
            They hold what no plan of this pool can hold.
        """
        batch = self.batch
        on_device = batch.block_tables, batch.seq_lens, batch.cu_seqlens_q, batch.holes
        tables, lens, cuts, holes = (x.cpu().numpy() for x in on_device)
        fault = first_fault(tables, lens, cuts, holes, self.block_size, self.num_blocks, int(cuts[-1]))
        if fault:
            raise InvalidOperation(f"plan on {self.device}: {fault}")
        slots = self.slot_mapping.cpu().numpy()
        require_slots(slots[slots != _NOWHERE], self.num_blocks * self.block_size)


def _require_room(what: str, count: int, room: int) -> None:
    if count > room:
        raise bad_argument("plan", f"at most {room} {what}", f"{count}")


_Shapes = list[tuple[torch.dtype, tuple[int, ...]]]


def _shapes(tokens: int, seqs: int, blocks: int) -> _Shapes:
    """Return dtypes and shapes of slots, positions, tables, lengths, cuts and holes."""
    int32: _Shapes = [(torch.int32, shape) for shape in ((seqs, blocks), (seqs,), (seqs + 1,), (seqs, 2))]
    return [(torch.int64, (tokens,)), (torch.int64, (tokens,)), *int32]


def _words(shapes: _Shapes) -> int:
    return sum(math.prod(shape) * dtype.itemsize // 4 for dtype, shape in shapes)


def _views(buffer: Tensor, shapes: _Shapes) -> list[Tensor]:
    """Return arrays of these shapes, one behind the other in a buffer of int32."""
    views, at = [], 0
    for dtype, shape in shapes:
        size = math.prod(shape) * dtype.itemsize // 4
        views.append(buffer[at : at + size].view(dtype).view(shape))
        at += size
    return views


_kept = threading.local()


def uploaded(call: AttentionCall) -> DeviceBatch:
    """Return the arrays of a checked call on its device.

    All layers of a step use the same arrays: the copy that this thread made last is used again where they are equal.

    Raises
    ------
    InvalidOperation
        A CUDA graph is being captured: it would replay these very arrays for ever.
    """
    device = call.queries.device
    arrays = (call.block_tables, call.seq_lens, call.cu_seqlens_q, call.holes)
    if is_capturing(device):
        raise bad_argument("block_tables", "a DevicePlan while a CUDA graph is captured", "host arrays")
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    made_for, made_on, batch = getattr(_kept, "last", ((), None, None))
    if batch is not None and made_on == (device, stream) and _equal(made_for, arrays):
        return batch  # type: ignore[no-any-return]
    shapes = _shapes(0, *call.block_tables.shape)
    staging = torch.empty(_words(shapes), dtype=torch.int32, pin_memory=device.type == "cuda")
    copies = [view.numpy() for view in _views(staging, shapes)[2:]]
    for copy, array in zip(copies, arrays, strict=True):
        copy[...] = array
    # On the CPU, in the interpreter, the staging memory is the destination.
    tables, lens, cuts, holes = _views(staging.to(device, non_blocking=True), shapes)[2:]
    counts = np.diff(call.cu_seqlens_q).astype(np.int32)
    longest = int(call.seq_lens.max(initial=0))
    batch = DeviceBatch(tables, lens, cuts, holes, len(call.queries), longest, counts)
    _kept.last = (tuple(array.copy() for array in arrays), (device, stream), batch)
    return batch


def _equal(these: tuple[Int32Array, ...], those: tuple[Int32Array, ...]) -> bool:
    return all(a.shape == b.shape and np.array_equal(a, b) for a, b in zip(these, those, strict=True))
