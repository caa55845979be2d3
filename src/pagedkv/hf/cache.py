"""PagedCache: a transformers cache whose keys and values live in blocks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.cache import PagedKvCache
from pagedkv.control.plan import BatchPlan
from pagedkv.control.strategies import EvictionStrategy
from pagedkv.data.storage import KvStorage, SlotIndex
from pagedkv.errors import InvalidOperation
from pagedkv.hf.batch import SequenceBatch
from pagedkv.hf.compat import Cache, CacheLayerMixin, is_pageable, is_stateless, stock_layers

__all__ = ["PagedCache"]


class ModelKvCache(PagedKvCache):
    """A PagedKvCache that takes its dtype and device from the first keys it sees."""

    def settle(self, dtype: Any, device: Any) -> None:
        """Fix dtype and device of the storage while it has no layers."""
        self._storage = KvStorage(replace(self._storage.spec, dtype=dtype), device)


@dataclass(slots=True)
class _Step:
    """One forward pass: its tokens have slots, and layer after layer writes into them."""

    plan: BatchPlan
    past: int
    written: set[int] = field(default_factory=set)
    slots: SlotIndex | None = None  # of all tokens of all rows, made when a layer first gathers


class _Pages:
    """What the layers of one cache share: the pool, the sequences and the forward pass that is under way."""

    def __init__(self, pool: ModelKvCache, cache_salt: str, expected: set[int], dtype: Any, device: Any) -> None:
        self.pool = pool
        self.batch = SequenceBatch(pool, cache_salt)
        self._step: _Step | None = None
        self._expected = expected  # layers that a forward pass should write
        self._numbers: dict[int, int] = {}  # layer: its number in the storage, for layers that were written
        self._dtype, self._device = dtype, device

    def is_written(self, layer: int) -> bool:
        """Tell whether a layer has memory yet."""
        return layer in self._numbers

    def length(self, layer: int) -> int:
        """Tokens that a layer holds: while a forward pass is under way, not all hold the same."""
        step = self._step
        if step is not None and layer in self._numbers and layer not in step.written:
            return step.past
        return self.batch.length

    def write(self, layer: int, keys: Tensor, values: Tensor) -> _Step:
        """Store K and V ``[batch, heads, tokens, dim]``; the first layer of a forward pass makes the room."""
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise InvalidOperation("keys: a paged cache passes no gradients on; run the model under torch.no_grad()")
        step = self._step
        if step is None or layer in step.written:
            self.finish()
            past = self.batch.length
            step = self._step = _Step(self.batch.grow(keys.shape[0], keys.shape[2]), past)
        number = self._number(layer, keys, values, step.past)
        self.pool.write(number, _by_token(keys), _by_token(values), step.plan)
        step.written.add(layer)
        return step

    def gather(self, layer: int, step: _Step) -> tuple[Tensor, Tensor]:
        """Return K and V of all tokens, ``[batch, heads, tokens, dim]``."""
        if step.slots is None:
            step.slots = self.pool.storage.slot_index(_all_slots(step.plan, self.pool.block_size))
        rows = step.plan.num_sequences
        keys, values = self.pool.storage.gather(self._numbers[layer], step.slots)
        return keys.unflatten(0, (rows, -1)).transpose(1, 2), values.unflatten(0, (rows, -1)).transpose(1, 2)

    def finish(self) -> None:
        """End the forward pass: what it wrote becomes findable, or is taken back if it did not come to its end."""
        step, self._step = self._step, None
        if step is None:
            return
        if step.written < self._numbers.keys():
            self.batch.truncate(step.past)
        elif self._expected <= step.written:
            self.pool.commit(step.plan)
        else:
            self.batch.forget()

    def release(self) -> None:
        """Free the sequences."""
        self.finish()
        self.batch.release()

    def _number(self, layer: int, keys: Tensor, values: Tensor, past: int) -> int:
        number = self._numbers.get(layer)
        if number is None:
            if past:
                raise InvalidOperation(f"layer {layer}: expected K and V from the first token on, {past} are missing")
            if not self._numbers:
                self.pool.settle(self._dtype or keys.dtype, self._device or keys.device)
            number = self.pool.add_layer(keys.shape[1], keys.shape[3], values.shape[3])
            self._numbers[layer] = number
        return number


def _by_token(states: Tensor) -> Tensor:
    """Turn ``[batch, heads, tokens, dim]`` into ``[batch * tokens, heads, dim]``."""
    return states.transpose(1, 2).flatten(0, 1)


def _all_slots(plan: BatchPlan, block_size: int) -> npt.NDArray[np.int64]:
    """Return the slot of every token of every row; all rows hold the same number of tokens."""
    length = int(plan.seq_lens[0])
    tables = plan.block_tables[:, : -(-length // block_size)].astype(np.int64)
    slots = tables[:, :, None] * block_size + np.arange(block_size)
    return slots.reshape(len(tables), -1)[:, :length].reshape(-1)


class PagedLayer(CacheLayerMixin):
    """One attention layer of a :class:`PagedCache`.

    It returns all tokens, sliding-window layers too: the mask, which transformers builds from the config, cuts the
    window out.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, pages: _Pages, number: int, config: Any) -> None:
        super().__init__()
        self._pages = pages
        self._layer = number

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: memory comes with the first update."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens into their slots and return K and V of all tokens."""
        step = self._pages.write(self._layer, key_states, value_states)
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

    def reorder_cache(self, beam_idx: Tensor) -> None:
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
        Type of the stored K and V; that of the first keys by default.
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
        self._pages = _Pages(pool, cache_salt, paged, dtype, device)
        # What a recurrent layer holds has no blocks, so no prefix of it can be found again.
        self._is_reusable = all(number in paged or is_stateless(layer) for number, layer in enumerate(layers))
        text = config.get_text_config(decoder=True)
        for number in paged:
            layers[number] = PagedLayer(self._pages, number, text)
        self._num_cached_tokens = 0
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
        super().reset()

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

    def reorder_cache(self, beam_idx: Tensor) -> None:
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
