"""What the compiler makes of the Triton kernels: read off machine code, as there is no device to run it.

A fast kernel needs these properties; whether it is fast, only a device can tell.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED_BYTES_OF_CORE = 228 << 10
RESERVED_BYTES = 1 << 10
REGISTERS_OF_CORE = 1 << 16


def compiled(cache, *options):
    """Facts of every kernel that was compiled, in a process that does not interpret."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "error", "-m", "tests.data.compile_kernels", *options]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("kernels"))


def one(kernels, **wanted):
    """The facts of the one kernel of which all this is true."""
    found = [facts for facts in kernels if wanted.items() <= facts.items()]
    assert found and all(facts == found[0] for facts in found), wanted
    return found[0]


def assert_fits(kernels, tolerated=0.0):
    for facts in kernels:
        if "expected_shared" in facts:
            assert facts["shared"] <= facts["expected_shared"] <= facts["allowed_shared"], facts
            assert facts["expected_shared"] <= 1.4 * facts["shared"], facts
            assert facts["loop_spills"] <= tolerated * facts["loop"], facts
            assert facts["loop"], facts


def test_every_kernel_compiles(kernels):
    """The interpreter forgives what the compiler does not: types, loops, layouts."""
    names = {"attend_tiles", "combine_splits", "_write_tokens", "_copy_words"}
    assert {facts["kernel"] for facts in kernels if facts["capability"] == 90} == names
    assert {facts["is_long"] for facts in kernels if facts["what"] == "features" and "is_long" in facts} == {
        True,
        False,
    }


def test_shared_memory_is_as_expected_and_main_loops_do_not_spill(kernels):
    assert_fits(kernels)


def test_decoding_bfloat16_can_keep_memory_busy(kernels):
    """Whole tiles of 64 keys are on their way, 16 bytes a copy, while the one before them is multiplied."""
    facts = one(kernels, what="bfloat16", is_long=False, capability=90)
    tile_bytes = 2 * 64 * 128 * 2
    assert facts["loop_wide_copies"] == facts["loop_copies"] == tile_bytes // 16 // facts["threads"]
    assert facts["loop_wide_loads"] == 0, "no keys by way of registers"
    assert facts["loop_pending_copies"] == [2], "keys and values of the next tile need not be there yet"
    assert facts["spills"] == 0
    # Three programs on a core: at least 96 KiB under way, where 35 KiB cover 1 µs at 4.8 TB/s over 132 cores.
    assert 3 * (facts["shared"] + RESERVED_BYTES) <= SHARED_BYTES_OF_CORE
    assert 3 * facts["registers"] * facts["threads"] <= REGISTERS_OF_CORE
    assert facts["loop"] <= 350, "instructions of a warp for a tile; 543 before blocks were looked up ahead"


def test_long_bfloat16_queries_multiply_by_warp_groups(kernels):
    facts = one(kernels, what="bfloat16", is_long=True, capability=90)
    assert facts["loop_group_products"] == 128 // 16 + 128 // 16 and facts["loop_warp_products"] == 0
    assert facts["loop_wide_copies"] == facts["loop_copies"] and facts["loop_pending_copies"] == [2]
    assert facts["spills"] == 0 and facts["loop"] <= 600


def test_writes_and_copies_move_sixteen_bytes_a_thread(kernels):
    facts = one(kernels, what="write torch.bfloat16")
    assert facts["wide_loads"] == facts["wide_stores"] == 1
    for facts in kernels:
        if facts["what"] == "copy":
            assert facts["wide_loads"] == facts["wide_stores"] == 8


@pytest.mark.slow
def test_other_types_sizes_and_devices(tmp_path):
    kernels = compiled(tmp_path, "--all")
    assert {facts["capability"] for facts in kernels} == {80, 89, 90}
    assert_fits([facts for facts in kernels if facts["what"] != "float32"], tolerated=0.01)
    for facts in kernels:
        if facts["what"] == "float32" and "is_long" in facts:
            assert facts["shared"] <= facts["expected_shared"] <= facts["allowed_shared"], facts
