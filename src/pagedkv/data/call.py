"""What an attention call is made of, checked once: every backend can trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, int32

from pagedkv.data.quantised import GREATEST, checked_scales
from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.jit import compiled
from pagedkv.spec import MAX_COUNT
from pagedkv.validate import require_int

# The arrays of a ragged batch, block tables and lengths: their kind, their shape, and where they point.

Int32Array = npt.NDArray[np.int32]


def int32_array(name: str, numbers: Any, dims: int) -> Int32Array:
    """Return a C-contiguous, writable int32 array: the kernels are compiled for that kind alone."""
    if isinstance(numbers, Tensor):
        if numbers.device.type != "cpu":
            raise bad_argument(name, "a NumPy array or a CPU tensor", f"one on {numbers.device}")
        numbers = numbers.detach().numpy() if numbers.dtype == int32 else numbers
    if numbers.__class__ is not np.ndarray or numbers.dtype != np.int32:
        numbers = _narrowed(name, numbers)
    if numbers.ndim != dims:
        raise bad_argument(name, f"{dims} dimension(s)", f"shape {list(numbers.shape)}")
    array: Int32Array = numbers
    return array if array.flags.c_contiguous and array.flags.writeable else array.copy(order="C")


def _narrowed(name: str, numbers: Any) -> Int32Array:
    """Return integers of another kind, or lists of them, as int32; what does not fit is refused, not cut."""
    try:
        given = np.asarray(numbers)
    except (ValueError, TypeError, RuntimeError):
        given = np.empty(1, object)
    if given.dtype.kind not in "iu" and given.size:
        kind = getattr(numbers, "dtype", type(numbers).__name__)
        raise bad_argument(name, "an int32 array or tensor", f"{kind}")
    if given.size and (given.min() < -MAX_COUNT or given.max() > MAX_COUNT):
        raise bad_argument(name, "numbers that fit int32", f"{given.min()} … {given.max()}")
    return given.astype(np.int32)


def require_shape(name: str, array: Int32Array, shape: tuple[int, ...], words: str) -> None:
    """Refuse an array of another shape; `words` say what the dimensions are."""
    if array.shape != shape:
        raise bad_argument(name, f"shape {words} = {list(shape)}", f"{list(array.shape)}")


_FAULTS = (
    "",
    "cu_seqlens_q: expected to begin with 0, got {got}",
    "cu_seqlens_q: expected never to decrease, got {got} after {bound} at index {i}",
    "cu_seqlens_q: expected to end at {bound}, the number of queries, got {got}",
    "seq_lens: expected at least the {bound} query tokens of sequence {i}, got {got}",
    "holes: expected 0 <= start <= end and start <= seq_len in sequence {i}, got start {got} and end {bound}",
    "block_tables: expected at least {bound} columns for sequence {i}, got {got}",
    "block_tables: expected block ids below {bound} in sequence {i}, got {got}",
)


def first_fault(
    block_tables: Int32Array,
    seq_lens: Int32Array,
    cu_seqlens_q: Int32Array,
    holes: Int32Array,
    block_size: int,
    num_blocks: int,
    total_tokens: int,
) -> str:
    """Return what is wrong with the arrays of a batch, C-contiguous and of the right shapes; "" if nothing."""
    fault, i, got, bound = _first_fault(
        block_tables, seq_lens, cu_seqlens_q, holes, block_size, num_blocks, total_tokens
    )
    return _FAULTS[fault].format(i=i, got=got, bound=bound)


@compiled
def _first_fault(
    block_tables: Int32Array,
    seq_lens: Int32Array,
    cu_seqlens_q: Int32Array,
    holes: Int32Array,
    block_size: int,
    num_blocks: int,
    total_tokens: int,
) -> tuple[int, int, int, int]:
    """Return (fault, sequence, what came, what was expected); fault 0 is none."""
    if cu_seqlens_q[0] != 0:
        return 1, 0, cu_seqlens_q[0], 0
    for i in range(len(seq_lens)):
        num_queries = cu_seqlens_q[i + 1] - cu_seqlens_q[i]
        if num_queries < 0:
            return 2, i + 1, cu_seqlens_q[i + 1], cu_seqlens_q[i]
        if seq_lens[i] < num_queries:
            return 4, i, seq_lens[i], num_queries
        start, end = holes[i, 0], holes[i, 1]
        if not 0 <= start <= end or start > seq_lens[i]:
            return 5, i, start, end
        num_slots = seq_lens[i] + (end - start if start < seq_lens[i] else 0)
        needed = (num_slots + block_size - 1) // block_size
        if needed > block_tables.shape[1]:
            return 6, i, block_tables.shape[1], needed
        for j in range(needed):
            if start <= j * block_size and (j + 1) * block_size <= end:
                continue  # wholly inside the hole: never read
            block = block_tables[i, j]
            if not 0 <= block < num_blocks:
                return 7, i, block, num_blocks
    if cu_seqlens_q[-1] != total_tokens:
        return 3, 0, cu_seqlens_q[-1], total_tokens
    return 0, 0, 0, 0


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_POOL_DTYPES = (*_DTYPES, *GREATEST)
_LAYOUTS = ("NHD", "HND")


@dataclass(slots=True, eq=False)
class AttentionCall:
    """One checked call of ``paged_attention``; a backend fills ``out``.

    The same names and meanings as there, made uniform: ``keys`` and ``values`` are always shown as
    ``[num_blocks, block_size, num_kv_heads, dim]`` whatever their layout, the arrays are C-contiguous int32 NumPy
    arrays, ``holes`` is always an array, no tensor carries a gradient, and nothing that a backend reads through
    the tables lies outside of the pool.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    block_tables: Int32Array
    seq_lens: Int32Array
    cu_seqlens_q: Int32Array
    holes: Int32Array
    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    out: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        """How many sequences the batch has."""
        return len(self.seq_lens)


def checked_call(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    block_tables: Any,
    seq_lens: Any,
    cu_seqlens_q: Any,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    holes: Any,
    layout: str,
    out: Tensor | None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> AttentionCall:
    """Return the call, or raise ``InvalidOperation`` that names the argument, what was expected and what came."""
    call = checked_tensors(
        queries,
        keys,
        values,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
        layout=layout,
        out=out,
        key_scales=key_scales,
        value_scales=value_scales,
    )
    num_blocks, block_size, _, _ = call.keys.shape
    tables = int32_array("block_tables", block_tables, 2)
    lens = int32_array("seq_lens", seq_lens, 1)
    cu_seqlens = int32_array("cu_seqlens_q", cu_seqlens_q, 1)
    count = len(lens)
    hole_rows = np.zeros((count, 2), np.int32) if holes is None else int32_array("holes", holes, 2)
    require_shape("block_tables", tables, (count, tables.shape[1]), "[n, max_blocks]")
    require_shape("cu_seqlens_q", cu_seqlens, (count + 1,), "[n + 1]")
    require_shape("holes", hole_rows, (count, 2), "[n, 2]")
    fault = first_fault(tables, lens, cu_seqlens, hole_rows, block_size, num_blocks, call.queries.shape[0])
    if fault:
        raise InvalidOperation(fault)
    call.block_tables, call.seq_lens, call.cu_seqlens_q, call.holes = tables, lens, cu_seqlens, hole_rows
    return call


_NO_TABLES = np.zeros((0, 1), np.int32)
_NO_LENS = np.zeros(0, np.int32)
_NO_CUTS = np.zeros(1, np.int32)
_NO_HOLES = np.zeros((0, 2), np.int32)


def checked_tensors(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    layout: str,
    out: Tensor | None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> AttentionCall:
    """Return a call of no sequences yet, all of it checked but the arrays of the batch."""
    if layout not in _LAYOUTS:
        raise bad_argument("layout", f"one of {', '.join(_LAYOUTS)}", f"{layout!r}")
    keys, values = _checked_pool(queries, keys, values, layout)
    scales = checked_scales(keys, values, key_scales, value_scales, layout)
    queries = queries.detach() if queries.requires_grad else queries
    return AttentionCall(
        queries,
        keys,
        values,
        _NO_TABLES,
        _NO_LENS,
        _NO_CUTS,
        _NO_HOLES,
        _positive_or_finite("scale", scale, positive=False),
        _checked_flag("causal", causal),
        None if window is None else require_int("window", window, 1, MAX_COUNT),
        None if softcap is None else _positive_or_finite("softcap", softcap, positive=True),
        None if sinks is None else _checked_sinks(sinks, queries),
        _checked_out(out, queries, values.shape[3]),
        *scales,
    )


def _checked_pool(queries: Tensor, keys: Tensor, values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Return keys and values as ``[num_blocks, block_size, num_kv_heads, dim]`` views without gradients."""
    _require_tensor("queries", queries, 3, "[total_tokens, num_q_heads, head_dim]")
    middle = "block_size, num_kv_heads" if layout == "NHD" else "num_kv_heads, block_size"
    shape = f"[num_blocks, {middle}, dim]"
    for name, tensor in (("keys", keys), ("values", values)):
        _require_tensor(name, tensor, 4, shape, _POOL_DTYPES)
        if tensor.device != queries.device:
            raise bad_argument(name, f"a tensor on {queries.device} as queries", f"{tensor.device}")
    if values.shape[:3] != keys.shape[:3]:
        raise bad_argument("values", f"shape {[*keys.shape[:3], 'v_head_dim']}", f"{list(values.shape)}")
    if values.dtype != keys.dtype:
        raise bad_argument("values", f"{keys.dtype} as keys", f"{values.dtype}")
    if layout == "HND":
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    _, _, num_kv_heads, head_dim = keys.shape
    _, num_q_heads, q_head_dim = queries.shape
    if q_head_dim != head_dim:
        raise bad_argument("queries", f"head_dim {head_dim} as keys", f"{q_head_dim}")
    if num_q_heads == 0 or num_q_heads % num_kv_heads:
        raise bad_argument("queries", f"a multiple of {num_kv_heads} kv heads", f"{num_q_heads} heads")
    return (keys.detach(), values.detach()) if keys.requires_grad or values.requires_grad else (keys, values)


def _require_tensor(
    name: str, tensor: Tensor, dims: int, shape: str, dtypes: tuple[torch.dtype, ...] = _DTYPES
) -> None:
    if not isinstance(tensor, Tensor):
        raise bad_argument(name, "a torch.Tensor", f"{type(tensor).__name__}")
    if tensor.dim() != dims:
        raise bad_argument(name, f"shape {shape}", f"{list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        raise bad_argument(name, f"{', '.join(names[:-1])} or {names[-1]}", f"{tensor.dtype}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise bad_argument(name, "a contiguous last dimension", f"stride {tensor.stride(-1)}")
    if 0 in tensor.shape[1:]:
        raise bad_argument(name, "nothing empty but the first dimension", f"{list(tensor.shape)}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise bad_argument(name, "no gradients", "a tensor that requires grad (detach it, or use torch.no_grad())")


def _positive_or_finite(name: str, value: float, *, positive: bool) -> float:
    words = "a positive finite number" if positive else "a finite number"
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError):
        raise bad_argument(name, f"{words}", f"{value!r}") from None
    if not math.isfinite(number) or (positive and number <= 0):
        raise bad_argument(name, f"{words}", f"{value!r}")
    return number


def _checked_flag(name: str, value: bool) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise bad_argument(name, "a bool", f"{value!r}")
    return bool(value)


def _checked_sinks(sinks: Tensor, queries: Tensor) -> Tensor:
    heads = queries.shape[1]
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
        kind = sinks.dtype if isinstance(sinks, Tensor) else type(sinks).__name__
        raise bad_argument("sinks", "a floating torch.Tensor", f"{kind}")
    if sinks.shape != (heads,):
        raise bad_argument("sinks", f"shape [num_q_heads] = [{heads}]", f"{list(sinks.shape)}")
    if sinks.device != queries.device:
        raise bad_argument("sinks", f"a tensor on {queries.device} as queries", f"{sinks.device}")
    if sinks.requires_grad and torch.is_grad_enabled():
        raise bad_argument("sinks", "no gradients", "a tensor that requires grad (detach it)")
    return sinks.detach()


def _checked_out(out: Tensor | None, queries: Tensor, v_head_dim: int) -> Tensor:
    shape = (*queries.shape[:2], v_head_dim)
    if out is None:
        return torch.empty(shape, dtype=queries.dtype, device=queries.device)
    _require_tensor("out", out, 3, "[total_tokens, num_q_heads, v_head_dim]")
    if out.shape != shape or out.dtype != queries.dtype or out.device != queries.device:
        raise bad_argument(
            "out",
            f"{queries.dtype} {list(shape)} on {queries.device}",
            f"{out.dtype} {list(out.shape)} on {out.device}",
        )
    return out.detach()
