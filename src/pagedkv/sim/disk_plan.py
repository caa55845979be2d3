"""Memory or disk: the price of a disk tier beneath the pool, and how soon the first token comes with either.

A disk that every finished request is stored on finds what an LRU pool of its size would (`HitCurve.split`), so the
price of each share of the hits is read off the exact curve. What differs is the time: what lies in memory costs
nothing, what lies on the disk is read, the rest is computed.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from pagedkv.format import duration, format_bytes, percent, share, short
from pagedkv.sim.plan_types import DiskPlan, DiskPrice, Level, Plan, Size

SHARES = (0.8, 0.9, 0.95)
"""Shares of the attainable hit ratio that are priced."""
MOST_OF_IT = 0.5
"""A disk that brings this share of what memory would bring is the better buy: a byte of it costs far less."""


def price_disk(plan: Plan, memory: Size, read_bytes_per_second: float) -> DiskPlan:
    """Price a disk beneath a memory for some levels of a plan.

    Parameters
    ----------
    plan : Plan
        With at least one level.
    memory : Size
        Beside the disk, under LRU.
    read_bytes_per_second : float

    Returns
    -------
    DiskPlan
    """
    per_token = max(plan.prefill_seconds / max(plan.tokens, 1), 1e-300)
    load_rate = read_bytes_per_second / plan.bytes_per_block * plan.block_tokens
    pays = load_rate * per_token > 1  # else blocks are computed, as that is sooner

    def first_token(size: Size, loaded_blocks: float = 0.0) -> float:
        """Return the mean of all requests, where this much is found and so much of it loaded."""
        loading = loaded_blocks * plan.bytes_per_block / read_bytes_per_second
        return (plan.prefill_seconds - size.seconds_saved + loading) / plan.requests

    def priced(level: Level) -> DiskPrice:
        alone = level.lru
        of_memory, of_disk = plan.curve.split(memory.blocks, alone.blocks).tolist()
        is_needed = alone.blocks > memory.blocks
        return DiskPrice(
            share=level.share,
            memory_alone=alone,
            disk_blocks=alone.blocks if is_needed else 0,
            disk_bytes=alone.blocks * plan.bytes_per_block if is_needed else 0,
            hit_ratio=of_memory + of_disk,
            disk_hit_ratio=of_disk,
            first_token=first_token(alone, of_disk * plan.accesses) if is_needed and pays else first_token(memory),
            first_token_memory=first_token(max(alone, memory, key=lambda size: size.blocks)),
        )

    prices = tuple(priced(level) for level in plan.levels if level.share in {*SHARES, plan.target})
    made = DiskPlan(
        read_bytes_per_second=read_bytes_per_second,
        load_tokens_per_second=load_rate,
        prefill_tokens_per_second=1 / per_token,
        memory=memory,
        first_token=first_token(memory),
        first_token_without=plan.prefill_seconds / plan.requests,
        prices=prices,
        choice="",
        advice="",
    )
    choice, advice = _advice(made, next(price for price in prices if price.share == plan.target))
    return replace(made, choice=choice, advice=advice)


def _advice(plan: DiskPlan, price: DiskPrice) -> tuple[str, str]:
    """Return what to buy for the target, and why."""
    memory, wanted = format_bytes(plan.memory.bytes), share(price.share)
    alone = format_bytes(price.memory_alone.bytes)
    if not price.disk_blocks:
        return "neither", f"Buy neither: {memory} of memory finds {wanted} of what can be found, with no disk beneath."
    if plan.load_tokens_per_second <= plan.prefill_tokens_per_second:
        load, prefill = short(plan.load_tokens_per_second), short(plan.prefill_tokens_per_second)
        why = f"the disk gives {load} tokens/s, and computing makes {prefill}, so what is read would come later"
        return "memory", f"Buy memory, {alone} for {wanted}: {why}."
    by_memory = plan.first_token - price.first_token_memory
    part = (plan.first_token - price.first_token) / by_memory if by_memory > 0 else 0.0
    times = (
        f"for {wanted} the first token comes {duration(max(0.0, plan.first_token - price.first_token))} sooner with "
        f"{format_bytes(price.disk_bytes)} of disk beneath {memory} of memory, and {duration(max(0.0, by_memory))} "
        f"sooner with {alone} of memory instead"
    )
    if part >= MOST_OF_IT:
        return "disk", f"Buy the disk: {times}. It brings {percent(part)} of what the memory would."
    return "memory", f"Buy memory: {times}. The disk brings only {percent(part)} of that."


# How fast a disk reads, measured as a tier reads it: pieces of a file in no order, by a few threads, from the medium.

_PIECE_BYTES, _THREADS = 2 * 2**20, 4


def measure_read_rate(
    folder: Path, num_bytes: int = 256 * 2**20, *, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Write a temporary file of this size into a folder, and return the bytes per second at which it is read back.

    Raises
    ------
    OSError
        If there is no room, or no permission.
    """
    offsets = list(range(0, num_bytes, _PIECE_BYTES))
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in offsets:
            file.write(os.urandom(_PIECE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that it is read from the disk, not from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        random.Random(0).shuffle(offsets)
        with ThreadPoolExecutor(_THREADS) as threads:
            began = clock()
            read = sum(threads.map(lambda offset: len(os.pread(file.fileno(), _PIECE_BYTES, offset)), offsets))
            return read / max(clock() - began, 1e-9)
