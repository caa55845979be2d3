"""The team of threads: every job is done once and whole, whoever comes late or never."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from pagedkv.data import team
from pagedkv.data.simd import fetch_add
from pagedkv.data.team import num_threads, run_in_threads, wait_until
from pagedkv.jit import compiled

ITEMS = 1000
compiled_only = pytest.mark.skipif("NUMBA_DISABLE_JIT" in os.environ, reason="threads are for compiled kernels")


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@compiled
def _count_items(counters, seen):
    """Count each of the items that is taken."""
    while True:
        item = fetch_add(counters, 0, 1)
        if item >= len(seen):
            return
        seen[item] += 1


@compiled
def _in_phases(counters, sums, num_phases):
    """Add one to every number, phase after phase; no phase begins before the last one ended."""
    size = len(sums)
    while True:
        work = fetch_add(counters, 0, 1)
        if work >= num_phases * size:
            return
        phase, place = work // size, work % size
        wait_until(counters, 1, phase * size)
        before = sums[place - 1] if place else sums[size - 1]
        if before >= phase:
            sums[place] += 1
        fetch_add(counters, 1, 1)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_item_is_worked_on_once(threads):
    for _ in range(50):
        seen = np.zeros(ITEMS, np.int64)
        run_in_threads(_count_items, (np.zeros(1, np.int64), seen), threads)
        assert (seen == 1).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_phase_sees_what_the_one_before_it_wrote(threads):
    sums = np.zeros(16, np.int64)
    run_in_threads(_in_phases, (np.zeros(2, np.int64), sums, 50), threads)
    assert (sums == 50).all()


def test_callers_at_the_same_time_do_all_of_their_work():
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(test_every_item_is_worked_on_once, 2) for _ in range(8)]:
            done.result()


def test_callers_at_the_same_time_do_not_wait_for_each_other():
    entered, leave = threading.Event(), threading.Event()

    def block():
        entered.set()
        leave.wait(60)

    blocking = threading.Thread(target=run_in_threads, args=(block, (), 2))
    blocking.start()
    try:
        assert entered.wait(60)
        test_every_item_is_worked_on_once(2)
        assert blocking.is_alive()
    finally:
        leave.set()
        blocking.join()


@compiled_only
def test_that_many_threads_call_the_kernel():
    together = threading.Barrier(3, timeout=60)
    run_in_threads(together.wait, (), 3)
    run_in_threads(together.wait, (), 3)


@compiled_only
def test_a_call_from_within_a_kernel_is_made_alone():
    names = []

    def outer():
        run_in_threads(lambda: names.append(threading.current_thread().name), (), 4)

    together = threading.Barrier(2, timeout=60)
    run_in_threads(lambda: (together.wait(), outer()), (), 2)
    assert len(names) == 2 and len(set(names)) == 2


@compiled_only
def test_nobody_waits_for_a_thread_that_never_comes(monkeypatch):
    monkeypatch.setattr(team, "_team", team._Team())
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    test_every_item_is_worked_on_once(3)
    test_a_phase_sees_what_the_one_before_it_wrote(3)


@compiled_only
def test_where_no_thread_can_be_started_the_caller_does_all(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(team, "_team", team._Team())
    monkeypatch.setattr(threading.Thread, "start", refuse)
    test_every_item_is_worked_on_once(3)


@compiled_only
def test_a_thread_that_comes_late_finds_nothing_to_do(monkeypatch):
    late, calls = threading.Event(), []

    class Late(team._Job):
        def take_place(self):
            if threading.current_thread().name.startswith("pagedkv"):
                late.wait(60)
            return super().take_place()

    crew = team._Team()
    monkeypatch.setattr(team, "_team", crew)
    monkeypatch.setattr(team, "_Job", Late)
    run_in_threads(calls.append, (1,), 2)
    late.set()
    crew.stop()
    assert calls == [1] and not crew.helpers[0].is_alive()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_an_error_in_any_thread_reaches_the_caller(threads):
    together = threading.Barrier(1 if team._INTERPRETED else threads, timeout=60)

    def kernel(number):
        together.wait()
        is_helper = threading.current_thread().name.startswith("pagedkv")
        if is_helper or threads == 1 or team._INTERPRETED:
            raise MemoryError(f"no room for {number}")

    with pytest.raises(MemoryError, match="no room for 3"):
        run_in_threads(kernel, (3,), threads)
    test_every_item_is_worked_on_once(threads)


@compiled_only
def test_who_is_interrupted_waits_for_the_others():
    together, ended = threading.Barrier(2, timeout=60), []

    def kernel():
        together.wait()
        if not threading.current_thread().name.startswith("pagedkv"):
            raise KeyboardInterrupt
        time.sleep(0.05)
        ended.append(1)

    with pytest.raises(KeyboardInterrupt):
        run_in_threads(kernel, (), 2)
    assert ended == [1]
    test_every_item_is_worked_on_once(2)


@compiled_only
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_that_are_about_to_return_from_a_kernel_that_joins_are_waited_for_by_the_next_call(threads):
    together, leave, ended = threading.Barrier(2, timeout=60), threading.Event(), []

    def kernel():
        together.wait()
        if threading.current_thread().name.startswith("pagedkv"):
            leave.wait(60)
            time.sleep(0.05)
            ended.append("helper")

    run_in_threads(kernel, (), 2, joins=True)
    assert not ended
    leave.set()
    run_in_threads(lambda: ended.append("next"), (), threads)
    assert ended[:2] == ["helper", "next"]


@compiled_only
def test_what_was_given_is_not_kept():
    class Given:
        pass

    given = Given()
    gone = weakref.ref(given)
    run_in_threads(lambda _: None, (given,), 2)
    del given
    assert gone() is None


@compiled_only
def test_threads_are_as_many_as_torch_has_and_the_machine_allows(torch_threads, monkeypatch):
    monkeypatch.setattr(team, "usable_cores", lambda: 3)
    for wanted, given in ((1, 1), (2, 2), (5, 3)):
        torch_threads(wanted)
        assert num_threads() == given


@compiled_only
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_one_processor_takes_one_thread(torch_threads):
    torch_threads(2)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert num_threads() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_without_the_compiler_there_is_one_thread(monkeypatch, torch_threads):
    torch_threads(2)
    monkeypatch.setattr(team, "_INTERPRETED", True)
    assert num_threads() == 1
    names = []
    run_in_threads(lambda: names.append(threading.current_thread().name), (), 4)
    assert names == [threading.current_thread().name]


@compiled_only
def test_idle_threads_sleep():
    run_in_threads(_count_items, (np.zeros(1, np.int64), np.zeros(ITEMS, np.int64)), 4)
    deadline = time.monotonic() + 60
    while not all(team._team.sleeping):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.15
    test_every_item_is_worked_on_once(4)


BEGIN = """
import os, signal, sys, threading, time, warnings
import numpy as np
warnings.simplefilter("ignore")
from tests.data.test_team import ITEMS, _count_items
from pagedkv.data import team
from pagedkv.data.team import run_in_threads

def work(threads=3):
    for _ in range(20):
        seen = np.zeros(ITEMS, np.int64)
        run_in_threads(_count_items, (np.zeros(1, np.int64), seen), threads)
        assert (seen == 1).all()

work()
"""
ENDINGS = {
    "asleep": "time.sleep(0.1)",
    "in a kernel": "threading.Thread(target=run_in_threads, args=(time.sleep, (9,), 2), daemon=True).start(); work()",
    "used at exit": "import atexit; atexit.register(work); atexit.register(team._team.stop)",
}
FORK = """
if hasattr(os, "fork"):
    def never_ends():
        while True:
            work()

    threading.Thread(target=never_ends, daemon=True).start()
    for _ in range(5):
        child = os.fork()
        if not child:
            signal.alarm(60)  # a child that hangs is killed by it
            work()
            os._exit(7 if len(team._team.helpers) == 2 else 8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


def output_of(script: str) -> tuple[int, list[str]]:
    """Return the exit code and what is printed, but for news of the compiler."""
    command = [sys.executable, "-c", BEGIN + script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    lines = (result.stdout + result.stderr).splitlines()
    return result.returncode, [line for line in lines if not line.startswith("pagedkv: ")]


@compiled_only
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_process_ends_in_silence(ending):
    assert output_of(ENDINGS[ending]) == (0, [])


@compiled_only
def test_a_forked_child_has_a_team_of_its_own():
    assert output_of(FORK) == (0, [])
