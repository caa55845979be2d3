"""Broken trace files end in a typed error or in a trace that is right, never in a traceback, a hang or no memory."""

from __future__ import annotations

import gzip
import resource
import signal
import sys
import tracemalloc
from collections import Counter
from contextlib import contextmanager
from random import Random

import pytest
from tests.sim.mutations import MB, mutated
from tests.sim.trace_checks import check_trace
from tests.sim.trace_files import SAMPLES, lines, mooncake

from pagedkv import PagedKvError
from pagedkv.sim import source
from pagedkv.sim.readers import kv_events, weka
from pagedkv.sim.reading import FORMATS, read_trace

SHARDS, FILES = 10, 1000
PATIENCE = 60  # seconds for one small file: whatever takes longer hangs


class Hangs(BaseException):
    """Not an Exception, and no OSError as TimeoutError is: nothing on the way may take it for a broken file."""


@contextmanager
def patience():
    """Break off what hangs, where the system can."""

    def give_up(*_):
        raise Hangs(f"not done after {PATIENCE} seconds")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(path, **options):
    """Read a file; return what came of it. Any other exception is a failure of the test."""
    try:
        with patience():
            trace = read_trace(path, **options)
    except PagedKvError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return type(error).__name__
    check_trace(trace)
    return "skipped" if trace.num_skipped else "trace"


def peak_memory():
    """Return the most memory that this process ever took, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_mutated_files(tmp_path, shard, caplog):
    caplog.set_level("ERROR", logger="pagedkv")
    path = tmp_path / "trace"
    before, outcomes = peak_memory(), Counter()
    for number in range(FILES):
        random = Random(f"{shard}/{number}")
        name, content = mutated(random)
        path.write_bytes(content)
        options = {
            "format": random.choice((None, name, name, random.choice(list(FORMATS)))),
            "skip_bad": random.random() < 0.5,
            "block_tokens": random.choice((None, None, 1, 16, 2**31 - 1)),
        }
        try:
            outcomes[outcome(path, **options)] += 1
        except BaseException as error:
            error.add_note(f"file {number} of shard {shard}, once {name}, {options}: {content[:2000]!r}")
            raise
    # The engine is no use if it breaks everything or nothing.
    assert all(outcomes[kind] > FILES // 20 for kind in ("TraceError", "skipped", "trace")), outcomes
    assert peak_memory() - before < 256 * MB


@pytest.mark.parametrize("name", SAMPLES)
def test_every_truncation(tmp_path, name):
    path = tmp_path / "trace"
    for content in SAMPLES[name]:
        for size in range(len(content)):
            path.write_bytes(content[:size])
            outcome(path, format=name)
            outcome(path, skip_bad=True)


GOOD = lines(mooncake())
BOMBS = {
    "one endless line": ("mooncake", GOOD + b"[" * (96 * MB)),
    "an endless number": ("mooncake", b'{"timestamp": ' + b"9" * (30 * MB) + b"}"),
    "a long list of ids": ("mooncake", b'{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [1'
                           + b",1" * (3 * MB) + b"]}"),
    "nothing but line ends": ("mooncake", GOOD + b"\n" * MB),
    "one endless document": ("weka", b'{"requests": [' + b"\n" * (96 * MB)),
    "an endless field": ("azure", b"TIMESTAMP,ContextTokens,GeneratedTokens\n" + b"1" * (96 * MB)),
    "an endless batch": ("kv-events", b"\xdd\xff\xff\xff\xff" + b"\x00" * (96 * MB)),
    "empty batches": ("kv-events", b"\xc4\x00" * (MB // 32)),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_decompression_bombs_stay_within_bounds(tmp_path, monkeypatch, bomb):
    """What a file unpacks to may be large; what is held of it at once may not."""
    monkeypatch.setattr(weka, "MAX_DOCUMENT_BYTES", 32 * MB)
    name, content = BOMBS[bomb]
    path = tmp_path / "trace.gz"
    path.write_bytes(gzip.compress(content, 1))
    assert path.stat().st_size < MB
    tracemalloc.start()
    try:
        for skip_bad in (False, True):
            outcome(path, format=name, skip_bad=skip_bad)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The longest piece, a second copy while it grows, and what is decoded of it: a reference for two bytes of text.
    limit = max(source.MAX_LINE_BYTES, kv_events.MAX_BATCH_BYTES)
    assert peak < 8 * limit
