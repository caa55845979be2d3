"""PagedCache: a transformers cache whose keys and values live in blocks."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.cache import PagedKvCache
from pagedkv.control.protocol import EvictionStrategy
from pagedkv.errors import InvalidOperation
from pagedkv.hf.compat import Cache, CacheLayerMixin, has_changing_rope, is_pageable, is_stateless, stock_layers
from pagedkv.hf.direct import DIRECT, PagedStates
from pagedkv.hf.pages import ModelKvCache, Pages

__all__ = ["PagedCache"]


class PagedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One attention layer of a :class:`PagedCache`.

    It returns all tokens, sliding-window layers too: the mask, which transformers builds from the config, cuts the
    window out.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, pages: Pages, number: int, config: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pages = pages
        self._layer = number
        self._config = config

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: memory comes with the first update."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens into their slots and return K and V of all tokens.

        In direct mode nothing is gathered: what is returned says where the attention function finds K and V.
        """
        step = self._pages.write(self._layer, key_states, value_states)
        if self._config._attn_implementation == DIRECT:
            number = self._pages.number(self._layer)
            where = (self._pages.pool, number, step.plan, int(step.plan.seq_lens[0]))
            return PagedStates.of(key_states, *where), PagedStates.of(value_states, *where)
        if not step.past and key_states.dtype == self._pages.pool.storage.dtype:
            return key_states, value_states
        keys, values = self._pages.gather(self._layer, step)
        return keys.to(key_states), values.to(value_states)

    def get_seq_length(self) -> int:
        """Return how many tokens the layer holds."""
        return self._pages.length(self._layer)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that `query_length` new tokens will see, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: only the pool is a limit."""
        return -1

    # The cache moves the sequences of all layers at once.

    def reset(self) -> None:
        """Leave it to the cache."""

    def crop(self, tokens_to_remove: int) -> None:
        """Leave it to the cache."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Leave it to the cache."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Leave it to the cache."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Leave it to the cache."""


class PagedCache(Cache):
    """A transformers cache over a paged pool: ``model.generate(..., past_key_values=cache)``.

    Every row of a batch is one sequence of ``cache.manager``. Beams and parallel samples are forks, nothing is copied
    but the block that is written. Give it the token ids of a prompt by :meth:`prompt`, or use
    :func:`pagedkv.hf.generate`, and it reuses the K and V of what it has seen before: ``generate()`` itself hands a
    cache no ids, and none are ever guessed.

    Parameters
    ----------
    config : PreTrainedConfig
        ``model.config``, of a decoder-only model.
    num_blocks : int
        Size of the pool.
    block_size : int
        Tokens per block.
    strategy : str or EvictionStrategy
        Which cached blocks are given up first.
    cache_salt : str
        What was stored under another salt is never reused.
    dtype : str or torch.dtype, optional
        Type of the stored K and V; that of the first keys by default. ``"int8"`` and ``"fp8"`` are quantised.
    device : str or torch.device, optional
        Where K and V live; with the first keys by default.
    eviction_threshold : float
        As in :class:`pagedkv.PagedKvCache`.
    prefix_caching : bool
        Whether committed blocks stay findable.

    Raises
    ------
    InvalidOperation
        If an argument is out of range, or the model has no attention layer or an encoder.

    Examples
    --------
    >>> cache = PagedCache(model.config, num_blocks=512)  # doctest: +SKIP
    >>> model.generate(ids, past_key_values=cache)  # doctest: +SKIP
    >>> cache.release()  # doctest: +SKIP
    """

    def __init__(
        self,
        config: Any,
        num_blocks: int = 2048,
        block_size: int = 16,
        *,
        strategy: str | EvictionStrategy = "lru",
        cache_salt: str = "",
        dtype: Any = None,
        device: Any = None,
        eviction_threshold: float = 0.9,
        prefix_caching: bool = True,
    ) -> None:
        pool = ModelKvCache(
            num_blocks,
            block_size,
            num_layers=0,
            dtype=dtype or "float32",
            device=device or "cpu",
            strategy=strategy,
            eviction_threshold=eviction_threshold,
            prefix_caching=prefix_caching,
        )
        pool.match_prefix([0], cache_salt)  # refuses what is no salt
        layers = stock_layers(config)
        paged = {number for number, layer in enumerate(layers) if is_pageable(layer)}
        if not paged:
            raise InvalidOperation(f"config: expected a model with attention layers, got {type(config).__name__}")
        self._pages = Pages(pool, cache_salt, paged, dtype, device)
        # What a recurrent layer holds has no blocks, so no prefix of it can be found again; and keys that were turned
        # by other frequencies are not those of a longer text.
        self._is_reusable = not has_changing_rope(config) and all(
            number in paged or is_stateless(layer) for number, layer in enumerate(layers)
        )
        text = config.get_text_config(decoder=True)
        for number in paged:
            layers[number] = PagedLayer(self._pages, number, text)
        self._num_cached_tokens = 0
        self._model: weakref.ref[Any] | None = None
        super().__init__(layers=layers)

    @property
    def manager(self) -> PagedKvCache:
        """The :class:`BlockManager` behind it: blocks, statistics, events."""
        return self._pages.pool

    @property
    def seq_ids(self) -> list[int]:
        """The sequences of the manager, one for each row of the batch."""
        ids: list[int] = self._pages.batch.seq_ids.tolist()
        return ids

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of each row that the last :meth:`prompt` found in the cache."""
        return self._num_cached_tokens

    def prompt(self, input_ids: Any, attention_mask: Any = None) -> int:
        """Tell the token ids of the coming prompt, so that what is cached of it is not computed again.

        Ends the sequences of the last prompt. Call ``model.generate(input_ids, past_key_values=cache)`` next, with the
        whole prompt. A batch reuses what all of its rows have cached. Rows with padding are stored without ids: no
        reuse, and nobody finds them.

        Parameters
        ----------
        input_ids : int Tensor [batch, tokens]
        attention_mask : Tensor [batch, tokens], optional
            0 for padding.

        Returns
        -------
        int
            How many tokens of each row are cached.

        Raises
        ------
        InvalidOperation
            If the ids are none, or the mask has another shape; nothing has changed then.
        OutOfMemory
            If even the first block of each row cannot be had; the cache is released then.
        """
        ids = _checked_ids(input_ids)
        is_padded = _padded_rows(attention_mask, ids)
        if not self._is_reusable:
            is_padded[:] = True
        self.release()
        self._num_cached_tokens = self._pages.batch.start(ids, is_padded)
        return self._num_cached_tokens

    def serve(self, model: Any) -> None:
        """Bind the cache to a model: from now on K and V of any other are refused.

        Raises
        ------
        InvalidOperation
            If it has served another one.
        """
        if self._model is None:
            self._model = weakref.ref(model)
        elif self._model() is not model:
            raise InvalidOperation("model: expected the one whose K and V this cache holds; make another PagedCache")

    def expect(self, input_ids: Any) -> None:
        """Tell the token ids [batch, tokens] of exactly the next forward pass, of generated tokens for instance.

        Raises
        ------
        InvalidOperation
            If the ids are none.
        """
        self._pages.batch.expect(_checked_ids(input_ids))

    def release(self) -> None:
        """Free the sequences; full blocks of known ids stay findable. The cache is ready for the next prompt."""
        self._pages.release()
        self._num_cached_tokens = 0
        super().reset()  # type: ignore[no-untyped-call]

    def reset(self) -> None:
        """Do as :meth:`release` does."""
        self.release()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens of every row; a positive number says how many stay.

        Raises
        ------
        InvalidOperation
            If there are fewer.
        """
        self._pages.finish()
        length = self._pages.batch.length
        kept = tokens_to_remove if tokens_to_remove > 0 else length + tokens_to_remove
        if kept < 0:
            raise InvalidOperation(f"tokens_to_remove: expected at most {length}, got {-tokens_to_remove}")
        if kept < length:
            self._pages.batch.truncate(kept)
        super().crop(min(kept - length, 0))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let row ``i`` go on as the old row ``beam_idx[i]``, by forks."""
        self._select(beam_idx)
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, by forks."""
        self._select(torch.arange(len(self._pages.batch)).repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self._select(torch.arange(len(self._pages.batch))[indices.cpu()])
        super().batch_select_indices(indices)

    def _select(self, rows: Tensor) -> None:
        self._pages.finish()
        numbers = rows.cpu().numpy().astype(np.int64)
        count = len(self._pages.batch)
        if count == 0:
            return
        if numbers.ndim != 1 or ((numbers < 0) | (numbers >= count)).any():
            raise InvalidOperation(f"rows: expected a flat list of rows 0 … {count - 1}, got {numbers.tolist()}")
        self._pages.batch.select(numbers)


def _checked_ids(input_ids: Any) -> npt.NDArray[np.int64]:
    ids = input_ids.detach().cpu().numpy() if isinstance(input_ids, Tensor) else np.asarray(input_ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not len(ids):
        raise InvalidOperation(f"input_ids: expected token ids [batch, tokens], got {ids.dtype} {list(ids.shape)}")
    if ids.size and ids.min() < 0:
        raise InvalidOperation(f"input_ids: expected token ids of at least 0, got {ids.min()}")
    return ids.astype(np.int64)


def _padded_rows(attention_mask: Any, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    if attention_mask is None:
        return np.zeros(len(ids), bool)
    mask = attention_mask.detach().cpu().numpy() if isinstance(attention_mask, Tensor) else np.asarray(attention_mask)
    if mask.shape != ids.shape:
        raise InvalidOperation(f"attention_mask: expected shape {list(ids.shape)}, got {list(mask.shape)}")
    padded: npt.NDArray[np.bool_] = (mask == 0).any(axis=1)
    return padded
