"""Batch-invariant attention on the CPU: a result depends on a query and what it sees alone, to the last bit.

Torch's matrix products change their order of additions with the number of rows, the decode kernels do not. So long
prompts are cut into pieces that the kernels take, each of them a sequence that ends earlier.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pagedkv.data import cpu
from pagedkv.data.call import AttentionCall

UNLIMITED = 2**31 - 1


def attend(call: AttentionCall) -> None:
    """Fill ``call.out``."""
    cpu.attend(_in_pieces(call) if call.causal else call, few_queries=UNLIMITED)


def _in_pieces(call: AttentionCall) -> AttentionCall:
    """Cut the query tokens of each sequence into pieces of at most ``cpu.FEW_QUERIES``."""
    batch = call.host_batch
    if len(call.queries) <= cpu.FEW_QUERIES:
        return call
    counts = np.diff(batch.cu_seqlens_q)
    num_pieces = -(-counts // cpu.FEW_QUERIES)
    if (num_pieces <= 1).all():
        return call
    rows = np.repeat(np.arange(len(counts)), num_pieces)
    place = np.arange(len(rows)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    ends = np.minimum((place + 1) * cpu.FEW_QUERIES, counts[rows])  # in query tokens of the sequence
    starts = np.append(batch.cu_seqlens_q[rows] + place * cpu.FEW_QUERIES, batch.cu_seqlens_q[-1])
    pieces = replace(
        batch,
        block_tables=batch.block_tables[rows],
        seq_lens=(batch.seq_lens[rows] - counts[rows] + ends).astype(np.int32),
        cu_seqlens_q=starts.astype(np.int32),
        holes=batch.holes[rows],
    )
    return replace(call, batch=pieces, into=call.out)
