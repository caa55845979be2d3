"""What is written is read back; large traces move to disk and stay the same; the real traces."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.trace_checks import check_trace
from tests.sim.trace_files import REAL, SAMPLES, lines, mooncake

from pagedkv import TraceError
from pagedkv.sim import collect
from pagedkv.sim.reading import read_trace
from pagedkv.sim.trace import write_trace

ARRAYS = ("times", "input_tokens", "output_tokens", "sessions", "offsets", "ids", "parents")

REQUESTS = st.lists(
    st.fixed_dictionaries(
        {
            "timestamp": st.one_of(st.integers(0, 2**40), st.floats(0, 1e9).map(lambda ms: round(ms, 6))),
            "input_length": st.integers(0, 2**53 - 1),
            "output_length": st.integers(0, 2**53 - 1),
            "hash_ids": st.lists(st.one_of(st.integers(0, 5), st.sampled_from(["a", "0x5", -1, 2**64])), max_size=5),
        },
        optional={"session_id": st.sampled_from([0, 1, "0", "x"])},
    ),
    min_size=1,
    max_size=12,
)


def assert_same(one, other, tolerance=0.0):
    for name in ARRAYS:
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype and np.allclose(a, b, rtol=0, atol=tolerance if name == "times" else 0), name
    assert (one.block_tokens, one.has_content) == (other.block_tokens, other.has_content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("traces")


@given(REQUESTS, st.sampled_from(["t.jsonl", "t.jsonl.gz"]), st.sampled_from([16, 512]))
@settings(max_examples=150)
def test_write_then_read(folder, requests, name, block_tokens):
    (folder / "first").write_bytes(lines(*requests))
    first = read_trace(folder / "first", block_tokens=block_tokens)
    check_trace(first)
    write_trace(first, folder / name)
    second = read_trace(folder / name)
    check_trace(second)
    assert second.num_reordered == 0
    # A nanosecond, or what a float64 tells apart at that size.
    assert_same(first, second, tolerance=max(1e-9, np.spacing(first.times[-1]) * 4))
    assert (folder / name).read_bytes()[:2] == (b"\x1f\x8b" if name.endswith("gz") else b'{"')


@pytest.mark.parametrize("format", SAMPLES)
def test_every_format_can_be_converted(tmp_path, format):
    for place, content in enumerate(SAMPLES[format]):
        path = tmp_path / f"{place}"
        path.write_bytes(content)
        trace = read_trace(path)
        write_trace(trace, tmp_path / "converted.jsonl")
        converted = read_trace(tmp_path / "converted.jsonl")
        assert converted.format == "mooncake"
        assert_same(trace, converted, tolerance=1e-9)


def test_the_same_trace_gives_the_same_bytes(tmp_path):
    (tmp_path / "t").write_bytes(SAMPLES["mooncake"][0])
    trace = read_trace(tmp_path / "t")
    for name in ("a.gz", "b.gz"):
        write_trace(trace, tmp_path / name)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "t").write_bytes(SAMPLES["mooncake"][0])
    trace = read_trace(tmp_path / "t")
    broken = read_trace(tmp_path / "t")
    object.__setattr__(broken, "output_tokens", broken.output_tokens[:1])
    write_trace(trace, tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(ValueError):
        write_trace(broken, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "t"]
    with pytest.raises(OSError):
        write_trace(trace, tmp_path / "none" / "out.jsonl")


def many(count, reverse=False):
    rng = np.random.default_rng(7)
    times = sorted(rng.integers(0, 10**6, count).tolist(), reverse=reverse)
    return lines(*(mooncake(t, ids=rng.integers(0, 9, 8).tolist(), session_id=t % 5) for t in times))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_large_trace_moves_to_disk_and_its_folder_goes_with_it(tmp_path, monkeypatch, reverse):
    (tmp_path / "t").write_bytes(many(500, reverse))
    in_memory = read_trace(tmp_path / "t")
    monkeypatch.setattr(collect, "SPILL_BYTES", 10_000)
    monkeypatch.setattr(collect, "BATCH", 64)
    on_disk = read_trace(tmp_path / "t")
    check_trace(on_disk)
    assert_same(in_memory, on_disk)
    assert isinstance(on_disk.ids, np.memmap) and not isinstance(in_memory.ids, np.memmap)
    folder = Path(on_disk.ids.filename).parent
    assert folder.exists()
    times = on_disk.times
    del on_disk
    assert not folder.exists()
    assert np.array_equal(times, in_memory.times), "what is still mapped stays readable"


def test_a_large_trace_that_breaks_leaves_nothing_on_disk(tmp_path, monkeypatch):
    (tmp_path / "t").write_bytes(many(500) + b"{")
    monkeypatch.setattr(collect, "SPILL_BYTES", 10_000)
    monkeypatch.setattr(collect, "BATCH", 64)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(TraceError, match="line 501"):
        read_trace(tmp_path / "t")
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("name, requests, distinct", [("mooncake_conversation", 12_031, 182_790),
                                                      ("coding_agents", 5_412, 44_847)])  # fmt: skip
def test_real_traces(name, requests, distinct):
    if not REAL[name].exists():
        pytest.skip("the real traces are not here")
    trace = read_trace(REAL[name])
    check_trace(trace)
    assert (trace.num_requests, trace.num_distinct) == (requests, distinct)
    assert trace.format == "mooncake" and trace.block_tokens == 512
    with gzip.open(REAL[name]) as file:
        records = [json.loads(line) for line in file]
    raw = np.array([block for record in records for block in record["hash_ids"]])
    # The ids of these traces are chained already: ours stand for theirs, one to one.
    pairs = np.unique(np.stack([raw, trace.ids]), axis=1)
    assert pairs.shape[1] == distinct == len(np.unique(raw))
    assert trace.input_tokens.tolist() == [record["input_length"] for record in records]
    assert trace.times.tolist() == [(record["timestamp"] - records[0]["timestamp"]) / 1000 for record in records]
