"""What the machine says of itself, read from files as Linux writes them."""

from __future__ import annotations

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
