"""Tenants share the steps: no queue of one delays the first token of another by more than a step or two."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.fakes import FakeRunner, alone, engine, request, run, tokens_of

from pagedkv.engine.room import Holdings
from pagedkv.engine.scheduler import Admission
from pagedkv.engine.tenants import DeficitRoundRobin
from pagedkv.errors import InvalidOperation

# Deficit round robin.


def total_of(turns: DeficitRoundRobin, steps: int, tokens: int, wanted: dict[str, int]) -> Counter[str]:
    total: Counter[str] = Counter()
    for _ in range(steps):
        total.update(turns.split(tokens, wanted))
    return total


def test_shares_follow_the_weights() -> None:
    assert DeficitRoundRobin(100, {"a": 3.0}).split(100, {"a": 1000, "b": 1000}) == {"a": 75, "b": 25}


def test_what_one_does_not_want_goes_to_the_others() -> None:
    assert DeficitRoundRobin(90).split(90, {"a": 10, "b": 1000, "c": 30}) == {"a": 10, "b": 50, "c": 30}
    assert DeficitRoundRobin(90).split(90, {"a": 10}) == {"a": 10}
    assert DeficitRoundRobin(90).split(0, {"b": 10}) == {"b": 0}


def test_what_is_decoded_is_charged() -> None:
    turns = DeficitRoundRobin(100)
    for _ in range(10):
        turns.charge("a", 40)
        assert turns.split(60, {"a": 1000, "b": 1000}) == {"a": 10, "b": 50}


def test_tenants_that_are_more_than_the_tokens_of_a_step_all_get_some() -> None:
    total = total_of(DeficitRoundRobin(10), 100, 10, {f"t{i}": 1000 for i in range(25)})
    assert total.total() == 1000 and min(total.values()) >= 39 and max(total.values()) <= 41


def test_nobody_saves_up_what_it_did_not_want_and_nobody_owes_more_than_a_step() -> None:
    turns = DeficitRoundRobin(100)
    total_of(turns, 100, 100, {"a": 30, "b": 100})
    assert turns.split(100, {"a": 1000, "b": 1000})["a"] <= 51
    for _ in range(100):
        turns.charge("a", 90)
    assert total_of(turns, 4, 100, {"a": 1000, "b": 1000})["a"] >= 140


@given(
    wanted=st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 200), min_size=1),
    weights=st.dictionaries(st.sampled_from("abcdef"), st.floats(0.001, 1000.0)),
    steps=st.lists(st.tuples(st.integers(0, 300), st.sampled_from("abcdef"), st.integers(0, 300)), max_size=8),
)
def test_no_token_is_left_while_somebody_wants_it_and_nobody_gets_more_than_that(
    wanted: dict[str, int], weights: dict[str, float], steps: list[tuple[int, str, int]]
) -> None:
    turns = DeficitRoundRobin(300, weights)
    for tokens, tenant, charged in steps:
        turns.charge(tenant, charged)
        shares = turns.split(tokens, wanted)
        assert sum(shares.values()) == min(tokens, sum(wanted.values()))
        assert all(0 <= shares[tenant] <= wanted[tenant] for tenant in wanted)


def test_the_larger_part_counts_and_a_weight_divides_it() -> None:
    held = Holdings(10, 100, DeficitRoundRobin(1, {"b": 2.0}))
    held.add("a", 1, 40)
    held.add("b", 6, 10)
    assert held.part("a") == 0.4 and held.part("b") == 0.3 and held.part("c") == 0.0
    assert held.part("a", places=4) == 0.5 and list(held.descending()) == ["a", "b"]


# In the engine.


def steps_until_first_token(core: Any, name: str, most: int = 200) -> int:
    for step in range(1, most):
        if any(output.request_id == name for output in core.step()):
            return step
    raise AssertionError("no token came")


def prompt_of(number: int, length: int = 8) -> list[int]:
    return [(number * 7 + place * place) % 31 for place in range(length)]


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 4000, "max_num_seqs": 1000, "max_batch_tokens": 2000},
        {"num_blocks": 4000, "max_num_seqs": 8},
        {"num_blocks": 40, "max_num_seqs": 100},
        {"num_blocks": 4000, "max_num_seqs": 1000, "max_batch_tokens": 64},
    ],
    ids=["room for all", "few places", "few blocks", "few tokens a step"],
)
@pytest.mark.parametrize("before", [0, 5])
def test_a_thousand_prompts_of_one_tenant_delay_another_by_a_step(options: dict[str, int], before: int) -> None:
    core = engine(**options)
    given = {f"a{i}": request(f"a{i}", prompt_of(i), max_tokens=30, tenant="a") for i in range(1000)}
    given["b"] = request("b", [5] * 8, max_tokens=3, tenant="b")
    for each in list(given.values())[:-1]:
        core.add(each)
    for _ in range(before):
        core.step()
    core.add(given["b"])
    assert steps_until_first_token(core, "b") <= 2
    for number in range(20, 1000):
        core.abort(f"a{number}")
    outputs = run(core)
    for name in ("a0", "a7", "a19"):
        if name in outputs:
            assert tokens_of(outputs[name]) == alone(given[name]), "who made way goes on as if nothing had been"


def test_a_long_prompt_of_one_tenant_delays_another_not_at_all() -> None:
    core = engine(num_blocks=4000, max_batch_tokens=32)
    core.add(request("a", prompt_of(1, 5000), max_tokens=2, tenant="a"))
    core.step()
    core.add(request("b", [5] * 16, max_tokens=2, tenant="b"))
    assert steps_until_first_token(core, "b") == 1
    assert core.runner.batches[-1] == [16, 16], "the other half goes on with the long one"


def test_tenants_get_the_same_number_of_tokens_however_many_requests_they_have() -> None:
    core = engine(num_blocks=4000, max_batch_tokens=20, prefix_caching=False)
    tenants = {f"{tenant}{i}": tenant for tenant, count in (("a", 90), ("b", 10), ("c", 50)) for i in range(count)}
    for number, (name, tenant) in enumerate(tenants.items()):
        core.add(request(name, prompt_of(number, 20), max_tokens=1, tenant=tenant))
    ended: Counter[str] = Counter()
    for _ in range(24):
        ended.update(tenants[output.request_id] for output in core.step())
    assert max(ended.values()) - min(ended.values()) <= 3, ended


def test_drafts_of_one_tenant_leave_room_for_the_prompt_of_another() -> None:
    core = engine(num_blocks=4000, max_batch_tokens=32, max_num_seqs=40)
    for number in range(8):
        core.add(request(f"a{number}", [1, 2] * 10, max_tokens=60, prompt_lookup=8, tenant="a"))
    for _ in range(20):
        core.step()
    core.add(request("b", [5] * 8, max_tokens=2, tenant="b"))
    assert steps_until_first_token(core, "b") == 1


def test_a_place_that_gets_free_goes_to_the_tenant_whose_turn_it_is() -> None:
    core = engine(max_num_seqs=1)
    for number in range(20):
        core.add(request(f"a{number}", prompt_of(number), max_tokens=4, tenant="a"))
    core.step()
    for tenant in "bcd":
        core.add(request(tenant, prompt_of(3), max_tokens=4, tenant=tenant))
    ended = []
    while len(ended) < 7:
        ended += [output.request_id for output in core.step() if output.finished]
    assert ended == ["a0", "b", "c", "d", "a1", "a2", "a3"]
    assert core.stats().num_preemptions == 0, "each has but one"


def test_a_large_request_is_not_passed_for_ever_by_small_ones_of_others() -> None:
    core = engine(num_blocks=16)
    for number in range(60):
        core.add(request(f"a{number}", prompt_of(number), max_tokens=12, tenant="a"))
    for _ in range(3):
        core.step()
    core.add(request("b", [5] * 52, max_tokens=3, tenant="b"))
    assert steps_until_first_token(core, "b") <= 15, "they end, no other one begins, and it has its turn"
    run(core)


def test_a_tenant_of_more_weight_may_have_more_places_and_keeps_them() -> None:
    core = engine(max_num_seqs=8, tenant_weights={"a": 3.0})
    for number in range(20):
        for tenant in "ab":
            core.add(request(f"{tenant}{number}", prompt_of(number), max_tokens=30, tenant=tenant))
    for _ in range(5):
        core.step()
    assert Counter(each.request.tenant for each in core.scheduler.running) == {"a": 6, "b": 2}
    assert core.stats().num_preemptions == 0


def test_places_are_evened_out_and_then_everybody_stays() -> None:
    core = engine(max_num_seqs=9)
    for tenant in "abc":
        for number in range(9):
            core.add(request(f"{tenant}{number}", prompt_of(number), max_tokens=60, tenant=tenant))
        for _ in range(4):
            core.step()
    assert Counter(each.request.tenant for each in core.scheduler.running) == {"a": 3, "b": 3, "c": 3}
    evened = core.stats().num_preemptions
    for _ in range(20):
        core.step()
    assert core.stats().num_preemptions == evened
    run(core)


def test_when_texts_outgrow_the_pool_the_tenant_that_holds_most_gives_way() -> None:
    core = engine(num_blocks=20, max_num_seqs=10)
    core.add(request("b", prompt_of(9), max_tokens=30, tenant="b", priority=0))
    for number in range(4):
        core.add(request(f"a{number}", prompt_of(number), max_tokens=30, tenant="a", priority=9))
    outputs = run(core)
    assert outputs["b"].metrics.num_preemptions == 0, "though its priority is the lowest"
    assert core.stats().num_preemptions > 0


def test_bad_tenants_and_weights_are_named() -> None:
    with pytest.raises(InvalidOperation, match=r"tenant_weights: expected numbers above 0, got 0.0 for 'a'"):
        engine(tenant_weights={"a": 0.0})
    with pytest.raises(InvalidOperation, match="tenant: expected a str, got 3"):
        engine().add(request("r", [1], tenant=3))


# Priorities.


def test_a_request_of_higher_priority_takes_the_place_of_a_lower_one() -> None:
    core = engine(max_num_seqs=2)
    low = [request(f"low{i}", prompt_of(i), max_tokens=40) for i in range(3)]
    for each in low:
        core.add(each)
    core.step()
    core.add(request("high", [4] * 8, max_tokens=3, priority=1))
    assert steps_until_first_token(core, "high") == 1
    outputs = run(core)
    assert sum(outputs[each.request_id].metrics.num_preemptions for each in low) == 1
    assert all(tokens_of(outputs[each.request_id]) == alone(each) for each in low)


def test_it_takes_the_only_place() -> None:
    core = engine(max_num_seqs=1)
    core.add(request("low", prompt_of(1), max_tokens=40))
    core.step()
    core.add(request("high", [4] * 8, max_tokens=3, priority=1))
    assert steps_until_first_token(core, "high") == 1
    assert core.scheduler.running[0].request.request_id == "high"
    assert tokens_of(run(core)["low"]) == alone(request("low", prompt_of(1), max_tokens=40))


def test_it_takes_blocks_as_well_and_those_of_the_lowest_first() -> None:
    core = engine(num_blocks=16)
    for number, priority in enumerate((1, 0, 1)):
        core.add(request(f"low{number}", prompt_of(number), max_tokens=20, priority=priority))
    for _ in range(6):
        core.step()
    core.add(request("high", [4] * 24, max_tokens=3, priority=2))
    assert steps_until_first_token(core, "high") == 1
    running = {each.request.request_id for each in core.scheduler.running}
    assert "high" in running and "low1" not in running and len(running) >= 2


def test_equals_do_not_displace_each_other() -> None:
    core = engine(num_blocks=16)
    for number in range(3):
        core.add(request(f"low{number}", prompt_of(number), max_tokens=12, priority=1))
    core.step()
    core.add(request("same", [4] * 30, max_tokens=3, priority=1))
    for _ in range(4):
        core.step()
    assert core.stats().num_preemptions == 0
    run(core)


def test_nobody_goes_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    make_way, enter = Admission._make_way, Admission._enter

    def noting(self: Any, newcomer: Any, admitted: Any) -> bool:
        made.extend([newcomer] if (done := make_way(self, newcomer, admitted)) else [])
        return done

    def checking(self: Any, sequence: Any, *args: Any) -> int:
        count = enter(self, sequence, *args)
        assert count or sequence not in made, "texts were preempted for one that does not enter"
        made.clear()
        return count

    monkeypatch.setattr(Admission, "_make_way", noting)
    monkeypatch.setattr(Admission, "_enter", checking)
    core = engine(num_blocks=24, max_batch_tokens=16, max_num_seqs=6)
    heads = [[3] * 9, [3] * 5 + [4] * 8, list(range(13)), []]
    for number in range(60):
        prompt = heads[number % 4] + prompt_of(number, 1 + number % 11)
        tenant, priority = "aaaaab"[number % 6], number % 7 // 3
        extra = [{}, {"n": 2, "temperature": 1.0}, {"beam_width": 2}, {"streaming": (2, 5)}][number % 5 % 4]
        core.add(request(f"r{number}", prompt, max_tokens=9, seed=1, tenant=tenant, priority=priority, **extra))
        core.step()
    run(core)
    assert core.stats().num_preemptions > 10


def test_priorities_hold_within_a_tenant() -> None:
    core = engine(max_num_seqs=1)
    core.add(request("a", prompt_of(1), max_tokens=20, tenant="a"))
    core.step()
    for number in range(5):
        core.add(request(f"b{number}", prompt_of(number), max_tokens=2, tenant="b", priority=9))
    core.step()
    assert core.stats().num_preemptions == 0 and core.scheduler.running[0].request.request_id == "a"
    run(core)


# Everything at once: it ends, and everybody gets what it would get alone.


class WholeRunner(FakeRunner):
    """One that takes prompts whole; beyond some length a text begins anew."""

    reuses_prefixes = chunkable = False


arrivals = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 12), st.sampled_from("aab"), st.integers(0, 2), st.integers(0, 3)),
    min_size=1,
    max_size=14,
)


@pytest.mark.parametrize("restarts", [None, 11])
@settings(max_examples=25, deadline=None)
@given(arrivals=arrivals, num_blocks=st.integers(8, 20), budget=st.integers(1, 9), places=st.integers(1, 4))
def test_prompts_that_are_not_cut_come_to_their_end(
    restarts: int | None, arrivals: Any, num_blocks: int, budget: int, places: int
) -> None:
    runner = WholeRunner(num_blocks, prefix_caching=False)
    runner.restarts_beyond = restarts
    core = engine(runner=runner, max_batch_tokens=budget, max_num_seqs=places)
    given, outputs = {}, {}
    for number, (length, max_tokens, tenant, priority, pause) in enumerate(arrivals):
        options = {"max_tokens": max_tokens, "tenant": tenant, "priority": priority}
        given[f"r{number}"] = request(f"r{number}", prompt_of(number, length), **options)
        core.add(given[f"r{number}"])
        for _ in range(pause):
            outputs.update({output.request_id: output for output in core.step()})
    outputs.update(run(core, most_steps=1000))
    for name, each in given.items():
        assert tokens_of(outputs[name]) == alone(each)
