"""What runs at the same time: requests in service, the blocks they hold, and what a memory has beside them."""

from __future__ import annotations

import numpy as np

from pagedkv.errors import bad_argument
from pagedkv.format import format_bytes
from pagedkv.sim.model_shape import ModelShape
from pagedkv.sim.plan_types import Hardware, Load
from pagedkv.sim.trace import MAX_BLOCKS, Floats, Int64s, Trace
from pagedkv.validate import require_int

MAX_MEMORY = 2**62
_COUNT_SHARED_UP_TO = 20_000_000
"""Accesses: the count sorts them all."""


def estimate_load(trace: Trace, model: ModelShape, hardware: Hardware) -> Load:
    """Estimate how many requests run at a time and how many blocks they hold, over at least one request."""
    flops = model.prefill_flops(trace.input_tokens)
    start = np.asarray(trace.times, np.float64)
    end = start + flops / hardware.flops_per_second + trace.output_tokens / hardware.decode_tokens_per_second
    span = max(float(start[-1] - start[0]), 1e-9)
    own = np.diff(trace.offsets)
    whole = -(-(trace.input_tokens + trace.output_tokens) // trace.block_tokens)
    shared = trace.num_accesses <= _COUNT_SHARED_UP_TO
    if shared:
        first, last = _held_blocks(trace, start, end)
        begins, ends = np.concatenate([first, start]), np.concatenate([last, end])
        blocks = np.concatenate([np.ones(len(first), np.int64), np.maximum(whole - own, 0)])
    else:
        begins, ends, blocks = start, end, np.maximum(whole, own)
    peak_requests = _peak(start, end, np.ones(len(start), np.int64))
    return Load(
        mean_requests=float((end - start).sum()) / max(span, float(end.max() - start[0])),
        peak_requests=peak_requests,
        mean_blocks=float(((ends - begins) * blocks).sum()) / max(span, float(end.max() - start[0])),
        peak_blocks=_peak(begins, ends, blocks),
        shared=shared,
        prefill_load=float(flops.sum()) / hardware.flops_per_second / span,
        prefill_load_saved=0.0,
        window_bytes=peak_requests * model.bytes_per_sequence,
    )


def _held_blocks(trace: Trace, start: Floats, end: Floats) -> tuple[Floats, Floats]:
    """Return when a block begins and ceases to be held, once for every unbroken time of every block."""
    request = np.repeat(np.arange(trace.num_requests), np.diff(trace.offsets))
    order = np.argsort(trace.ids, kind="stable")
    block, request = np.asarray(trace.ids)[order], request[order]
    if not len(block):
        return np.zeros(0), np.zeros(0)
    begins, ends = start[request], end[request]
    # One running maximum serves all blocks: each lies higher than the one before by more than the whole span.
    lift = block.astype(np.float64) * (float(end.max() - start[0]) + 1.0)
    held_until = np.maximum.accumulate(ends + lift) - lift
    fresh = np.ones(len(block), bool)
    fresh[1:] = (block[1:] != block[:-1]) | (begins[1:] > held_until[:-1])
    firsts = np.flatnonzero(fresh)
    lasts = np.append(firsts[1:] - 1, len(block) - 1)
    return begins[firsts], held_until[lasts]


def _peak(begins: Floats, ends: Floats, blocks: Int64s) -> int:
    """Return the most that is held at a time; what ends at a moment is gone before anything begins."""
    times = np.concatenate([ends, begins])
    changes = np.concatenate([-blocks, blocks])
    order = np.argsort(times, kind="stable")
    return int(np.cumsum(changes[order]).max(initial=0))


def blocks_in(memory: int, trace: Trace, model: ModelShape, load: Load) -> int:
    """Return how many blocks fit a memory beside the windows of running requests."""
    memory = require_int("memory", memory, 1, MAX_MEMORY - 1)
    block = trace.block_tokens * model.bytes_per_token
    least = load.window_bytes + block
    if memory < least:
        windows = (
            f" and {format_bytes(load.window_bytes)} for windows and states of running requests"
            if load.window_bytes
            else ""
        )
        needs = f"{format_bytes(block)} for one block of {trace.block_tokens} tokens{windows}"
        raise bad_argument("memory", f"at least {format_bytes(least)}: {needs}; got {format_bytes(memory)}")
    return min((memory - load.window_bytes) // block, MAX_BLOCKS)
