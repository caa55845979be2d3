"""The scheduler under random load: everybody gets what it would get alone, and nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from tests.engine.fakes import FakeRunner, RecurrentRunner, alone, engine, request, run, tokens_of

from pagedkv.engine import RequestRefused
from pagedkv.engine.request import blocks_at_most

HEADS = [[3] * 9, [3] * 5 + [4] * 8, list(range(13)), []]

prompts = st.builds(
    lambda head, tail: head + tail, st.sampled_from(HEADS), st.lists(st.integers(0, 4), min_size=1, max_size=14)
)
extras = st.one_of(
    st.just({}),
    st.just({}),
    st.fixed_dictionaries({"n": st.integers(2, 3), "temperature": st.just(1.0)}),
    st.fixed_dictionaries({"prompt_lookup": st.integers(1, 5)}),
    st.fixed_dictionaries({"prompt_lookup": st.integers(1, 5), "temperature": st.just(0.3)}),
    st.fixed_dictionaries({"beam_width": st.integers(2, 3), "n": st.just(2)}),
    st.fixed_dictionaries({"streaming": st.tuples(st.integers(0, 5), st.integers(1, 9))}),
    st.fixed_dictionaries({"logprobs": st.just(2), "frequency_penalty": st.just(1.5)}),
)


class Load(RuleBasedStateMachine):
    """Requests come, are aborted and stepped over a pool that is too small for them."""

    options: dict[str, Any] = {}

    def __init__(self) -> None:
        super().__init__()
        options = dict(self.options)
        own = {name: options.pop(name) for name in ("max_batch_tokens", "max_num_seqs") if name in options}
        runner = (RecurrentRunner if "num_states" in options else FakeRunner)(block_size=4, **options)
        self.core = engine(eos_token_ids=[30], runner=runner, **own)
        self.given: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self.aborted: set[str] = set()
        self.steps = 0

    @rule(
        prompt=prompts,
        max_tokens=st.integers(1, 24),
        priority=st.sampled_from([0, 0, 0, 1, 2]),
        salt=st.sampled_from(["", "", "other"]),
        seed=st.integers(0, 3),
        tenant=st.sampled_from(["", "", "", "a", "b"]),
        extra=extras,
    )
    def arrive(self, prompt, max_tokens, priority, salt, seed, tenant, extra):
        name = f"r{len(self.given)}"
        given = {"priority": priority, "cache_salt": salt, "tenant": tenant, "seed": seed}
        new = request(name, prompt, max_tokens=max_tokens, **given, **extra)
        try:
            self.core.add(new)
            self.given[name] = new
        except RequestRefused as refusal:
            assert f"the pool has {self.core.runner.cache.total_blocks}" in str(refusal)
            assert blocks_at_most(new, 4, False) > self.core.runner.cache.total_blocks

    @rule(which=st.integers(0, 50))
    def abort(self, which):
        name = f"r{which}"
        output = self.core.abort(name)
        if output is not None:
            assert output.finished and name not in self.outputs
            self.aborted.add(name)

    @rule(often=st.integers(0, 4))
    def forget(self, often):
        if often == 0:
            self.core.clear_prefix_cache()

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            before = self.core.runner.computed_tokens
            for output in self.core.step():
                assert output.request_id not in self.aborted
                if output.finished:
                    assert output.request_id not in self.outputs
                    self.outputs[output.request_id] = output
            self.core.runner.cache.check()
            self.steps += self.core.runner.computed_tokens == before
        assert self.steps < 500

    @invariant()
    def the_books_agree(self):
        stats = self.core.stats()
        assert stats.num_running + stats.num_waiting == len(self.given) - len(self.outputs) - len(self.aborted)
        assert len(self.core.scheduler.running) == self.core.runner.cache.num_sequences

    def teardown(self):
        for _ in range(3000):
            if not self.core.has_work:
                break
            self.step(1)
        assert not self.core.has_work, "somebody starves"
        assert self.core.runner.cache.used_block_count == 0 and self.core.runner.cache.num_sequences == 0
        for name, output in self.outputs.items():
            assert tokens_of(output) == alone(self.given[name], eos_token_ids=[30]), self.given[name]


LOADS = {
    "small": {"num_blocks": 18, "max_batch_tokens": 16, "max_num_seqs": 5},
    "chunks of 3": {"num_blocks": 18, "max_batch_tokens": 3, "max_num_seqs": 4, "strategy": "lfu"},
    "without prefixes": {
        "num_blocks": 24,
        "max_batch_tokens": 200,
        "prefix_caching": False,
        "strategy": "longest_first",
    },
    "one token a step": {"num_blocks": 20, "max_batch_tokens": 1, "strategy": "priority:levels=3"},
    "states": {"num_blocks": 24, "max_batch_tokens": 16, "num_states": 12},
    "few states": {"num_blocks": 18, "max_batch_tokens": 7, "num_states": 4},
    "tiny": {"num_blocks": 11, "max_batch_tokens": 64},
    "one place": {"num_blocks": 14, "max_batch_tokens": 2, "max_num_seqs": 3},
}


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("examples", [12, pytest.param(300, marks=pytest.mark.slow)])
def test_random_load(name, examples):
    machine = type("Load", (Load,), {"options": LOADS[name]})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


# ---------------------------------------------------------------- prompts that are not cut


class WholeRunner(FakeRunner):
    """One that takes prompts whole; beyond some length a text begins anew."""

    reuses_prefixes = chunkable = False


@pytest.mark.parametrize("num_blocks", [64, 12])
@pytest.mark.parametrize("restarts", [None, 11, 20])
def test_no_prompt_is_cut_and_what_follows_goes_token_by_token(num_blocks, restarts):
    runner = WholeRunner(num_blocks, prefix_caching=False)
    runner.restarts_beyond = restarts
    core = engine(runner=runner, max_batch_tokens=8)
    given = [request(f"r{n}", [n % 5] * n, max_tokens=12, seed=n) for n in (3, 19, 4, 17, 9)]
    for each in given:
        core.add(each)
    outputs = run(core)
    for each in given:
        assert tokens_of(outputs[each.request_id]) == alone(each)
    whole = {len(each.prompt_token_ids) for each in given} | {(restarts or 0) + 1}
    assert {count for batch in runner.batches for count in batch} <= whole | {1}


def test_a_prompt_beyond_the_budget_has_a_step_without_other_prompts():
    runner = WholeRunner(64, prefix_caching=False)
    core = engine(runner=runner, max_batch_tokens=8)
    for name, length in (("a", 2), ("b", 30), ("c", 3), ("d", 3)):
        core.add(request(name, [1] * length, max_tokens=4))
    run(core)
    assert [sorted(batch) for batch in runner.batches[:3]] == [[2], [1, 30], [1, 1, 3, 3]]
