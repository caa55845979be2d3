"""Prometheus metrics at ``/metrics``: vLLM's names with the prefix ``pagedkv:``, and ``vllm:`` where wanted."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from pagedkv.engine import EngineStats, RequestOutput, TierFigures
from pagedkv.server.auth import Operator
from pagedkv.server.background import in_background
from pagedkv.server.engines import ReplicaCount, ReplicatedEngine, ServedEngine
from pagedkv.server.errors import ApiError
from pagedkv.server.state import Server, ServerState

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
        "kv_offload_load_bytes",
        "kv_offload_load_time",
        "kv_offload_store_bytes",
        "kv_offload_store_time",
    }
)
"""Metrics that vLLM has under the same name, with the same meaning and unit."""

_GAUGES = (
    ("num_requests_running", "Requests that hold blocks", "num_running"),
    ("num_requests_waiting", "Requests that hold none yet", "num_waiting"),
    ("kv_blocks_used", "Blocks that requests hold", "blocks_used"),
    ("kv_blocks_cached", "Blocks that no request holds and that are still findable", "blocks_cached"),
    ("kv_blocks_available", "Blocks that an allocation can have: free, or cached and not pinned", "blocks_free"),
)
_COUNTERS = (
    ("prompt_tokens", "Tokens of prompts that were admitted", "prompt_tokens"),
    ("generation_tokens", "Tokens that were written", "generation_tokens"),
    ("prefix_cache_queries", "Prompt tokens looked up in the cache", "prefix_queries"),
    ("prefix_cache_hits", "Prompt tokens found in it", "prefix_hits"),
    ("num_preemptions", "Texts that lost their blocks to others and were computed again", "num_preemptions"),
    ("evictions", "Sequences evicted by the cache", "evictions"),
    ("blocks_reclaimed", "Cached blocks reclaimed for a new use", "reclaimed"),
    ("engine_steps", "Forward passes", "steps"),
    ("engine_busy_seconds", "Time of all steps", "busy_seconds"),
    ("engine_bookkeeping_seconds", "Of it outside of the model and the sampler", "bookkeeping_seconds"),
    ("draft_tokens", "Tokens guessed by prompt lookup", "draft_tokens"),
    ("accepted_tokens", "Of them those that turned out right", "accepted_tokens"),
)

# Of tiers, by medium; those of one medium together.
_TIER_GAUGES = (
    ("tier_blocks_used", "Blocks that a tier holds, where it says", "blocks"),
    ("tier_blocks_capacity", "Blocks that it has room for, where it says", "total_blocks"),
)
_TIER_COUNTERS = (
    ("tier_hits", "Texts that got something from a tier", "hits"),
    ("tier_loads", "Blocks that came from it and were right", "loads"),
    ("tier_stores", "Blocks that it stored", "stores"),
    ("tier_corrupt", "Blocks that were not what was stored: misses", "corrupt"),
    ("tier_late", "Texts that did not wait any longer for it", "late"),
    ("tier_gated", "Texts that were computed, as this is faster", "gated"),
    ("tier_failed", "Calls that it answered by an error", "failed"),
    ("tier_dropped", "Texts that were not stored, as too much was on its way", "dropped"),
)
_DIRECTIONS = {"read": ("read_bytes", "read_seconds"), "write": ("written_bytes", "write_seconds")}
_OFFLOAD = (
    ("kv_offload_load_bytes", "Bytes that came from all tiers", "read_bytes"),
    ("kv_offload_load_time", "Seconds that this took, added up", "read_seconds"),
    ("kv_offload_store_bytes", "Bytes that all tiers stored", "written_bytes"),
    ("kv_offload_store_time", "Seconds that this took, added up", "write_seconds"),
)


class EngineCounters(Collector):
    """Reads the counters of an engine.

    Parameters
    ----------
    engine : ServedEngine
    model : str
        The label ``model_name``.
    """

    def __init__(self, engine: ServedEngine, model: str) -> None:
        self._engine = engine
        self._labels = {"model_name": model, "engine": "0"}

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics: of a fleet those of each replica, and how many there are."""
        if not isinstance(self._engine, ReplicatedEngine):
            yield from self._of(self._engine.stats(), self._labels)
            return
        merged: dict[str, Metric] = {}
        for replica, stats in self._engine.replica_stats().items():
            for metric in self._of(stats, {**self._labels, "replica": replica}):
                if metric.name in merged:
                    merged[metric.name].samples += metric.samples
                else:
                    merged[metric.name] = metric
        yield from merged.values()
        yield from self._replicas(self._engine.replica_count())

    def _replicas(self, count: ReplicaCount) -> Iterable[Metric]:
        names, values = tuple(self._labels), tuple(self._labels.values())
        for name, text, value in (
            ("replicas_ready", "Replicas that take requests", count.ready),
            ("replicas_wanted", "Replicas that there should be at least", count.wanted),
        ):
            gauge = GaugeMetricFamily(OURS + name, text, labels=names)
            gauge.add_metric(values, value)
            yield gauge
        counter = CounterMetricFamily(
            f"{OURS}replica_failovers", "Requests that went on at another replica, as theirs had gone", labels=names
        )
        counter.add_metric(values, count.failovers)
        yield counter

    def _of(self, stats: EngineStats, labels: Mapping[str, str]) -> Iterable[Metric]:
        """Yield the metrics of one engine."""
        names, values = tuple(labels), tuple(labels.values())
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
        if stats.tiers:
            yield from self._tiers(stats.tiers, labels)

    def _tiers(self, tiers: Sequence[TierFigures], labels: Mapping[str, str]) -> Iterable[Metric]:
        """Yield what is known of tiers."""
        names, values = tuple(labels), tuple(labels.values())
        by_medium: dict[str, list[TierFigures]] = {}
        for tier in tiers:
            by_medium.setdefault(tier.medium, []).append(tier)

        def total(of: Iterable[TierFigures], field: str) -> float:
            return float(sum(getattr(tier, field) for tier in of))

        made: list[tuple[type[Any], tuple[tuple[str, str, str], ...]]] = [
            (GaugeMetricFamily, _TIER_GAUGES),
            (CounterMetricFamily, _TIER_COUNTERS),
        ]
        for kind, listed in made:
            for name, text, field in listed:
                metric = kind(OURS + name, text, labels=(*names, "medium"))
                for medium, some in by_medium.items():
                    metric.add_metric((*values, medium), total(some, field))
                yield metric
        for place, (name, text) in enumerate((("tier_bytes", "Bytes moved"), ("tier_seconds", "Time of it, added up"))):
            counter = CounterMetricFamily(OURS + name, text, labels=(*names, "medium", "direction"))
            for medium, some in by_medium.items():
                for direction, fields in _DIRECTIONS.items():
                    counter.add_metric((*values, medium, direction), total(some, fields[place]))
            yield counter
        for name, text, field in _OFFLOAD:
            counter = CounterMetricFamily(OURS + name, text, labels=names)
            counter.add_metric(values, total(tiers, field))
            yield counter


# Lifetimes of cached blocks: how long they live, idle before they are reclaimed, and wait for their next use.

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class LifeSamples:
    """What was learned since the last look, in seconds.

    Attributes
    ----------
    lifetimes : float64
        Of blocks that can no longer be found: from being stored until then.
    idle_before_evict : float64
        Of the same blocks: from the last use until then.
    reuse_gaps : float64
        Between two uses of a block by different sequences.
    """

    lifetimes: Seconds
    idle_before_evict: Seconds
    reuse_gaps: Seconds


class BlockLives:
    """Follows a sample of the blocks by looking at them now and then; times are as exact as the looks are frequent.

    Parameters
    ----------
    read_blocks : callable
        Block ids to copies of their records.
    total_blocks : int
    most : int
        Blocks in the sample, spread evenly over the pool.
    """

    def __init__(
        self, read_blocks: Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]], total_blocks: int, most: int = 1024
    ) -> None:
        self._read_blocks = read_blocks
        self._ids = np.unique(np.linspace(0, max(0, total_blocks - 1), min(most, total_blocks), dtype=np.int64))
        size = len(self._ids)
        self._lives = np.zeros(size, bool)
        self._created, self._last_access, self._uses = (np.zeros(size, np.int64) for _ in range(3))
        self._born, self._touched = np.zeros(size), np.zeros(size)

    def look(self, now: float) -> LifeSamples:
        """Compare with the last look; `now` is in seconds of any steady clock."""
        records = self._read_blocks(self._ids)
        lives, created, uses = records["indexed"] != 0, records["created"], records["access_count"]
        goes_on = self._lives & lives & (created == self._created)
        ended, begun = self._lives & ~goes_on, lives & ~goes_on
        reused = goes_on & (uses > self._uses)
        samples = LifeSamples(
            lifetimes=now - self._born[ended],
            idle_before_evict=now - self._touched[ended],
            reuse_gaps=now - self._touched[reused],
        )
        self._born[begun] = now
        self._touched[begun | (goes_on & (records["last_access"] > self._last_access))] = now
        self._lives = lives
        self._created, self._uses, self._last_access = created, uses, records["last_access"]
        return samples


SECONDS_BETWEEN_LOOKS = 0.25
_BLOCK_SECONDS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 21600)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_NEXT_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20)
_REQUEST = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From the arrival of a request to its first token", _FIRST_TOKEN),
    "e2e_request_latency_seconds": ("From the arrival of a request to its last token", _REQUEST),
    "request_queue_time_seconds": ("From the arrival of a request until it is first computed", _REQUEST),
    "request_prefill_time_seconds": ("From then until the first token", _REQUEST),
    "request_decode_time_seconds": ("From the first token to the last", _REQUEST),
    "request_time_per_output_token_seconds": ("Mean time between the tokens of a request", _NEXT_TOKEN),
    "request_prompt_tokens": ("Tokens of the prompt of a request", _TOKENS),
    "request_generation_tokens": ("Tokens that were written for a request", _TOKENS),
    "kv_block_lifetime_seconds": ("From when a block is stored until it is reclaimed, of a sample", _BLOCK_SECONDS),
    "kv_block_idle_before_evict_seconds": ("From the last use of a block until it is reclaimed", _BLOCK_SECONDS),
    "kv_block_reuse_gap_seconds": ("Between two uses of a block by different sequences", _BLOCK_SECONDS),
}


class _Gaps(Collector):
    """A histogram of the times between tokens: each takes a moment, and several equal ones no longer."""

    def __init__(self, name: str, text: str, labels: dict[str, str]) -> None:
        self._name, self._text, self._labels = OURS + name, text, labels
        self._counts = [0] * (len(_NEXT_TOKEN) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, times: int) -> None:
        """Take a time that came so many times."""
        self._counts[bisect_left(_NEXT_TOKEN, seconds)] += times
        self._sum += seconds * times

    def collect(self) -> Iterable[Metric]:
        """Yield the metric."""
        bounds = [*map(floatToGoString, _NEXT_TOKEN), "+Inf"]
        buckets = [*zip(bounds, map(float, accumulate(self._counts)), strict=True)]
        family = HistogramMetricFamily(self._name, self._text, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), buckets=buckets, sum_value=self._sum)
        yield family


class ServerMetrics:
    """The metrics of one server, in a registry of its own; an observer of its requests.

    Parameters
    ----------
    state : ServerState
    """

    def __init__(self, state: ServerState) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(EngineCounters(state.engine, state.model.name))
        self._labels = {"model_name": state.model.name, "engine": "0"}
        names = tuple(self._labels)
        self._histograms = {
            name: Histogram(OURS + name, text, names, buckets=buckets, registry=self._registry).labels(**self._labels)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        # Series that are there from the start: the rate of one that appears with its first event misses that event.
        self._ended = Counter(
            f"{OURS}request_success",
            "Texts that came to their end",
            (*names, "finished_reason"),
            registry=self._registry,
        )
        self._failed = Counter(
            f"{OURS}request_failure", "Requests that did not", (*names, "reason"), registry=self._registry
        )
        for reason in ("stop", "length", "abort"):
            self._ended.labels(**self._labels, finished_reason=reason)
        for reason in ("aborted", "timeout", "error"):
            self._failed.labels(**self._labels, reason=reason)
        self._gaps = _Gaps("inter_token_latency_seconds", "Between two tokens of a text", self._labels)
        self._registry.register(self._gaps)
        self._published = _Published(self._registry, state.config.vllm_metrics)
        self._progress: dict[str, tuple[float, int]] = {}
        self.lives = BlockLives(state.engine.block_records, state.engine.sizes.total_blocks)

    def text(self) -> bytes:
        """Return all metrics in the text format."""
        return generate_latest(self._published)

    def updated(self, output: RequestOutput) -> None:
        """Take the time between tokens; several that came at once share what they took."""
        now, written = time.monotonic(), sum(len(choice.token_ids) for choice in output.outputs)
        before = self._progress.get(output.request_id)
        if before is None:
            self._begun(output)
        elif written > before[1] and before[1]:
            texts = sum(not choice.finished for choice in output.outputs) or 1
            each = (now - before[0]) * min(texts, written - before[1]) / (written - before[1])
            self._gaps.observe(each, written - before[1])
        if before is None or written > before[1]:
            self._progress[output.request_id] = (now, written)

    def ended(self, output: RequestOutput | None, reason: str) -> None:
        """Take the end of a request."""
        if output is not None:
            self._progress.pop(output.request_id, None)
        if reason != "finished" or output is None:
            self._failed.labels(**self._labels, reason=reason).inc()
            return
        times, written = output.metrics, sum(len(choice.token_ids) for choice in output.outputs)
        for choice in output.outputs:
            self._ended.labels(**self._labels, finished_reason=choice.finish_reason or "stop").inc()
        self._observe("request_prompt_tokens", len(output.prompt_token_ids))
        self._observe("request_generation_tokens", written)
        if times.finished is not None:
            self._observe("e2e_request_latency_seconds", times.finished - times.arrived)
            if times.first_token is not None:
                decoding = times.finished - times.first_token
                self._observe("request_decode_time_seconds", decoding)
                longest = max(len(choice.token_ids) for choice in output.outputs)
                if longest > 1:
                    self._observe("request_time_per_output_token_seconds", decoding / (longest - 1))

    def look_at_blocks(self) -> None:
        """Learn what became of the sample of the blocks."""
        samples = self.lives.look(time.monotonic())
        for name, seconds in (
            ("kv_block_lifetime_seconds", samples.lifetimes),
            ("kv_block_idle_before_evict_seconds", samples.idle_before_evict),
            ("kv_block_reuse_gap_seconds", samples.reuse_gaps),
        ):
            for value in seconds.tolist():
                self._observe(name, value)

    def _begun(self, output: RequestOutput) -> None:
        times = output.metrics
        if times.first_scheduled is not None:
            self._observe("request_queue_time_seconds", times.first_scheduled - times.arrived)
        if times.first_token is not None:
            self._observe("time_to_first_token_seconds", times.first_token - times.arrived)
            if times.first_scheduled is not None:
                self._observe("request_prefill_time_seconds", times.first_token - times.first_scheduled)

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)


class _Published(Collector):
    """What is exported: without the times at which series were made, and twice where vLLM's names are wanted, too."""

    def __init__(self, registry: CollectorRegistry, with_vllm_names: bool) -> None:
        self._registry, self._with_vllm_names = registry, with_vllm_names

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics."""
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
            if self._with_vllm_names and metric.name.removeprefix(OURS) in VLLMS:
                twin = Metric(metric.name.replace(OURS, "vllm:", 1), metric.documentation, metric.type)
                twin.samples = [Sample(s.name.replace(OURS, "vllm:", 1), *s[1:]) for s in metric.samples]
                yield twin


@asynccontextmanager
async def metering(state: ServerState) -> AsyncIterator[None]:
    """Observe the requests and the blocks of a server for as long as it runs."""
    metrics = ServerMetrics(state)
    state.observers.append(metrics)
    try:
        async with in_background(_look(metrics)):
            yield
    finally:
        state.observers.remove(metrics)


async def _look(metrics: ServerMetrics) -> None:
    while True:
        metrics.look_at_blocks()
        await asyncio.sleep(SECONDS_BETWEEN_LOOKS)


router = APIRouter(tags=["server"], dependencies=[Operator])


@router.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
async def metrics(server: Server) -> Response:
    """Return the metrics in Prometheus' text format."""
    found = next((observer for observer in server.observers if isinstance(observer, ServerMetrics)), None)
    if found is None:
        raise ApiError(503, "the server has not started yet", code="not_ready", retry_after=1)
    return Response(found.text(), media_type=CONTENT_TYPE_LATEST)
