"""The same random calls without the compiler: every compiled function is also plain Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import numba
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from tests.stateful.test_states import States
from tests.stateful.test_stateful import BooksAlone, WithTensors

assert numba.config.DISABLE_JIT
short = settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
for machine in (BooksAlone, WithTensors):
    run_state_machine_as_test(machine, settings=short)
    assert machine.steps > 200
run_state_machine_as_test(States, settings=short)
"""

LONG = """
import numba
from tests.stateful import test_stateful

assert numba.config.DISABLE_JIT
test_stateful.run_steps(test_stateful.{machine}, 500_000)
"""


def test_every_public_call_as_plain_python():
    run_without_compiler(SCRIPT, seconds=300)


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["WithTensors", "BooksAlone"])
def test_half_a_million_steps_as_plain_python(machine):
    run_without_compiler(LONG.format(machine=machine), seconds=3600)


def run_without_compiler(script, seconds):
    """Run a script in an interpreter of its own, in which every compiled function is plain Python."""
    here = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "NUMBA_DISABLE_JIT": "1",
        "PYTHONPATH": os.pathsep.join([str(here / "src"), str(here)]),
    }
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-4000:]
