"""Other ways to replay a block trace through LRU, each prepared as far as it allows and then timed by its own call.

A peer is made from a trace and a capacity; calling it replays everything once and returns the blocks found, counted
from the request `counts_from` on.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np

from pagedkv.sim.trace import Trace


class PythonDict:
    """An OrderedDict in pure Python, tail first: among the blocks of a request the deeper goes first."""

    name = "pure-Python OrderedDict LRU"
    exact = True
    counts_from = 0

    def __init__(self, trace: Trace, blocks: int) -> None:
        ids, offsets = trace.ids.tolist(), trace.offsets.tolist()
        self.requests = [ids[start:stop] for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
        self.blocks = blocks

    def __call__(self) -> int:
        cache: OrderedDict[int, None] = OrderedDict()
        use, give_up, blocks, hits = cache.move_to_end, cache.popitem, self.blocks, 0
        for request in self.requests:
            for block in request:
                if block not in cache:
                    break
                hits += 1
            for block in reversed(request):
                cache[block] = None
                use(block)
            while len(cache) > blocks:
                give_up(last=False)
        return hits


def tail_first(trace: Trace) -> np.ndarray:
    """Return the ids with every request turned around, so that plain LRU gives up the tail of a request first."""
    ends = np.repeat(trace.offsets[1:] + trace.offsets[:-1] - 1, np.diff(trace.offsets))
    return trace.ids[ends - np.arange(trace.num_accesses)]


class LibCacheSim:
    """Its LRU over a binary trace file, read and replayed by its C code in one call.

    It knows no requests: it may give up a request's first blocks while it inserts the last ones, so its counts differ
    a little.
    """

    name = "libCacheSim's Python package, LRU"
    exact = False
    counts_from = 0

    def __init__(self, trace: Trace, blocks: int) -> None:
        import libcachesim

        self.library, self.blocks, self.accesses = libcachesim, blocks, trace.num_accesses
        self.folder = tempfile.TemporaryDirectory()
        file = Path(self.folder.name) / "trace.oracleGeneral.bin"
        record = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
        records = np.zeros(trace.num_accesses, record)
        records["id"], records["size"], records["next"] = tail_first(trace), 1, -2
        records.tofile(file)
        self.reader = libcachesim.TraceReader(str(file), libcachesim.TraceType.ORACLE_GENERAL_TRACE)

    def __call__(self) -> int:
        self.reader.reset()
        cache = self.library.LRU(self.blocks, hashpower=max(10, self.blocks.bit_length() + 1))
        miss_ratio, _ = cache.process_trace(self.reader)
        return round((1 - miss_ratio) * self.accesses)


class KvCacheSimulator:
    """Its C++ sweep at one capacity; it writes the trace to files and starts a program, which adds a ceiling.

    It counts from a request on before which the cache must be full. It counts tokens; with every block one token long
    these are blocks.
    """

    name = "kvcache-simulator's C++ sweep, LRU and its ceiling"
    exact = False

    def __init__(self, trace: Trace, blocks: int) -> None:
        from kvcache_sim.cpp_backend import ensure_cpp_simulator, run_cpp_sweep
        from kvcache_sim.trace import TraceData

        ensure_cpp_simulator()
        self.sweep, self.blocks, self.counts_from = run_cpp_sweep, blocks, trace.num_requests // 2
        self.trace = TraceData(
            ids=trace.ids.tolist(),
            tokens=[1] * trace.num_accesses,
            request_starts=trace.offsets.tolist(),
            block_size=1,
            request_count=trace.num_requests,
            unique_raw_blocks=trace.num_distinct,
            total_input_tokens=trace.num_accesses,
            average_input_tokens=trace.num_accesses / max(1, trace.num_requests),
            parse_errors=0,
            skipped_records=0,
        )

    def __call__(self) -> int:
        found = self.sweep(self.trace, capacities=[self.blocks], policies=["lru"], warmup_requests=self.counts_from)
        return int(found.results["lru", self.blocks].hitTokens)


PEERS = (PythonDict, LibCacheSim, KvCacheSimulator)
