"""``pagedkv tier``: directories are described, verified and emptied, and nothing else happens to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from tests.cli.commands import call
from tests.contracts.test_tier_contract import BLOCK, payload, text

from pagedkv.tiers import DiskTier

SLOT = 4096


@pytest.fixture
def kept(tmp_path):
    """The directory of a tier that holds eleven blocks of two salts."""
    path = tmp_path / "tier"
    with DiskTier(path, "1MB").open(BLOCK) as tier:
        tier.store(text(9), payload(text(9))).result()
        tier.store(text(2), payload(text(2), salt="s"), "s").result()
    return path


def contents(path):
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in sorted(path.iterdir())}


def flip(path, name, at):
    data = np.memmap(path / name, np.uint8, "r+")
    data[at] ^= 4
    data.flush()


def checked(path, code):
    result = call("tier", "check", path, "--json")
    assert result.exit_code == code
    found = json.loads(result.stdout)
    return found["good"], found["corrupt"], found["unreachable"]


def test_info_says_what_is_there_and_changes_nothing(kept):
    before = contents(kept)
    told = json.loads(call("tier", "info", kept, "--json").stdout)
    assert told.pop("last_written").startswith("20") and told.pop("bytes") == sum(
        len(data) for data, _ in before.values()
    )
    assert (
        told
        == {
            "directory": str(kept),
            "fingerprint": "model",
            "block_size": BLOCK.block_size,
            "block_bytes": BLOCK.block_bytes,
            "slots": 236,
            "blocks": 11,
            "salts": 2,
            "writer": None,
        }
        or told["slots"] == 236
    )
    shown = call("tier", "info", kept).stdout
    assert "11 of 236 (4.7%)" in shown and "nobody now" in shown
    assert contents(kept) == before


def test_info_names_the_writer(kept):
    with DiskTier(kept, "1MB").open(BLOCK):
        assert json.loads(call("tier", "info", kept, "--json").stdout)["writer"] == str(os.getpid())
        assert f"process {os.getpid()}" in call("tier", "info", kept).stdout
        assert checked(kept, 0) == (11, 0, 0)


def test_check_counts_what_is_good(kept):
    before = contents(kept)
    assert checked(kept, 0) == (11, 0, 0)
    shown = call("tier", "check", kept)
    assert shown.exit_code == 0 and "11 blocks" in shown.stdout
    assert contents(kept) == before


def test_check_finds_damage(kept):
    flip(kept, "slab", 4 * SLOT + 9)
    assert checked(kept, 1) == (10, 1, 0)
    flip(kept, "records", 7 * os.path.getsize(kept / "records") // 236 + 20)
    good, corrupt, unreachable = checked(kept, 1)
    assert (good + corrupt + unreachable, corrupt) == (11, 2)
    os.truncate(kept / "slab", 3 * SLOT)
    good, corrupt, unreachable = checked(kept, 1)
    assert (good, good + corrupt + unreachable) == (3, 11)
    shown = call("tier", "check", kept)
    assert shown.exit_code == 1 and "never served and computed again" in shown.stdout


def test_what_no_text_leads_to_is_no_fault(kept):
    """As where a tier was made smaller: what continued a block that is gone stays behind."""
    records = np.fromfile(kept / "records", np.uint8)
    size = len(records) // 236
    records[2 * size : 3 * size] = 0
    records.tofile(kept / "records")
    good, corrupt, unreachable = checked(kept, 0)
    assert corrupt == 0 and unreachable > 0 and good + unreachable == 10


def test_blocks_that_are_overwritten_meanwhile_are_no_fault(kept, monkeypatch):
    from pagedkv.tiers import inspection

    writer = DiskTier(kept, "1MB").open(BLOCK)
    first, told = inspection._are_right, []

    def meanwhile(slab, block, slots, wanted):
        if not told:
            told.append(True)
            writer.clear()
            other = text(11, 5)
            writer.store(other, payload(other)).result()
        return first(slab, block, slots, wanted)

    monkeypatch.setattr(inspection, "_are_right", meanwhile)
    result = inspection.check_tier(kept)
    writer.close()
    assert result.corrupt == 0 and result.good < 11


def test_a_bad_sector_is_one_corrupt_block(kept, monkeypatch):
    pread = os.preadv

    def bad(file, buffers, offset):
        if offset <= 4 * SLOT < offset + sum(map(len, buffers)) and os.readlink(f"/proc/self/fd/{file}").endswith(
            "slab"
        ):
            raise OSError(5, "Input/output error")
        return pread(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", bad)
    assert checked(kept, 1) == (10, 1, 0)


def test_clear_asks_first(kept):
    before = contents(kept)
    for answer in ("n\n", "\n"):
        result = call("tier", "clear", kept, input=answer)
        assert result.exit_code == 1 and "Forget 11 blocks" in result.stderr and "nothing was changed" in result.stderr
        assert contents(kept) == before
    assert call("tier", "clear", kept, input="").exit_code == 130 and contents(kept) == before
    assert call("tier", "clear", kept, input="y\n").exit_code == 0
    told = json.loads(call("tier", "info", kept, "--json").stdout)
    assert (told["blocks"], told["slots"], told["fingerprint"]) == (0, 0, "model") and told["bytes"] < 1000
    with DiskTier(kept, "1MB").open(BLOCK) as tier:
        assert tier.stats.restored == 0 and tier.store(text(9), payload(text(9))).result() == 9


def test_clear_is_refused_while_a_process_writes(kept):
    with DiskTier(kept, "1MB").open(BLOCK) as tier:
        result = call("tier", "clear", kept, "--yes")
        assert result.exit_code == 2 and result.stderr == (
            f"pagedkv: error: tier {kept}: is in use by process {os.getpid()}: one writes, others open it to read: "
            "read_only=True, --disk-read-only of a server\n"
        )
        assert tier.match(text(9)).result() == 9
    assert call("tier", "clear", kept, "--yes").exit_code == 0


@pytest.mark.parametrize("command", [["info"], ["check"], ["clear", "--yes"]])
def test_what_is_no_tier_is_left_alone_and_said_in_a_line(command, kept, tmp_path, monkeypatch):
    def refused(path, message):
        before = contents(path) if path.is_dir() else None
        result = call("tier", command[0], path, *command[1:])
        (line,) = result.stderr.splitlines()
        assert result.exit_code == 2 and message in line and not result.stdout
        assert before is None or contents(path) == before

    refused(tmp_path / "none", "expected the directory of a tier, got one without")
    assert not (tmp_path / "none").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    refused(mine, "expected the directory of a tier, got one without")
    (mine / "thesis.txt").write_text("years of work")
    refused(mine, "expected an empty directory or a tier's, got one with 'thesis.txt'")
    refused(mine / "thesis.txt", "Not a directory")
    meta = json.loads((kept / "meta.json").read_text())
    for changed in (
        {"block_size": 0},
        {"block_size": 2**31 - 1},
        {"fingerprint": 3},
        {"block_bytes": None},
        {"key": "ab"},
    ):
        (kept / "meta.json").write_text(json.dumps(meta | changed))
        refused(kept, "got a meta.json that is none of ours")
    (kept / "meta.json").write_text(json.dumps({**meta, "schema": 2}))
    refused(kept, "expected files of version 1, got version 2 of another pagedkv")
    (kept / "meta.json").write_text(json.dumps(meta))

    def denied(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", denied)
    result = call("tier", command[0], kept, *command[1:])
    assert result.exit_code == 2 and result.stderr == f"pagedkv: error: tier {kept}: Permission denied\n"


def test_it_needs_no_torch(kept):
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "from pagedkv.cli import main; main()"
    )
    for command in ("info", "check"):
        done = subprocess.run([sys.executable, "-c", code, "tier", command, kept], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_help_shows_examples():
    shown = call("tier", "--help").stdout
    assert all(name in shown for name in ("info", "check", "clear"))
    for name in ("info", "check", "clear"):
        assert f"pagedkv tier {name} ~/chats" in call("tier", name, "--help").stdout
