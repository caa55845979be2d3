"""What the machine says of itself, read from files as Linux writes them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pagedkv import machine


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/", {"cpu.max": "290000 100000"}, 2),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/jobs/mine", {"jobs/mine/cpu.max": "max 100000", "jobs/cpu.max": "300000 100000"}, 3),
        ("0::/seen/from/outside", {"cpu.max": "400000 100000"}, 4),
        ("1:cpu:/docker\n0::/", {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "50000"}, 5),
        ("1:cpu:/\n0::/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("0::/", {}, None),
    ],
)
def test_a_container_limits_the_cores(own, files, cores, tmp_path):
    (tmp_path / "own").write_text(own + "\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert machine._cores_of_group(tmp_path, tmp_path / "own") == cores


def test_no_control_groups_no_limit(tmp_path):
    assert machine._cores_of_group(tmp_path, tmp_path / "missing") is None


def test_fewer_cores_than_the_container_grants_are_all_there_are(monkeypatch):
    monkeypatch.setattr(machine, "_cores_of_group", lambda: 1)
    assert machine.usable_cores() == 1
    monkeypatch.setattr(machine, "_cores_of_group", lambda: 1 << 20)
    assert 1 <= machine.usable_cores() < 1 << 20


MAPS = """\
7f0000000000-7f0000002000 r--p 00000000 08:01 11   /site-packages/torch/lib/libtorch_cpu.so
Rss:                   8 kB
Anonymous:             0 kB
7f0000002000-7f0000006000 r-xp 00002000 08:01 11   /site-packages/torch/lib/libtorch_cpu.so
Rss:                  16 kB
Anonymous:             0 kB
7f0000006000-7f0000007000 r--p 00006000 08:01 11   /site-packages/torch/lib/libtorch_cpu.so
Rss:                   4 kB
Anonymous:             4 kB
7f0000007000-7f0000008000 rw-p 00007000 08:01 11   /site-packages/torch/lib/libtorch_cpu.so
Rss:                   0 kB
Anonymous:             0 kB
7f0000010000-7f0000011000 r-xp 00000000 08:01 12   /site-packages/llvmlite/binding/libllvmlite.so
Rss:                   4 kB
Anonymous:             0 kB
7f0000020000-7f0000021000 r-xp 00000000 08:01 13   /site-packages/torch/lib/libgomp.so.1
Rss:                   4 kB
Anonymous:             0 kB
7f0000030000-7f0000031000 r-xp 00000000 08:01 14   /usr/lib/libc.so.6
Rss:                   4 kB
Anonymous:             0 kB
7f0000040000-7f0000041000 r--p 00000000 08:01 15   /models/torch/lib/model.safetensors
Rss:                   4 kB
Anonymous:             0 kB
7f0000050000-7f0000051000 rw-p 00000000 00:00 0
Rss:                   4 kB
Anonymous:             4 kB
"""


def test_only_code_that_is_as_in_its_file_is_dropped():
    dropped = [(0x7F0000000000, 0x2000), (0x7F0000002000, 0x4000), (0x7F0000010000, 0x1000), (0x7F0000020000, 0x1000)]
    assert machine._untouched_code(MAPS) == dropped
    assert machine._untouched_code("") == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_code_that_was_dropped_runs_again():
    script = """
import llvmlite.binding, torch
from pagedkv import machine
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
def product(): return torch.ones(64, 64) @ torch.ones(64, 64)
first, before = product(), resident()
machine.give_back_unused()
after = resident()
assert after < before - 20, (before, after)
assert torch.equal(product(), first)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
