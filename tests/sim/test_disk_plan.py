"""Memory or disk: every price against a replay with tiers, and when to buy what."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.test_planner import BLOCK, MODEL, hot_among_fresh, nothing_twice, there_and_back
from tests.sim.traces import CHAT, chained_traces, real_trace

from pagedkv import InvalidOperation
from pagedkv.sim import TierSpec, replay
from pagedkv.sim.disk_plan import measure_read_rate
from pagedkv.sim.model_shape import read_model
from pagedkv.sim.planner import Hardware, plan
from pagedkv.sim.report import plan_report


def first_token_of(trace, made, result):
    """Seconds until prefill is done: what the disk found is read, what nobody found is computed; the mean."""
    flops = MODEL.prefill_flops(trace.input_tokens)
    found = np.minimum(result.hits.astype(np.int64) * trace.block_tokens, trace.input_tokens)
    computing = float((flops - MODEL.prefill_flops(found)).sum()) / made.hardware.flops_per_second
    loading = sum(tier.hit_blocks for tier in result.tiers) * made.bytes_per_block / made.disk.read_bytes_per_second
    return (computing + loading) / trace.num_requests


@settings(max_examples=25, deadline=None)
@given(trace=chained_traces(), memory=st.integers(1, 20), target=st.sampled_from([0.6, 0.9]))
def test_every_price_is_what_a_replay_finds(trace, memory, target):
    if not trace.num_tokens:
        return
    memory *= BLOCK // 4 * trace.block_tokens
    made = plan(trace, MODEL, target=target, memory=memory, strategies=["lru"], disk_read=1e12, prefill_rate=10)
    if made.disk is None:
        assert not made.levels
        return
    assert [price.share for price in made.disk.prices] == sorted({0.8, 0.9, 0.95, target})
    assert made.disk.memory.blocks == made.memory.blocks
    alone = replay(trace, made.memory.blocks)
    assert made.disk.first_token == pytest.approx(first_token_of(trace, made, alone))
    for price in made.disk.prices:
        level = next(level for level in made.levels if level.share == price.share)
        assert price.memory_alone == level.lru
        tiers = [TierSpec("disk", price.disk_blocks)] if price.disk_blocks else []
        result = replay(trace, made.memory.blocks, tiers=tiers)
        assert price.hit_ratio == pytest.approx(result.hit_ratio) and price.hit_ratio >= level.lru.hit_ratio - 1e-12
        assert price.disk_hit_ratio == pytest.approx(result.tiers[0].hit_ratio if tiers else 0.0)
        assert price.first_token == pytest.approx(first_token_of(trace, made, result))
        in_memory = replay(trace, max(made.memory.blocks, level.lru.blocks))
        assert price.first_token_memory == pytest.approx(first_token_of(trace, made, in_memory))
        assert price.disk_bytes == price.disk_blocks * made.bytes_per_block
    assert made.disk.first_token_without == pytest.approx(trace.num_tokens / 10 / trace.num_requests)


def made_with(read_rate, memory=10, target=0.9, **more):
    more = {"strategies": ["lru"], "prefill_rate": 1000} | more
    return plan(there_and_back(), MODEL, target=target, memory=memory * BLOCK, disk_read=read_rate, **more)


def test_a_disk_that_is_faster_than_computing_is_bought():
    made = made_with(100 * 1000 * 256)  # 256 bytes a token
    disk = made.disk
    assert (disk.choice, disk.load_tokens_per_second, disk.prefill_tokens_per_second) == (
        "disk",
        100_000,
        pytest.approx(1000),
    )
    price = next(price for price in disk.prices if price.share == 0.9)
    assert price.first_token_memory < price.first_token < disk.first_token < disk.first_token_without
    assert disk.advice.startswith("Buy the disk: for 90% the first token comes ")
    assert "sooner with " in disk.advice and "of what the memory would" in disk.advice


def test_a_disk_that_is_slower_than_computing_is_not_read():
    disk = made_with(0.5 * 1000 * 256).disk
    assert disk.choice == "memory" and "the disk gives 500 tokens/s, and computing makes 1 k" in disk.advice
    assert {price.first_token for price in disk.prices} == {disk.first_token}


def test_a_disk_that_brings_less_than_half_is_not_bought():
    disk = made_with(1.2 * 1000 * 256).disk
    assert disk.choice == "memory" and "The disk brings only" in disk.advice
    assert all(price.first_token < disk.first_token for price in disk.prices)


def test_where_the_memory_does_neither_is_bought():
    disk = made_with(10**9, memory=60).disk
    assert disk.choice == "neither" and {price.disk_blocks for price in disk.prices} == {0}
    assert "Buy neither" in disk.advice


def test_without_a_memory_it_is_that_of_running_requests():
    made = plan(hot_among_fresh(), MODEL, strategies=["lru"], disk_read=1e9)
    assert made.disk.memory.blocks == made.load.peak_blocks and made.memory is None


def test_a_prefill_rate_takes_the_place_of_the_hardware():
    trace = hot_among_fresh()
    made = plan(trace, MODEL, strategies=["lru"], prefill_rate=700, hardware=Hardware(1.0, 0.5, 33.0))
    assert made.prefill_seconds == pytest.approx(trace.num_tokens / 700) and made.disk is None
    assert made.hardware.mfu == 1.0 and made.hardware.decode_tokens_per_second == 33.0


def test_traffic_without_reuse_needs_no_disk():
    assert plan(nothing_twice(), MODEL, strategies=["lru"], disk_read=1e9).disk is None


@pytest.mark.parametrize("name", ["disk_read", "prefill_rate"])
@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), True, "1"])
def test_rates_out_of_range(name, rate):
    with pytest.raises(InvalidOperation, match=f"{name}: expected a number"):
        plan(there_and_back(), MODEL, strategies=["lru"], **{name: rate})


def test_a_small_model_on_a_real_trace():
    """SmolLM2-135M at 700 tokens/s over a disk of 1 GB/s, as measured on two cores."""
    config = {"model_type": "llama", "dtype": "bfloat16", "hidden_size": 576, "intermediate_size": 1536}
    heads = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
    made = plan(
        real_trace(CHAT), read_model(config | heads), memory=8 * 2**30, strategies=["lru"], disk_read=1e9,
        prefill_rate=700,
    )  # fmt: skip
    price = next(price for price in made.disk.prices if price.share == 0.9)
    assert (price.disk_blocks, made.disk.choice, made.disk.memory.blocks) == (31_435, "disk", 728)
    assert round(made.disk.load_tokens_per_second / 700) == 62


def test_the_report_says_what_to_buy():
    made = made_with(100 * 1000 * 256)
    page = plan_report(made, there_and_back())
    assert "Memory or disk" in page and made.disk.advice in page
    assert "Memory or disk" not in plan_report(plan(there_and_back(), MODEL, strategies=["lru"]), there_and_back())


def test_the_rate_of_a_disk_is_bytes_over_seconds(tmp_path):
    moments = iter([3.0, 3.5])
    assert measure_read_rate(tmp_path, 8 * 2**20, clock=lambda: next(moments)) == 16 * 2**20
    assert list(tmp_path.iterdir()) == []
