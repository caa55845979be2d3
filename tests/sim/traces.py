"""Traces for the tests: random chained ones, and the real ones where they are at hand."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from pagedkv.sim.trace import NO_PARENT, NO_SESSION, Trace

TRACES = Path(__file__).parents[3] / "shared" / "traces"
CHAT, AGENTS = "mooncake_conversation", "coding_agents"

Requests = list[list[int]]


def as_requests(trace: Trace) -> Requests:
    """The content ids of every request, as lists: what the oracles take."""
    ids, offsets = trace.ids.tolist(), trace.offsets.tolist()
    return [ids[start:stop] for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]


def as_trace(
    requests: Sequence[Sequence[int]], block_tokens: int = 4, input_tokens: Sequence[int] | None = None
) -> Trace:
    """A trace of chained requests; ids are made dense, tokens default to full blocks."""
    dense: dict[int, int] = {}
    parents = []
    for request in requests:
        for depth, block in enumerate(request):
            if block not in dense:
                dense[block] = len(dense)
                parents.append(dense[request[depth - 1]] if depth else NO_PARENT)
    lengths = [len(request) for request in requests]
    tokens = [length * block_tokens for length in lengths] if input_tokens is None else list(input_tokens)
    count = len(requests)
    return Trace(
        name="test",
        format="test",
        block_tokens=block_tokens,
        times=np.arange(count, dtype=np.float64),
        input_tokens=np.array(tokens, np.int64),
        output_tokens=np.zeros(count, np.int64),
        sessions=np.full(count, NO_SESSION, np.int64),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        ids=np.array([dense[block] for request in requests for block in request], np.int32),
        parents=np.array(parents, np.int32),
    )


@st.composite
def chained_requests(draw: st.DrawFn, max_requests: int = 30, max_fresh: int = 6) -> Requests:
    """Requests that each continue some prefix of an earlier one (or of nothing) with fresh blocks."""
    requests: Requests = []
    fresh = 0
    for _ in range(draw(st.integers(0, max_requests))):
        before = requests[draw(st.integers(0, len(requests) - 1))] if requests else []
        kept = draw(st.integers(0, len(before)))
        grown = draw(st.integers(0, max_fresh))
        requests.append(before[:kept] + list(range(fresh, fresh + grown)))
        fresh += grown
    return requests


@st.composite
def chained_traces(draw: st.DrawFn, max_requests: int = 30, max_fresh: int = 6) -> Trace:
    """Chained requests with block sizes and input lengths, the last block filled fully, partly or not at all."""
    requests = draw(chained_requests(max_requests, max_fresh))
    block_tokens = draw(st.integers(1, 5))
    tokens = [max(0, len(request) * block_tokens - draw(st.integers(0, block_tokens))) for request in requests]
    return as_trace(requests, block_tokens, tokens)


@cache
def real_trace(name: str) -> Trace:
    """The trace of this name, or a skipped test where it is not at hand."""
    path = TRACES / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not at hand")
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    return as_trace([row["hash_ids"] for row in rows], 512, [row["input_length"] for row in rows])


def real_times(name: str) -> np.ndarray:
    """When the requests of this trace came, in seconds."""
    return np.array(_column(name, "timestamp")) / 1000


def real_outputs(name: str) -> np.ndarray:
    """How many tokens the requests of this trace wrote."""
    return np.array(_column(name, "output_length"), np.int64)


def _column(name: str, field: str) -> list[float]:
    with gzip.open(TRACES / f"{name}.jsonl.gz", "rt") as lines:
        return [json.loads(line)[field] for line in lines]
