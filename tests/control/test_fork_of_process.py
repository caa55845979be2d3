"""os.fork() while other threads are inside calls: the child has a cache at rest, or a typed error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork here")

BEGIN = """
import os, signal, threading, warnings
warnings.simplefilter("ignore")
from pagedkv import BlockManager, InvalidOperation
from pagedkv.control import call_lock

def in_child(work):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(60)  # a child that hangs is killed by it
    try:
        os._exit(work())
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(9)

manager = BlockManager(400, 4)
"""

COMPILING = """
import time
from numba.core.compiler_lock import global_compiler_lock

held = threading.Event()

def compile_for_a_while():
    with global_compiler_lock:
        held.set()
        time.sleep(0.5)

def use():  # kernels that are loaded in the child
    manager.allocate(1, 5)
    return 0

threading.Thread(target=compile_for_a_while).start()
held.wait()
assert in_child(use) == 0
print("fine", flush=True)
"""

BUSY = """
def serve(seq_id):
    manager.allocate(seq_id, list(range(400)))
    manager.commit(seq_id)
    manager.append(seq_id, [1] * 9)
    manager.free(seq_id)

def keep_busy():
    seq_id = 0
    while True:
        seq_id += 1
        serve(seq_id)

def use():
    manager.check()
    manager.allocate(2**60, 5)
    manager.free(2**60)
    manager.check()
    return 0

use(), serve(0)  # what is imported while a process forks is nothing that pagedkv can wait for
threading.Thread(target=keep_busy, daemon=True).start()
for _ in range(6):
    assert in_child(use) == 0
print("fine", flush=True)
os._exit(0)
"""

STUCK = """
inside, for_ever = threading.Event(), threading.Event()
call_lock.PATIENCE_SECONDS = 0.05

def wait(event):
    inside.set()
    for_ever.wait()

def call():
    manager.allocate(1, [1, 2, 3, 4, 5])
    manager.commit(1)

def use():
    BlockManager(4).allocate(1, 1)
    try:
        manager.allocate(2, 1)
    except InvalidOperation as error:
        return 0 if "when the process forked" in str(error) else 1
    return 2

manager.subscribe(wait)
threading.Thread(target=call, daemon=True).start()
inside.wait()
assert in_child(use) == 0
for_ever.set()
manager.allocate(3, 1)
manager.check()
print("fine", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("script", [BUSY, STUCK, COMPILING], ids=["busy", "stuck", "compiling"])
def test_the_child_of_a_fork_has_a_cache_at_rest_or_a_typed_error(script):
    done = subprocess.run([sys.executable, "-c", BEGIN + script], capture_output=True, text=True, timeout=240)
    assert done.stdout == "fine\n", done.stdout + done.stderr
