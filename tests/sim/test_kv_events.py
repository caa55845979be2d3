"""KV cache events: what becomes a request, every way to record them, and the file format itself."""

from __future__ import annotations

import io
import os
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sim.trace_checks import check_trace
from tests.sim.trace_files import bare, framed, stored, stored_map

from pagedkv.control import events
from pagedkv.control.events import append_event_batch
from pagedkv.errors import TraceError
from pagedkv.sim.readers import kv_events
from pagedkv.sim.readers.kv_events import INCOMPLETE, INVALID, extent, read_event_batches
from pagedkv.sim.reading import read_trace
from pagedkv.sim.source import BadRecord

VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), st.binary(max_size=300),
        st.text(max_size=40), st.builds(msgspec.msgpack.Ext, st.integers(-128, 127), st.binary(max_size=20)),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=20), st.dictionaries(st.text(max_size=3), inner, max_size=20)),
    max_leaves=30,
)  # fmt: skip


@pytest.fixture(params=["bare", "framed", "behind lengths"])
def read(tmp_path, request):
    """Return a function that records batches in one of the ways and reads them."""

    def read(*batches):
        if request.param == "behind lengths":
            parts = [msgspec.msgpack.encode(batch) for batch in batches]
            content = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        else:
            content = (bare if request.param == "bare" else framed)(*batches)
        (tmp_path / "events").write_bytes(content)
        trace = read_trace(tmp_path / "events")
        check_trace(trace)
        return trace

    return read


def chains(trace):
    return [trace.ids[a:b].tolist() for a, b in zip(trace.offsets[:-1], trace.offsets[1:], strict=True)]


def test_what_a_batch_stores_of_a_chain_is_a_request_for_it(read):
    trace = read(
        [10.0, [stored([1, 2]), stored([3], 2)], 0],
        [11.5, [stored([4, 5], 1)]],
        [12.0, [["BlockRemoved", [3], "GPU"], stored([3], 2)], None],
    )
    assert chains(trace) == [[0, 1, 2], [0, 3, 4], [0, 1, 2]]
    assert trace.times.tolist() == [0.0, 1.5, 2.0]
    assert trace.input_tokens.tolist() == [12, 12, 12] and trace.output_tokens.tolist() == [0, 0, 0]
    assert trace.block_tokens == 4 and trace.format == "kv-events"


def test_a_prompt_that_is_stored_block_by_block_is_one_request(read):
    trace = read([1.0, [stored([1]), stored([2], 1), stored([3], 2)]], [2.0, [stored([4], 3)]], [2.5, [stored([5], 4)]])
    assert chains(trace) == [[0, 1, 2, 3, 4]] and trace.times.tolist() == [0.0]


@pytest.mark.parametrize(
    "next_turn",
    [
        [stored([3, 4], 2)],  # two blocks at once
        [stored([3], 2), stored([4], 3)],
    ],
)
def test_more_blocks_behind_a_chain_are_its_next_turn(read, next_turn):
    trace = read([1.0, [stored([1, 2])]], [9.0, next_turn])
    assert chains(trace) == [[0, 1], [0, 1, 2, 3]] and trace.times.tolist() == [0.0, 8.0]


def test_only_what_follows_at_once_belongs_to_a_request(read):
    trace = read(
        [1.0, [stored([1, 2])]],
        [2.0, [stored([8])]],
        [3.0, [stored([3], 2)]],  # of the first request, but another one lies between
        [4.0, [stored([4], 2)]],  # beside the last block, not behind it
        [5.0, [stored([9]), stored([5], 4)]],
        [6.0, [["AllBlocksCleared"], stored([6], 5)]],
    )
    assert chains(trace) == [[0, 1], [2], [0, 1, 3], [0, 1, 4], [5], [0, 1, 4, 6], [7, 8]]


@pytest.mark.parametrize(
    "events",
    [
        [stored([1, 2]), stored([3], 2)],
        [stored([1, 2], None, 4, None, "GPU", None, None, 0), stored([3], 2, 4, 7)],
        [stored_map([1, 2]), stored_map([3], 2, medium="GPU", group_idx=0, lora_name="x")],
        [stored_map([b"a" * 32, b"b" * 32]), stored([b"c" * 32], b"b" * 32)],
        [stored([2**64 - 1, 2**63]), stored([-(2**63)], 2**63)],
        [["BlockStored", [1, 2], None, [], 4, None, "CPU"], *[stored([1, 2]), stored([3], 2)]],
        [stored([1, 2]), stored([8, 9], None, 4, None, "GPU", None, None, 1), stored([3], 2), ["BlockTransferred", 1]],
    ],
)
def test_positional_and_tagged_events_of_every_age(read, events):
    assert chains(read([1.0, events])) == [[0, 1, 2]]
    assert chains(read({"type": "EventBatch", "ts": 1.0, "events": events})) == [[0, 1, 2]]


def test_nothing_is_equal_to_what_was_before_a_clear(read):
    trace = read([1.0, [stored([1, 2]), ["AllBlocksCleared"], stored([1, 2]), stored([3], 2)]])
    assert chains(trace) == [[0, 1], [2, 3, 4]]
    assert trace.parents.tolist() == [-1, 0, -1, 2, 3]


def test_a_chain_whose_beginning_was_not_recorded(read):
    trace = read([1.0, [stored([5], 4), stored([6], 5), stored([7], 4)]])
    assert chains(trace) == [[0, 1, 2], [0, 3]]


@given(st.lists(VALUES, max_size=5), st.integers(1, 50))
def test_what_is_appended_is_read_back(batches, size):
    file = io.BytesIO()
    for batch in batches:
        append_event_batch(file, batch if not isinstance(batch, bytes) else msgspec.msgpack.encode(batch))
    content = file.getvalue()
    pieces = [content[place : place + size] for place in range(0, len(content), size)]
    assert [bytes(part) for part in read_event_batches(pieces)] == [msgspec.msgpack.encode(batch) for batch in batches]


def test_a_payload_is_appended_as_it_is():
    file = io.BytesIO()
    payload = msgspec.msgpack.encode([1.0, []])
    for kind in (bytes, bytearray, memoryview):
        append_event_batch(file, kind(payload))
    assert file.getvalue() == 3 * (b"\xc6" + len(payload).to_bytes(4, "big") + payload)


def test_a_batch_beyond_the_limit(monkeypatch):
    for module in (kv_events, events):
        monkeypatch.setattr(module, "MAX_BATCH_BYTES", 1000)
    file = io.BytesIO()
    with pytest.raises(ValueError, match="at most 1000 bytes, got 1003"):
        append_event_batch(file, b"x" * 1003)
    assert file.getvalue() == b""
    for content in (bare(["x" * 2000]), b"\xdd\xff\xff\xff\xff" + b"\x00" * 3000, b"\xc6\xff\xff\xff\xff" * 500):
        *_, last = read_event_batches([content])
        assert isinstance(last, BadRecord) and "longer than 1000 bytes" in str(last)


@pytest.mark.parametrize("inside", [b"", b"\xdd\xff\xff\xff\xff", b"\x01\x02", b"\xc1", b"\x93\x01"])
def test_a_frame_holds_exactly_one_value(inside):
    frame = b"\xc4" + bytes([len(inside)]) + inside
    bad, good = read_event_batches([frame + framed([1.0, []])])
    assert isinstance(bad, BadRecord) and "one msgpack value" in str(bad)
    assert bytes(good) == msgspec.msgpack.encode([1.0, []])


@given(VALUES, st.data())
def test_the_extent_of_a_value_is_its_length(value, data):
    content = msgspec.msgpack.encode(value)
    behind = data.draw(st.binary(max_size=5))
    assert extent(np.frombuffer(content + behind, np.uint8)) == len(content)
    cut = data.draw(st.integers(0, len(content) - 1))
    assert extent(np.frombuffer(content[:cut], np.uint8)) == INCOMPLETE


@pytest.mark.parametrize("size", [31, 32, 255, 256, 65_535, 65_536])
def test_the_extent_of_long_values(size):
    for value in (b"x" * size, "x" * size, [0] * size, dict.fromkeys(range(size)), msgspec.msgpack.Ext(5, b"x" * size)):
        content = msgspec.msgpack.encode(value)
        assert extent(np.frombuffer(content + b"\x00", np.uint8)) == len(content)


def test_the_extent_of_nonsense():
    assert extent(np.frombuffer(b"\xc1", np.uint8)) == INVALID
    assert extent(np.frombuffer(b"\x92\x01\xc1", np.uint8)) == INVALID
    bombs = (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff\x00", b"\xdb\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01")
    for bomb in (*bombs, b"\x91" * 10_000, b"\xdd\xff\xff\xff\xff" * 100):
        assert extent(np.frombuffer(bomb, np.uint8)) == INCOMPLETE


def lines_run(read) -> int:
    """Return how many lines of the reader and of the collector run."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if not frame.f_code.co_filename.endswith(("kv_events.py", "collect.py")):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        read()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.skipif(os.environ.get("NUMBA_DISABLE_JIT") == "1", reason="kernels run line by line there")
def test_a_chain_that_grows_by_a_block_an_event_takes_steps_in_proportion(tmp_path):
    def one_by_one(num_events: int) -> int:
        path = tmp_path / f"{num_events}"
        path.write_bytes(framed(*([float(i), [stored([i + 1], i or None)]] for i in range(num_events))))
        return lines_run(lambda: read_trace(path))

    one_by_one(1)
    assert one_by_one(800) < 2.2 * one_by_one(400)
    assert read_trace(tmp_path / "800").num_accesses == 800  # not the sum of all lengths on the way


def test_chains_that_grow_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(kv_events, "MAX_ACCESSES", 10)
    path = tmp_path / "events"
    batches = [[float(i), [stored([2 * i + 1, 2 * i + 2], 2 * i or None)]] for i in range(3)]  # 2, 4 and 6 blocks
    path.write_bytes(framed(*batches))
    with pytest.raises(TraceError, match="batch 3: .*more than 10 blocks in all"):
        read_trace(path)
    path.write_bytes(framed(*batches[:2], [9.0, [stored([9], 4)]]))
    assert read_trace(path).num_accesses == 7
