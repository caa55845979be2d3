from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import socket
import subprocess
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from tests.sim import sweeping
from tests.sim.sweeping import small_trace

from pagedkv.control.strategies import LRU
from pagedkv.errors import InvalidOperation, MissingExtra, ReplayFailed
from pagedkv.sim import Timing
from pagedkv.sim.replayer import replay
from pagedkv.sim.sweeps import sweep

HERE = "tests.sim.sweeping"


def counts(results):
    """Everything of the results but the seconds."""
    return [
        (r.strategy, r.blocks, r.requests, r.accesses, r.hit_blocks, r.hit_tokens, r.reclaimed, r.hits.tolist())
        for r in results
    ]


def tail_first_lru(trace, blocks):
    """Count the hits of a plain dictionary."""
    cache, hits = OrderedDict(), 0
    for start, stop in zip(trace.offsets[:-1], trace.offsets[1:], strict=True):
        request = trace.ids[start:stop].tolist()
        for block in request:
            if block not in cache:
                break
            hits += 1
        for block in reversed(request):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > blocks:
            cache.popitem(last=False)
    return hits


def test_results_come_in_the_order_asked_for_and_are_right():
    trace = small_trace()
    results = sweep(trace, ["fifo", "lru"], [200, 16, 64], jobs=1)
    assert [(r.strategy, r.blocks) for r in results] == [
        *(("fifo", blocks) for blocks in (200, 16, 64)),
        *(("lru", blocks) for blocks in (200, 16, 64)),
    ]
    assert [r.hit_blocks for r in results[3:]] == [tail_first_lru(trace, blocks) for blocks in (200, 16, 64)]


def test_processes_find_what_one_process_finds():
    trace = small_trace()
    strategies = ["lru", "LFU", "optimal", "priority:levels=3", f"{HERE}:Learns", sweeping.Mine()]
    alone = sweep(trace, strategies, [16, 64], jobs=1)
    assert counts(sweep(trace, strategies, [16, 64], jobs=2)) == counts(alone)
    assert [r.strategy for r in alone[::2]] == [*strategies[:-1], "LRU"]


def test_what_a_strategy_learned_in_one_cell_is_not_known_in_the_next():
    trace, learner = small_trace(), sweeping.Learns()
    first, again = sweep(trace, [learner], [16, 16], jobs=1)
    assert first.hit_blocks == again.hit_blocks
    assert learner.seen == 0
    assert first.hit_blocks != replay(trace, 16).hit_blocks  # so it does turn its mind


def test_timing_reaches_every_cell():
    trace, timing = small_trace(), Timing(100.0, 1.0)
    timed = sweep(trace, ["lru", "fifo"], [64, 128], jobs=1, timing=timing)
    assert [r.preempted for r in timed] == [
        replay(trace, b, s, timing=timing).preempted for s in ("lru", "fifo") for b in (64, 128)
    ]
    assert sum(r.preempted for r in timed) > 0


def test_a_capacity_beyond_the_trace_finds_all_that_can_be_found():
    trace = small_trace()
    for result in sweep(trace, ["lru", "optimal"], [trace.num_distinct, 10**9], jobs=1):
        assert result.hit_blocks == trace.num_accesses - trace.num_distinct
        assert result.reclaimed == 0


def test_progress_counts_every_cell():
    for jobs in (1, 2):
        calls = []
        sweep(
            small_trace(), ["lru", "fifo"], [16, 64], jobs=jobs, progress=lambda *call, calls=calls: calls.append(call)
        )
        assert calls == [(done, 4) for done in range(5)]


def test_nothing_asked_for_is_nothing():
    assert sweep(small_trace(), [], [16]) == [] == sweep(small_trace(), ["lru"], [])


def test_an_empty_trace_has_no_hits():
    result, best = sweep(small_trace().slice(0, 0), ["lru", "optimal"], [16], jobs=1)
    assert (result.accesses, result.hit_ratio, result.token_hit_ratio) == (0, 0.0, 0.0)
    assert (best.accesses, best.hit_ratio) == (0, 0.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"blocks": [0]}, "blocks: expected an int in 1"),
        ({"blocks": [16, -1]}, "got -1"),
        ({"blocks": [True]}, "got True"),
        ({"blocks": [2.5]}, "got 2.5"),
        ({"blocks": [2**40]}, "blocks"),
        ({"blocks": "16"}, "blocks: expected a sequence"),
        ({"strategies": "lru"}, "strategies: expected a sequence"),
        ({"strategies": ["no_such"]}, "expected module:Class or one of adaptive, fifo, "),
        ({"strategies": ["no_such:levels=3"]}, "expected module:Class or one of adaptive, fifo, "),
        ({"strategies": ["lru:levels=3"]}, "takes no arguments"),
        ({"strategies": ["no_such.module:Class"]}, "'no_such.module:Class' cannot be imported: ModuleNotFoundError"),
        ({"strategies": [f"{HERE}:NoSuch"]}, "cannot be imported: AttributeError"),
        ({"strategies": [f"{HERE}:HERE"]}, "cannot be imported"),
        ({"strategies": ["sys:maxsize"]}, "expected a class, got"),
        ({"strategies": [f"{HERE}:NoStrategy"]}, "score_sequences and score_blocks"),
        ({"strategies": [f"{HERE}:NeedsArguments"]}, "cannot be made without arguments: TypeError"),
        ({"strategies": [LRU]}, "strategy: expected a name or an object"),
        ({"jobs": 0}, "jobs: expected an int in 1"),
        ({"jobs": 1.5}, "jobs: expected an int"),
        ({"strategies": ["lru", "optimal"], "timing": Timing()}, "the optimum knows no time"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(changes, said):
    calls = []
    arguments = {"strategies": ["lru"], "blocks": [16], "progress": lambda *call: calls.append(call)} | changes
    with pytest.raises(InvalidOperation) as caught:
        sweep(small_trace(), **arguments)
    assert said in str(caught.value)
    assert calls == []


def test_lengths_alone_tell_no_hits():
    trace = dataclasses.replace(small_trace(), has_content=False, format="azure")
    with pytest.raises(InvalidOperation, match="format azure carries lengths only"):
        sweep(trace, ["lru"], [16])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("WrongShape", "WrongShape.score_blocks: expected to return integers of shape"),
        ("NotANumber", "NotANumber.score_blocks: expected to return integers"),
        ("Raises", "LookupError: no such table"),
        ("RaisesLate", "LookupError: no such table"),
    ],
)
def test_a_strategy_that_fails_is_named_with_its_cell(name, said):
    with pytest.raises(ReplayFailed) as caught:
        sweep(small_trace(), ["lru", f"{HERE}:{name}"], [32, 16], jobs=1)
    assert (caught.value.strategy, caught.value.blocks) == (f"{HERE}:{name}", 32)
    assert said in caught.value.reason and said in str(caught.value)


def test_a_failure_elsewhere_comes_home_with_its_traceback():
    with pytest.raises(ReplayFailed) as caught:
        sweep(small_trace(), ["lru", f"{HERE}:RaisesLate"], [32], jobs=2)
    assert (caught.value.strategy, caught.value.blocks) == (f"{HERE}:RaisesLate", 32)
    assert caught.value.reason == "LookupError: no such table"
    assert any("in score_blocks" in note for note in caught.value.__notes__)


def test_a_process_that_dies_names_its_cell():
    with pytest.raises(ReplayFailed) as caught:
        sweep(small_trace(), ["lru", f"{HERE}:Dies"], [24], jobs=2)
    assert (caught.value.strategy, caught.value.blocks) == (f"{HERE}:Dies", 24)
    assert "exit code 7" in caught.value.reason


def test_a_strategy_that_cannot_be_sent_is_named():
    class Local(LRU):
        pass

    trace = small_trace()
    assert sweep(trace, [Local()], [16], jobs=1)[0].hit_blocks == tail_first_lru(trace, 16)
    with pytest.raises(ReplayFailed, match="cannot be sent to another process"):
        sweep(trace, [Local(), "lru"], [16], jobs=2)


# --- Ray -------------------------------------------------------------------------------------------------------------


class FakeRay(types.ModuleType):
    """The few calls that are used, answered in this process, the last task first."""

    def __init__(self, cluster=True):
        super().__init__("ray")
        self.cluster, self.connected, self.cancelled, self.dead = cluster, False, [], ()

    def is_initialized(self):
        return self.connected

    def init(self, address, **options):
        if not self.cluster:
            raise ConnectionError("Could not find any running Ray instance.")
        self.connected = address == "auto"

    def put(self, value):
        for name in ("ids", "offsets", "times", "input_tokens"):
            getattr(value, name).flags.writeable = False  # as arrays in the object store are
        return lambda: value

    def remote(self, **options):
        def make(function):
            def call(stored, cell):
                return lambda: function(stored(), cell)

            return types.SimpleNamespace(remote=call)

        return make

    def wait(self, tasks, num_returns):
        return tasks[-num_returns:], tasks[:-num_returns]

    def get(self, task):
        if self.dead and task.__qualname__.count("remote"):
            raise RuntimeError(self.dead)
        return task()

    def cancel(self, task, force):
        self.cancelled.append(task)


def test_ray_finds_what_one_process_finds(monkeypatch):
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    trace, calls = small_trace(), []
    found = sweep(trace, ["lru", "optimal"], [16, 64], ray=True, progress=lambda *call, calls=calls: calls.append(call))
    assert counts(found) == counts(sweep(trace, ["lru", "optimal"], [16, 64], jobs=1))
    assert fake.connected and calls == [(done, 4) for done in range(5)]


def test_a_task_that_fails_is_named_and_the_others_are_cancelled(monkeypatch):
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    with pytest.raises(ReplayFailed, match="RaisesLate with 64 blocks failed: LookupError"):
        sweep(small_trace(), ["lru", f"{HERE}:RaisesLate"], [16, 64], ray=True)
    assert len(fake.cancelled) == 3
    fake.dead = "the node is gone"
    with pytest.raises(ReplayFailed, match="fifo with 16 blocks failed: RuntimeError: the node is gone"):
        sweep(small_trace(), ["lru", "fifo"], [16], ray=True)


def test_ray_without_a_cluster(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", FakeRay(cluster=False))
    with pytest.raises(InvalidOperation, match="ray start --head") as caught:
        sweep(small_trace(), ["lru"], [16], ray=True)
    assert caught.value.reason.endswith("got ConnectionError: Could not find any running Ray instance.")
    assert caught.value.argument == "ray"


def test_ray_that_is_not_installed_says_how_to_install_it(monkeypatch):
    def no_ray(name, *rest):
        if name == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
        return importlib.import_module(name, *rest)

    monkeypatch.setattr("pagedkv.sim.sweeps.import_module", no_ray)
    with pytest.raises(MissingExtra, match=r"pip install 'pagedkv\[ray\]'"):
        sweep(small_trace(), ["lru"], [16], ray=True)


@pytest.mark.peer
def test_a_real_cluster_finds_the_same():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        trace = small_trace()
        found = sweep(trace, ["lru", "fifo", "optimal"], [16, 64], ray=True)
        assert counts(found) == counts(sweep(trace, ["lru", "fifo", "optimal"], [16, 64], jobs=1))
    finally:
        ray.shutdown()


# --- scripts ---------------------------------------------------------------------------------------------------------


def test_a_script_without_the_guard_is_told_about_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from tests.sim.sweeping import small_trace\nfrom pagedkv.sim.sweeps import sweep\n"
        "sweep(small_trace(), ['lru', 'fifo'], [16], jobs=2)\n"
    )
    root = str(Path(sweeping.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1
    assert 'needs the guard if __name__ == "__main__":' in done.stderr.splitlines()[-1]


def test_the_oracle_sees_a_difference():
    trace = small_trace()
    assert len({tail_first_lru(trace, blocks) for blocks in (16, 64, 200)}) == 3
    assert np.array_equal(np.unique(trace.ids), np.arange(trace.num_distinct))


class UnreachableRay:
    """As much of Ray as a sweep touches before it is connected."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.asked = error, []

    def is_initialized(self) -> bool:
        return False

    def init(self, **options) -> None:
        self.asked.append(options)
        raise self.error or AssertionError("connected")


@pytest.fixture
def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return port


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "[::1]:{port}", "no.such.invalid:{port}"]
)
def test_a_cluster_that_nobody_serves_is_refused_before_ray_tries_for_minutes(monkeypatch, closed_port, address):
    ray = UnreachableRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_ADDRESS", address.format(port=closed_port))
    with pytest.raises(
        InvalidOperation, match="ray: expected a running cluster .*, got nobody who answers at RAY_ADDR"
    ):
        sweep(small_trace(), ["lru"], [4], ray=True)
    assert ray.asked == []


def test_what_ray_says_is_shown(monkeypatch):
    words = "This node has an IP address of 192.0.2.2, and Ray cannot find the matching Raylet address"
    ray = UnreachableRay(RuntimeError(words))
    monkeypatch.setitem(sys.modules, "ray", ray)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(InvalidOperation, match=f"got RuntimeError: {words}"):
            sweep(small_trace(), ["lru"], [4], ray=True)
    (options,) = ray.asked
    assert options["logging_level"] <= logging.WARNING
