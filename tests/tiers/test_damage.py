"""Whatever happens to the files of a disk tier: blocks are lost, and none is ever wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def damage(kind, path, rounds, record):
    """Run one kind of damage in a process of its own; its counts are shown with the test."""
    command = [sys.executable, "-m", "tests.tiers.damage", kind, str(path), str(rounds)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    print(f"{kind} {rounds}: {counts}")
    for name, count in counts.items():
        record(name, count)
    return counts


@pytest.mark.parametrize("rounds", [6, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_writer_that_is_killed(rounds, tmp_path, record_property):
    counts = damage("kill", tmp_path, rounds, record_property)
    assert counts["wrong"] == 0
    assert counts["stored"] > 20 * rounds and counts["served"] > 100 * rounds and counts["opened"] == rounds


@pytest.mark.parametrize("rounds", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_pages_from_before_and_after(rounds, tmp_path, record_property):
    counts = damage("torn", tmp_path, rounds, record_property)
    assert counts["wrong"] == 0
    assert counts["stored"] > 20 * rounds and counts["served"] > 10 * rounds and counts["missed"] > rounds


@pytest.mark.parametrize("rounds", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_flipped_bits_and_files_cut_off(rounds, tmp_path, record_property):
    counts = damage("flips", tmp_path, rounds, record_property)
    assert counts["wrong"] == 0 == counts.get("healed_missed", 0)
    assert counts["stored"] > 200 and counts["served"] > 20 * rounds and counts["missed"] > rounds
    assert counts["opened"] + counts.get("refused", 0) == rounds
    assert counts["healed_served"] >= counts["healing_served"] > 0 == counts.get("healed_wrong", 0)


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_readers_beside_a_writer(seconds, tmp_path, record_property):
    counts = damage("readers", tmp_path, seconds, record_property)
    assert counts["wrong"] == 0
    assert counts["stored"] > 256 and counts["served"] > 50 and counts["opened"] > 2
