"""DevicePlan: the arrays of a batch on the device, in buffers for CUDA graphs, or copied once for all layers."""

from __future__ import annotations

import math
import threading
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from pagedkv.data.call import AttentionCall, Batch, DeviceBatch, Int32Array
from pagedkv.data.gpu_device import checked_device, is_capturing, is_debugging, require_slots
from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.spec import MAX_COUNT
from pagedkv.validate import require_int

_NOWHERE = -1
"""The slot of a token that is none; nothing is written there."""


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
    loaded : BatchPlan or None
        The plan that was loaded last: a cache looks at it, and not at the device, to refuse what is stale.

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
        self.loaded: Any = None
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
        batch = Batch(tables, lens, cuts, plan.holes)
        batch.check(self.num_blocks, self.block_size)
        batch.require_total(total)
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
        self.loaded = plan
        return self

    def check_device_arrays(self) -> None:
        """Check that the buffers hold what a plan of this pool can hold, waiting for the device."""
        batch = self.batch
        on_device = batch.block_tables, batch.seq_lens, batch.cu_seqlens_q, batch.holes
        try:
            Batch(*(x.cpu().numpy() for x in on_device)).check(self.num_blocks, self.block_size)
        except InvalidOperation as error:
            raise InvalidOperation(f"plan on {self.device}: {error.reason}", "plan") from None
        slots = self.slot_mapping.cpu().numpy()
        require_slots(slots[slots != _NOWHERE], self.num_blocks * self.block_size)


def require_plan_of(plan: Any, num_blocks: int, block_size: int, device: torch.device) -> None:
    """Refuse what is no plan on this device for a pool of this shape; in debug mode look into its buffers too."""
    if not isinstance(plan, DevicePlan):
        raise bad_argument("plan", "a DevicePlan", f"{type(plan).__name__}")
    if plan.device != device:
        raise bad_argument("plan", f"a DevicePlan on {device}", f"one on {plan.device}")
    if plan.block_size != block_size or plan.num_blocks > num_blocks:
        raise bad_argument(
            "plan",
            f"one for {num_blocks} blocks of {block_size} tokens",
            f"one for {plan.num_blocks} of {plan.block_size}",
        )
    if is_debugging() and not is_capturing(device):
        plan.check_device_arrays()


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
    While a CUDA graph is captured they are refused, as it would replay these very arrays for ever.
    """
    device = call.queries.device
    arrays = call.host_batch.arrays
    if is_capturing(device):
        raise bad_argument("block_tables", "a DevicePlan while a CUDA graph is captured", "host arrays")
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    made_for, made_on, batch = getattr(_kept, "last", ((), None, None))
    if batch is not None and made_on == (device, stream) and _equal(made_for, arrays):
        return batch  # type: ignore[no-any-return]
    shapes = _shapes(0, *arrays[0].shape)
    staging = torch.empty(_words(shapes), dtype=torch.int32, pin_memory=device.type == "cuda")
    copies = [view.numpy() for view in _views(staging, shapes)[2:]]
    for copy, array in zip(copies, arrays, strict=True):
        copy[...] = array
    # On the CPU, in the interpreter, the staging memory is the destination.
    tables, lens, cuts, holes = _views(staging.to(device, non_blocking=True), shapes)[2:]
    counts = np.diff(arrays[2]).astype(np.int32)
    longest = int(arrays[1].max(initial=0))
    batch = DeviceBatch(tables, lens, cuts, holes, len(call.queries), longest, counts)
    _kept.last = (tuple(array.copy() for array in arrays), (device, stream), batch)
    return batch


def _equal(these: tuple[Int32Array, ...], those: tuple[Int32Array, ...]) -> bool:
    return all(a.shape == b.shape and np.array_equal(a, b) for a, b in zip(these, those, strict=True))
