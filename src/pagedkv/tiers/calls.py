"""What a call of a tier may be given: token ids of whole blocks, and rows for the last of them."""

from __future__ import annotations

import numpy as np

from pagedkv.control.arguments import parse_ids
from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.tiers.tier import BlockFormat, Rows
from pagedkv.tiers.transfers import Ints
from pagedkv.typing import TokenIds

MAX_TOKEN = 2**31 - 1
"""Token ids are kept as int32."""


def whole_blocks(token_ids: TokenIds, block: BlockFormat) -> Ints:
    """Return the ids of the whole blocks of a text.

    Raises
    ------
    InvalidOperation
        If these are no token ids in 0 … 2³¹−1.
    """
    ids = parse_ids("token_ids", token_ids)
    ids = ids[: len(ids) // block.block_size * block.block_size]
    if len(ids) and not 0 <= ids.min() <= ids.max() <= MAX_TOKEN:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise bad_argument("token_ids", f"ids in 0 … {MAX_TOKEN}", f"{wrong}")
    return ids


def first_block(ids: Ints, rows: Rows, block: BlockFormat, *, is_filled: bool = False) -> int:
    """Return the block that the first of the rows is for.

    Raises
    ------
    InvalidOperation
        If they are no rows of such blocks, more than the text has, or cannot be filled though they are to be.
    """
    size, count = block.block_bytes, len(ids) // block.block_size
    is_array = isinstance(rows, np.ndarray) and rows.dtype == np.uint8 and rows.ndim == 2
    if not is_array or rows.shape[1] != size or len(rows) > count or (len(rows) and rows.strides[1] != 1):
        got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else type(rows).__name__
        wanted = f"uint8 [m, {size}] with m of at most {count}, rows in one piece"
        raise bad_argument("rows", wanted, got, f"a row has the {size} bytes of a block of the format")
    if is_filled and not rows.flags.writeable:
        raise bad_argument("rows", "an array that may be written", "one that may not")
    return count - len(rows)


def not_open() -> InvalidOperation:
    """Return the error of a tier that is used before it is opened."""
    return InvalidOperation(
        "the tier is not open: call open() with the format of the blocks",
        hint="open(BlockFormat(…)); an LLM with tiers=[…] does it",
    )
