"""What must be true of every trace, whatever file it came from."""

from __future__ import annotations

import numpy as np

from pagedkv.sim.trace import Trace


def check_trace(trace: Trace) -> None:
    """Raise AssertionError where the arrays of a trace do not fit together."""
    assert trace.num_requests > 0 and trace.block_tokens > 0
    assert trace.num_skipped >= 0 and trace.num_reordered >= 0
    _check_requests(trace)
    _check_ids(trace)


def _check_requests(trace: Trace) -> None:
    assert trace.times.dtype == np.float64
    assert np.isfinite(trace.times).all() and trace.times[0] == 0.0 and (np.diff(trace.times) >= 0).all()
    for lengths in (trace.input_tokens, trace.output_tokens):
        assert lengths.dtype == np.int64 and lengths.shape == trace.times.shape
        assert ((lengths >= 0) & (lengths < 2**53)).all()
    sessions = trace.sessions
    assert sessions.dtype == np.int64 and sessions.shape == trace.times.shape and (sessions >= -1).all()
    seen, first_places = np.unique(sessions[sessions >= 0], return_index=True)
    assert np.array_equal(seen, np.arange(len(seen))), "session numbers are dense"
    assert (np.diff(first_places) > 0).all(), "in the order of first appearance"


def _check_ids(trace: Trace) -> None:
    ids, parents, offsets = trace.ids, trace.parents, trace.offsets
    assert offsets.dtype == np.int64 and ids.dtype == np.int32 and parents.dtype == np.int32
    assert len(offsets) == trace.num_requests + 1 and offsets[0] == 0 and offsets[-1] == len(ids)
    assert (np.diff(offsets) >= 0).all()
    assert trace.has_content or len(ids) == 0
    seen, first_places = np.unique(ids, return_index=True)
    assert np.array_equal(seen, np.arange(len(parents))), "ids are dense, every one occurs"
    assert (np.diff(first_places) > 0).all(), "in the order of first appearance"
    before = np.concatenate([[-1], ids[:-1]]) if len(ids) else ids
    before[offsets[:-1][np.diff(offsets) > 0]] = -1
    assert np.array_equal(parents[ids], before), "every block has one parent"
