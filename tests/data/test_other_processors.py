"""The kernels compiled for processors that have less than this one: they run, and give what they should."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding
import pytest

AVX2 = (
    "avx avx2 bmi bmi2 f16c fma fsgsbase lzcnt movbe popcnt sse sse2 sse3 sse4.1 sse4.2 ssse3 xsave cx16 sahf".split()
)
AVX512 = "avx512f avx512bw avx512cd avx512dq avx512vl avx512vbmi avx512vnni".split()
PROCESSORS = {"haswell": AVX2, "icelake-server": AVX2 + AVX512}
"""What none of them has: products of bfloat16; and the first has no registers of a whole vector."""
TESTS = ["tests/data/test_products.py", "tests/data/test_forward_products.py", "tests/hf/test_compiled.py"]
CHOSEN = "test_products or test_forward_products or (test_a_folders_weights and llama and bfloat16)"


@pytest.mark.parametrize("name", PROCESSORS)
def test_kernels_for_another_processor_pass_their_tests(name):
    features = PROCESSORS[name]
    if not all(llvmlite.binding.get_host_cpu_features().get(feature) for feature in features):
        pytest.skip("this processor cannot run them")
    env = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in features)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *TESTS, "-k", CHOSEN]
    run = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
