"""Broken files: which file, which line, why; and what skipping keeps."""

from __future__ import annotations

import gzip
import pickle

import pytest
from tests.sim.trace_checks import check_trace
from tests.sim.trace_files import (
    AZURE_HEADER,
    BURST_HEADER,
    bare,
    framed,
    lines,
    mooncake,
    qwen,
    stored,
    turn,
    weka,
)  # fmt: skip

from pagedkv import PagedKvError, TraceError
from pagedkv.sim import collect, source
from pagedkv.sim.readers import weka as weka_reader
from pagedkv.sim.reading import read_trace

GOOD_LINE = {
    "mooncake": lines(mooncake()),
    "qwen": lines(qwen(1, -1, 0.0, [1])),
    "tokens": lines({"timestamp": 0, "token_ids": [1]}),
    "weka": lines(weka("a", turn(0.0, [1]))),
    "burstgpt": BURST_HEADER + b"1,s,1,m,1,1,2,x\n",
    "azure": AZURE_HEADER + b"2023-11-16,1,1\n",
}


def with_field(line: bytes, name: str, value: bytes) -> bytes:
    """Return the line with the value of a field replaced."""
    before, _, after = line.partition(b'"%s": ' % name.encode())
    end = after.index(b"]") + 1 if after.startswith(b"[") else min(after.find(c) % 10**9 for c in (b",", b"}"))
    return before + b'"%s": ' % name.encode() + value + after[end:]


BROKEN = [
    ("mooncake", b"{", "truncated"),
    ("mooncake", b"not json", "malformed"),
    ("mooncake", b"[1, 2]", "Expected `object`"),
    ("mooncake", b"\xff\xfe{}", "malformed"),
    ("mooncake", b'{"timestamp": 1}', "input_length is missing"),
    ("mooncake", b'{"input_length": 1, "output_length": 2, "hash_ids": []}', "timestamp is missing"),
    ("mooncake", b'{"timestamp": 1, "input_length": 1}', "output_length is missing"),
    ("mooncake", b'{"timestamp": 1, "input_length": 1, "output_length": 1}', "hash_ids is missing"),
    ("mooncake", ("timestamp", b"NaN"), "malformed"),
    ("mooncake", ("timestamp", b"1e999"), "out of range"),
    ("mooncake", ("timestamp", b"1e300"), "timestamp: expected a finite number"),
    ("mooncake", ("timestamp", b'"1"'), "Expected `float | null`, got `str`"),
    ("mooncake", ("input_length", b"-1"), "input length: expected 0 … 2\\*\\*53 - 1, got -1"),
    ("mooncake", ("input_length", b"9007199254740992"), "input length"),
    ("mooncake", ("input_length", b"1.5"), "Expected `int | null`, got `float`"),
    ("mooncake", ("output_length", b"-7"), "output length: expected .* got -7"),
    ("mooncake", ("output_length", b"true"), "Expected `int | null`, got `bool`"),
    ("mooncake", ("hash_ids", b"[1, null]"), r"Expected `int | str`, got `null` - at `\$.hash_ids\[...\]`"),
    ("mooncake", ("hash_ids", b"[1, 2.5]"), "Expected `int | str`, got `float`"),
    ("mooncake", ("hash_ids", b'"1"'), "Expected `array | null`"),
    ("mooncake", ("hash_ids", b'[1], "block_size": 0'), "block size: expected"),
    ("mooncake", b"[" * 100_000, "Expected `object`|nested too deeply"),
    ("mooncake", b'{"x": ' + b"[" * 100_000, "nested too deeply"),
    ("mooncake", b'{"session_id": "\xff\xff"}', "not UTF-8"),
    ("qwen", ("timestamp", b"null"), "Expected `float`, got `null`"),
    ("qwen", b'{"chat_id": 1, "timestamp": 1}', "missing required field `input_length`"),
    ("tokens", ("token_ids", b"[2147483648]"), "token ids must fit in 32 bits"),
    ("tokens", ("token_ids", b'["a"]'), "Expected `int`, got `str`"),
    ("weka", b'{"id": "b"}', "missing required field `requests`"),
    ("weka", b'{"requests": [{"in": "x"}]}', "Expected `int | null`, got `str`"),
    ("weka", lines(weka("b", block_size=-1)).strip(), "block size: expected"),
    ("burstgpt", b"1,s,1,m,1,1,2", "expected 8 fields, got 7"),
    ("burstgpt", b"x,s,1,m,1,1,2,x", "Timestamp: expected a number, got 'x'"),
    ("burstgpt", b"nan,s,1,m,1,1,2,x", "timestamp: expected a finite number .* got nan"),
    ("burstgpt", b"1,s,1,m,1.5,1,2,x", "Request tokens: expected an int, got '1.5'"),
    ("burstgpt", b"1,s,1,m,inf,1,2,x", "Request tokens: expected an int, got 'inf'"),
    ("burstgpt", b"1,s,1,m,1," + b"9" * 5000 + b",2,x", "Response tokens: expected an int"),
    ("burstgpt", b'1,"s,1,m,1,1,2,x', "unexpected end of data"),
    ("burstgpt", b"1,\xff,1,m,1,1,2,x", "not UTF-8"),
    ("azure", b"yesterday,1,1", "TIMESTAMP: expected an ISO 8601 date and time, got 'yesterday'"),
    ("azure", b"2023-11-16,-1,1", "input length: expected"),
    ("azure", b"2023-11-16,,1", "ContextTokens: expected a number, got ''"),
]


@pytest.mark.parametrize("format, broken, reason", BROKEN)
def test_a_broken_line_is_named_or_skipped(tmp_path, format, broken, reason):
    good = GOOD_LINE[format]
    if isinstance(broken, tuple):
        broken = with_field(good, *broken).strip()
    number = good.count(b"\n") + 2
    path = tmp_path / "file"
    path.write_bytes(good + b"\n" + broken + b"\n" + good.splitlines(keepends=True)[-1])
    with pytest.raises(TraceError, match=reason) as caught:
        read_trace(path, format=format)
    error = caught.value
    assert (error.file, error.line, error.place) == (str(path), number, "line")
    assert str(error) == f"{path}, line {number}: {error.reason}"
    trace = read_trace(path, skip_bad=True)
    check_trace(trace)
    assert trace.num_skipped == 1 and trace.num_requests == 2 and trace.format == format


def test_skipping_keeps_nothing_of_a_broken_line(tmp_path):
    path = tmp_path / "file"
    bad = mooncake(0, ids=["new", "names"], session_id="gone", outputs=-1)
    path.write_bytes(lines(mooncake(ids=[1]), bad, mooncake(ids=["names", "new"], session_id="kept")))
    trace = read_trace(path, skip_bad=True)
    check_trace(trace)
    assert trace.ids.tolist() == [0, 1, 2] and trace.sessions.tolist() == [-1, 0]


def test_broken_requests_of_a_session_are_named_by_their_place(tmp_path):
    path = tmp_path / "s.json"
    bad = {"t": 1.0, "in": 5, "out": 1, "hash_ids": ["a", {}]}
    path.write_bytes(lines(weka("s", turn(0.0, [1]), bad, {"in": 5}, {"t": 0.0}, turn(1.0, [1]))))
    with pytest.raises(TraceError, match=r"s.json, request 2: Expected `int \| str`, got `object`"):
        read_trace(path)
    trace = read_trace(path, skip_bad=True)
    assert trace.num_skipped == 3 and trace.num_requests == 2


@pytest.mark.parametrize("write", [bare, framed])
@pytest.mark.parametrize(
    "batch, reason",
    [
        ({}, "batch: expected"),
        (["x", []], "a number and a list"),
        ([1.0, {}], "a number and a list"),
        ([float("nan"), [stored([1])]], "timestamp: expected a finite number"),
        ([1.0, [5]], "event: expected"),
        ([1.0, [[]]], "event: expected"),
        ([1.0, [["BlockStored"]]], "block_hashes: expected"),
        ([1.0, [stored([])]], "block_hashes: expected"),
        ([1.0, [stored([1.5])]], "block_hashes: expected"),
        ([1.0, [stored([1], 2.5)]], "parent_block_hash: expected"),
        ([1.0, [["BlockStored", [1], None, [], "4"]]], "block_size: expected a number"),
        ([1.0, [stored([1], size=5)]], "blocks of 5 tokens, but of 4 before"),
    ],
)
def test_broken_batches_are_named_by_their_place(tmp_path, write, batch, reason):
    path = tmp_path / "events"
    good = [0.0, [stored([1, 2])]]
    path.write_bytes(write(good, batch, good))
    with pytest.raises(TraceError, match=f"events, batch 2: .*{reason}"):
        read_trace(path)
    trace = read_trace(path, skip_bad=True)
    check_trace(trace)
    assert trace.num_skipped == 1 and trace.num_requests == 2


def test_events_that_end_too_early(tmp_path):
    path = tmp_path / "events"
    for write in (bare, framed):
        content = write([0.0, [stored([1, 2])]], [1.0, [stored([1, 2])]])
        path.write_bytes(content[:-1])
        with pytest.raises(TraceError, match="batch 2: the file ends within a batch"):
            read_trace(path)
        assert read_trace(path, skip_bad=True).num_requests == 1


@pytest.mark.parametrize("content", [b"", b"\n\n", gzip.compress(b"", mtime=0)], ids=["nothing", "blank", "packed"])
@pytest.mark.parametrize("format", ["mooncake", "qwen", "tokens", "burstgpt", "azure", "kv-events"])
def test_an_empty_trace_is_an_error(tmp_path, format, content):
    path = tmp_path / "empty"
    path.write_bytes(b"" if format == "kv-events" else content)
    with pytest.raises(TraceError, match="empty: holds no request"):
        read_trace(path, format=format)


def test_a_header_alone_is_an_empty_trace(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(AZURE_HEADER)
    with pytest.raises(TraceError, match="holds no request"):
        read_trace(path)
    path.write_bytes(b"2023-11-16,1,1\n" + AZURE_HEADER)
    with pytest.raises(TraceError, match="line 1: the first line must name the columns; missing: TIMESTAMP, Con"):
        read_trace(path, format="azure")


@pytest.mark.parametrize("content", [b"", b"hello\n", b"<html>", b"{}\n", b"\x00" * 3, b"PK\x03\x04", b"\xff\xd8"])
def test_an_unknown_format_lists_the_known_ones(tmp_path, content):
    path = tmp_path / "what"
    path.write_bytes(content)
    with pytest.raises(TraceError, match="what(: the format is not recognised; name it: mooncake|, batch 1)"):
        read_trace(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(TraceError, match="cannot be read: .*No such file"):
        read_trace(tmp_path / "none")
    packed = gzip.compress(lines(*(mooncake(k) for k in range(2000))))
    for content in (packed[:-9], packed[: len(packed) // 2], packed[:40] + b"\x00" * 40 + packed[80:]):
        path = tmp_path / "packed"
        path.write_bytes(content)
        with pytest.raises(TraceError, match="cannot be read|line"):
            read_trace(path, format="mooncake")


def test_a_line_beyond_the_limit_is_skipped_without_being_held(tmp_path, monkeypatch):
    monkeypatch.setattr(source.Source.lines, "__defaults__", (1000,))
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(lines(mooncake()) + b"[" * 10**7 + b"\n" + lines(mooncake()) + b"x" * 2000))
    with pytest.raises(TraceError, match="line 2: longer than 1000 bytes"):
        read_trace(path)
    trace = read_trace(path, skip_bad=True)
    assert (trace.num_requests, trace.num_skipped) == (2, 2)


def test_a_document_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(weka_reader, "MAX_DOCUMENT_BYTES", 100)
    path = tmp_path / "s.json"
    path.write_bytes(b'{\n"requests": [' + b" " * 200 + b"]}")
    with pytest.raises(TraceError, match="s.json: longer than 100 bytes"):
        read_trace(path)


def test_a_trace_error_is_a_value_error_and_survives_pickling():
    error = TraceError("a.jsonl", 3, "broken", "batch")
    assert isinstance(error, ValueError) and isinstance(error, PagedKvError)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.file, copy.line, copy.reason) == ("a.jsonl, batch 3: broken", "a.jsonl", 3, "broken")
    assert str(TraceError("a", None, "b")) == "a: b"


def test_more_blocks_than_can_be_numbered(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "MAX_DISTINCT", 5)
    path = tmp_path / "file"
    path.write_bytes(lines(mooncake(ids=range(4)), mooncake(ids=range(4, 8))))
    for skip_bad in (False, True):
        with pytest.raises(TraceError, match="file: more than 5 different blocks"):
            read_trace(path, skip_bad=skip_bad)


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "SPILL_BYTES", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    path = tmp_path / "file"
    path.write_bytes(lines(mooncake()))
    with pytest.raises(TraceError, match="file: .*No such file or directory"):
        read_trace(path)
