"""DiskTier: restarts, whose a directory is, and how much room it takes."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
from tests.contracts.test_tier_contract import BLOCK, BYTES, SIZE, loaded, payload, text

from pagedkv import InvalidOperation, TierError
from pagedkv.tiers import BlockFormat, DiskTier
from pagedkv.tiers import slab as slab_module

ROOM = 64 * (4096 + 128)


def opened(path, size=ROOM, block=BLOCK, **options):
    return DiskTier(path, size, **options).open(block)


@pytest.fixture
def kept(tmp_path):
    """The directory of a tier that holds a text of nine blocks."""
    with opened(tmp_path / "tier") as tier:
        tier.store(text(9), payload(text(9))).result()
        tier.store(text(2), payload(text(2), salt="s"), "s").result()
    return tmp_path / "tier"


def contents(path):
    """Every byte of a directory."""
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_a_restart_finds_everything(kept):
    with opened(kept) as tier:
        assert tier.stats.restored == 11 and tier.match(text(9)).result() == 9
        assert (loaded(tier, text(9)) == payload(text(9))).all()
        assert (loaded(tier, text(2), "s") == payload(text(2), salt="s")).all()
        assert tier.match(text(2), "other").result() == 0
        tier.books.check()


def test_a_text_goes_on_after_a_restart(kept):
    ids = np.concatenate([text(9), text(3, 5)])
    with opened(kept) as tier:
        assert tier.store(ids, payload(ids)[9:]).result() == 12
    with opened(kept) as tier:
        assert (loaded(tier, ids) == payload(ids)).all() and tier.stats.restored == 14


def test_what_was_used_last_is_given_up_last_after_a_restart(tmp_path):
    room = 8 * (4096 + 128)
    with opened(tmp_path / "tier", room) as tier:
        for seed in (1, 2):
            tier.store(text(4, seed), payload(text(4, seed))).result()
    with opened(tmp_path / "tier", room) as tier:
        loaded(tier, text(4, 1))
    with opened(tmp_path / "tier", room) as tier:
        tier.store(text(4, 3), payload(text(4, 3))).result()
        assert [tier.match(text(4, seed)).result() for seed in (1, 2, 3)] == [4, 0, 4]


@pytest.mark.parametrize("other", [("model 2", SIZE, BYTES), ("model", 2 * SIZE, BYTES), ("model", SIZE, BYTES + 1)])
def test_another_model_finds_nothing(kept, other, caplog):
    with caplog.at_level(logging.WARNING, "pagedkv"), opened(kept, block=BlockFormat(*other)) as tier:
        assert tier.stats.restored == 0 == tier.match(text(9)).result()
        tier.books.check()
    assert "held blocks of another model: they are dropped" in caplog.text
    with opened(kept) as tier:
        assert tier.stats.restored == 0


def test_old_records_beside_a_new_key_are_void(kept):
    """As when a power cut keeps the new ``meta.json`` and loses that the records were emptied."""
    before = contents(kept)
    with opened(kept, block=BlockFormat("model 2", SIZE, BYTES)):
        pass
    for name in ("records", "slab"):
        (kept / name).write_bytes(before[name])
    with opened(kept, block=BlockFormat("model 2", SIZE, BYTES)) as tier:
        assert tier.stats.restored == 0


def test_what_was_cleared_stays_cleared(kept):
    with opened(kept) as tier:
        tier.clear()
        assert not np.any(np.fromfile(kept / "records", np.uint8)) and not np.any(np.fromfile(kept / "slab", np.uint8))
        tier.store(text(3, 4), payload(text(3, 4))).result()
    with opened(kept) as tier:
        assert tier.stats.restored == 3 and tier.match(text(9)).result() == 0


def test_what_is_cleared_while_it_is_stored_does_not_come_back(kept, monkeypatch):
    reached, go_on, write = threading.Event(), threading.Event(), slab_module.Slab.write

    def write_later(self, *arguments):
        reached.set()
        assert go_on.wait(60)
        write(self, *arguments)

    monkeypatch.setattr(slab_module.Slab, "write", write_later)
    with opened(kept) as tier:
        stored = tier.store(text(3, 4), payload(text(3, 4)))
        assert reached.wait(60)
        tier.clear()
        go_on.set()
        assert stored.result(60) == 0
    with opened(kept) as tier:
        assert tier.stats.restored == 0


def test_a_block_from_before_is_no_child_of_what_took_the_place_of_its_parent(tmp_path):
    """As where a power cut kept one page of each file from being written."""
    path, room = tmp_path / "tier", ROOM // 32  # two slots
    old, new = text(2), text(2, 2)
    with opened(path, room) as tier:
        tier.store(old, payload(old)).result()
    before = contents(path)
    with opened(path, room) as tier:
        for ids in (text(2, 1), new):  # the first of `new` lies where the first of `old` lay
            assert tier.store(ids, payload(ids)).result() == 2
    for name in ("records", "slab"):
        half = len(before[name]) // 2
        (path / name).write_bytes((path / name).read_bytes()[:half] + before[name][half:])
    with opened(path, room) as tier:
        assert tier.stats.restored == 1
        assert tier.match(new).result() == 1 == tier.match(np.concatenate([new[:SIZE], old[SIZE:]])).result()


def test_it_grows_and_shrinks(kept):
    with opened(kept, 2 * ROOM) as tier:
        assert tier.books.total_blocks == 128 and tier.stats.restored == 11
    with opened(kept, 5 * (4096 + 128)) as tier:
        assert tier.books.total_blocks == 5 == tier.stats.restored
        assert (loaded(tier, text(9)) == payload(text(9))[:5]).all()
        tier.books.check()


def test_a_salt_has_another_name_in_another_directory(tmp_path):
    """So that records of one tell nobody who else has the same."""
    names = set()
    for name in ("a", "b"):
        with opened(tmp_path / name) as tier:
            tier.store(text(1), payload(text(1)), "secret").result()
            names.add(tier._slots.name_of_salt("secret"))
            tier.clear()
            names.add(tier._slots.name_of_salt("secret"))
    assert len(names) == 4


@pytest.mark.parametrize("block_bytes", [1, 4095, 4096, 4097, 12_288])
def test_its_files_are_never_larger_than_it_may_be(tmp_path, block_bytes):
    block = BlockFormat("model", 24, block_bytes)
    rows, ids = np.random.default_rng(1).integers(0, 256, (40, block_bytes), np.uint8), np.arange(40 * 24)
    with opened(tmp_path / "tier", 300_000, block) as tier:
        assert tier.store(ids, rows).result() == min(40, tier.books.total_blocks)
        sizes = [(tmp_path / "tier" / name).stat().st_size for name in ("slab", "records")]
    assert 0.9 * 300_000 < sum(sizes) <= 300_000
    with opened(tmp_path / "tier", 300_000, block) as tier:
        into = np.zeros_like(rows)
        count = tier.load(ids, into).result()
        assert count == min(40, tier.books.total_blocks) and (into[:count] == rows[:count]).all()


def test_nobody_else_can_read_it(kept):
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in kept.iterdir()} == {0o600}
    assert b"secret" not in b"".join(contents(kept).values())


def test_no_text_of_a_salt_is_in_a_file(tmp_path):
    with opened(tmp_path / "tier") as tier:
        tier.store(text(2), payload(text(2)), "my secret salt").result()
    assert b"secret" not in b"".join(contents(tmp_path / "tier").values())


# Bad directories: one clear error each, and nothing is changed.


def refused(path, match, **options):
    before = contents(path) if path.is_dir() else None
    with pytest.raises(TierError, match=match) as caught:
        opened(path, **options)
    assert before is None or contents(path) == before
    assert caught.value.place == str(path) and isinstance(caught.value, OSError)


def test_the_directory_of_somebody_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    refused(tmp_path, "expected an empty directory or a tier's, got one with 'thesis.txt'")
    (tmp_path / "thesis.txt").rename(tmp_path / "slab")
    refused(tmp_path, "expected an empty directory or a tier's, got one with 'slab'")
    (tmp_path / "slab").rename(tmp_path / "meta.json")
    refused(tmp_path, "got a meta.json that is none of ours")
    for strange in ([], {"format": "else"}, {"format": "pagedkv tier", "schema": 1, "key": "ab"}, 3):
        (tmp_path / "meta.json").write_text(json.dumps(strange))
        refused(tmp_path, "got a meta.json that is none of ours")


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "Not a directory")


def test_files_of_another_version(kept):
    meta = json.loads((kept / "meta.json").read_text())
    (kept / "meta.json").write_text(json.dumps({**meta, "schema": 2}))
    refused(kept, "expected files of version 1, got version 2 of another pagedkv")


def test_a_directory_that_may_not_be_written(kept, monkeypatch):
    opens = os.open

    def read_only(path, flags, *mode):
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opens(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    refused(kept, "Read-only file system")
    with opened(kept, read_only=True) as tier:
        assert tier.match(text(9)).result() == 9


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="needs Linux")
def test_a_directory_that_cannot_be_made():
    with pytest.raises(
        TierError, match="tier /sys/kernel/pagedkv: (Operation not permitted|Permission denied|Read-only)"
    ):
        opened("/sys/kernel/pagedkv")


def test_a_directory_that_another_process_writes_to(kept):
    code = (
        "import sys; from pagedkv.tiers import DiskTier, BlockFormat\n"
        f"tier = DiskTier({str(kept)!r}, {ROOM}).open(BlockFormat('model', {SIZE}, {BYTES}))\n"
        "print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "open\n"
        refused(kept, f"is in use by process {other.pid}: one writes, others open it to read: read_only=True")
        with opened(kept, read_only=True) as reader:
            assert (loaded(reader, text(9)) == payload(text(9))).all()
        other.stdin.close()
    with opened(kept) as tier:
        assert tier.stats.restored == 11


def test_one_who_asks_who_writes_keeps_no_writer_out(kept, monkeypatch):
    monkeypatch.setattr(slab_module, "_LOCK_SECONDS", 60)
    with open(kept / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        threading.Timer(0.05, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        with opened(kept) as tier:
            assert tier.match(text(9)).result() == 9


def test_it_can_be_opened_by_what_it_says_of_itself(kept, tmp_path):
    assert DiskTier.format_of(kept) == BLOCK
    with DiskTier(kept, 1, read_only=True).open(DiskTier.format_of(kept)) as tier:
        assert (loaded(tier, text(9)) == payload(text(9))).all()
    with pytest.raises(TierError, match="expected the directory of a tier, got one without"):
        DiskTier.format_of(tmp_path / "none")


def test_a_second_tier_of_this_process(kept):
    with opened(kept) as tier:
        with pytest.raises(TierError, match=f"is in use by process {os.getpid()}"):
            opened(kept)
        assert (loaded(tier, text(9)) == payload(text(9))).all()


def test_a_disk_without_room(kept):
    refused(kept, r"expected room for 7,27\d TiB, got [\d.]+ \wiB on the disk", size="8000TB")
    with opened(kept) as tier:
        assert tier.stats.restored == 11


def test_a_disk_that_fills_up_while_files_are_allocated(kept, monkeypatch):
    def full(file, start, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(kept, r"512 KiB cannot be had for slab: No space left on device", size=2 * ROOM)
    monkeypatch.undo()
    with opened(kept) as tier:
        assert tier.stats.restored == 11


def test_a_full_disk_is_no_matter_once_it_is_open(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system of its own can be mounted here")
    try:
        with pytest.raises(TierError, match=r"expected room for 9.54 MiB, got 4 MiB on the disk"):
            opened(disk / "tier", "10MB")
        with opened(disk / "tier", "2MB") as tier:
            with pytest.raises(OSError, match="No space left"):
                (disk / "filler").write_bytes(bytes(2**22))
            ids = text(400)
            count = tier.store(ids, payload(ids)).result()
            assert count == tier.books.total_blocks > 400 or count == 400
            assert (loaded(tier, ids) == payload(ids)).all() and tier.stats.failed == 0
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_network_file_system_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(slab_module, "file_system_of", lambda path: "nfs4")
    refused(tmp_path / "tier", "expected a local file system, got nfs4")
    assert not (tmp_path / "tier").exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/mountinfo"), reason="needs Linux")
def test_the_file_system_of_a_path_is_that_of_its_nearest_mount(tmp_path):
    assert slab_module.file_system_of(tmp_path.__class__("/proc/self")) == "proc"
    assert slab_module.file_system_of(tmp_path / "not" / "there") not in ("", "proc")


def test_a_system_without_file_locks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(slab_module, "fcntl", None)
    refused(tmp_path, "needs file locks as POSIX has them")


def test_a_failed_opening_leaves_no_lock_behind(kept, monkeypatch):
    monkeypatch.setattr(slab_module.Slab, "_kept", lambda self, num_slots: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opened(kept)
    with open(kept / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_bad_arguments(tmp_path):
    for wrong in ("50 parsecs", "GB", 0, -1, 1.5, None, "0GB"):
        with pytest.raises(InvalidOperation, match="size: expected"):
            DiskTier(tmp_path, wrong)
    for wrong in (None, 3, ""):
        with pytest.raises(InvalidOperation, match="directory: expected a path"):
            DiskTier(wrong, "1GB")
    with pytest.raises(InvalidOperation, match="durable: expected a bool"):
        DiskTier(tmp_path, "1GB", durable=1)
    with pytest.raises(InvalidOperation, match="daily_writes: expected"):
        DiskTier(tmp_path, "1GB", daily_writes="much")
    with pytest.raises(InvalidOperation, match="strategy"):
        DiskTier(tmp_path, "1GB", strategy="best")
    with pytest.raises(InvalidOperation, match="size: expected at least 4224 bytes, got 4000"):
        opened(tmp_path / "tier", 4000)
    for wrong in (("", 1, 1), (None, 1, 1), ("m", 0, 1), ("m", 1, 0), ("m", 1.0, 1)):
        with pytest.raises(InvalidOperation):
            BlockFormat(*wrong)
    assert not list(tmp_path.iterdir())


# Readers.


def test_a_reader_sees_what_was_there_when_it_opened(kept):
    reader = opened(kept, read_only=True)
    with opened(kept) as writer:
        writer.store(text(3, 9), payload(text(3, 9))).result()
        assert reader.match(text(3, 9)).result() == 0 and reader.store(text(9), payload(text(9))).result() == 9
        assert reader.store(text(3, 9), payload(text(3, 9))).result() == 0
        assert (loaded(reader, text(9)) == payload(text(9))).all()
        writer.clear()
        writer.store(text(9, 3), payload(text(9, 3))).result()
        assert len(loaded(reader, text(9))) == 0
        reader.close()
        with reader.open(BLOCK):
            assert reader.match(text(9, 3)).result() == 9


def test_what_a_reader_forgets_is_still_the_writers(kept):
    with opened(kept) as writer, DiskTier(kept, read_only=True).open(BLOCK) as reader:
        assert reader.is_read_only and not writer.is_read_only
        reader.clear()
        assert reader.match(text(9)).result() == 0
        assert (loaded(writer, text(9)) == payload(text(9))).all()
    with opened(kept) as writer:
        assert writer.stats.restored == 11
    with pytest.raises(InvalidOperation, match="size: expected the most bytes of its files"):
        DiskTier(kept)


def test_a_reader_needs_a_tier(tmp_path, kept):
    refused(tmp_path / "none", "expected the directory of a tier, got one without", read_only=True)
    refused(kept, "holds blocks of another model", read_only=True, block=BlockFormat("model 2", SIZE, BYTES))


def test_a_tier_that_nobody_closed_lets_its_process_end(tmp_path):
    code = (
        "from pagedkv.tiers import DiskTier, BlockFormat; import numpy as np\n"
        f"tier = DiskTier({str(tmp_path / 'tier')!r}, '1MB').open(BlockFormat('m', 1, 8))\n"
        "print(tier.store([1, 2], np.zeros((2, 8), np.uint8)).result())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    with opened(tmp_path / "tier", "1MB", BlockFormat("m", 1, 8)) as tier:
        assert tier.stats.restored == 2


def test_texts_that_begin_alike_and_are_stored_at_once_are_all_found_after_a_restart(tmp_path):
    head = np.arange(8 * SIZE)
    texts = [np.concatenate([head, np.full(3 * SIZE, i)]) for i in range(6)]
    with opened(tmp_path / "tier") as tier:
        stores = [tier.store(ids, payload(ids)) for ids in (head, *texts)]
        assert [stored.result(60) for stored in stores] == [8] + 6 * [11]
        assert tier.stats.stored == 8 + 6 * 3, "a block was written twice"
    with opened(tmp_path / "tier") as tier:
        for ids in texts:
            assert (loaded(tier, ids) == payload(ids)).all() and len(loaded(tier, ids)) == 11


def test_a_store_that_waits_for_another_is_forgotten_with_it(tmp_path):
    with opened(tmp_path / "tier") as tier:
        texts = [np.concatenate([np.arange(8 * SIZE), np.full(3 * SIZE, i)]) for i in range(4)]
        stores = [tier.store(ids, payload(ids)) for ids in texts]
        tier.clear()
        assert all(stored.result(60) in (0, 11) for stored in stores) and tier.match(texts[3]).result() == 0
        tier.books.check()
