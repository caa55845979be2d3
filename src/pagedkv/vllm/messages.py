"""What the two halves of the connector tell each other: plain records, which vLLM pickles between its processes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Copy:
    """Blocks between rows of the staging memory and vLLM's pool.

    Attributes
    ----------
    ticket : int
        What the rows are marked with: rows that are marked otherwise are others by now.
    row : int
        The first of the rows; the others follow it.
    block_ids : tuple of int
        The blocks of the pool, one a row.
    """

    ticket: int
    row: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What a worker has to do in one step.

    Attributes
    ----------
    staging : str
        The file of the staging memory.
    num_rows : int
        Its rows.
    loads, stores : tuple of Copy
        Into the pool, before the model runs; out of it, after that.
    forgiven : tuple of int
        Tickets of loads that failed, of which vLLM has heard: what they should have brought is computed by now.
    """

    staging: str
    num_rows: int
    loads: tuple[Copy, ...] = ()
    stores: tuple[Copy, ...] = ()
    forgiven: tuple[int, ...] = ()


@dataclass
class Done:
    """What workers did: how many of them, by ticket.

    Attributes
    ----------
    copied, failed : Counter of int
        A copy that failed is in `failed` alone.
    """

    copied: Counter[int] = field(default_factory=Counter)
    failed: Counter[int] = field(default_factory=Counter)

    def aggregate(self, other: Done) -> Done:
        """Return what both say."""
        return Done(self.copied + other.copied, self.failed + other.failed)


@dataclass(frozen=True)
class WorkerFacts:
    """What the scheduler's half has to know of a worker.

    Attributes
    ----------
    row_bytes : int
        Bytes of a block in the pool of this worker, over all layers.
    layout : str
        How keys and values lie in it: blocks of another layout are not readable.
    host : str
        The machine that it runs on.
    """

    row_bytes: int
    layout: str
    host: str
