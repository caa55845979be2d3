"""paged_attention, and the dispatch of attention calls to their backends."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable

import torch
from torch import Tensor

from pagedkv.data.call import AttentionCall, Batch, DeviceBatch
from pagedkv.data.gpu_device import has_triton, require_runnable
from pagedkv.errors import bad_argument
from pagedkv.typing import Backend, IntRows, Ints, Layout
from pagedkv.validate import require_choice

BACKENDS = {
    "cpu": "pagedkv.data.cpu:attend",
    "cpu_invariant": "pagedkv.data.cpu:attend",
    "flashinfer": "pagedkv.data.gpu_flashinfer:attend",
    "reference": "pagedkv.data.reference:attend",
    "triton": "pagedkv.data.gpu:attend",
}
"""The function of each backend, which fills ``call.out``. Its module is loaded when it is first used."""


def paged_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    block_tables: IntRows,
    seq_lens: Ints,
    cu_seqlens_q: Ints,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    holes: IntRows | None = None,
    layout: Layout = "NHD",
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Let every query token of a ragged batch attend over the blocks of its own sequence, in place.

    Prefill, chunked prefill over a cached context and decode are one case: the query tokens of sequence ``i`` are its
    *last* ``cu_seqlens_q[i + 1] - cu_seqlens_q[i]`` tokens, and their keys and values are in the pool already.

    Parameters
    ----------
    queries : Tensor [total_tokens, num_q_heads, head_dim]
        float32, bfloat16 or float16. Query head ``h`` reads kv head ``h // (num_q_heads // num_kv_heads)``.
    keys : Tensor [num_blocks, block_size, num_kv_heads, head_dim]
        float32, bfloat16, float16, or quantised int8 or float8_e4m3fn, whatever the queries are. May be a strided view,
        as ``storage[layer][0]``; the last dimension has to be contiguous.
    values : Tensor [num_blocks, block_size, num_kv_heads, v_head_dim]
        As ``keys``, of the same dtype.
    block_tables : int32 [n, max_blocks], NumPy array or CPU tensor
        The blocks of each sequence. What stands behind a row's last needed block is not read. Here and below other
        integers and lists are taken too, and copied.
    seq_lens : int32 [n]
        Visible tokens of each sequence, the query tokens included.
    cu_seqlens_q : int32 [n + 1]
        Sequence ``i`` owns the queries ``[cu_seqlens_q[i], cu_seqlens_q[i + 1])``.
    scale : float
        Factor of the scores, usually ``head_dim ** -0.5``.
    causal : bool
        A query sees no key behind its own position.
    window : int, optional
        A query sees the last ``window`` positions, its own included.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
    sinks : Tensor [num_q_heads], optional
        One more logit per head, which takes part in the softmax's sum only (gpt-oss).
    holes : int32 [n, 2], optional
        ``(start, end)``: the slots ``start <= j < end`` of a sequence's table hold nothing visible (StreamingLLM).
        Positions are counted without them: slot ``j`` is position ``j`` before the hole and ``j - (end - start)``
        behind it.
    layout : {"NHD", "HND"}
        ``"HND"`` swaps the middle two dimensions of ``keys`` and ``values``, and the last two of their scales.
    key_scales, value_scales : float32 Tensor [num_blocks, block_size, num_kv_heads], optional
        Of quantised keys and values, which need them: an element is its number times the scale of its token's head.
        Both of the same strides.
    out : Tensor [total_tokens, num_q_heads, v_head_dim], optional
        Receives the result; of the queries' dtype.
    backend : {"auto", "cpu", "cpu_invariant", "triton", "flashinfer", "reference"}
        ``"auto"`` takes ``"cpu"`` for CPU tensors and ``"triton"`` for CUDA tensors (``"reference"`` where there is no
        Triton); ``"cpu_invariant"`` is another name of ``"cpu"``;
        ``"triton"`` takes CPU tensors too in Triton's interpreter (``TRITON_INTERPRET=1``), for tests.

    Returns
    -------
    Tensor [total_tokens, num_q_heads, v_head_dim]
        In the queries' dtype, accumulated in float32; zeros where a query sees no key. Carries no gradient.

    Raises
    ------
    InvalidOperation
        An argument does not fit; nothing was written. Also where a gradient would get lost: a tensor that requires
        grad while gradients are enabled.

    Notes
    -----
    On the CPU a query token gets the same bits however its sequence is cut into calls, whatever else is in the batch
    and however many threads there are. What sequences begin with in common, by their tables, is read once. Threads
    are torch's: ``torch.set_num_threads`` sets how many. Calls from several Python threads may overlap.
    """
    call = AttentionCall(
        queries,
        keys,
        values,
        Batch.of(block_tables, seq_lens, cu_seqlens_q, holes),
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
        key_scales=key_scales,
        value_scales=value_scales,
        layout=layout,
        into=out,
    )
    return attend(call, backend)


def attend(call: AttentionCall, backend: str = "auto") -> Tensor:
    """Let a backend fill ``call.out`` and return it."""
    require_choice("backend", backend, ("auto", *sorted(BACKENDS)))
    name = _fastest_for(call) if backend == "auto" else backend
    if isinstance(call.batch, DeviceBatch) and name != "triton":
        raise bad_argument("backend", "auto or triton for a DevicePlan", f"{backend!r}")
    if call.batch.num_sequences:
        if name == "triton":
            require_runnable("queries", call.queries.device)
        with torch.no_grad():
            _backend(name)(call)
    return call.out


def _fastest_for(call: AttentionCall) -> str:
    if isinstance(call.batch, DeviceBatch):
        return "triton"
    if call.queries.device.type == "cpu":
        return "cpu"
    return "triton" if call.queries.device.type == "cuda" and has_triton() else "reference"


@functools.cache
def _backend(name: str) -> Callable[[AttentionCall], None]:
    attend: Callable[[AttentionCall], None] = pkgutil.resolve_name(BACKENDS[name])
    return attend
