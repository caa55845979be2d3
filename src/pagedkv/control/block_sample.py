"""The records of a few blocks, copied: enough to learn how long blocks live without looking at all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.control.inspection import Inspection

__all__ = ["read_blocks"]


def read_blocks(cache: Inspection, block_ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Return copies of the records of some blocks, as `control.state.BLOCK` has them."""
    with cache._lock:
        records: npt.NDArray[Any] = cache._state.blocks[block_ids]
        return records
