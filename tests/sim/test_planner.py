"""The planner: exact arithmetic, bounds that must hold, and three kinds of traffic built to be what they are."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from tests.sim.traces import AGENTS, CHAT, as_trace, chained_requests, real_trace

from pagedkv.errors import InvalidOperation
from pagedkv.format import format_bytes, percent
from pagedkv.sim.curves import lru_curve
from pagedkv.sim.model_shape import read_model
from pagedkv.sim.plan_types import Level, Size
from pagedkv.sim.planner import LEVELS, Hardware, default_strategies, estimate_load, judge, plan

CONFIG = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
MODEL = read_model(CONFIG)  # 256 bytes per token
BLOCK = 4 * 256
FEW = ("lru", "lfu", "fifo")


def there_and_back(length=60, times=2):
    """A walk up and down: what was used last is used next, so LRU is the optimum and nothing beats memory."""
    walk = [*range(length), *reversed(range(length))] * times
    return as_trace([[block] for block in walk])


def hot_among_fresh(hot=10, rounds=12, fresh=4):
    """A few blocks come back again and again, between many that never do: LRU keeps the wrong ones."""
    new = itertools.count(hot)
    mixed = [block for turn in range(hot * rounds) for block in (turn % hot, *itertools.islice(new, fresh))]
    return as_trace([[block] for block in [*range(hot)] * 3 + mixed])


def nothing_twice(count=300):
    return as_trace([[block] for block in range(count)])


def test_the_states_of_a_hybrid_are_counted_for_what_runs():
    model = read_model({**CONFIG, "layer_types": ["conv"] * 3 + ["full_attention"], "conv_L_cache": 3})
    made, plain = plan(there_and_back(), model, strategies=FEW), plan(there_and_back(), MODEL, strategies=FEW)
    assert model.state_bytes_per_sequence == 3 * 2 * 2 * 64 and made.load.peak_requests >= 1
    assert made.load.window_bytes == made.load.peak_requests * model.state_bytes_per_sequence
    assert made.at_target.lru.blocks == plain.at_target.lru.blocks
    assert made.at_target.lru.bytes == made.at_target.lru.blocks * BLOCK // 4 + made.load.window_bytes
    assert any("states are counted once per running request, 768 B each" in note for note in made.notes)
    assert not any("windowed layers" in note for note in made.notes)


def test_traffic_without_reuse_is_told_so():
    made = plan(nothing_twice(), MODEL, strategies=FEW, memory=100 * BLOCK)
    assert (made.verdict.kind, made.attainable, made.attainable_blocks, made.levels) == ("nothing", 0.0, 0, ())
    assert made.at_target is None and made.knee is None and made.memory.best.hit_ratio == 0.0
    assert made.memory.best.strategy == "lru" and "finds nothing" in made.verdict.text


def test_traffic_with_hardly_any_reuse_is_told_so():
    made = plan(as_trace([[block] for block in [*range(95), *range(5)]]), MODEL, strategies=FEW)
    assert made.verdict.kind == "nothing" and made.attainable == 0.05 and "only 5.0%" in made.verdict.text
    assert made.at_target.lru.blocks == 95  # 4.5 of 5 hits: the first block comes again after 94 others


def test_traffic_that_only_memory_helps_is_limited_by_capacity():
    made = plan(there_and_back(), MODEL, strategies=FEW)
    assert made.verdict.kind == "capacity" and made.verdict.text.startswith("Limited by capacity")
    assert made.at_target.lru.blocks < 2 * made.at_target.optimum.blocks
    assert made.verdict.text.endswith(f"plan {format_bytes(made.at_target.lru.bytes)} and keep LRU.")
    tight = plan(there_and_back(), MODEL, strategies=FEW, memory=18 * BLOCK)
    assert tight.verdict.kind == "capacity" and tight.verdict.lost_to_strategy == 0
    assert tight.verdict.lost_to_capacity == pytest.approx(0.6) and tight.memory.optimum.share == pytest.approx(0.3)


def test_where_lru_is_best_the_advice_says_so_with_figures():
    made = plan(there_and_back(), MODEL, strategies=FEW)
    blocks = made.at_target.lru.blocks
    others = [result.hit_blocks for result in made.runs if result.blocks == blocks and result.strategy in FEW[1:]]
    share = percent(max(others) / (made.attainable * made.accesses))
    lru = f"LRU {percent(made.at_target.lru.share)}; plan {format_bytes(made.at_target.lru.bytes)} and keep LRU."
    told = re.search(r"LRU is best here: (\w+), the next, finds (\S+) of what can be found in the same memory, (.*)$",
                     made.verdict.text)  # fmt: skip
    assert told and told[1] in FEW[1:] and told.groups()[1:] == (share, lru)
    tight = plan(there_and_back(), MODEL, strategies=FEW, memory=18 * BLOCK)
    rival = next(size for size in tight.memory.all if size.strategy != "lru")
    assert f"LRU is best there: {rival.strategy}, the next, finds {percent(rival.share)}" in tight.verdict.text
    alone = plan(there_and_back(), MODEL, strategies=["lru"])
    assert "No other strategy was compared: plan" in alone.verdict.text


def test_traffic_that_lru_gets_wrong_is_limited_by_the_strategy():
    made = plan(hot_among_fresh(), MODEL, strategies=FEW)
    level = made.at_target
    assert made.verdict.kind == "strategy" and made.verdict.text.startswith("Limited by the strategy")
    assert level.lru.blocks == 10 * 5 and level.optimum.blocks <= 10
    assert level.best.strategy == "lfu" and level.best.blocks < level.lru.blocks / 2
    assert made.verdict.text.endswith(f"lfu takes {format_bytes(level.best.bytes)}: plan that.")
    tight = plan(hot_among_fresh(), MODEL, strategies=FEW, memory=25 * BLOCK)
    assert tight.verdict.kind == "strategy" and tight.verdict.lost_to_capacity == 0
    assert (
        tight.verdict.lost_to_strategy == pytest.approx(0.9 - tight.memory.lru.share) and tight.memory.lru.share < 0.2
    )
    assert tight.memory.best.strategy == "lfu" and tight.verdict.regained == 1.0


def test_the_advice_where_another_strategy_is_better_in_little_memory_only():
    size = Size("lru", 10, 10 * 2**30, 0.5, 0.5, 0.9, 0.0, 0.0)
    small = dataclasses.replace(size, blocks=5, bytes=5 * 2**30)
    level = Level(0.9, size, size, dataclasses.replace(small, strategy="optimal"))
    sizes = [dataclasses.replace(small, strategy=name, share=found) for name, found in (("lru", 0.5), ("lfu", 0.6))]
    text = judge(0.5, 0.9, level, (*sizes, level.optimum)).text
    assert "plan 10 GiB and keep LRU. With only 5 GiB, take lfu: there it finds 60.0% of" in text
    assert "closes 25.0% of the gap" in text


def test_enough_memory_is_enough():
    made = plan(hot_among_fresh(), MODEL, strategies=FEW, memory=150 * BLOCK + 7)
    assert made.verdict.kind == "enough" and made.memory.blocks == 150 and made.memory.bytes == 150 * BLOCK + 7
    assert made.memory.lru.share == 1.0 and made.shown_blocks == 150


def test_sizes_are_exact():
    model = read_model("llama-3.1-8b")
    trace = dataclasses.replace(hot_among_fresh(), block_tokens=512, input_tokens=np.full(630, 512))
    made = plan(trace, model, strategies=FEW, memory=int(3.2 * 2**30))
    assert made.bytes_per_block == 64 * 2**20  # 512 tokens of 128 KiB
    assert made.at_target.lru.bytes == 50 * 64 * 2**20 and made.at_target.lru.gib == 3.125
    assert made.memory.blocks == 51 and made.memory.lru.blocks == 51
    for line in made.lines:
        np.testing.assert_array_equal(line.bytes, line.blocks * made.bytes_per_block)


def test_windows_of_running_requests_come_on_top():
    model = read_model({**CONFIG, "model_type": "gemma2", "sliding_window": 10})
    made = plan(there_and_back(), model, strategies=FEW, memory=10_000)
    assert made.bytes_per_block == 4 * 128 and model.window_bytes_per_sequence == 1280
    windows = made.load.peak_requests * 1280
    assert made.load.window_bytes == windows > 0
    assert made.memory.blocks == (10_000 - windows) // 512
    assert made.at_target.lru.bytes == made.at_target.lru.blocks * 512 + windows
    assert any("windowed layers" in note and "2.0×" in note for note in made.notes)


@settings(max_examples=15, deadline=None)
@given(chained_requests())
def test_bounds_hold_on_random_traffic(requests):
    trace = as_trace(requests)
    made = plan(trace, MODEL, strategies=FEW, target=0.7, jobs=1) if trace.num_accesses else None
    if made is None or not made.levels:
        return
    curve, most = lru_curve(trace), int(lru_curve(trace).hit_blocks[-1])
    assert [level.share for level in made.levels] == sorted({*LEVELS, 0.7})
    for level in made.levels:
        wanted = math.ceil(level.share * most - 1e-9)
        assert level.lru.share * most >= wanted - 1e-6 and curve.at(level.lru.blocks) == level.lru.hit_ratio
        assert level.lru.blocks == 1 or round(curve.at(level.lru.blocks - 1) * trace.num_accesses) < wanted
        assert level.optimum.blocks <= level.best.blocks <= level.lru.blocks
        assert level.best.strategy == "lru" or level.best.blocks < level.lru.blocks
        assert min(level.best.share, level.optimum.share) * most >= wanted - 1e-6
    for name in ("lru", "best", "optimum"):
        blocks = [getattr(level, name).blocks for level in made.levels]
        assert blocks == sorted(blocks)
    assert curve.at(made.attainable_blocks) == curve.attainable == made.attainable


def test_saved_prefill_is_the_prefill_of_what_was_found():
    trace = as_trace([[0, 1, 2], [0, 1, 3, 4], [0, 1, 2]], input_tokens=[11, 16, 11])
    made = plan(trace, MODEL, strategies=FEW, target=1.0, hardware=Hardware(2.0, 0.25))
    saved = float(MODEL.prefill_flops(8) + MODEL.prefill_flops(11))  # the third finds all it has: 11 tokens, not 12
    assert made.at_target.lru.flops_saved == saved == made.at_target.optimum.flops_saved
    assert made.at_target.lru.seconds_saved == saved / 0.5e12
    assert made.prefill_flops == float(MODEL.prefill_flops([11, 16, 11]).sum())
    assert made.attainable_tokens == 19 / 38
    assert made.load.prefill_load_saved == pytest.approx(made.load.prefill_load * saved / made.prefill_flops)


def test_a_plan_has_what_its_report_draws():
    trace = hot_among_fresh()
    made = plan(trace, MODEL, strategies=FEW)
    assert [line.name for line in made.lines] == ["lru", "optimal", "lfu", "fifo"]
    for line in made.lines:
        assert len(line.blocks) == len(line.hit_ratio) == len(line.token_hit_ratio) <= 400
        assert (np.diff(line.blocks) > 0).all()
    shown = {run.strategy: run for run in made.runs if len(run.hits)}
    assert set(shown) == {"lru", "lfu", "optimal"}
    assert all(run.blocks == made.shown_blocks and run.hits.sum() == run.hit_blocks for run in shown.values())


def test_long_curves_are_thinned_but_keep_their_ends():
    made = plan(there_and_back(450, 1), MODEL, strategies=["lru"])
    line, curve = made.lines[0], made.curve
    assert len(curve.blocks) == 451 and 100 < len(line.blocks) <= 400
    assert (line.blocks[0], line.blocks[-1]) == (1, 450) and line.hit_ratio[-1] == made.attainable == 0.5
    np.testing.assert_array_equal(line.hit_ratio, curve.at(line.blocks))


def test_the_load_counts_what_runs_together():
    trace = as_trace([[0, 1], [0, 1], [2]], block_tokens=4, input_tokens=[8, 7, 4])
    trace = dataclasses.replace(
        trace, times=np.array([0.0, 1.0, 100.0]), output_tokens=np.array([20, 1, 100], np.int64)
    )
    load = estimate_load(trace, MODEL, Hardware(1e12, 1.0, decode_tokens_per_second=10.0))
    # 0 … 2 s and 1 … 1.1 s share two blocks; outputs take 5 and 0 more; alone from 100 s: 1 block and 25 of output.
    assert (load.peak_requests, load.shared) == (2, True)
    assert load.peak_blocks == 26
    assert load.mean_requests == pytest.approx((2 + 0.1 + 10) / 110, rel=1e-6)
    assert load.mean_blocks == pytest.approx((2 * 2 + 5 * 2 + 26 * 10) / 110, rel=1e-6)


def test_the_load_counts_shared_blocks_once():
    trace = dataclasses.replace(as_trace([[0, 1, 2]] * 5), times=np.zeros(5), output_tokens=np.full(5, 4))
    load = estimate_load(trace, MODEL, Hardware())
    assert (load.peak_requests, load.peak_blocks) == (5, 3 + 5)


def test_a_block_is_held_for_as_long_as_any_request_needs_it():
    trace = dataclasses.replace(
        as_trace([[0]] * 3), times=np.array([0.0, 1.0, 5.0]), output_tokens=np.array([100, 10, 10], np.int64)
    )
    load = estimate_load(trace, MODEL, Hardware(1e12, 1.0, decode_tokens_per_second=10.0))
    # The first runs for 10 s around the other two: one shared block, and 25, 3 and 3 for outputs.
    assert load.peak_blocks == 1 + 25 + 3
    assert load.mean_blocks == pytest.approx((1 * 10 + 25 * 10 + 3 + 3) / 10, rel=1e-6)


def test_a_size_that_running_requests_outgrow_is_noted():
    busy = dataclasses.replace(there_and_back(), output_tokens=np.full(240, 4000))
    assert any("at the peak running requests alone hold" in note for note in plan(busy, MODEL, strategies=FEW).notes)
    assert not plan(there_and_back(), MODEL, strategies=FEW).notes


@pytest.mark.parametrize(
    ("name", "blocks", "gib", "kind"),
    [(CHAT, 31_435, 1964.6875, "strategy"), (AGENTS, 3_216, 201.0, "capacity")],
)
def test_real_traffic_keeps_its_figures(name, blocks, gib, kind):
    made = plan(real_trace(name), read_model("llama-3.1-8b"), strategies=["lru"])
    level = made.at_target
    assert (level.lru.blocks, level.lru.gib, made.verdict.kind) == (blocks, gib, kind)
    assert level.optimum.share >= 0.9 and level.optimum.blocks < level.lru.blocks


@pytest.mark.parametrize("target", [0, -0.1, 1.1, 90, float("nan"), True, "0.9", None])
def test_a_target_that_is_no_share_is_refused(target):
    with pytest.raises(InvalidOperation, match="target: expected a share"):
        plan(there_and_back(), MODEL, target=target)


@pytest.mark.parametrize("memory", [0, -5, 1.5, True, 2**70])
def test_memory_that_is_no_size_is_refused(memory):
    with pytest.raises(InvalidOperation, match="memory"):
        plan(there_and_back(), MODEL, memory=memory)


def test_memory_for_less_than_a_block_says_what_a_block_takes():
    with pytest.raises(InvalidOperation, match=r"memory: expected at least 1 KiB: .* one block of 4 tokens"):
        plan(there_and_back(), MODEL, memory=BLOCK - 1)


def test_a_model_beyond_all_memory_is_refused():
    huge = read_model({**CONFIG, "head_dim": 2**31 - 1, "num_key_value_heads": 8, "num_hidden_layers": 10_000})
    with pytest.raises(InvalidOperation, match="model: expected sizes that fit"):
        plan(there_and_back(10**4, 1), huge, strategies=["lru"])


def test_memory_beyond_the_trace_finds_everything():
    made = plan(there_and_back(), MODEL, strategies=FEW, memory=2**61)
    assert made.memory.lru.share == 1.0 and made.verdict.kind == "enough"


def test_traces_that_say_nothing_are_refused():
    lengths = dataclasses.replace(there_and_back(), has_content=False, format="azure")
    with pytest.raises(InvalidOperation, match=r"azure.*lengths only"):
        plan(lengths, MODEL)
    for empty in (as_trace([]), as_trace([[], []])):
        with pytest.raises(InvalidOperation, match="at least one request with a block"):
            plan(empty, MODEL)


@pytest.mark.parametrize("strategies", ["lru", ["no-such"], [""], [3]])
def test_strategies_that_are_none_are_refused(strategies):
    with pytest.raises(InvalidOperation):
        plan(there_and_back(), MODEL, strategies=strategies)


@pytest.mark.parametrize("field", ["tflops", "mfu", "decode_tokens_per_second"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1", True])
def test_hardware_that_is_none_is_refused(field, value):
    with pytest.raises(InvalidOperation, match=field):
        Hardware(**{field: value})


def test_the_strategies_compared_by_default():
    names = default_strategies()
    assert names[0] == "lru" and {"lfu", "fifo"} <= set(names) and len(set(names)) == len(names)
    made = plan(as_trace([[0], [1], [0]]), MODEL, strategies=["LRU", "optimal", "lfu", "lfu"])
    assert made.strategies == ("lru", "lfu")
