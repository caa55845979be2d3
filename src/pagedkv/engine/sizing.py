"""How large a pool is where nobody says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

__all__ = ["default_blocks", "free_memory"]

SHARE = 4  # of the free memory the pool takes one part in so many
LEAST = 64
MOST = 2**20
USUAL_LENGTH = 4096


def default_blocks(model: Any, block_size: int, max_num_seqs: int) -> Callable[[int], int]:
    """Return a function from the bytes of one block to the number of blocks.

    As many as `max_num_seqs` texts of the model's full length need, or a quarter of the memory that is free.
    """
    length = _longest(model) or USUAL_LENGTH
    wanted = -(-length // max(1, block_size)) * max_num_seqs
    device = getattr(model, "device", None)

    def count(bytes_per_block: int) -> int:
        affordable = free_memory(device) // (SHARE * max(1, bytes_per_block))
        return max(LEAST, min(wanted, affordable, MOST))

    return count


def free_memory(device: Any = None) -> int:
    """Return how many bytes are free on a torch device, the machine's memory by default."""
    if getattr(device, "type", "cpu") == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    free = [_free_of_machine(), *_free_of_group()]
    return min(free)


def _free_of_machine() -> int:
    try:
        fields = Path("/proc/meminfo").read_text().split()
        return int(fields[fields.index("MemAvailable:") + 1]) * 1024
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _free_of_group() -> list[int]:
    """Return what a container leaves, if it limits memory."""
    try:
        group = Path("/sys/fs/cgroup")
        most, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
        return [max(0, int(most) - int(used))]
    except (OSError, ValueError):  # no limit reads "max"
        return []


def _longest(model: Any) -> int | None:
    if isinstance(model, (str, PathLike)):
        config: Any
        try:
            config = json.loads((Path(model) / "config.json").read_text())
        except (OSError, ValueError):
            return None
        limit = config.get("max_position_embeddings") if isinstance(config, dict) else None
    else:
        config = getattr(model, "config", None)
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
