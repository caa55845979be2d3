"""The worker's half: blocks between vLLM's tensors and rows of the staging memory."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pagedkv.errors import bad_argument
from pagedkv.tiers.tier import Rows
from pagedkv.vllm.messages import Copy, Done, Plan, WorkerFacts
from pagedkv.vllm.staging import Staging

logger = logging.getLogger("pagedkv")


class KvPages:
    """The keys and values of a pool as pages: what one block has in one layer.

    Parameters
    ----------
    kv_caches : mapping of str to Tensor
        By layer, ``[num_blocks · k, …]``: a block is k neighbours along the first axis. Layers that share a tensor
        count once.
    num_blocks : int

    Raises
    ------
    InvalidOperation
        If a tensor has no such shape.

    Attributes
    ----------
    row_bytes : int
        Of a block over all layers.
    layout : str
        Shapes, dtypes and the order of axes.
    """

    def __init__(self, kv_caches: Mapping[str, Tensor], num_blocks: int) -> None:
        seen: set[int] = set()
        self._pages: list[Tensor] = []
        self._spans: list[tuple[int, int]] = []
        self.row_bytes = 0
        layouts = []
        for name, kv in kv_caches.items():
            if not isinstance(kv, Tensor) or kv.ndim < 2 or not len(kv) or len(kv) % num_blocks:
                got = list(kv.shape) if isinstance(kv, Tensor) else type(kv).__name__
                hint = "models whose layers keep other states than keys and values are not supported"
                raise bad_argument(f"kv_caches[{name!r}]", f"[{num_blocks} blocks, …]", f"{got}", hint)
            if kv.data_ptr() in seen:
                continue
            seen.add(kv.data_ptr())
            layouts.append((str(kv.dtype), len(kv) // num_blocks, tuple(kv.shape[1:]), kv.stride()[1:]))
            if kv.is_contiguous():
                pages = kv.view(torch.uint8).view(num_blocks, -1)
            else:
                pages = kv.view(num_blocks, len(kv) // num_blocks, *kv.shape[1:])
                pages = pages.view(torch.uint8) if kv.stride(-1) == 1 else pages
            size = pages[0].numel() * pages.element_size()
            self._pages.append(pages)
            self._spans.append((self.row_bytes, self.row_bytes + size))
            self.row_bytes += size
        self.layout = repr(layouts)

    def read(self, block_ids: Sequence[int], rows: Rows) -> None:
        """Copy blocks into rows, uint8 ``[n, row_bytes]``."""
        into = torch.from_numpy(rows)
        for pages, (start, stop) in zip(self._pages, self._spans, strict=True):
            ids = torch.tensor(block_ids, dtype=torch.int64, device=pages.device)
            into[:, start:stop] = pages.index_select(0, ids).view(len(rows), -1).view(torch.uint8).cpu()

    def write(self, block_ids: Sequence[int], rows: Rows) -> None:
        """Copy rows into blocks."""
        data = torch.from_numpy(rows)
        for pages, (start, stop) in zip(self._pages, self._spans, strict=True):
            ids = torch.tensor(block_ids, dtype=torch.int64, device=pages.device)
            part = data[:, start:stop].contiguous().view(pages.dtype).view(len(rows), *pages.shape[1:])
            pages.index_copy_(0, ids, part.to(pages.device))


class WorkerHalf:
    """Carries out what the scheduler's half plans. It knows of no tier: what it copies was verified before.

    Parameters
    ----------
    kv_caches : mapping of str to Tensor
    num_blocks : int
    layout : str
        What else says how keys and values lie in a page.
    rank, num_ranks : int
        Which part of a row is this worker's.
    """

    def __init__(
        self, kv_caches: Mapping[str, Tensor], num_blocks: int, layout: str = "", rank: int = 0, num_ranks: int = 1
    ) -> None:
        self._pages = KvPages(kv_caches, num_blocks)
        self._layout = layout
        size = self._pages.row_bytes
        self._part = slice(rank * size, (rank + 1) * size)
        self._row_bytes = num_ranks * size
        self._staging: Staging | None = None
        self._done = Done()
        self._wrong: set[int] = set()
        self._failed: set[int] = set()  # loads of whose failure vLLM may not have heard

    @property
    def facts(self) -> WorkerFacts:
        """What the other half has to know."""
        layout = f"{self._layout} {self._pages.layout}"
        return WorkerFacts(self._pages.row_bytes, layout, socket.gethostname())

    def load(self, plan: Plan) -> None:
        """Fill blocks of the pool."""
        self._failed.difference_update(plan.forgiven)
        for copy in plan.loads:
            if not self._is_copied(plan, copy, is_load=True):
                self._wrong.update(copy.block_ids)
                self._failed.add(copy.ticket)

    def store(self, plan: Plan) -> None:
        """Copy blocks out of the pool, unless they may rest upon blocks that could not be filled."""
        for copy in plan.stores:
            if self._failed:
                self._done.failed[copy.ticket] += 1
            else:
                self._is_copied(plan, copy, is_load=False)

    def _is_copied(self, plan: Plan, copy: Copy, is_load: bool) -> bool:
        try:
            if self._staging is None:
                self._staging = Staging(plan.staging, plan.num_rows, self._row_bytes)
            place = slice(copy.row, copy.row + len(copy.block_ids))
            if not (self._staging.tickets[place] == copy.ticket).all():
                raise bad_argument("rows", f"those of ticket {copy.ticket}", "others")
            rows = self._staging.rows[place, self._part]
            (self._pages.write if is_load else self._pages.read)(copy.block_ids, rows)
        except Exception:
            logger.exception("blocks could not be copied: they are %s", "computed" if is_load else "not stored")
            self._done.failed[copy.ticket] += 1
            return False
        self._done.copied[copy.ticket] += 1
        return True

    def take_done(self) -> Done | None:
        """Return what was done since the last call, None if that is nothing."""
        done, self._done = self._done, Done()
        return done if done.copied or done.failed else None

    def take_wrong(self) -> set[int]:
        """Return the blocks that could not be filled since the last call."""
        wrong, self._wrong = self._wrong, set()
        return wrong
