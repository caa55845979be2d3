"""What a tier is: five calls over whole chains of blocks, and what it has to know of a block."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from pagedkv.errors import bad_argument
from pagedkv.spec import MAX_COUNT
from pagedkv.typing import TokenIds
from pagedkv.validate import require_int, shown

Rows = npt.NDArray[np.uint8]
Value = TypeVar("Value")


@dataclass(frozen=True)
class BlockFormat:
    """What a tier must know of the blocks that it keeps.

    Parameters
    ----------
    fingerprint : str
        Whatever K and V depend on besides token ids: see :func:`fingerprint_of`. Blocks of one are never those of
        another.
    block_size : int
        Tokens of a block.
    block_bytes : int
        Bytes of a block, K and V over all layers.

    Raises
    ------
    InvalidOperation
        If an argument is out of range.
    """

    fingerprint: str
    block_size: int
    block_bytes: int

    def __post_init__(self) -> None:
        if not isinstance(self.fingerprint, str) or not self.fingerprint:
            hint = "fingerprint_of(…) makes one of the model"
            raise bad_argument("fingerprint", "a str that is not empty", shown(self.fingerprint), hint)
        require_int("block_size", self.block_size, 1, MAX_COUNT)
        require_int("block_bytes", self.block_bytes, 1)


@runtime_checkable
class Tier(Protocol):
    """Where whole blocks are kept beyond the pool, found by the token ids up to their end. Write your own with these.

    All calls count blocks from the first token, and take only whole ones: token ids behind the last are left aside.
    `rows` is staging memory, uint8 ``[m, block_bytes]``, for the last m of them; the tier reads or writes it until the
    future is done, and the caller leaves it alone so long. None of the calls waits for a medium.

    What a tier cannot give, for whatever reason, is a miss: the future answers with fewer blocks, and has an exception
    only where the tier itself is at fault. A tier may forget anything at any time. It must never answer with what was
    stored for other tokens, another salt or another model, nor with bytes that it has not verified.
    """

    medium: str
    """What it is made of, as events and metrics name it: ``"CPU"``, ``"DISK"``, ``"REMOTE"``."""

    def match(self, token_ids: TokenIds, cache_salt: str = "") -> Future[int]:
        """Answer how many leading blocks it seems to have."""
        ...

    def load(self, token_ids: TokenIds, rows: Rows, cache_salt: str = "") -> Future[int]:
        """Fill `rows`; answers how many of them, from the first one on, are right."""
        ...

    def store(self, token_ids: TokenIds, rows: Rows, cache_salt: str = "") -> Future[int]:
        """Keep blocks; answers how many leading blocks of the text it has then. What is there already is skipped.

        Blocks before those of `rows` must be there: where they are not, nothing can be kept.
        """
        ...

    def clear(self) -> None:
        """Forget everything; what is being stored now is forgotten, too."""
        ...

    def close(self) -> None:
        """Finish what is under way and let go of the medium. A second call does nothing."""
        ...


def answered(value: Value) -> Future[Value]:
    """Return a future that is done already."""
    future: Future[Value] = Future()
    future.set_result(value)
    return future
