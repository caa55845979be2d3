"""Metrics: names that dashboards read, counters that only rise, histograms that hold what was seen."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.server.fake_snapshots import FakeEngine, app_around, server_state

from pagedkv import BlockManager
from pagedkv.engine import CompletionOutput, RequestMetrics, RequestOutput
from pagedkv.server import metrics
from pagedkv.server.metrics import VLLMS, BlockLives, ServerMetrics
from pagedkv.tiers.rung import TierFigures

# What vLLM's own Grafana board and the inference gateway ask for.
READ_BY_OTHERS = [
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
    "prefix_cache_hits_total", "num_preemptions_total", "prompt_tokens_total", "generation_tokens_total",
    "request_success_total", "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket",
    "e2e_request_latency_seconds_bucket", "request_queue_time_seconds_sum", "request_prefill_time_seconds_sum",
    "request_decode_time_seconds_sum", "request_prompt_tokens_bucket", "request_generation_tokens_bucket",
    "kv_block_lifetime_seconds_bucket", "kv_block_idle_before_evict_seconds_bucket",
    "kv_block_reuse_gap_seconds_bucket", "cache_config_info",
]  # fmt: skip


@pytest.fixture
def engine():
    return FakeEngine(96)


def samples_of(text):
    """Return {(name, labels without the two of all)}: value, once the text is known to be well-formed."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            key = (sample.name, *sorted(labels.items()))
            assert key not in found, key
            assert sample.labels["model_name"] == "pysmall" and sample.labels["engine"] == "0"
            found[key] = sample.value
    return found


def names_of(samples):
    return {key[0] for key in samples}


def test_the_names_are_there_from_the_start(engine):
    names = names_of(samples_of(ServerMetrics(server_state(engine)).text()))
    assert {f"pagedkv:{name}" for name in READ_BY_OTHERS} <= names
    assert not any(name.startswith("vllm:") or name.endswith("_created") for name in names)


def test_vllms_names_carry_the_same_values(engine):
    for _ in range(30):
        engine.step()
    samples = samples_of(ServerMetrics(server_state(engine, vllm_metrics=True)).text())
    assert {f"vllm:{name}" for name in READ_BY_OTHERS} <= names_of(samples)
    twins = [key for key in samples if key[0].startswith("vllm:")]
    assert len({key[0].removeprefix("vllm:").split("_bucket")[0] for key in twins}) >= len(VLLMS)
    for key in twins:
        assert samples[key] == samples[(key[0].replace("vllm:", "pagedkv:"), *key[1:])]


def test_counters_rise_with_the_engine_and_never_fall(engine):
    made = ServerMetrics(server_state(engine))
    before = samples_of(made.text())
    for _ in range(15):
        for _ in range(10):
            engine.step()
        now = samples_of(made.text())
        for key, value in now.items():
            if key[0].endswith(("_total", "_count", "_sum", "_bucket")):
                assert value >= before[key], key
        before = now
    stats = engine.stats()
    assert before["pagedkv:generation_tokens_total",] == stats.generation_tokens > 0
    assert before["pagedkv:prefix_cache_hits_total",] == stats.prefix_hits > 0
    assert before["pagedkv:blocks_reclaimed_total",] == stats.reclaimed > 0
    assert before["pagedkv:kv_cache_usage_perc",] == stats.blocks_used / 96 <= 1
    assert before["pagedkv:cache_config_info", ("block_size", "16"), ("num_gpu_blocks", "96")] == 1


def test_tiers_are_told_by_medium(engine):
    figures = {"loads": 3, "stores": 5, "read_bytes": 300, "written_bytes": 500, "read_seconds": 0.5}
    near = TierFigures(medium="CPU", blocks=7, total_blocks=10, hits=2, **figures)
    far = TierFigures(medium="DISK", blocks=70, total_blocks=100, corrupt=1, late=4, **figures)
    without = samples_of(ServerMetrics(server_state(engine)).text())
    assert not any("tier" in key[0] or "offload" in key[0] for key in without)
    engine.tier_figures = (near, far, replace(far, blocks=1))
    seen = samples_of(ServerMetrics(server_state(engine, vllm_metrics=True)).text())
    assert seen["pagedkv:tier_blocks_used", ("medium", "DISK")] == 71
    assert seen["pagedkv:tier_blocks_capacity", ("medium", "CPU")] == 10
    for name, medium, value in [
        ("hits", "CPU", 2), ("loads", "CPU", 3), ("loads", "DISK", 6), ("stores", "DISK", 10), ("corrupt", "DISK", 2),
        ("late", "DISK", 8), ("gated", "CPU", 0), ("failed", "DISK", 0), ("dropped", "CPU", 0),
    ]:  # fmt: skip
        assert seen[f"pagedkv:tier_{name}_total", ("medium", medium)] == value
    assert seen["pagedkv:tier_bytes_total", ("direction", "write"), ("medium", "DISK")] == 1000
    assert seen["pagedkv:tier_seconds_total", ("direction", "read"), ("medium", "CPU")] == 0.5
    for name, value in [("load_bytes", 900), ("store_bytes", 1500), ("load_time", 1.5), ("store_time", 0)]:
        assert seen[f"vllm:kv_offload_{name}_total",] == seen[f"pagedkv:kv_offload_{name}_total",] == value


def output(written, *, finished=False, arrived=100.0, n=1):
    choices = [
        CompletionOutput(
            index=i, text="", token_ids=tuple(range(written)), finish_reason="length" if finished else None
        )
        for i in range(n)
    ]
    times = RequestMetrics(
        arrived=arrived,
        first_scheduled=arrived + 0.25,
        first_token=arrived + 1.5,
        finished=arrived + 5.5 if finished else None,
    )
    return RequestOutput(
        request_id="r", prompt=None, prompt_token_ids=(1, 2, 3), outputs=choices, finished=finished, metrics=times
    )


def test_a_request_leaves_its_times(engine, monkeypatch):
    made = ServerMetrics(server_state(engine))
    clock = iter([10.0, 10.5, 10.5, 12.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    for written in (1, 2, 2):
        made.updated(output(written))
    last = output(6, finished=True)
    made.updated(last)
    made.ended(last, "finished")
    monkeypatch.undo()
    seen = samples_of(made.text())
    for name, count, total in [
        ("time_to_first_token_seconds", 1, 1.5),
        ("request_queue_time_seconds", 1, 0.25),
        ("request_prefill_time_seconds", 1, 1.25),
        ("request_decode_time_seconds", 1, 4.0),
        ("e2e_request_latency_seconds", 1, 5.5),
        ("inter_token_latency_seconds", 5, 2.5),
        ("request_time_per_output_token_seconds", 1, 0.8),
        ("request_prompt_tokens", 1, 3),
        ("request_generation_tokens", 1, 6),
    ]:
        assert seen[f"pagedkv:{name}_count",] == count, name
        assert seen[f"pagedkv:{name}_sum",] == pytest.approx(total), name
    assert seen["pagedkv:inter_token_latency_seconds_bucket", ("le", "0.5")] == 5
    assert seen["pagedkv:inter_token_latency_seconds_bucket", ("le", "0.4")] == 0
    assert seen["pagedkv:request_success_total", ("finished_reason", "length")] == 1
    assert made._progress == {}, "nothing is kept of a request that ended"


def test_requests_that_fail_are_counted_apart(engine):
    made = ServerMetrics(server_state(engine))
    made.updated(output(1))
    made.ended(output(1), "timeout")
    made.ended(None, "error")
    seen = samples_of(made.text())
    assert seen["pagedkv:request_failure_total", ("reason", "timeout")] == 1
    assert seen["pagedkv:request_failure_total", ("reason", "error")] == 1
    assert seen["pagedkv:e2e_request_latency_seconds_count",] == 0 and made._progress == {}


def test_the_lives_of_blocks(engine):
    """Four blocks stored at 0 s: two are used again at 3 s, the others given up at 3 s and at 11 s."""
    cache = BlockManager(4, 4)
    lives = BlockLives(cache.block_records, 4)
    cache.allocate(1, list(range(16)))
    cache.commit(1)
    cache.free(1)
    assert not any(len(x) for x in vars_of(lives.look(0.0)))
    cache.allocate(2, [*range(8), 99])
    cache.free(2)
    seen = lives.look(3.0)
    assert seen.reuse_gaps.tolist() == [3.0, 3.0] and seen.lifetimes.tolist() == [3.0]
    assert not any(len(x) for x in vars_of(lives.look(10.0)))
    cache.allocate(3, 8)
    seen = lives.look(11.0)
    assert seen.lifetimes.tolist() == [11.0] and seen.idle_before_evict.tolist() == [11.0]
    cache.clear_prefix_cache()
    seen = lives.look(20.0)
    assert seen.lifetimes.tolist() == [20.0, 20.0] and seen.idle_before_evict.tolist() == [17.0, 17.0]


def vars_of(samples):
    return samples.lifetimes, samples.idle_before_evict, samples.reuse_gaps


def test_a_large_pool_is_sampled(engine):
    lives = BlockLives(engine.block_records, 1_000_000)
    assert len(lives._ids) == 1024 and lives._ids[0] == 0 and lives._ids[-1] == 999_999


def test_the_route_wants_a_running_server_and_a_key(engine):
    state = server_state(engine, api_keys=("secret",))
    app = app_around(state, metrics.router)

    async def scrape():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            key = {"Authorization": "Bearer secret"}
            early = await client.get("/metrics", headers=key)
            async with metrics.metering(state):
                found = await client.get("/metrics", headers=key)
                refused = await client.get("/metrics")
            return early, found, refused

    early, found, refused = asyncio.run(scrape())
    assert early.status_code == 503 and refused.status_code == 401 and not state.observers
    assert found.headers["content-type"].startswith("text/plain; version=")
    assert ("pagedkv:num_requests_running",) in samples_of(found.content)


def test_several_texts_that_advance_together_are_not_faster(engine, monkeypatch):
    made = ServerMetrics(server_state(engine))
    clock = iter([1.0, 2.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    made.updated(output(1, n=4))
    made.updated(replace(output(2, n=4)))
    monkeypatch.undo()
    seen = samples_of(made.text())
    assert seen["pagedkv:inter_token_latency_seconds_count",] == 4
    assert seen["pagedkv:inter_token_latency_seconds_sum",] == pytest.approx(4.0)
