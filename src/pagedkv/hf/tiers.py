"""Tiers behind the pool of a PagedCache: asked before a prompt is computed, told when its sequences end."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pagedkv.errors import OutOfMemory, bad_argument
from pagedkv.hf.pool import Ids, ModelKvCache, block_format
from pagedkv.tiers.ladder import close_tiers, open_tiers
from pagedkv.tiers.moving import promote, read_rows
from pagedkv.tiers.tier import Tier
from pagedkv.validate import shown

logger = logging.getLogger("pagedkv")


class CacheTiers:
    """The tiers of one cache, the nearest first. They are opened when the model is known, as its weights are a part of
    what a block is.

    A tier that fails, which is another thing than one that has nothing, is left out from then on, and the log says so.

    Parameters
    ----------
    tiers : sequence of Tier
    pool : ModelKvCache
    cache_salt : str

    Raises
    ------
    InvalidOperation
        If these are no tiers, or nothing in the pool can be found.
    """

    def __init__(self, tiers: Sequence[Tier], pool: ModelKvCache, cache_salt: str) -> None:
        if not isinstance(tiers, Sequence) or not all(isinstance(tier, Tier) for tier in tiers):
            raise bad_argument("tiers", "a sequence of tiers", shown(tiers))
        if tiers and not pool.prefix_caching:
            raise bad_argument("prefix_caching", "True for a cache with tiers", "False")
        self._tiers, self._pool, self._salt = list(tiers), pool, cache_salt
        self._opened: list[Tier] = []
        self._stores: dict[int, Future[int]] = {}  # the last one of each tier
        self._is_ready = False
        if tiers:
            pool.when_cleared(self._clear)

    def serve(self, model: Any, cache: Any, is_reusable: bool) -> None:
        """Be open for the blocks of a model, or go on without tiers where its blocks are not all that a text is.

        Parameters
        ----------
        model : PreTrainedModel or None
        cache : PagedCache
            Over the pool; one token goes through the model where the pool does not know the shapes of its layers.
        is_reusable : bool
            Whether the cache reuses prefixes for this model.

        Raises
        ------
        TierError
            If a tier cannot be had; none is open then that was not.
        InvalidOperation
            If one is open already for other blocks, or there is no model.
        """
        if self._is_ready or not self._tiers:
            return
        if model is None:
            why = "as its weights are a part of what is stored: call serve() first, or use pagedkv.hf.generate()"
            raise bad_argument("tiers", f"a cache that serves a model, {why}")
        if not is_reusable or self._pool.total_states:
            reason = "keeps states besides K and V" if self._pool.total_states else "cannot reuse prefixes"
            logger.warning("a PagedCache goes on without its tiers: %s %s", type(model).__name__, reason)
            self.close()
            return
        if not self._pool.block_memory_bytes:
            with torch.no_grad():
                model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), past_key_values=cache, use_cache=True)
            cache.reset()
        self._opened = open_tiers(self._tiers, block_format(model, self._pool))
        self._is_ready = True

    def promote(self, texts: Ids, is_padded: npt.NDArray[np.bool_]) -> None:
        """Make findable in the pool what tiers have of texts without padding."""
        if not self._is_ready:
            return
        for ids in texts[~is_padded]:
            for tier in self._tiers:
                self._try(tier, partial(self._promote, tier, ids))

    def _promote(self, tier: Tier, ids: Ids) -> None:
        free_id = next(number for number in range(2**64 - 1, 0, -1) if number not in self._pool)
        try:
            promote(self._pool, tier, free_id, ids, self._salt)
        except OutOfMemory:
            return  # of what is computed instead, generate() says how much room it takes

    def demote(self, seq_ids: Ids) -> None:
        """Store what others could find of some sequences. The last stores go on while the cache does."""
        if not self._is_ready:
            return
        for seq_id in seq_ids.tolist():
            if seq_id in self._pool and len(ids := self._pool.findable_ids(seq_id)):
                for tier in [tier for tier in self._tiers if not getattr(tier, "is_read_only", False)]:
                    self._try(tier, partial(self._demote, tier, seq_id, ids))

    def _demote(self, tier: Tier, seq_id: int, ids: Ids) -> None:
        if last := self._stores.get(id(tier)):
            last.result()  # so that rows with one prefix store it once
        count = len(ids) // self._pool.block_size
        first = min(count, tier.match(ids, self._salt).result())
        if first < count:
            blocks = self._pool.get_sequence(seq_id).block_table[first:count]
            self._stores[id(tier)] = tier.store(ids, read_rows(self._pool.storage, blocks), self._salt)

    def _try(self, tier: Tier, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as fault:  # whatever a tier of somebody else's does
            logger.warning("tier %s failed and is left out: %s", tier.medium, str(fault) or repr(fault))
            self._tiers = [other for other in self._tiers if other is not tier]

    def _clear(self) -> None:
        """Forget everything. The weights may be others from here on, so tiers are opened anew."""
        if not self._is_ready:
            return
        self._stores, self._is_ready = {}, False
        with contextlib.ExitStack() as all_of_it:
            all_of_it.callback(self._close_opened)
            for tier in self._tiers:
                all_of_it.callback(tier.clear)

    def close(self) -> None:
        """Finish what is being stored, and close the tiers that were opened here."""
        self._tiers, self._stores, self._is_ready = [], {}, False
        self._close_opened()

    def _close_opened(self) -> None:
        opened, self._opened = self._opened, []
        close_tiers(opened)
