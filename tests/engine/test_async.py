"""AsyncEngine: streams, aborts, errors, the end."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import numpy as np
import pytest
from tests.engine.fakes import VOCAB, FakeRunner, alone, request

from pagedkv import InvalidOperation
from pagedkv.engine import LLM, AsyncEngine, EngineDead, RequestRefused, SamplingParams


class SlowRunner(FakeRunner):
    """Takes its time, so that things can happen during a step."""

    def forward(self, *args):
        time.sleep(0.002)
        return super().forward(*args)


def new_engine(num_blocks=64, runner=FakeRunner, **options):
    return AsyncEngine(LLM(runner(num_blocks, 4), **options))


async def collect(stream):
    return [output async for output in stream]


async def settled(engine):
    """Wait until nothing is under way, then see that nothing is held."""
    for _ in range(500):
        if not engine.stats().num_running + engine.stats().num_waiting and engine.snapshot().stats.blocks_used == 0:
            break
        await asyncio.sleep(0.01)
    cache = engine.llm.core.runner.cache
    cache.check()
    assert cache.used_block_count == 0 and engine.stats().num_running == 0


def run_with(test, **options):
    async def whole():
        others = set(threading.enumerate())
        engine = new_engine(**options)
        await test(engine)
        await engine.shutdown()
        left = [thread for thread in threading.enumerate() if thread not in others]
        assert not engine.is_alive and not any(thread.name == "pagedkv-engine" for thread in left)

    asyncio.run(asyncio.wait_for(whole(), 240))


def test_many_streams_at_once():
    prompts = [[1, 2, 3 + i % 7] * 3 for i in range(40)]

    async def test(engine):
        params = SamplingParams(max_tokens=15)
        streams = [collect(engine.generate(prompt, params)) for prompt in prompts]
        for prompt, outputs in zip(prompts, await asyncio.gather(*streams), strict=True):
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
            texts = [output.outputs[0].token_ids for output in outputs]
            assert [texts[-1]] == alone(request("r", prompt, max_tokens=15))
            assert all(texts[-1][: len(text)] == text for text in texts)
        await settled(engine)

    run_with(test, num_blocks=24)


def test_closing_a_stream_frees_its_blocks():
    async def test(engine):
        stream = engine.generate([1, 2, 3], SamplingParams(max_tokens=200))
        async for output in stream:
            if len(output.outputs[0].token_ids) > 3:
                break
        await stream.aclose()
        task = asyncio.ensure_future(collect(engine.generate([4, 5], SamplingParams(max_tokens=200))))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settled(engine)
        assert engine.stats().aborted_requests == 2 and engine.stats().finished_requests == 0

    run_with(test, runner=SlowRunner)


def test_abort_by_id_ends_the_stream_with_what_there_is():
    async def test(engine):
        outputs = []
        async for output in engine.generate([1, 2, 3], SamplingParams(max_tokens=200), request_id="mine"):
            outputs.append(output)
            if len(outputs) == 3:
                await engine.abort("nobody")
                await engine.abort("mine")
        assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
        assert 0 < len(outputs[-1].outputs[0].token_ids) < 200
        await settled(engine)

    run_with(test, runner=SlowRunner)


def test_a_request_whose_loop_was_closed_ends():
    engine, loop = new_engine(runner=SlowRunner), asyncio.new_event_loop()
    stream = engine.generate([1, 2], SamplingParams(max_tokens=None, streaming=(4, 8)))
    loop.run_until_complete(anext(stream))
    loop.close()
    asyncio.run(asyncio.wait_for(settled(engine), 60))
    asyncio.run(engine.shutdown())


def test_what_is_refused_is_refused_to_its_caller_only():
    async def test(engine):
        good = asyncio.ensure_future(collect(engine.generate([1], SamplingParams(max_tokens=20), request_id="a")))
        await asyncio.sleep(0)
        with pytest.raises(RequestRefused, match="the pool has 8"):
            await collect(engine.generate([1] * 30, SamplingParams(max_tokens=20)))
        with pytest.raises(InvalidOperation, match="token ids in"):
            await collect(engine.generate([-1]))
        with pytest.raises(InvalidOperation, match="no tokenizer"):
            await collect(engine.generate("text"))
        assert (await good)[-1].finished
        assert engine.is_alive

    run_with(test, num_blocks=8)


def test_an_id_in_use_is_refused_and_its_owner_goes_on():
    async def test(engine):
        first = asyncio.ensure_future(collect(engine.generate([1], SamplingParams(max_tokens=30), request_id="a")))
        await asyncio.sleep(0.01)
        with pytest.raises(InvalidOperation, match="not in use, got 'a'"):
            await collect(engine.generate([2], request_id="a"))
        assert len((await first)[-1].outputs[0].token_ids) == 30

    run_with(test, runner=SlowRunner)


def test_a_step_that_fails_ends_all_and_the_engine(caplog):
    async def test():
        engine = new_engine(runner=SlowRunner)
        streams = [collect(engine.generate([1, i], SamplingParams(max_tokens=100))) for i in range(3)]
        tasks = [asyncio.ensure_future(stream) for stream in streams]
        await asyncio.sleep(0.02)
        engine.llm.core.runner.fail = True
        for task in tasks:
            with pytest.raises(EngineDead, match="RuntimeError: the model broke") as caught:
                await task
            assert isinstance(caught.value.__cause__, RuntimeError)
        assert not engine.is_alive and "the model broke" in str(engine.error)
        with pytest.raises(EngineDead):
            await collect(engine.generate([1]))
        assert engine.llm.core.runner.cache.used_block_count == 0
        assert engine.snapshot().stats.num_running == 0
        await engine.shutdown()

    with caplog.at_level(logging.CRITICAL, "pagedkv"):
        asyncio.run(asyncio.wait_for(test(), 240))


@pytest.mark.parametrize("drain", [True, False])
def test_shutdown_drains_or_does_not(drain):
    async def test():
        engine = new_engine(runner=SlowRunner)
        task = asyncio.ensure_future(collect(engine.generate([1, 2], SamplingParams(max_tokens=40))))
        await asyncio.sleep(0.02)
        await engine.shutdown(drain=drain)
        if drain:
            assert len((await task)[-1].outputs[0].token_ids) == 40
        else:
            with pytest.raises(EngineDead, match="shut down"):
                await task
        with pytest.raises(EngineDead, match="shut"):
            await collect(engine.generate([1]))
        assert engine.llm.core.runner.cache.used_block_count == 0

    asyncio.run(asyncio.wait_for(test(), 240))


def test_a_drain_has_a_limit():
    async def test():
        engine = new_engine(runner=SlowRunner)
        endless = SamplingParams(max_tokens=None, streaming=(4, 8))
        task = asyncio.ensure_future(collect(engine.generate([1, 2], endless)))
        await asyncio.sleep(0.02)
        await engine.shutdown(timeout=0.1)
        with pytest.raises(EngineDead, match="shut down"):
            await task

    asyncio.run(asyncio.wait_for(test(), 240))


def test_snapshots_and_clearing_come_between_steps():
    async def test(engine):
        assert engine.snapshot().stats.steps == 0  # nothing runs yet
        task = asyncio.ensure_future(collect(engine.generate([1] * 9, SamplingParams(max_tokens=60))))
        await asyncio.sleep(0.03)
        snapshot = await asyncio.to_thread(engine.snapshot)
        assert [each.state for each in snapshot.requests] == ["running"] and snapshot.requests[0].blocks > 2
        assert snapshot.stats.num_running == 1 and engine.stats().num_running == 1
        await task
        assert await engine.clear_prefix_cache() > 0
        assert engine.stats().blocks_cached == 0

    run_with(test, runner=SlowRunner)


def test_what_the_engine_shows_of_its_cache():
    async def test(engine):
        events = []
        stop = engine.subscribe(events.append)
        for last in (3, 4):
            await collect(engine.generate([1] * 9 + [last], SamplingParams(max_tokens=2)))
        stop()
        cache = engine.llm.core.runner.cache
        assert engine.cache_stats() == cache.stats and engine.cache_stats().prefix_hits == 1
        hottest = engine.hottest_prefixes(max_tokens=5)
        assert [(each.num_tokens, each.uses, each.token_ids) for each in hottest] == [(8, 2, (1,) * 5)]
        stored = [int(event.block_id) for event in events]
        assert len(stored) >= 2 and (engine.block_records(np.array(stored))["indexed"] == 1).all()
        sizes = engine.sizes
        assert (sizes.block_size, sizes.total_blocks, sizes.vocab_size) == (4, cache.total_blocks, VOCAB)
        assert sizes.max_model_len == 4 * cache.total_blocks and sizes.bytes_per_block == 0

    run_with(test)


def test_reset_forgets_and_counts_from_zero():
    async def test(engine):
        fresh = engine.stats()
        task = asyncio.ensure_future(collect(engine.generate([1] * 9, SamplingParams(max_tokens=60))))
        await asyncio.sleep(0.03)
        with pytest.raises(InvalidOperation, match="1 requests are under way"):
            await engine.reset()
        await task
        assert engine.stats().steps and engine.stats().blocks_cached
        assert await engine.reset() > 0
        assert engine.stats() == fresh

    run_with(test, runner=SlowRunner)


def test_several_event_loops_share_an_engine():
    engine = new_engine()
    lengths = {}

    def use(name):
        outputs = asyncio.run(collect(engine.generate([name, 1], SamplingParams(max_tokens=10 + name))))
        lengths[name] = len(outputs[-1].outputs[0].token_ids)

    threads = [threading.Thread(target=use, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert lengths == {name: 10 + name for name in range(4)}
    asyncio.run(engine.shutdown())


def test_a_storm_of_requests_and_disconnects():
    random = np.random.default_rng(0)
    kinds = [{}, {"n": 2, "temperature": 1.0}, {"beam_width": 2}, {"prompt_lookup": 3}, {"streaming": (2, 6)}]

    async def client(engine, number):
        params = SamplingParams(max_tokens=int(random.integers(1, 20)), seed=number, **kinds[number % len(kinds)])
        prompt = [1] * int(random.integers(1, 12)) + [number % 30]
        patience = int(random.integers(1, 40))
        await asyncio.sleep(number / 5000)
        last = None
        async for output in engine.generate(prompt, params, priority=number % 3):
            last, patience = output, patience - 1
            if patience == 0:
                return None
        return request(f"r{number}", prompt), params, last

    async def test(engine):
        clients = [asyncio.ensure_future(client(engine, number)) for number in range(200)]
        await asyncio.sleep(0.05)
        for task in clients[::7]:
            task.cancel()
        results = await asyncio.gather(*clients, return_exceptions=True)
        ended = [result for result in results if isinstance(result, tuple)]
        assert len(ended) > 50
        for plain, params, last in ended:
            plain.params = params
            assert [each.token_ids for each in last.outputs] == alone(plain)
        assert all(r is None or isinstance(r, (tuple, asyncio.CancelledError)) for r in results)
        await settled(engine)

    run_with(test, num_blocks=20, max_batch_tokens=24)


def test_a_prefix_is_pinned_and_unpinned_between_two_steps():
    async def test(engine):
        await collect(engine.generate([1] * 13, SamplingParams(max_tokens=1)))
        handle, count = await engine.pin([1] * 12)
        cache = engine.llm.core.runner.cache
        assert count == 12 and cache.free_block_count == cache.total_blocks - 3
        await engine.unpin(handle)
        assert cache.free_block_count == cache.total_blocks
        for _ in range(20):  # nobody waits for what it brings, and the engine lives
            task = asyncio.ensure_future(engine.clear_prefix_cache())
            await asyncio.sleep(0)
            task.cancel()
        await collect(engine.generate([1] * 13, SamplingParams(max_tokens=1)))
        await engine.pin([1] * 12)
        await engine.clear_prefix_cache()
        await engine.unpin(handle)
        assert cache.free_block_count == cache.total_blocks
        await settled(engine)

    run_with(test)
