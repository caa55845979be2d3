"""Streaming sequences in a runner, beside others: what a StreamingSession of their own would give."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.hf.models import build, prompt
from tests.hf.serving import generated, step

from pagedkv import InvalidOperation
from pagedkv.hf import ModelRunner, StreamingSession, load_runner

SINKS, WINDOW = 3, 14
PROMPT = prompt(1, 12, seed=3)[0].tolist()


def runner_of(name: str, mode: str = "auto", dtype: torch.dtype = torch.float32) -> ModelRunner:
    model = build(name) if dtype == torch.float32 else copy.deepcopy(build(name)).to(dtype)
    return load_runner(model, num_blocks=60, block_size=4, mode=mode)


def feed(runner: ModelRunner, streams: list[int], tokens: list[list[int]], others: list[int]) -> torch.Tensor:
    """Feed sequences that stream, by count, and others of known ids; cut the streams; return the last logits."""
    cache = runner.cache
    cache.append_batch(streams, counts=[len(new) for new in tokens[: len(streams)]])
    if others:
        cache.append_batch(others, tokens[len(streams) :])
    plan = cache.plan(streams + others)
    logits = runner.forward(plan, np.concatenate(tokens), plan.cu_seqlens_q[1:].astype(np.int64) - 1)
    cache.commit(plan)
    for seq_id in streams:
        if cache.get_sequence(seq_id).num_tokens > SINKS + WINDOW:
            cache.apply_streaming_llm(seq_id, SINKS, WINDOW)
    return logits


@pytest.mark.parametrize("mode", ["compiled", "ragged", "gather"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_stream_beside_others_equals_a_session(name, mode):
    """120 tokens past sinks and window, so that positions start again several times."""
    runner, session = runner_of(name, mode), StreamingSession(build(name), SINKS, WINDOW, block_size=4)
    other = prompt(1, 20, seed=4)[0].tolist()
    wanted, text = generated(build(name), other, 120), list(other)
    runner.cache.allocate(0, 0)
    runner.cache.allocate(1, 0)
    expected = session.feed(PROMPT)
    rows = feed(runner, [0], [PROMPT, other], [1])
    for _ in range(120):
        torch.testing.assert_close(rows[0], expected, rtol=1e-4, atol=1e-4)
        token = int(expected.argmax())
        text.append(int(rows[1].argmax()))
        expected = session.feed([token])
        rows = feed(runner, [0], [[token], text[-1:]], [1])
    assert text == wanted
    assert runner.cache.get_sequence(0).num_dropped_tokens > 100
    runner.cache.check()


def test_several_streams_of_one_batch_keep_apart():
    """They drop at different times; one ends and another takes its id."""
    runner, model = runner_of("llama"), build("llama")
    starts = {0: PROMPT, 1: PROMPT[:5], 2: PROMPT[3:]}
    sessions = {seq_id: StreamingSession(model, SINKS, WINDOW, block_size=4) for seq_id in starts}
    for seq_id in starts:
        runner.cache.allocate(seq_id, 0)
    rows = dict(zip(starts, feed(runner, [0, 1, 2], list(starts.values()), []), strict=True))
    expected = {seq_id: session.feed(starts[seq_id]) for seq_id, session in sessions.items()}
    for number in range(60):
        news = {}
        for seq_id in starts:
            torch.testing.assert_close(rows[seq_id], expected[seq_id], rtol=1e-4, atol=1e-4)
            news[seq_id] = [int(expected[seq_id].argmax())]
        if number == 30:
            runner.cache.free(1)
            runner.release(1)
            runner.cache.allocate(1, 0)
            sessions[1].reset()
            news[1] = PROMPT[2:9]
        rows = dict(zip(news, feed(runner, [0, 1, 2], list(news.values()), []), strict=True))
        expected = {seq_id: session.feed(news[seq_id]) for seq_id, session in sessions.items()}


def test_an_id_that_was_not_released_begins_anew():
    runner = runner_of("llama")
    for _ in range(2):
        session = StreamingSession(build("llama"), SINKS, WINDOW, block_size=4)
        runner.cache.allocate(0, 0)
        for token in prompt(1, 30, seed=8)[0].tolist():
            row = feed(runner, [0], [[token]], [])[0]
            torch.testing.assert_close(row, session.feed([token]), rtol=1e-4, atol=1e-4)
        runner.cache.free(0)


def test_bfloat16_streams():
    runner = runner_of("llama", dtype=torch.bfloat16)
    session = StreamingSession(runner.model, SINKS, WINDOW, block_size=4)
    runner.cache.allocate(0, 0)
    for token in prompt(1, 60, seed=9)[0].tolist():
        row = feed(runner, [0], [[token]], [])[0]
        torch.testing.assert_close(row, session.feed([token]).float(), rtol=0.1, atol=0.1)


def dropped(runner: ModelRunner, seq_id: int = 0) -> None:
    runner.cache.apply_streaming_llm(seq_id, SINKS, WINDOW)


def test_blocks_that_others_can_find_are_refused():
    runner = runner_of("llama")
    step(runner, {0: prompt(1, 30)[0].tolist()})
    dropped(runner)
    with pytest.raises(InvalidOperation, match="allocate it by a count"):
        step(runner, {0: [5]})


def test_a_fork_of_a_stream_is_refused():
    runner = runner_of("llama")
    runner.cache.allocate(0, 0)
    feed(runner, [0], [prompt(1, 30)[0].tolist()], [])
    feed(runner, [0], [[7]], [])
    with pytest.raises(InvalidOperation, match="not dropped"):
        runner.fork(0, 1)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "mistral", "gemma4"])
def test_models_that_cannot_stream_are_refused(name):
    """No rotary positions, or several kinds, or a sliding window of their own that is shorter."""
    runner = runner_of(name)
    runner.cache.allocate(0, 0)
    feed(runner, [0], [prompt(1, 30)[0].tolist()], [])
    with pytest.raises(InvalidOperation):
        feed(runner, [0], [[7]], [])
