"""Every format, its aliases and what its numbers mean."""

from __future__ import annotations

import gzip
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tests.sim.trace_checks import check_trace
from tests.sim.trace_files import (
    AZURE_HEADER,
    BURST_HEADER,
    SAMPLES,
    agent,
    lines,
    mooncake,
    qwen,
    turn,
    weka,
)  # fmt: skip

from pagedkv import InvalidOperation, TraceError
from pagedkv.sim import source
from pagedkv.sim.reading import FORMATS, detect_format, read_trace


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
