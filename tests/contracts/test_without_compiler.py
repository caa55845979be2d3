"""The strategies keep their contract in plain Python too, where a kernel's integers have NumPy's rules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_strategy_contract_holds_without_the_compiler():
    contract = Path(__file__).with_name("test_strategy_contract.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", str(contract)]
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    assert " passed" in found.stdout
