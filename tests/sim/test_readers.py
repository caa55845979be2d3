"""Every format, its aliases and what its numbers mean."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.trace_checks import check_trace
from tests.sim.trace_files import (
    AZURE_HEADER,
    BURST_HEADER,
    REAL,
    SAMPLES,
    agent,
    bare,
    framed,
    lines,
    mooncake,
    qwen,
    stored,
    turn,
    weka,
)  # fmt: skip

from pagedkv import InvalidOperation, PagedKvError, TraceError
from pagedkv.sim import collect, source
from pagedkv.sim.readers import weka as weka_reader
from pagedkv.sim.reading import FORMATS, detect_format, read_trace
from pagedkv.sim.trace import write_trace


@pytest.fixture
def read(tmp_path):
    """Return a function that writes a file, reads it and checks the trace."""

    def read(content: bytes, **options):
        path = tmp_path / "trace"
        path.write_bytes(content)
        trace = read_trace(path, **options)
        check_trace(trace)
        return trace

    return read


def chains(trace):
    """Return the ids of every request."""
    return [trace.ids[a:b].tolist() for a, b in zip(trace.offsets[:-1], trace.offsets[1:], strict=True)]


@pytest.mark.parametrize("name, content", [(name, content) for name in SAMPLES for content in SAMPLES[name]])
def test_every_format_is_recognised(tmp_path, name, content):
    path = tmp_path / "anything"
    path.write_bytes(content)
    assert detect_format(path) == name
    found, named = read_trace(path), read_trace(path, format=name)
    check_trace(found)
    assert found.format == named.format == name
    assert found.name == "anything"
    assert np.array_equal(found.ids, named.ids) and np.array_equal(found.times, named.times)


def test_every_format_has_a_sample():
    assert set(SAMPLES) == set(FORMATS)


def test_mooncake(read):
    trace = read(lines(mooncake(1000, 1000, 5, [7, 9]), mooncake(1250, 1025, 6, [7, 9, 11])))
    assert trace.times.tolist() == [0.0, 0.25]
    assert trace.input_tokens.tolist() == [1000, 1025]
    assert trace.output_tokens.tolist() == [5, 6]
    assert trace.sessions.tolist() == [-1, -1]
    assert chains(trace) == [[0, 1], [0, 1, 2]]
    assert trace.parents.tolist() == [-1, 0, 1]
    assert trace.block_tokens == 512 and trace.has_content


@pytest.mark.parametrize(
    "line",
    [
        {"timestamp": 9, "input_length": 3, "output_length": 4, "hash_ids": [1]},
        {"created_time": 9, "input_tokens": 3, "output_tokens": 4, "hash_ids": [1]},
        {"timestamp": 9.0, "input_tokens": 3, "output_length": 4, "hash_ids": ["0x01"], "more": {"a": [1]}},
        {"delay_ms": 9, "input_length": 3, "output_tokens": 4, "hash_ids": [1]},
        {"delay": 9, "input_length": 3, "output_tokens": 4, "hash_ids": [1]},
    ],
)
def test_mooncake_aliases(read, line):
    trace = read(lines({**line, "timestamp": 0}, line), format="mooncake")
    assert trace.times.tolist() == [0.0, 0.009]
    assert trace.input_tokens.tolist() == [3, 3]
    assert trace.output_tokens.tolist() == [4, 4]
    assert chains(trace) == [[0], [0]]


def test_mooncake_delays_count_from_the_request_before_of_the_session(read, caplog):
    later = {"input_length": 1, "output_length": 1, "hash_ids": [1]}
    trace = read(
        lines(
            mooncake(1000, session_id="a"),
            {**later, "session_id": "a", "delay": 4000},
            mooncake(2000, session_id="b"),
            {**later, "session_id": "b", "delay": 500},
            {**later, "session_id": "b", "delay": 500},
        )
    )
    assert trace.times.tolist() == [0.0, 1.0, 1.5, 2.0, 4.0]
    assert trace.sessions.tolist() == [0, 1, 1, 1, 0]
    assert trace.num_reordered == 0 and "backwards" not in caplog.text


def test_mooncake_says_its_block_size(read):
    assert read(lines(mooncake(block_size=500))).block_tokens == 500
    assert read(lines(mooncake(block_size=500)), block_tokens=499).block_tokens == 499


def test_mooncake_without_ids_gives_lengths(read):
    line = {"timestamp": 1, "input_length": 3, "output_length": 4}
    trace = read(lines(line, line))
    assert not trace.has_content
    assert trace.num_accesses == 0 and trace.offsets.tolist() == [0, 0, 0]


@pytest.mark.parametrize("ids", [[1], [1, 2, 3, 4, 5], []])
def test_more_or_fewer_ids_than_the_input_fills_are_taken_as_they_stand(read, ids):
    trace = read(lines(mooncake(0, 1000, ids=ids), mooncake(0, 1000, ids=[1, 2]), mooncake(0, 1000, ids=[1, 2])))
    assert len(chains(trace)[0]) == len(ids)
    assert trace.input_tokens[0] == 1000


def test_a_block_size_that_fits_nothing_is_doubted(read, caplog):
    read(lines(mooncake(0, 512, ids=range(32))))
    assert "1 of 1 requests list another number of blocks than their input fills at 512 tokens a block" in caplog.text
    caplog.clear()
    read(lines(mooncake(0, 512, ids=range(32))), block_tokens=16)
    assert not caplog.records


def test_ids_of_every_kind_stay_apart(read):
    ids = [5, "5", 2**63 - 1, 2**63, 2**64, -(2**62) - 1, -(2**62), -(2**63), -(2**63) - 1, "", "0x05"]
    trace = read(lines(*(mooncake(ids=[name]) for name in ids), *(mooncake(ids=[name]) for name in ids)))
    assert trace.ids.tolist() == 2 * list(range(len(ids)))


def test_timestamps_that_go_backwards_are_sorted_and_counted(read, caplog):
    trace = read(
        lines(mooncake(30, ids=[9]), mooncake(10, 11, ids=[7, 8]), mooncake(20, ids=[9]), mooncake(10, 12, ids=[7]))
    )
    assert trace.times.tolist() == [0.0, 0.0, 0.01, 0.02]
    assert trace.input_tokens.tolist()[:2] == [11, 12], "equal times stay in the order of the file"
    assert chains(trace) == [[0, 1], [0], [2], [2]]
    assert trace.parents.tolist() == [-1, 0, -1]
    assert trace.num_reordered == 3
    assert "3 of 4 timestamps go backwards" in caplog.text


def test_qwen_chains_its_ids_and_names_sessions_by_the_root(read):
    trace = read(
        lines(
            qwen(1, -1, 0.0, [10, 11]),
            qwen(2, 1, 1.0, [10, 11, 12]),
            qwen(3, -1, 2.0, [20, 11]),
            qwen(4, 2, 2.5, [10, 11, 12, 12]),
            qwen(6, 5, 3.0, [10]),
            qwen(7, 5, 3.0, [10]),
        )
    )
    assert chains(trace) == [[0, 1], [0, 1, 2], [3, 4], [0, 1, 2, 5], [0], [0]]
    assert trace.parents.tolist() == [-1, 0, 1, -1, 3, 2]
    assert trace.sessions.tolist() == [0, 0, 1, 0, 2, 2]
    assert trace.times.tolist() == [0.0, 1.0, 2.0, 2.5, 3.0, 3.0]
    assert trace.block_tokens == 16


SESSION = weka("s", turn(0.0, [1, 2]), agent(1.0, turn(3.0, [1, 3]), agent(3.0, turn(3.5, [5]))), turn(2.0, [1, 2]))


@pytest.mark.parametrize(
    "content",
    [json.dumps(SESSION).encode(), json.dumps(SESSION, indent=2).encode(), gzip.compress(lines(SESSION)),
     b"\xef\xbb\xbf" + json.dumps(SESSION).encode()],
)  # fmt: skip
def test_weka_with_nested_sub_agents(read, content, caplog):
    trace = read(content)
    assert trace.times.tolist() == [0.0, 2.0, 3.0, 3.5]
    assert chains(trace) == [[0, 1], [0, 1], [0, 2], [3]]
    assert trace.sessions.tolist() == [0, 0, 0, 0]
    assert trace.input_tokens.tolist() == [131, 131, 131, 67]
    assert trace.output_tokens.tolist() == [7, 7, 7, 7]
    assert trace.block_tokens == 64 and trace.num_reordered == 0 and not caplog.records


def test_weka_ids_are_local_to_a_session_unless_the_file_says_global(tmp_path):
    (tmp_path / "a.json").write_bytes(lines(weka("same", turn(0.0, [1, 2]))))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(lines(weka("same", turn(1.0, [1, 2])))))
    (tmp_path / "c.jsonl").write_bytes(lines(*(weka(n, turn(2.0, [1, 2]), hash_id_scope="global") for n in "xy")))
    (tmp_path / "notes.txt").write_text("no session")
    trace = read_trace(tmp_path)
    check_trace(trace)
    assert chains(trace) == [[0, 1], [2, 3], [4, 5], [4, 5]]
    assert trace.parents.tolist() == [-1, 0, -1, 2, -1, 4]
    assert trace.sessions.tolist() == [0, 1, 2, 3]
    assert trace.name == tmp_path.name


def test_weka_sessions_of_different_block_sizes_do_not_mix(tmp_path):
    (tmp_path / "a.json").write_bytes(lines(weka("a", turn(0.0, [1]))))
    (tmp_path / "b.json").write_bytes(lines(weka("b", turn(0.0, [1]), block_size=16)))
    with pytest.raises(TraceError, match=r"b.json, line 1: blocks of 16 tokens, but of 64 before"):
        read_trace(tmp_path)
    assert read_trace(tmp_path, skip_bad=True).num_skipped == 1


def test_folder_without_sessions(tmp_path):
    with pytest.raises(TraceError, match="the folder holds none of"):
        read_trace(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        BURST_HEADER + b"5,s1,1.0,GPT-4,100,10,110,Conversation log\n7.5,s2,1,GPT-4,20.0,0,20,API log\n"
        b'8,s1,,"a, b",1,2,3,x\n9,,,,4,5,9,x\n',
    ],
)
def test_burstgpt(read, content):
    trace = read(content)
    assert trace.times.tolist() == [0.0, 2.5, 3.0, 4.0]
    assert trace.input_tokens.tolist() == [100, 20, 1, 4]
    assert trace.output_tokens.tolist() == [10, 0, 2, 5]
    assert trace.sessions.tolist() == [0, 1, 0, -1]
    assert not trace.has_content and trace.num_accesses == 0


def test_burstgpt_of_the_first_release(read):
    trace = read(b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,x\n")
    assert trace.input_tokens.tolist() == [472] and trace.sessions.tolist() == [-1]


def test_azure(read):
    trace = read(
        b"\xef\xbb\xbf"
        + AZURE_HEADER
        + b"2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04.0319600,3180,8\r\n"
        b"2023-11-16 19:17:05.031960+01:00,1,2\n2023-11-16T18:17:06,3,4"
    )
    assert trace.times == pytest.approx([0.0, 0.052, 1.052, 2.02004], abs=1e-6)
    assert trace.input_tokens.tolist() == [4808, 3180, 1, 3]
    assert trace.output_tokens.tolist() == [10, 8, 2, 4]
    assert not trace.has_content


def test_columns_are_found_by_name(read):
    trace = read(b"TIMESTAMP,NumImages,GeneratedTokens,ContextTokens\n2024-10-15 00:00:00,2,120,900\n")
    assert trace.input_tokens.tolist() == [900] and trace.output_tokens.tolist() == [120]


def test_tokens_are_cut_into_blocks(read):
    trace = read(
        lines(
            {"timestamp": 1, "token_ids": [1, 2, 3, 4, 5, 6]},
            {"timestamp": 2, "token_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9], "output_length": 3, "session_id": "x"},
            {"timestamp": 3, "token_ids": [1, 2, 3, 4, 5, 6], "output_tokens": 4},
            {"timestamp": 4, "token_ids": [5, 6]},
            {"timestamp": 5, "token_ids": []},
        ),
        block_tokens=4,
    )
    assert chains(trace) == [[0, 1], [0, 2, 3], [0, 1], [4], []]
    assert trace.input_tokens.tolist() == [6, 9, 6, 2, 0]
    assert trace.output_tokens.tolist() == [0, 3, 4, 0, 0]
    assert trace.sessions.tolist() == [-1, 0, -1, -1, -1]
    assert trace.times.tolist() == [0, 1, 2, 3, 4]


def test_blank_lines_and_packed_files(read):
    content = b"\n" + lines(mooncake()) + b"  \r\n\n" + lines(mooncake(1)) + b"\n"
    assert read(content).num_requests == read(gzip.compress(content)).num_requests == 2
    assert read(gzip.compress(lines(mooncake())) + gzip.compress(lines(mooncake()))).num_requests == 2


def test_progress_tells_bytes_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "REPORT_BYTES", 64)
    path = tmp_path / "trace.gz"
    path.write_bytes(gzip.compress(lines(*(mooncake(k) for k in range(100)))))
    told = []
    read_trace(path, progress=lambda done, total: told.append((done, total)))
    size = path.stat().st_size
    assert len(told) > 10 and {total for _, total in told} == {size}
    assert all(0 < done <= size for done, _ in told) and told == sorted(told)


def test_arguments_are_checked(tmp_path):
    with pytest.raises(InvalidOperation, match="format: expected one of mooncake, .*, got 'moon'"):
        read_trace(tmp_path, format="moon")
    for block_tokens in (0, -1, 2**31, 1.5, "16"):
        with pytest.raises(InvalidOperation, match=f"block_tokens: expected an int.*, got {block_tokens!r}"):
            read_trace(tmp_path, block_tokens=block_tokens)


def test_numbers_may_be_written_as_floats(read):
    line = b'{"timestamp": 1e3, "input_length": 12, "output_length": 3, "hash_ids": [9007199254740993]}\n'
    assert read(line + line.replace(b"1e3", b"1.5e3")).times.tolist() == [0.0, 0.5]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
@pytest.mark.parametrize("packed", [False, True])
def test_a_pipe_says_that_it_waits_and_is_read_when_its_writer_comes(tmp_path, monkeypatch, caplog, packed):
    monkeypatch.setattr(source, "PATIENCE", 0.01)
    caplog.set_level("WARNING", logger="pagedkv")
    content = lines(mooncake())
    pipe, file = tmp_path / "pipe", tmp_path / "file"
    os.mkfifo(pipe)
    file.write_bytes(content)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_trace, pipe)
        while not caplog.records and not reading.done():
            time.sleep(0.01)
        pipe.write_bytes(gzip.compress(content) if packed else content)
        trace = reading.result()
    assert caplog.messages == [f"{pipe}: waiting for a writer, this is a pipe"]
    assert trace.name == "pipe" and trace.ids.tolist() == read_trace(file).ids.tolist()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_errors_of_a_pipe_name_the_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for content, format, place in ((b"what?", None, "pipe: the format"), (b"{", "mooncake", "pipe, line 1: ")):
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read_trace, pipe, format=format)
            pipe.write_bytes(content)
            with pytest.raises(TraceError, match=place) as caught:
                reading.result()
        assert caught.value.file == str(pipe)


# --- Broken files: which file, which line, why; and what skipping keeps ---


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


# --- What is written is read back; large traces move to disk and stay the same; the real traces ---


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
