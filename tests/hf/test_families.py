"""Families of transformers through every way to use the cache: a dozen of them, and all of them as a slow test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
# Hybrids with recurrent, convolution and linear-attention layers, mixtures of experts, decoders without an encoder.
SERVED = ["afmoe", "bamba", "bart", "cohere2", "glm4_moe", "granitemoehybrid", "lfm2_moe", "minimax_m2", "nemotron_h"]
SERVED += ["olmo_hybrid", "qwen3_5_text", "starcoder2"]
HYBRIDS = {"bamba", "granitemoehybrid", "lfm2_moe", "nemotron_h", "olmo_hybrid", "qwen3_5_text"}  # states are no blocks
REFUSED = ["minimax", "rwkv"]


@pytest.fixture(scope="module")
def families():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import families
    finally:
        sys.path.remove(str(SCRIPTS))
    return families


@pytest.mark.parametrize("name", SERVED)
def test_each_way_of_a_family_gives_its_own_tokens_or_is_refused(families, name):
    cells = families.sit(name)
    direct, reused, tiers = cells.pop("direct"), cells.pop("reused"), cells.pop("tiers")
    assert cells == dict.fromkeys(set(families.COLUMNS) - {"direct", "reused", "tiers"}, "equal")
    assert tiers == ("without" if name in HYBRIDS else "equal")
    assert int(reused.split(" of ")[0]) >= 180  # hybrids too, behind snapshots of their states
    assert direct == "equal" or direct.startswith("refused: ")


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_no_cache_is_right_for_is_refused_in_every_way(families, name):
    cells = families.sit(name)
    assert set(cells) == set(families.COLUMNS) and cells.pop("reused") == ""
    assert all(cell.startswith("refused: ") for cell in cells.values())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_family_is_wrong_and_none_crashes(tmp_path):
    command = [sys.executable, SCRIPTS / "families.py", "--output", tmp_path / "families.md"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert (tmp_path / "families.md").read_text().count(" | = |") > 800
