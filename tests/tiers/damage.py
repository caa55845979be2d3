"""Damage done to the files of a disk tier, and what is served after it: run as a process of its own, as it forks.

``python -m tests.tiers.damage kill|torn|flips|readers DIRECTORY ROUNDS`` prints the counts as JSON.

Every payload follows from the tokens up to its end, so each block that is served is known to be right or wrong.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import xxhash

from pagedkv.tiers import BlockFormat, DiskTier, TierError

SIZE, BYTES, SLOTS = 16, 20_000, 256
BLOCK = BlockFormat("model", SIZE, BYTES)
TOTAL = SLOTS * (20_480 + 128)
SALTS = ["", "salt"]


def payload(ids, first=0):
    """Rows of the blocks from `first` on."""
    digest, rows = xxhash.xxh3_64(), np.empty((len(ids) // SIZE, BYTES), np.uint8)
    for i, row in enumerate(rows):
        digest.update(np.ascontiguousarray(ids[i * SIZE : (i + 1) * SIZE], np.int64).tobytes())
        if i >= first:
            row[:] = np.random.default_rng(digest.intdigest()).integers(0, 256, BYTES, np.uint8)
    return rows[first:]


def texts(seed):
    """Texts without end, most of which go on from an earlier one."""
    rng, made = np.random.default_rng(seed), []
    while True:
        head = np.empty(0, np.int64)
        if made and rng.random() < 0.6:
            head = made[rng.integers(max(0, len(made) - 50), len(made))][: SIZE * int(rng.integers(0, 8))]
        made.append(np.concatenate([head, rng.integers(0, 3, SIZE * int(rng.integers(1, 12)))]))
        yield made[-1], SALTS[rng.integers(0, 2)]


def chains(tier):
    """Every chain that can be asked for, from its first block to a leaf, with its salt; another key knows no salts."""
    books, names = tier.books, {tier._slots.name_of_salt(salt): salt for salt in SALTS}
    blocks, contents = books._state.blocks, books._state.contents
    for leaf in np.flatnonzero((blocks["indexed"] != 0) & (blocks["num_children"] == 0)).tolist():
        path, at = [], leaf
        while at >= 0:
            path.append(at)
            at = int(blocks[at].parent)
        ids = np.concatenate([contents[block * SIZE : (block + 1) * SIZE] for block in reversed(path)])
        salt = names.get(books._namespaces.salt_of(-1 - at))
        if salt is not None:
            yield ids, salt


def serve(path, *, read_only=False, heal=False):
    """Open a tier, read all that it has and compare."""
    counts = Counter(opened=1)
    try:
        tier = DiskTier(path, TOTAL, read_only=read_only).open(BLOCK)
    except TierError:
        return Counter(refused=1)
    with tier:
        tier.books.check()
        counts["restored"] += tier.stats.restored
        for ids, salt in list(chains(tier)):
            rows = np.zeros((len(ids) // SIZE, BYTES), np.uint8)
            count = tier.load(ids, rows, salt).result()
            same = (rows[:count] == payload(ids)[:count]).all(axis=1)
            counts["served"] += int(same.sum())
            counts["wrong"] += int((~same).sum())
            if heal:
                tier.store(ids, payload(ids), salt).result()
        counts["missed"] += tier.stats.corrupt
        tier.books.check()
    return counts


def store(path, seed, most=10**9, stored=None, until=None, say=None):
    """Store texts, and count into shared memory; with a time, until then and until the slab was overwritten."""
    with DiskTier(path, TOTAL).open(BLOCK) as tier:
        for number, (ids, salt) in zip(range(most), texts(seed), strict=False):
            there = tier.match(ids, salt).result()
            tier.store(ids, payload(ids, there), salt).result()
            if stored is not None:
                stored[:8] = (tier.stats.stored).to_bytes(8, "little")
            if number == 1 and say is not None:
                os.write(say, b"r")  # from here on it may be killed: it has compiled, and it stores
            if until is not None and time.time() > until and tier.stats.stored > 2 * SLOTS:
                break
        tier.books.check()
        return Counter(stored=tier.stats.stored)


def forked(work):
    """Start a process; returns a function that waits for what it answers."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        try:
            os.write(write, json.dumps(work()).encode())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write)

    def answer():
        with os.fdopen(read, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        assert status == 0, "a process failed"
        return Counter(json.loads(said))

    return answer


def kill(path, rounds):
    """Kill a process that stores, at a random moment; then read all."""
    rng, counts, stored = np.random.default_rng(7), Counter(), mmap.mmap(-1, 8)
    for number in range(rounds):
        stored[:8] = bytes(8)
        ready, say = os.pipe()
        child = os.fork()
        if not child:
            try:
                store(path, number, stored=stored, say=say)
            finally:
                os._exit(1)
        os.close(say)
        assert os.read(ready, 1) == b"r"
        time.sleep(float(rng.uniform(0, 0.1)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        counts["stored"] += int.from_bytes(stored[:8], "little")
        counts += forked(lambda: serve(path))()
    return counts


def torn(path, rounds):
    """A power cut: each page of the slab and each half KiB of the records is from before or after more stores."""
    rng, counts, mixed = np.random.default_rng(8), forked(lambda: store(path, 0, 60))(), path / "../mixed"
    for number in range(rounds):
        before = {name: np.fromfile(path / name, np.uint8) for name in ("slab", "records")}
        counts += forked(lambda number=number: store(path, 1000 + number, 20))()
        shutil.rmtree(mixed, ignore_errors=True)
        shutil.copytree(path, mixed)
        for name, page in (("slab", 4096), ("records", 512)):
            after = np.fromfile(path / name, np.uint8).reshape(-1, page)
            is_new = rng.random(len(after)) < rng.uniform(0.02, 0.98)
            np.where(is_new[:, None], after, before[name].reshape(-1, page)).tofile(mixed / name)
        counts += forked(lambda: serve(mixed))()
    return counts


def flips(path, rounds):
    """Flip bits in all files, cut one off now and then; then store again, and all is well."""
    rng, counts, damaged = np.random.default_rng(9), forked(lambda: store(path, 0, 80))(), path / "../damaged"
    for number in range(rounds):
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(path, damaged)
        for name in ("slab", "records", *(["meta.json"] if number % 4 == 1 else [])):
            data = np.fromfile(damaged / name, np.uint8)
            at = rng.integers(0, len(data), 1 if name == "meta.json" else 40)
            data[at] ^= (1 << rng.integers(0, 8, len(at))).astype(np.uint8)
            data.tofile(damaged / name)
        if number % 3 == 0:
            name = ("slab", "records")[number % 2]
            os.truncate(damaged / name, int(rng.integers(0, os.path.getsize(damaged / name))))
        counts += forked(lambda: serve(damaged))()
    counts += Counter({f"healing_{name}": n for name, n in forked(lambda: serve(damaged, heal=True))().items()})
    return counts + Counter({f"healed_{name}": n for name, n in forked(lambda: serve(damaged))().items()})


def readers(path, seconds):
    """One process overwrites a small slab again and again while two others read it without locks."""
    forked(lambda: store(path, 1, 30))()
    until, is_over = time.time() + seconds, mmap.mmap(-1, 1)

    def write():
        try:
            return store(path, 1, until=until)
        finally:
            is_over[:] = b"1"

    def read():
        counts = Counter()
        while is_over[:] != b"1" or counts["opened"] < 2:
            counts += serve(path, read_only=True)
        return counts

    answers = [forked(write), forked(read), forked(read)]
    return sum((answer() for answer in answers), Counter())


def main():
    kind, path, rounds = sys.argv[1], Path(sys.argv[2]) / "tier", float(sys.argv[3])
    warm = path / "../warm"  # compile before forking, or children are killed that have stored nothing
    forked(lambda: store(warm, 0, 40))()
    forked(lambda: serve(warm))()
    counts = {"kill": kill, "torn": torn, "flips": flips, "readers": readers}[kind](path, int(rounds))
    print(json.dumps({"wrong": 0} | counts))


if __name__ == "__main__":
    main()
