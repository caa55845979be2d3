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
        """Answer how many leading blocks of a text it seems to have.

        Parameters
        ----------
        token_ids : sequence of int
            In 0 … 2³¹−1.
        cache_salt : str
            Texts of two salts share nothing.

        Raises
        ------
        InvalidOperation
            If these are no token ids, or the tier is not open; the same holds of `load` and `store`.
        """
        ...

    def load(self, token_ids: TokenIds, rows: Rows, cache_salt: str = "") -> Future[int]:
        """Fill `rows` with the last blocks of a text; answers how many of them, from the first one on, are right.

        Parameters
        ----------
        token_ids : sequence of int
        rows : uint8 [m, block_bytes]
            For the last m whole blocks; the caller's again when the future is done.
        cache_salt : str

        Raises
        ------
        InvalidOperation
            As for `match`; if `rows` are not like that.
        """
        ...

    def store(self, token_ids: TokenIds, rows: Rows, cache_salt: str = "") -> Future[int]:
        """Keep the last blocks of a text; answers how many leading blocks of it are there then.

        What is there already is skipped, and counts as used.

        Parameters
        ----------
        token_ids : sequence of int
        rows : uint8 [m, block_bytes]
            The last m whole blocks, or none; not to be changed until the future is done. Those before them must be
            there: where they are not, nothing can be kept.
        cache_salt : str

        Raises
        ------
        InvalidOperation
            As for `match`; if `rows` are not like that.
        """
        ...

    def clear(self) -> None:
        """Forget everything; what is being stored now is forgotten, too.

        Raises
        ------
        InvalidOperation
            If the tier is not open.
        TierError
            If the medium refuses: then some may still be there.
        """
        ...

    def close(self) -> None:
        """Finish what is under way and let go of the medium. A second call does nothing."""
        ...


def answered(value: Value) -> Future[Value]:
    """Return a future that is done already."""
    future: Future[Value] = Future()
    future.set_result(value)
    return future
