"""AttentionCall: the tensors, the rules and the batch of one call of attention, checked, in one object that travels.

A call that exists is valid: every backend can trust it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, int32

from pagedkv.data.gpu_device import tensor_for
from pagedkv.data.quantised import GREATEST, checked_scales
from pagedkv.errors import bad_argument
from pagedkv.jit import compiled
from pagedkv.spec import MAX_COUNT
from pagedkv.validate import require_choice, require_flag, require_int, require_number

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
        raise bad_argument(name, "an int32 array or tensor", f"{kind}", "make it int32: plan arrays are")
    if given.size and (given.min() < -MAX_COUNT or given.max() > MAX_COUNT):
        raise bad_argument(name, "numbers that fit int32", f"{given.min()} … {given.max()}")
    return given.astype(np.int32)


def require_shape(name: str, array: Int32Array, shape: tuple[int, ...], words: str) -> None:
    """Refuse an array of another shape; `words` say what the dimensions are."""
    if array.shape != shape:
        raise bad_argument(
            name, f"shape {words} = {list(shape)}", f"{list(array.shape)}", "n is the length of seq_lens"
        )


_FAULTS = (
    ("cu_seqlens_q", "to begin with 0", "{got}"),
    ("cu_seqlens_q", "never to decrease", "{got} after {bound} at index {i}"),
    ("seq_lens", "at least the {bound} query tokens of sequence {i}", "{got}"),
    ("holes", "0 <= start <= end and start <= seq_len in sequence {i}", "start {got} and end {bound}"),
    ("block_tables", "at least {bound} columns for sequence {i}", "{got}"),
    ("block_tables", "block ids below {bound} in sequence {i}", "{got}"),
)
"""Of fault 1, 2, …: the argument, what is expected, what came."""


@dataclass(slots=True, eq=False)
class Batch:
    """Which blocks and how many tokens each sequence of a ragged batch has.

    Once it was checked the arrays are C-contiguous int32, and nothing that is read through the tables lies outside of
    the pool that it was checked for. Who keeps a batch for several calls keeps others from writing to its arrays.

    Attributes
    ----------
    block_tables : int32 [n, max_blocks]
    seq_lens : int32 [n]
    cu_seqlens_q : int32 [n + 1]
    holes : int32 [n, 2]
        None, until it is checked, stands for no holes.
    checked_for : (int, int), optional
        Blocks of the pool, and tokens of a block.
    plans : dict
        What a backend planned for it, for the calls of other layers.
    """

    block_tables: Int32Array
    seq_lens: Int32Array
    cu_seqlens_q: Int32Array
    holes: Int32Array
    checked_for: tuple[int, int] | None = field(default=None, kw_only=True)
    plans: dict[Any, Any] = field(default_factory=dict, kw_only=True)

    @classmethod
    def of(cls, *arrays: Any) -> Batch:
        """Return a batch of what a caller passed, which its check turns into arrays."""
        return cls(*arrays)

    @property
    def num_sequences(self) -> int:
        """How many sequences the batch has."""
        return len(self.seq_lens)

    @property
    def arrays(self) -> tuple[Int32Array, Int32Array, Int32Array, Int32Array]:
        """Block tables, lengths, cumulative query tokens and holes."""
        return self.block_tables, self.seq_lens, self.cu_seqlens_q, self.holes

    def window(self, first: int, last: int) -> Batch:
        """Return the sequences with query tokens in ``[first, last)``, with these alone, and their lengths by then."""
        begins, ends = self.cu_seqlens_q[:-1], self.cu_seqlens_q[1:]
        rows = np.flatnonzero((begins < last) & (ends > first) & (begins < ends))
        lens = self.seq_lens[rows] - (ends[rows] - np.minimum(ends[rows], last))
        cuts = np.append(np.maximum(begins[rows], first), last) - first
        return Batch(self.block_tables[rows], lens.astype(np.int32), cuts.astype(np.int32), self.holes[rows])

    def check(self, num_blocks: int, block_size: int) -> None:
        """Refuse arrays that do not fit each other or a pool; a batch that was checked for it is not checked again."""
        if self.checked_for == (num_blocks, block_size):
            return
        tables = int32_array("block_tables", self.block_tables, 2)
        lens = int32_array("seq_lens", self.seq_lens, 1)
        cu_seqlens = int32_array("cu_seqlens_q", self.cu_seqlens_q, 1)
        count = len(lens)
        holes = np.zeros((count, 2), np.int32) if self.holes is None else int32_array("holes", self.holes, 2)
        require_shape("block_tables", tables, (count, tables.shape[1]), "[n, max_blocks]")
        require_shape("cu_seqlens_q", cu_seqlens, (count + 1,), "[n + 1]")
        require_shape("holes", holes, (count, 2), "[n, 2]")
        fault, i, got, bound = _first_fault(tables, lens, cu_seqlens, holes, num_blocks, block_size)
        if fault:
            told = [words.format(i=i, got=got, bound=bound) for words in _FAULTS[fault - 1]]
            raise bad_argument(told[0], told[1], told[2], "the arrays of one BatchPlan fit each other")
        self.block_tables, self.seq_lens, self.cu_seqlens_q, self.holes = tables, lens, cu_seqlens, holes
        self.checked_for = (num_blocks, block_size)

    def require_total(self, num_queries: int) -> None:
        """Refuse another number of query tokens than that of the batch."""
        total = int(self.cu_seqlens_q[-1])
        if total != num_queries:
            hint = "begin with 0 and add up the query tokens of each sequence"
            raise bad_argument("cu_seqlens_q", f"to end at {num_queries}, the number of queries", f"{total}", hint)


@compiled
def _first_fault(
    block_tables: Int32Array,
    seq_lens: Int32Array,
    cu_seqlens_q: Int32Array,
    holes: Int32Array,
    num_blocks: int,
    block_size: int,
) -> tuple[int, int, int, int]:
    """Return (fault, sequence, what came, what was expected); fault 0 is none."""
    if cu_seqlens_q[0] != 0:
        return 1, 0, cu_seqlens_q[0], 0
    for i in range(len(seq_lens)):
        num_queries = cu_seqlens_q[i + 1] - cu_seqlens_q[i]
        if num_queries < 0:
            return 2, i + 1, cu_seqlens_q[i + 1], cu_seqlens_q[i]
        if seq_lens[i] < num_queries:
            return 3, i, seq_lens[i], num_queries
        start, end = holes[i, 0], holes[i, 1]
        if not 0 <= start <= end or start > seq_lens[i]:
            return 4, i, start, end
        num_slots = np.int64(seq_lens[i]) + (end - start if start < seq_lens[i] else 0)
        needed = int((num_slots + block_size - 1) // block_size)
        if needed > block_tables.shape[1]:
            return 5, i, block_tables.shape[1], needed
        for j in range(needed):
            if start <= j * block_size and (j + 1) * block_size <= end:
                continue  # wholly inside the hole: never read
            block = block_tables[i, j]
            if not 0 <= block < num_blocks:
                return 6, i, block, num_blocks
    return 0, 0, 0, 0


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_POOL_DTYPES = (*_DTYPES, *GREATEST)
_LAYOUTS = ("NHD", "HND")


@dataclass(slots=True, eq=False)
class DeviceBatch:
    """What the GPU kernels need to know of a batch, on the device.

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


@dataclass(slots=True, eq=False)
class AttentionCall:
    """One call of attention: made of what ``paged_attention`` takes, checked as it is made; a backend fills ``out``.

    The names and meanings are those of ``paged_attention``, made uniform: ``keys`` and ``values`` are always shown as
    ``[num_blocks, block_size, num_kv_heads, dim]`` and their scales likewise, whatever the layout they came in, and no
    tensor carries a gradient. ``out`` is ``into`` where that is given, and of zeros where a ``DeviceBatch``, which a
    ``DevicePlan`` holds, may have fewer tokens than queries.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    batch: Batch | DeviceBatch
    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    out: Tensor = field(init=False)
    layout: InitVar[str] = "NHD"
    into: InitVar[Tensor | None] = None

    def __post_init__(self, layout: str, into: Tensor | None) -> None:
        require_choice("layout", layout, _LAYOUTS)
        self.keys, self.values = _checked_pool(self.queries, self.keys, self.values, layout)
        scales = checked_scales(self.keys, self.values, self.key_scales, self.value_scales, layout)
        self.key_scales, self.value_scales = scales
        self.queries = self.queries.detach() if self.queries.requires_grad else self.queries
        self.scale = require_number("scale", self.scale)
        self.causal = require_flag("causal", bool(self.causal) if isinstance(self.causal, np.bool_) else self.causal)
        self.window = None if self.window is None else require_int("window", self.window, 1, MAX_COUNT)
        self.softcap = None if self.softcap is None else require_number("softcap", self.softcap, 0, above=True)
        self.sinks = None if self.sinks is None else _checked_sinks(self.sinks, self.queries)
        batch, num_queries = self.batch, len(self.queries)
        new = torch.zeros if isinstance(batch, DeviceBatch) else torch.empty
        self.out = _checked_out(into, self.queries, self.values.shape[3], new)
        if isinstance(batch, Batch):
            batch.check(*self.keys.shape[:2])
            batch.require_total(num_queries)
        elif batch.total_tokens != num_queries:
            raise bad_argument("queries", f"{batch.total_tokens} tokens as the DevicePlan", f"{num_queries}")

    @property
    def host_batch(self) -> Batch:
        """The batch, for a backend that reads it on the host."""
        if isinstance(self.batch, Batch):
            return self.batch
        raise bad_argument("backend", "auto or triton for a DevicePlan")


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
        hint = "queries and keys have heads of one size"
        raise bad_argument("queries", f"head_dim {head_dim} as keys", f"{q_head_dim}", hint)
    if num_q_heads == 0 or num_q_heads % num_kv_heads:
        hint = "each kv head serves as many query heads as the others"
        raise bad_argument("queries", f"a multiple of {num_kv_heads} kv heads", f"{num_q_heads} heads", hint)
    return (keys.detach(), values.detach()) if keys.requires_grad or values.requires_grad else (keys, values)


def _require_tensor(
    name: str, tensor: Tensor, dims: int, shape: str, dtypes: tuple[torch.dtype, ...] = _DTYPES
) -> None:
    if not isinstance(tensor, Tensor):
        raise bad_argument(name, "a torch.Tensor", f"{type(tensor).__name__}", tensor_for(tensor))
    if tensor.dim() != dims:
        hint = f"flatten or unflatten it to {dims} dimensions; tokens of all sequences follow each other"
        raise bad_argument(name, f"shape {shape}", f"{list(tensor.shape)}", hint)
    if tensor.dtype not in dtypes:
        names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        hint = f".to(torch.{names[0]})"
        raise bad_argument(name, f"{', '.join(names[:-1])} or {names[-1]}", f"{tensor.dtype}", hint)
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise bad_argument(name, "a contiguous last dimension", f"stride {tensor.stride(-1)}", ".contiguous()")
    if 0 in tensor.shape[1:]:
        raise bad_argument(name, "nothing empty but the first dimension", f"{list(tensor.shape)}")
    if tensor.requires_grad and torch.is_grad_enabled():
        hint = "detach it, or use torch.no_grad()"
        raise bad_argument(name, "no gradients", "a tensor that requires grad", hint)


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
        raise bad_argument("sinks", "no gradients", "a tensor that requires grad", "detach it")
    return sinks.detach()


def _checked_out(out: Tensor | None, queries: Tensor, v_head_dim: int, new: Callable[..., Tensor]) -> Tensor:
    shape = (*queries.shape[:2], v_head_dim)
    if out is None:
        return new(shape, dtype=queries.dtype, device=queries.device)
    _require_tensor("out", out, 3, "[total_tokens, num_q_heads, v_head_dim]")
    if out.shape != shape or out.dtype != queries.dtype or out.device != queries.device:
        raise bad_argument(
            "out",
            f"{queries.dtype} {list(shape)} on {queries.device}",
            f"{out.dtype} {list(out.shape)} on {out.device}",
        )
    return out.detach()
