"""The engine over tiers: the same tokens as without, whatever these have, lose, answer late or get wrong."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test
from tests.contracts.user_tiers import DictTier
from tests.engine.fakes import FakeRunner, RecurrentRunner, alone, engine, request, run, tokens_of
from tests.engine.test_scheduler import Load

from pagedkv import InvalidOperation
from pagedkv.engine import LLM, AsyncEngine, SamplingParams, offload
from pagedkv.tiers import BlockFormat, DiskTier, HostTier, TierError, rung

PROMPT = list(range(29))  # seven blocks of four, and one token
EIGHT = {"max_tokens": 8, "ignore_eos": True}


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Give loads all the time they need: how long a thread takes here says nothing."""
    monkeypatch.setattr(offload, "LEAST_PATIENCE", 60.0)
    monkeypatch.setattr(offload, "PATIENCE_UNMEASURED", 60.0)
    monkeypatch.setattr(offload, "LONGEST_ASK", 60.0)
    monkeypatch.setattr(offload, "FEWEST_MEASURED", 10**9)


class MutedTier(DictTier):
    """Answers when it is told to, in the order it is told; or with an error, or with less than it has."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.thread.shutdown()
        self.asked: list[tuple[Future[int], Any]] = []

    def _ask(self, call, *args):
        future: Future[int] = Future()
        self.asked.append((future, lambda: call(*args)))
        return future

    def match(self, token_ids, cache_salt=""):
        return self._ask(self._count, self._keys(token_ids, cache_salt))

    def load(self, token_ids, rows, cache_salt=""):
        rows[:] = 99
        return self._ask(self._load, self._keys(token_ids, cache_salt), rows)

    def store(self, token_ids, rows, cache_salt=""):
        return self._ask(self._store, self._keys(token_ids, cache_salt), rows)

    def answer(self, place=0, how="right"):
        future, call = self.asked.pop(place)
        if how == "fails":
            future.set_exception(OSError("the line is cut"))
        else:
            future.set_result(call() if how == "right" else 0)

    def clear(self):
        self.blocks.clear()

    def close(self):
        pass


def disk(path, size="1MB"):
    return DiskTier(path / "tier", size)


def new(name="one", prompt=PROMPT, **options):
    return request(name, prompt, **{**EIGHT, **options})


def answer_of(core, *requests):
    for each in requests:
        core.add(each)
    return run(core)


def settle(core):
    """Wait for what is being stored."""
    while core.scheduler.offload.ladder.staged_bytes:
        time.sleep(0.001)


def test_a_chat_goes_on_after_a_restart(tmp_path):
    wanted = alone(new())
    core = engine(tiers=[disk(tmp_path)])
    assert tokens_of(answer_of(core, new())["one"]) == wanted
    core.close()
    core = engine(tiers=[disk(tmp_path)])
    core.add(new())
    output = run(core)["one"]
    assert tokens_of(output) == wanted and output.num_cached_tokens == 28
    assert core.runner.computed_tokens == 1 + 7
    figures = core.stats().tiers[0]
    assert (figures.medium, figures.hits, figures.loads, figures.late, figures.failed) == ("DISK", 1, 7, 0, 0)
    more = [*PROMPT, *wanted[0], 5, 6]
    core.close()
    core = engine(tiers=[disk(tmp_path)])
    output = answer_of(core, new("two", more))["two"]
    assert output.num_cached_tokens == 36 and tokens_of(output) == alone(new("two", more))


def test_of_a_last_whole_block_all_but_one_token_are_loaded(tmp_path):
    core = engine(tiers=[disk(tmp_path)])
    answer_of(core, new(prompt=[*PROMPT, 1, 2, 3]))
    core.close()
    core = engine(tiers=[disk(tmp_path)])
    output = answer_of(core, new(prompt=[*PROMPT, 1, 2, 3]))["one"]
    assert output.num_cached_tokens == 31 and tokens_of(output) == alone(new(prompt=[*PROMPT, 1, 2, 3]))


def test_what_was_preempted_comes_back_from_a_tier():
    wanted = {name: alone(new(name, [i] * 21, max_tokens=30)) for i, name in enumerate("abcd")}
    tier = HostTier("1MB")
    core = engine(22, tiers=[tier])
    outputs = answer_of(core, *[new(name, [i] * 21, max_tokens=30) for i, name in enumerate("abcd")])
    assert {name: tokens_of(output) for name, output in outputs.items()} == wanted
    assert core.stats().num_preemptions > 0 and core.stats().tiers[0].loads > 0
    without = engine(22)
    answer_of(without, *[new(name, [i] * 21, max_tokens=30) for i, name in enumerate("abcd")])
    assert core.runner.computed_tokens < without.runner.computed_tokens


def test_salts_share_nothing_and_other_blocks_are_refused(tmp_path):
    core = engine(tiers=[disk(tmp_path)])
    answer_of(core, new(cache_salt="mine"))
    core.close()
    core = engine(tiers=[disk(tmp_path)])
    outputs = answer_of(core, new("theirs", cache_salt="theirs"), new("none"), new("mine", cache_salt="mine"))
    cached = {name: output.num_cached_tokens for name, output in outputs.items()}
    assert cached == {"theirs": 0, "none": 0, "mine": 28}
    with pytest.raises(InvalidOperation, match="open for"):
        engine(tiers=[HostTier("1MB").open(BlockFormat("other", 4, 64))])
    with pytest.raises(InvalidOperation, match="tiers: expected tiers"):
        engine(tiers=["disk"])


def test_texts_that_begin_alike_share_a_load():
    tier = MutedTier(4)
    core = engine(tiers=[tier])
    tails = {"a": [1] * 8, "b": [2] * 8}
    for name, tail in tails.items():
        core.add(new(name, PROMPT + tail))
        while core.has_work or tier.asked:
            if tier.asked:
                tier.answer()
            core.step()
    core.runner.cache.clear_prefix_cache()
    before = core.runner.computed_tokens
    for name, tail in tails.items():
        core.add(new(name, PROMPT + tail))
    assert len(tier.asked) == 2
    tier.answer(), tier.answer()
    assert core.step() == [] and len(tier.asked) == 2  # the second load is of the tail alone
    assert core.patience > 0
    tier.answer(), tier.answer()
    outputs = {}
    while core.has_work:
        outputs |= {output.request_id: output for output in core.step()}
        while tier.asked:
            tier.answer()
    for name, tail in tails.items():
        assert tokens_of(outputs[name]) == alone(new(name, PROMPT + tail))
        assert outputs[name].num_cached_tokens == 36
    assert core.stats().tiers[0].loads == 9 + 2 and core.runner.computed_tokens - before == 2 * 8
    assert core.scheduler.offload.ladder.staged_bytes == 0


def test_nobody_waits_longer_than_it_takes_to_compute(monkeypatch):
    tier = MutedTier(4)
    core = engine(tiers=[tier])
    core.add(new())
    tier.answer()
    run(core)
    while tier.asked:
        tier.answer()
    core.runner.cache.clear_prefix_cache()
    core.add(new("two"))
    core.add(new("three", [7] * 9))
    tier.answer(), tier.answer()
    core.step()  # the load of the first one begins; the other one is computed meanwhile
    assert core.runner.batches[-1] == [9] and [each.request.request_id for each in core.scheduler.running] == ["three"]
    monkeypatch.setattr(offload, "LEAST_PATIENCE", 0.0)
    core.scheduler.offload.prefill.note(1e12, 1.0)
    output = run(core)["two"]
    assert tokens_of(output) == alone(new("two")) and output.num_cached_tokens == 0
    assert core.stats().tiers[0].late == 1
    assert core.scheduler.offload.ladder.staged_bytes > 0
    while tier.asked:
        tier.answer()
    assert core.scheduler.offload.ladder.staged_bytes == 0


def stalled_behind(near, monkeypatch):
    """Return an engine over `near`, which has a prompt, and a tier that has it and answers nothing."""
    far = MutedTier(4)
    core = engine(tiers=[near, far])
    core.add(new())
    while core.has_work or far.asked:
        while far.asked:
            far.answer()
        core.step()
    settle(core)
    core.runner.cache.clear_prefix_cache()
    monkeypatch.setattr(offload, "LONGEST_ASK", 0.0)
    monkeypatch.setattr(rung, "LEAST_REST", 1e9)
    monkeypatch.setattr(rung, "LONGEST_REST", 1e9)
    return core, far


def test_a_tier_that_says_nothing_does_not_keep_a_text_from_what_nearer_ones_have(monkeypatch):
    core, far = stalled_behind(HostTier("1MB"), monkeypatch)
    core.add(new("two"))
    assert core.scheduler.offload.ladder.staged_bytes > 0  # it is on its way while the other one is asked
    output = run(core)["two"]
    assert output.num_cached_tokens == 28 and tokens_of(output) == alone(new())
    assert [each.late for each in core.stats().tiers] == [0, 1] and [each.loads for each in core.stats().tiers] == [
        7,
        0,
    ]


def test_a_near_tier_that_says_nothing_is_passed_over(monkeypatch):
    near = MutedTier(4)
    far = HostTier("1MB")
    core = engine(tiers=[near, far])
    monkeypatch.setattr(offload, "LONGEST_ASK", 0.0)
    answer_of(core, new())
    while near.asked:
        near.answer(how="fails")
    settle(core)
    core.runner.cache.clear_prefix_cache()
    core.scheduler.offload.ladder.rungs[0]._back_at = 0.0
    output = answer_of(core, new("two"))["two"]
    assert output.num_cached_tokens == 28 and tokens_of(output) == alone(new())


def test_a_far_tier_adds_what_a_near_one_has_not():
    near, far = HostTier(3 * 64), MutedTier(4)
    core = engine(tiers=[near, far])
    core.add(new())
    while core.has_work or far.asked:
        while far.asked:
            far.answer()
        core.step()
    settle(core)
    core.runner.cache.clear_prefix_cache()
    core.add(new("two"))
    assert core.step() == [] and len(far.asked) == 1
    far.answer()
    core.step()
    far.answer()
    output = run(core)["two"]
    assert output.num_cached_tokens == 28 and tokens_of(output) == alone(new())
    assert [each.loads for each in core.stats().tiers] == [3, 4]


def test_a_load_that_stalls_does_not_keep_a_text_from_what_has_come(monkeypatch):
    core, far = stalled_behind(HostTier(3 * 64), monkeypatch)
    monkeypatch.setattr(offload, "LONGEST_ASK", 60.0)
    core.add(new("two"))
    far.answer()
    offloading = core.scheduler.offload
    offloading.poll()
    (arrival,) = offloading._arrivals.values()
    while not arrival.parts[0][0].is_done:
        time.sleep(0.001)
    monkeypatch.setattr(offload, "LEAST_PATIENCE", 0.0)
    offloading.prefill.note(1e12, 1.0)
    output = run(core)["two"]
    assert output.num_cached_tokens == 12 and tokens_of(output) == alone(new())
    assert [each.late for each in core.stats().tiers] == [0, 1]
    while far.asked:
        far.answer()
    assert core.scheduler.offload.ladder.staged_bytes == 0


def test_a_tier_that_stalls_is_left_alone_for_a_while(monkeypatch, caplog):
    core, far = stalled_behind(HostTier("1MB"), monkeypatch)
    for name in ("two", "three", "four"):
        answer_of(core, new(name))
        core.runner.cache.clear_prefix_cache()
    assert sum(each.late for each in core.stats().tiers) == 1
    assert caplog.text.count("does not answer in time") == 1
    matches = len(far.asked)
    assert matches <= 2  # what the second text asked, and stored
    core.scheduler.offload.ladder.rungs[
        1
    ]._back_at = 0.0  # the rest is over: one asks, and until it is answered nobody else does
    core.add(new("five"))
    core.add(new("six"))
    assert len(far.asked) == matches + 1
    monkeypatch.setattr(offload, "LONGEST_ASK", 60.0)
    while core.has_work or far.asked:
        while far.asked:
            far.answer()
        core.step()
    core.add(new("seven"))
    assert len(far.asked) == 1
    far.answer()
    run(core)


def test_a_text_that_is_looked_up_anew_has_all_its_patience_again():
    tier = MutedTier(4)
    core = engine(tiers=[tier])
    core.add(new())
    tier.answer()
    run(core)
    while tier.asked:
        tier.answer()
    core.add(new("two"))
    tier.answer()
    sequence, offloading = next(iter(core.scheduler.waiting)), core.scheduler.offload
    offloading.poll()
    assert not offloading.awaits(sequence)  # the pool has it all
    offloading._arrivals[sequence].since = -1e9
    core.runner.cache.clear_prefix_cache()
    assert offloading.awaits(sequence) and len(tier.asked) == 1
    tier.answer()
    offloading.poll()
    tier.answer()
    output = run(core)["two"]
    assert output.num_cached_tokens == 28 and core.stats().tiers[0].late == 0


def test_of_what_the_pool_has_lost_only_that_is_loaded_anew():
    tier = MutedTier(4)
    core = engine(tiers=[tier])
    for name, prompt, how in (("one", PROMPT, "right"), ("short", PROMPT[:13], "nothing")):
        core.add(new(name, prompt, max_tokens=1))
        while core.has_work or tier.asked:
            while tier.asked:
                tier.answer(how=how)
            core.step()
        if name == "one":
            core.runner.cache.clear_prefix_cache()
    core.add(new("two"))
    tier.answer()
    sequence, offloading = next(iter(core.scheduler.waiting)), core.scheduler.offload
    offloading.poll()
    tier.answer()
    assert core.stats().tiers[0].loads == 4  # the pool has the first three
    core.runner.cache.clear_prefix_cache()
    assert offloading.awaits(sequence)
    tier.answer()
    offloading.poll()
    tier.answer()
    output = run(core)["two"]
    assert output.num_cached_tokens == 28 and tokens_of(output) == alone(new())
    assert core.stats().tiers[0].loads == 4 + 3


def test_what_is_computed_sooner_is_not_loaded():
    core = engine(tiers=[HostTier("1MB")])
    answer_of(core, new())
    settle(core)
    core.runner.cache.clear_prefix_cache()
    offloading = core.scheduler.offload
    offloading.prefill.note(1e12, 1.0)
    offloading.ladder.rungs[0].rate.note(1.0, 1.0)
    for trial in range(32):
        assert answer_of(core, new(f"{trial}"))[f"{trial}"].num_cached_tokens == (0 if trial < 31 else 28)
        core.runner.cache.clear_prefix_cache()
    assert core.stats().tiers[0].gated == 31


def test_a_ladder_asks_the_nearest_first(tmp_path):
    core = engine(tiers=[HostTier(3 * 64), disk(tmp_path)])
    answer_of(core, new())
    settle(core)
    core.runner.cache.clear_prefix_cache()
    output = answer_of(core, new("two"))["two"]
    assert output.num_cached_tokens == 28 and tokens_of(output) == alone(new())
    near, far = core.stats().tiers
    assert (near.medium, near.loads, far.medium, far.loads) == ("CPU", 3, "DISK", 4)
    assert near.total_blocks == 3 and far.blocks >= 7


@pytest.mark.parametrize("how", ["fails", "nothing"])
def test_a_tier_that_fails_is_a_miss(how):
    tier = MutedTier(4)
    core = engine(tiers=[tier])
    for name in "ab":
        core.add(new(name))
        for _ in range(100):
            while tier.asked:
                tier.answer(how=how)
            if not core.has_work:
                break
            for output in core.step():
                last = output
        assert not core.has_work and tokens_of(last) == alone(new())
    assert last.num_cached_tokens == 28  # of the pool
    assert core.stats().tiers[0].failed == (4 if how == "fails" else 0)
    assert core.scheduler.offload.ladder.staged_bytes == 0


def test_a_tier_that_raises_is_a_miss():
    class Broken(DictTier):
        def match(self, token_ids, cache_salt=""):
            raise RuntimeError("no")

        def store(self, token_ids, rows, cache_salt=""):
            raise RuntimeError("no")

    core = engine(tiers=[Broken(4)])
    assert tokens_of(answer_of(core, new())["one"]) == alone(new())
    assert core.stats().tiers[0].failed == 3


def test_clearing_reaches_the_tiers_and_warming_up_does_not(tmp_path):
    llm = LLM(FakeRunner(64, 4), tiers=[disk(tmp_path)])
    llm.generate([PROMPT], SamplingParams(**EIGHT))
    settle(llm.core)
    llm.warm_up()
    assert llm.generate([PROMPT], SamplingParams(**EIGHT))[0].num_cached_tokens == 28
    llm.clear_prefix_cache()
    assert llm.generate([PROMPT], SamplingParams(**EIGHT))[0].num_cached_tokens == 0
    llm.close()
    llm.close()
    assert llm.stats().tiers == () and llm.generate([PROMPT], SamplingParams(**EIGHT))[0].num_cached_tokens == 28


def test_a_context_closes_tiers(tmp_path):
    tier = disk(tmp_path)
    with LLM(FakeRunner(64, 4), tiers=[tier]) as llm:
        llm.generate([PROMPT], SamplingParams(**EIGHT))
        assert tier.is_open
    assert not tier.is_open


def test_other_weights_after_a_clear_have_other_blocks(tmp_path):
    """What is stored by new weights must not be found by those of before, in whichever order they come."""
    runner, weights = FakeRunner(64, 4), ["old"]
    runner.block_format = lambda: BlockFormat(weights[0], 4, 64)
    with LLM(runner, tiers=[disk(tmp_path), HostTier("1MB").open(BlockFormat("old", 4, 64))]) as llm:
        weights[0] = "new"
        llm.clear_prefix_cache()
        assert [each.medium for each in llm.stats().tiers] == ["DISK"]
        llm.generate([PROMPT], SamplingParams(**EIGHT))
    for weights[0], cached in (("new", 28), ("old", 0)):
        runner.cache.clear_prefix_cache()
        with LLM(runner, tiers=[disk(tmp_path)]) as llm:
            assert llm.generate([PROMPT], SamplingParams(**EIGHT))[0].num_cached_tokens == cached


def test_who_opens_a_tier_closes_it(tmp_path):
    runner = FakeRunner(64, 4)
    tier = disk(tmp_path).open(runner.block_format())
    for _ in range(2):
        with LLM(runner, tiers=[tier]) as llm:
            runner.cache.clear_prefix_cache()
            output = llm.generate([PROMPT], SamplingParams(**EIGHT))[0]
        assert tier.is_open
    assert output.num_cached_tokens == 28
    tier.close()


def test_what_a_pool_keeps_for_itself_is_not_given_up_by_a_tier():
    """A text that the pool has all the time is used, if not in the tier; it is the last one that goes there."""
    tier = HostTier(16 * 64)
    core = engine(128, tiers=[tier])
    for i in range(8):
        answer_of(core, new(f"hot {i}"), new(f"cold {i}", [i] * 20, max_tokens=2))
        settle(core)
    assert tier.match(PROMPT).result() == 7
    tier.books.check()


def _without_copies(store, ids, salt, read):
    store(ids, salt, None)  # to copy a row would fail


def test_a_second_process_finds_what_the_first_has_stored_and_stores_nothing(tmp_path, monkeypatch):
    code = (
        "import sys; from tests.engine.test_offload import *\n"
        f"core = engine(tiers=[DiskTier({str(tmp_path / 'tier')!r}, '1MB')])\n"
        "answer_of(core, new()); settle(core); print('stored', flush=True)\n"
        "sys.stdin.readline(); core.runner.cache.clear_prefix_cache()\n"
        "print(answer_of(core, new('again'))['again'].num_cached_tokens, core.stats().tiers[0].blocks, flush=True)\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "stored\n"
        with pytest.raises(TierError, match=f"is in use by process {first.pid}: one writes"):
            engine(tiers=[disk(tmp_path)])
        reader = DiskTier(tmp_path / "tier", read_only=True)
        core = engine(tiers=[reader])
        output = answer_of(core, new())["one"]
        assert output.num_cached_tokens == 28 and tokens_of(output) == alone(new())
        ladder = core.scheduler.offload.ladder
        monkeypatch.setattr(ladder, "store", partial(_without_copies, ladder.store))
        answer_of(core, new("two", [7] * 20))
        assert core.stats().tiers[0].stores == 0 == core.stats().tiers[0].dropped
        core.clear_prefix_cache()
        assert answer_of(core, new("three"))["three"].num_cached_tokens == 0
        first.stdin.write("go on\n"), first.stdin.flush()
        assert first.stdout.readline() == "28 9\n"  # the reader's clear was its own
        core.close()


def test_one_that_cannot_be_opened_leaves_none_open(tmp_path):
    first = disk(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(TierError):
        LLM(FakeRunner(64, 4), tiers=[first, DiskTier(tmp_path / "other", "1MB")])
    assert not first.is_open


@pytest.mark.parametrize("options", [{"num_states": 4}, {"prefix_caching": False}])
def test_models_whose_blocks_are_no_prefix_go_without(tmp_path, caplog, options):
    made = (RecurrentRunner if "num_states" in options else FakeRunner)(64, 4, **options)
    core = engine(runner=made, tiers=[disk(tmp_path)])
    assert core.scheduler.offload is None and "tiers are left alone" in caplog.text
    assert not (tmp_path / "tier").exists()


def test_beams_samples_and_streams_go_on_from_tiers(tmp_path):
    kinds = {
        "beams": {"beam_width": 3, "n": 2},
        "samples": {"n": 3, "temperature": 1.0, "seed": 5},
        "lookup": {"prompt_lookup": 4},
        "stream": {"streaming": (2, 6)},
        "scored": {"prompt_logprobs": 1},
    }
    for _ in range(2):
        core = engine(256, tiers=[disk(tmp_path)])
        outputs = answer_of(core, *[new(name, [i, *PROMPT], **kind) for i, (name, kind) in enumerate(kinds.items())])
        for i, (name, kind) in enumerate(kinds.items()):
            assert tokens_of(outputs[name]) == alone(new(name, [i, *PROMPT], **kind)), name
        core.close()
    cached = {name: output.num_cached_tokens for name, output in outputs.items()}
    assert cached == {"beams": 28, "samples": 28, "lookup": 28, "stream": 0, "scored": 0}


def test_the_thread_of_an_engine_sleeps_while_a_load_is_under_way(tmp_path):
    class Slow(DictTier):
        def _load(self, keys, rows):
            time.sleep(0.3)
            return super()._load(keys, rows)

    llm = LLM(FakeRunner(64, 4), tiers=[Slow(4)])
    llm.generate([PROMPT], SamplingParams(**EIGHT))
    settle(llm.core)
    llm.core.runner.cache.clear_prefix_cache()
    steps, step = [0], llm.core.step

    def counted():
        steps[0] += 1
        return step()

    llm.core.step = counted
    engine_thread = AsyncEngine(llm)

    async def ask():
        async for output in engine_thread.generate(PROMPT, SamplingParams(**EIGHT)):
            last = output
        await engine_thread.shutdown()
        return last

    output = asyncio.run(ask())
    assert output.num_cached_tokens == 28 and tokens_of(output) == alone(new())
    assert steps[0] < 30
    assert threading.active_count() < 20 and llm.core.scheduler.offload is None


def test_memory_on_its_way_is_bounded():
    tier = MutedTier(4)
    core = engine(tiers=[tier])
    ladder = core.scheduler.offload.ladder
    for name in "ab":
        core.add(new(name, [ord(name) % 31, *PROMPT]))
        while core.has_work or tier.asked:
            while tier.asked:
                tier.answer()
            core.step()
    core.runner.cache.clear_prefix_cache()
    ladder._loading.most = 3 * 64
    for name in "ab":
        core.add(new(name, [ord(name) % 31, *PROMPT]))
    tier.answer(), tier.answer()
    core.step()
    assert ladder.staged_bytes == 3 * 64 and len(tier.asked) == 1  # the first three blocks of one; the other one waits
    outputs = {}
    for _ in range(200):
        while tier.asked:
            tier.answer()
        if not core.has_work:
            break
        outputs |= {output.request_id: output for output in core.step()}
    assert ladder.staged_bytes == 0
    for name in "ab":
        assert tokens_of(outputs[name]) == alone(new(name, [ord(name) % 31, *PROMPT]))
        assert outputs[name].num_cached_tokens == 12


class TieredLoad(Load):
    """Requests come and go while tiers answer whenever they like, in any order, with what they like."""

    def __init__(self) -> None:
        super().__init__()
        self.tiers = [MutedTier(4, 12), MutedTier(4)]
        runner = self.core.runner
        names = ("max_batch_tokens", "max_num_seqs")
        own = {name: self.options[name] for name in names if name in self.options}
        self.core = engine(eos_token_ids=[30], runner=runner, tiers=self.tiers, **own)

    @rule(
        which=st.integers(0, 1),
        place=st.integers(0, 3),
        how=st.sampled_from(["right", "right", "right", "right", "fails", "nothing"]),
    )
    def answer(self, which, place, how):
        tier = self.tiers[which]
        if place < len(tier.asked):
            tier.answer(place, how)

    @rule(which=st.integers(0, 1), oldest=st.integers(0, 40))
    def lose(self, which, oldest):
        blocks = self.tiers[which].blocks
        for key in list(blocks)[:oldest]:
            del blocks[key]

    @rule()
    def lose_patience(self):
        for arrival in list(self.core.scheduler.offload._arrivals.values()):
            self.core.scheduler.offload._give_up(arrival)

    def step(self, count):
        self.steps = 0  # to wait for a tier is no fault
        super().step(count)

    step = rule(count=st.integers(1, 6))(step)

    def teardown(self):
        for _ in range(3000):
            if not self.core.has_work:
                break
            for tier in self.tiers:
                while tier.asked:
                    tier.answer()
            self.step(1)
        for tier in self.tiers:
            while tier.asked:
                tier.answer()
        assert self.core.scheduler.offload._arrivals == {} and self.core.scheduler.offload.ladder.staged_bytes == 0
        super().teardown()


LOADS = {
    "small": {"num_blocks": 18, "max_batch_tokens": 16, "max_num_seqs": 5},
    "roomy": {"num_blocks": 64, "max_batch_tokens": 16},
    "one place": {"num_blocks": 14, "max_batch_tokens": 2, "max_num_seqs": 3},
}


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("examples", [12, pytest.param(300, marks=pytest.mark.slow)])
def test_random_load_over_tiers(name, examples):
    machine = type("TieredLoad", (TieredLoad,), {"options": LOADS[name]})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
