"""FlashInfer backend of attention: block tables become its CSR arrays, its paged prefill kernel serves every batch.

FlashInfer is not a dependency; where it is installed it may be chosen by name. "FlashInfer: Efficient and Customizable
Attention Engine for LLM Inference Serving" (Ye et al., 2025).
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.data.call import AttentionCall
from pagedkv.data.gpu_device import MOST_FEW_TOKENS, is_capturing
from pagedkv.errors import InvalidOperation, MissingExtra

Int32Array = npt.NDArray[np.int32]

_WORKSPACE_BYTES = 128 << 20
_kept = threading.local()


def csr_arrays(
    block_tables: Int32Array, seq_lens: Int32Array, block_size: int
) -> tuple[Int32Array, Int32Array, Int32Array]:
    """Return the blocks of a batch as FlashInfer wants them, compressed rows: indptr, indices and last_page_len.

    Sequence ``i`` owns the blocks ``indices[indptr[i] : indptr[i + 1]]``, with ``last_page_len[i]`` tokens in the last
    one: 1 to block_size, or 0 for an empty sequence.
    """
    counts = -(-seq_lens.astype(np.int64) // block_size)
    indptr = np.zeros(len(seq_lens) + 1, np.int32)
    np.cumsum(counts, out=indptr[1:])
    is_owned = np.arange(block_tables.shape[1]) < counts[:, None]
    indices = np.ascontiguousarray(block_tables[is_owned], np.int32)
    last_page_len = np.where(seq_lens > 0, (seq_lens - 1) % block_size + 1, 0).astype(np.int32)
    return indptr, indices, last_page_len


def attend(call: AttentionCall) -> None:
    """Fill ``call.out``; InvalidOperation where FlashInfer's kernel does not do what the call needs."""
    try:
        import flashinfer
    except ImportError as error:
        raise MissingExtra("flashinfer", "flashinfer") from error
    _require_known(call)
    if not len(call.queries):
        return
    is_hnd = call.keys.stride(2) > call.keys.stride(1)
    keys, values = (x.transpose(1, 2) if is_hnd else x for x in (call.keys, call.values))
    wrapper = _planned(flashinfer, call, "HND" if is_hnd else "NHD")
    result = wrapper.run(call.queries.contiguous(), (keys, values))
    call.out.copy_(result)


def _require_known(call: AttentionCall) -> None:
    """Refuse every call that FlashInfer would answer with something else."""
    batch, queries = call.host_batch, call.queries
    has_hole = (batch.holes[:, 1] > batch.holes[:, 0]) & (batch.holes[:, 0] < batch.seq_lens)
    faults = {
        f"queries: expected a tensor on a CUDA device, got one on {queries.device}": not _is_on_gpu(call),
        f"queries: expected {call.keys.dtype} as keys, got {queries.dtype}": queries.dtype != call.keys.dtype,
        "sinks: expected none": call.sinks is not None,
        "holes: expected none": bool(has_hole.any()),
        "block_tables: expected no CUDA graph to be captured": is_capturing(queries.device),
        "window: expected causal attention": call.window is not None and not call.causal,
    }
    for fault, is_there in faults.items():
        if is_there:
            raise InvalidOperation(f"backend 'flashinfer': {fault}")


def _is_on_gpu(call: AttentionCall) -> bool:
    return call.queries.device.type == "cuda"


def _planned(flashinfer: Any, call: AttentionCall, layout: str) -> Any:
    """Return a wrapper that is planned for this batch; all layers of a step share it."""
    options = _plan_options(call)
    block_tables, seq_lens, cu_seqlens_q, _ = arrays = call.host_batch.arrays
    # With few queries the kernel for Hopper, which "auto" takes there, reads a quarter of what memory gives.
    kind = "fa2" if np.diff(cu_seqlens_q).max(initial=0) <= MOST_FEW_TOKENS else "auto"
    key = (call.queries.device, layout, kind, tuple(options.items()))
    kept_key, kept_arrays, wrapper = getattr(_kept, "last", ((), (), None))
    if kept_key == key and all(np.array_equal(a, b) for a, b in zip(kept_arrays, arrays, strict=True)):
        return wrapper
    indptr, indices, last_page_len = csr_arrays(block_tables, seq_lens, call.keys.shape[1])
    if wrapper is None or kept_key[:3] != key[:3]:
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=call.queries.device)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, layout, backend=kind)
    _kept.last = ((), (), None)  # a plan that fails leaves nothing behind
    on_host = (torch.from_numpy(np.array(x)) for x in (cu_seqlens_q, indptr, indices, last_page_len))
    on_device: list[Tensor] = [x.to(call.queries.device) for x in on_host]
    wrapper.plan(*on_device, **options)
    _kept.last = (key, tuple(x.copy() for x in arrays), wrapper)
    return wrapper


def _plan_options(call: AttentionCall) -> dict[str, Any]:
    return {
        "num_qo_heads": call.queries.shape[1],
        "num_kv_heads": call.keys.shape[2],
        "head_dim_qk": call.keys.shape[3],
        "head_dim_vo": call.values.shape[3],
        "page_size": call.keys.shape[1],
        "causal": call.causal,
        "sm_scale": call.scale,
        "window_left": -1 if call.window is None else call.window - 1,
        "logits_soft_cap": call.softcap,
        "q_data_type": call.queries.dtype,
        "kv_data_type": call.keys.dtype,
    }
