"""What policies find on two replicas is what the simulator says of the same requests."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHATS, TURNS, GROWTH, BLOCKS = 13, 10, 8, 728


def chats() -> list[dict[str, object]]:
    """Chats that grow by some blocks a turn; in each round every one takes a turn, in another order."""
    drawn = random.Random(3)
    return [
        {
            "timestamp": 1000 * turn,
            "input_length": 512 * GROWTH * (turn + 1),
            "output_length": 1,
            "hash_ids": [0, *(1 + 1000 * chat + place for place in range(GROWTH * (turn + 1) - 1))],
        }
        for turn in range(TURNS)
        for chat in drawn.sample(range(CHATS), CHATS)
    ]


def test_prefix_routing_finds_half_as_much_again_as_round_robin(tmp_path: Path, ray_folder: str) -> None:
    trace, out = tmp_path / "chats.jsonl", tmp_path / "rows.json"
    trace.write_text("".join(json.dumps(row) + "\n" for row in chats()))
    asked = ["--trace", trace, "--start", "0", "--blocks", BLOCKS, "--json", out]
    done = subprocess.run(
        [sys.executable, "benchmarks/fleet.py", *map(str, asked)],
        cwd=ROOT,
        env={**os.environ, "RAY_TMPDIR": ray_folder},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    *found, ratio = json.loads(out.read_text())
    assert ratio["name"] == "prefix over round robin" and ratio["value"] >= ratio["target"] == 1.5, done.stdout
    served = {row["name"].partition(", ")[2]: row["value"] for row in found}
    said = {row["name"].partition(", ")[2]: float(re.findall(r"[\d.]+", row["note"])[0]) for row in found}
    assert all(abs(served[name] - said[name]) < 0.05 for name in said), done.stdout
    assert min(served["prefix"], served["sticky"]) > max(served["round_robin"], served["least_load"])
