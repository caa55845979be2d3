"""The same random calls without the compiler: every compiled function is also plain Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import numba
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from tests.stateful.test_stateful import BooksAlone, WithTensors

assert numba.config.DISABLE_JIT
for machine in (BooksAlone, WithTensors):
    short = settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=short)
    assert machine.steps > 200
"""


def test_every_public_call_as_plain_python():
    here = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "NUMBA_DISABLE_JIT": "1",
        "PYTHONPATH": os.pathsep.join([str(here / "src"), str(here)]),
    }
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
