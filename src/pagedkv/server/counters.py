"""The counters of the engine as metrics, read when somebody asks for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from pagedkv.engine import EngineStats

__all__ = ["OURS", "VLLMS", "EngineCounters"]

OURS = "pagedkv:"

VLLMS = frozenset(
    {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "num_preemptions",
        "prompt_tokens",
        "generation_tokens",
        "request_success",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_time_per_output_token_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "kv_block_lifetime_seconds",
        "kv_block_idle_before_evict_seconds",
        "kv_block_reuse_gap_seconds",
        "cache_config",
    }
)
"""Metrics that vLLM has under the same name, with the same meaning and unit."""

_GAUGES = (
    ("num_requests_running", "Requests that hold blocks", "num_running"),
    ("num_requests_waiting", "Requests that hold none yet", "num_waiting"),
    ("kv_blocks_used", "Blocks that requests hold", "blocks_used"),
    ("kv_blocks_cached", "Blocks that nobody holds and that are still findable", "blocks_cached"),
    ("kv_blocks_available", "Blocks that an allocation can have: free, or cached and not pinned", "blocks_free"),
)
_COUNTERS = (
    ("prompt_tokens", "Tokens of prompts that were let in", "prompt_tokens"),
    ("generation_tokens", "Tokens that were written", "generation_tokens"),
    ("prefix_cache_queries", "Prompt tokens looked up in the cache", "prefix_queries"),
    ("prefix_cache_hits", "Prompt tokens found in it", "prefix_hits"),
    ("num_preemptions", "Texts that lost their blocks to others and were computed again", "num_preemptions"),
    ("evictions", "Sequences evicted by the cache", "evictions"),
    ("blocks_reclaimed", "Cached blocks given up for a new use", "reclaimed"),
    ("engine_steps", "Forward passes", "steps"),
    ("engine_busy_seconds", "Time of all steps", "busy_seconds"),
    ("engine_bookkeeping_seconds", "Of it outside of the model and the sampler", "bookkeeping_seconds"),
    ("draft_tokens", "Tokens guessed by prompt lookup", "draft_tokens"),
    ("accepted_tokens", "Of them those that turned out right", "accepted_tokens"),
)


class EngineCounters(Collector):
    """Reads the counters of an engine.

    Parameters
    ----------
    engine : AsyncEngine
    model : str
        The label ``model_name``.
    """

    def __init__(self, engine: Any, model: str) -> None:
        self._engine = engine
        self._labels = {"model_name": model, "engine": "0"}

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics."""
        stats: EngineStats = self._engine.stats()
        names, values = tuple(self._labels), tuple(self._labels.values())
        usage = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        gauges = [(name, text, float(getattr(stats, field))) for name, text, field in _GAUGES]
        gauges.append(("kv_cache_usage_perc", "Blocks that requests hold, a fraction of all: 0 to 1", usage))
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(OURS + name, text, labels=names)
            gauge.add_metric(values, value)
            yield gauge
        for name, text, field in _COUNTERS:
            counter = CounterMetricFamily(OURS + name, text, labels=names)
            counter.add_metric(values, float(getattr(stats, field)))
            yield counter
        info = InfoMetricFamily(
            f"{OURS}cache_config", "Size of a block in tokens, and of the pool in blocks", labels=names
        )
        sizes = {"block_size": str(stats.block_size), "num_gpu_blocks": str(stats.blocks_total)}
        info.add_metric(values, sizes)
        yield info
