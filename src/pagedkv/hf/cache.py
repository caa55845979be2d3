"""PagedCache: a transformers cache whose keys and values live in blocks."""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.cache import PagedKvCache
from pagedkv.control.manager import BlockManager
from pagedkv.control.plan import BatchPlan
from pagedkv.control.protocol import Strategy
from pagedkv.data.storage import SlotIndex
from pagedkv.errors import InvalidOperation, OutOfMemory, SequenceNotFound, bad_argument
from pagedkv.hf import compat
from pagedkv.hf.compat import Cache, PagedLayer, has_changing_rope, paged_layer, paged_layers, stock_layers
from pagedkv.hf.direct import DIRECT, PagedStates
from pagedkv.hf.pool import CacheReport, Ids, LayerTable, ModelKvCache, as_ids, by_row, by_token, padding, visible_slots
from pagedkv.hf.recurrent import BatchStates
from pagedkv.hf.tiers import CacheTiers
from pagedkv.tiers.tier import Tier
from pagedkv.typing import Device, Dtype
from pagedkv.validate import require_int

# SequenceBatch: the sequences behind the rows of one ``generate()`` call, and what is known of their token ids.


class SequenceBatch:
    """One sequence of the manager for each row of the batch, all of one length.

    Parameters
    ----------
    manager : BlockManager
    cache_salt : str
        Given to every sequence.
    """

    def __init__(self, manager: BlockManager, cache_salt: str) -> None:
        self._manager = manager
        self._salt = cache_salt
        self._numbers = itertools.count()
        # Of the prompts that it began with, the last ones after `release` too; tokens are those of each of them.
        self.num_prompts = self.num_prompt_tokens = self.num_cached_tokens = 0
        self._clear()

    def _clear(self) -> None:
        self.seq_ids: Ids = np.empty(0, np.int64)
        self.length = 0
        self._is_known = np.empty(0, bool)  # rows that may be given ids: no padding
        self._coming: Ids | None = None  # [rows, n]: ids of the next tokens

    def __len__(self) -> int:
        return len(self.seq_ids)

    def start(self, ids: Ids, is_padded: npt.NDArray[np.bool_]) -> int:
        """Begin a sequence for each row with what is cached of its ids; returns how many tokens all rows have cached.

        One number has to hold for the whole batch, so longer matches are cut to the shortest one.
        """
        rows, width = ids.shape
        reused = 0
        if rows and width and not is_padded.any():
            reused = self._matched(ids)
        try:
            for row in ids:
                # One token more than is cached, because allocate never counts the last one as cached: so it is no more.
                reused = self._open(row[: reused + 1] if reused else 0).num_cached_tokens
            cached = {self._manager.get_sequence(int(seq_id)).num_cached_tokens for seq_id in self.seq_ids}
            if self._manager.total_states and len(cached) > 1:
                # One needed the slot of another's snapshot.
                self.release()
                for _ in ids:
                    self._open(0)
                reused = 0
            for seq_id in self.seq_ids.tolist():
                self._manager.truncate(seq_id, min(reused, self._manager.get_sequence(seq_id).num_tokens))
        except OutOfMemory:
            self.release()
            raise
        self.length = self.num_cached_tokens = reused
        self.num_prompts, self.num_prompt_tokens = rows, width
        self._is_known = ~is_padded
        self._coming = ids[:, reused:]
        return reused

    def _matched(self, ids: Ids) -> int:
        """Return how many tokens all rows have cached; with states, up to a snapshot of each."""
        reused: int = ids.shape[1]
        while True:
            before, reused = reused, min(self._manager.match_prefix(row[: reused + 1], self._salt) for row in ids)
            if reused == before or not self._manager.total_states:
                return reused

    def expect(self, ids: Ids) -> None:
        """Tell the ids [rows, n] of the next tokens to come."""
        self._coming = ids

    def forget(self) -> None:
        """Store tokens by count from here on."""
        self._is_known[:] = False

    def grow(self, rows: int, num_tokens: int) -> BatchPlan:
        """Make room for `num_tokens` new tokens in each of `rows` rows; all or nothing."""
        if not len(self):
            self._open_rows(rows)
            self.num_prompts, self.num_prompt_tokens, self.num_cached_tokens = rows, num_tokens, 0
        elif rows != len(self):
            self._repeat_to(rows)
        coming = self._take_coming(rows, num_tokens)
        try:
            plan = self._append(coming, num_tokens)
        except OutOfMemory as error:
            size = self._manager.block_size
            total = rows * -(-(self.length + num_tokens) // size)
            hint = f"{rows} sequences of {self.length + num_tokens} tokens take {total} blocks of {size} tokens"
            if not self.length:
                self.release()
            raise OutOfMemory(error.requested, error.available, hint) from None
        self.length += num_tokens
        self._coming = None if self._coming is None else self._coming[:, num_tokens:]
        return plan

    def _append(self, coming: Ids, num_tokens: int) -> BatchPlan:
        known = self._is_known if coming.shape[1] else np.zeros(len(self), bool)
        if not known.any():
            return self._manager.append_batch(self.seq_ids, counts=num_tokens)
        if known.all() and coming.shape[1] == num_tokens:
            return self._manager.append_batch(self.seq_ids, coming)
        return self._append_mixed(coming, known, num_tokens)

    def _append_mixed(self, coming: Ids, known: npt.NDArray[np.bool_], num_tokens: int) -> BatchPlan:
        """Append ids where they are known, a count for the rest."""
        try:
            self._manager.append_batch(self.seq_ids[known], coming[known])
            counts = np.where(known, num_tokens - coming.shape[1], num_tokens)
            self._manager.append_batch(self.seq_ids, counts=counts)
        except OutOfMemory:
            for seq_id in self.seq_ids.tolist():
                self._manager.truncate(seq_id, self.length)
            raise
        return self._manager.plan(self.seq_ids, num_tokens)

    def _take_coming(self, rows: int, num_tokens: int) -> Ids:
        if self._coming is None:
            return np.empty((rows, 0), np.int64)
        if len(self._coming) != rows:
            raise InvalidOperation(f"token ids: expected {rows} rows as the keys have, got {len(self._coming)}")
        expected = self._coming.shape[1]
        if self.length and 0 < expected < num_tokens:
            raise bad_argument(
                "keys",
                f"at most the {expected} tokens of the prompt that are not cached",
                f"{num_tokens}: assisted decoding hands over the whole prompt, use pagedkv.hf.generate()",
            )
        return np.ascontiguousarray(self._coming[:, :num_tokens])

    def select(self, rows: Ids) -> None:
        """Let row ``i`` go on as the old row ``rows[i]``: forks where a row is taken twice, nothing is copied."""
        taken: set[int] = set()
        chosen = []
        for row in rows.tolist():
            seq_id = int(self.seq_ids[row])
            if row in taken:
                twin = self._next_number()
                self._manager.fork(seq_id, twin)
                seq_id = twin
            taken.add(row)
            chosen.append(seq_id)
        for row in set(range(len(self))) - taken:
            self._manager.free(int(self.seq_ids[row]))
        self.seq_ids = np.array(chosen, np.int64)
        self._is_known = self._is_known[rows]
        self._coming = None if self._coming is None else self._coming[rows]

    def truncate(self, num_tokens: int) -> None:
        """Take back every token from position `num_tokens` on."""
        for seq_id in self.seq_ids.tolist():
            self._manager.truncate(seq_id, num_tokens)
        self.length = num_tokens
        self._coming = None

    def release(self) -> None:
        """Free every sequence."""
        for seq_id in self.seq_ids.tolist():
            if seq_id in self._manager:  # the caller may have freed or evicted it
                self._manager.free(seq_id)
        self._clear()

    def _open(self, tokens: Any) -> Any:
        number = self._next_number()
        info = self._manager.allocate(number, tokens, cache_salt=self._salt)
        self.seq_ids = np.append(self.seq_ids, number)
        return info

    def _open_rows(self, rows: int) -> None:
        for _ in range(rows):
            self._open(0)
        self._is_known = np.zeros(rows, bool)

    def _repeat_to(self, rows: int) -> None:
        """Follow generate(), which repeats every prompt for beams and parallel samples before the first forward."""
        times, rest = divmod(rows, len(self))
        if rest or self._coming is None:
            raise bad_argument("keys", f"a batch of {len(self)}, as this cache holds", f"{rows}")
        coming = self._coming
        if len(coming) == rows:  # told for every row already
            self._coming = None
        self.select(np.repeat(np.arange(len(self)), times))
        self._coming = coming if len(coming) == rows else self._coming

    def _next_number(self) -> int:
        return next(number for number in self._numbers if number not in self._manager)


# Pages: what the layers of a PagedCache share, and the forward pass that writes into it.


@dataclass(slots=True)
class Step:
    """One forward pass: its tokens have slots, and layer after layer writes into them."""

    plan: BatchPlan
    past: int
    written: set[int] = field(default_factory=set)
    slots: SlotIndex | None = None  # of all tokens of all rows, made when a layer first gathers


class Pages:
    """What the layers of one cache share: the pool, the sequences and the forward pass that is under way."""

    def __init__(
        self, pool: ModelKvCache, tiers: CacheTiers, cache_salt: str, config: Any, expected: set[int], table: LayerTable
    ) -> None:
        self.pool, self.tiers = pool, tiers
        self.batch = SequenceBatch(pool, cache_salt)
        self._step: Step | None = None
        self._config = config  # of the text model
        self._expected = expected  # layers that a forward pass should write
        self._table = table
        self._states = BatchStates(pool)
        self.stock: list[Any] = []  # the stock layers, which hold the states of the rows
        self.report = CacheReport()

    def load_states(self) -> None:
        """Let the stock layers go on from the snapshots that the sequences began with."""
        if self.batch.length and self.pool.total_states:
            self._states.load(self.stock, self.batch.seq_ids)

    def length(self, layer: int) -> int:
        """Tokens that a layer holds: while a forward pass is under way, not all hold the same."""
        step = self._step
        return self.batch.length if step is None or layer in step.written else step.past

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store K and V ``[batch, heads, tokens, dim]`` and return those of all tokens.

        The first layer of a forward pass makes the room. In direct mode nothing is gathered: what is returned says
        where the attention function finds K and V.
        """
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise InvalidOperation("keys: a paged cache passes no gradients on; run the model under torch.no_grad()")
        step = self._step
        if step is None or layer in step.written:
            self.finish(has_states=False)  # some recurrent layers may have gone on already
            past = self.batch.length
            step = self._step = Step(self.batch.grow(keys.shape[0], keys.shape[2]), past)
        if step.past and layer not in self._table.numbers:
            raise InvalidOperation(f"layer {layer}: expected K and V from the first token on, {step.past} are missing")
        number = self._table.place(layer, keys, values)
        self.pool.write(number, by_token(keys), by_token(values), step.plan)
        step.written.add(layer)
        if self._config._attn_implementation == DIRECT:
            where = (self.pool, number, step.plan, int(step.plan.seq_lens[0]))
            return PagedStates.of(keys, *where), PagedStates.of(values, *where)
        storage, rows = self.pool.storage, step.plan.num_sequences
        if not step.past and keys.dtype == storage.dtype:
            return keys, values
        if step.slots is None:
            step.slots = storage.slot_index(visible_slots(step.plan, self.pool.block_size))
        all_keys, all_values = storage.gather(number, step.slots)
        return by_row(all_keys, rows).to(keys), by_row(all_values, rows).to(values)

    def finish(self, *, has_states: bool = True) -> None:
        """End the forward pass: what it wrote becomes findable, or is taken back if it did not come to its end.

        `has_states`: the stock layers hold the states behind it, and nothing later.
        """
        step, self._step = self._step, None
        if step is None:
            return
        if step.written < self._table.numbers.keys():
            self.batch.truncate(step.past)
        elif self._expected <= step.written:
            has_states = has_states and self.pool.total_states > 0 and self.batch.length % self.pool.block_size == 0
            if has_states:
                self._states.store(self.stock, step.plan)
            self.pool.commit(step.plan, has_states=has_states)
        else:
            self.batch.forget()

    def note(self) -> None:
        """Note what the sequences hold, if there are any: of those that are freed nothing else can be told."""
        if self.batch.length:
            self.report = CacheReport.of(self.pool, self.batch, self._config)

    def release(self) -> None:
        """Store what tiers want of the sequences, and free them."""
        with contextlib.suppress(SequenceNotFound):  # the caller may have freed or evicted one
            self.finish()
            self.note()
        self.tiers.demote(self.batch.seq_ids)
        self.batch.release()


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
        Which cached blocks are reclaimed first.
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
    num_states : int
        Slots for the states of recurrent, convolution and linear-attention layers: one for each row of a batch, beams
        included, the rest for snapshots, by which :func:`pagedkv.hf.generate` reuses prefixes. Without, a model that
        has such layers computes every prompt anew. None are made where a model has none.
    tiers : sequence of Tier
        Where blocks are kept beyond the pool, the nearest first: what they have of a prompt is not computed again, and
        a sequence is stored when it ends. They are opened when the cache is bound to a model (:meth:`serve`, which
        :func:`pagedkv.hf.generate` calls), as its weights are a part of what a block is; :meth:`close` closes them.
        Models that keep states, or whose prefixes cannot be reused, go on without, and the log says so.

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
        config: compat.PreTrainedConfig,
        num_blocks: int = 2048,
        block_size: int = 16,
        *,
        strategy: Strategy = "lru",
        cache_salt: str = "",
        dtype: Dtype | None = None,
        device: Device | None = None,
        eviction_threshold: float = 0.9,
        prefix_caching: bool = True,
        num_states: int = 0,
        tiers: Sequence[Tier] = (),
    ) -> None:
        paged, keeps_nothing_else = paged_layers("config", config)
        require_int("num_states", num_states, 0, 2**31 - 2)
        pool = ModelKvCache(
            num_blocks,
            block_size,
            num_layers=0,
            dtype=dtype or "float32",
            device=device or "cpu",
            strategy=strategy,
            eviction_threshold=eviction_threshold,
            prefix_caching=prefix_caching,
            num_states=0 if keeps_nothing_else else num_states,
            clock=time.monotonic,
        )
        pool.match_prefix([0], cache_salt)  # refuses what is no salt
        self._config, self._paged = config, paged
        self._tiers = CacheTiers(tiers, pool, cache_salt)
        table = LayerTable(pool, dtype, device)
        self._pages = Pages(pool, self._tiers, cache_salt, config.get_text_config(decoder=True), paged, table)
        # Recurrent layers go on from snapshots only; keys turned by other frequencies are not those of a longer text.
        self._is_reusable = (keeps_nothing_else or num_states > 0) and not has_changing_rope(config)
        self._model: weakref.ref[Any] | None = None
        super().__init__(layers=self._new_layers())

    def _new_layers(self) -> list[Any]:
        stock = self._pages.stock = stock_layers(self._config)
        return [
            paged_layer(self._pages, number, layer) if number in self._paged else layer
            for number, layer in enumerate(stock)
        ]

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
        """Tokens of each row that were found in the cache by the last call of ``generate()``, or :meth:`prompt`.

        Also after :meth:`release`; 0 where the prompt was not told, as nothing is found without its ids.
        """
        return self._pages.batch.num_cached_tokens

    def report(self) -> CacheReport:
        """Tell what the last call of ``generate()`` found cached, shared and held; ``print`` it.

        Returns
        -------
        CacheReport
            Of the sequences that are held now, or else of those that were released last.
        """
        with contextlib.suppress(SequenceNotFound):
            self._pages.note()
        return self._pages.report

    def prompt(self, input_ids: Tensor | npt.NDArray[np.integer], attention_mask: Tensor | None = None) -> int:
        """Tell the token ids of the coming prompt, so that what is cached of it is not computed again.

        Ends the sequences of the last prompt. Call ``model.generate(input_ids, past_key_values=cache)`` next, with the
        whole prompt. A batch reuses what all of its rows have cached. Rows with padding are stored without ids: no
        reuse, and they cannot be found.

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
            If the ids are none, the mask has another shape, or the cache has tiers and serves no model yet; nothing has
            changed then.
        TierError
            If tiers have to be opened anew, after ``clear_prefix_cache()``, and cannot be had.
        OutOfMemory
            If even the first block of each row cannot be had; the cache is released then.
        """
        ids = as_ids(input_ids)
        is_padded = padding(attention_mask, ids)
        if not self._is_reusable:
            is_padded[:] = True
        self._tiers.serve(self._model and self._model(), self, self._is_reusable)
        self.reset()
        self._tiers.promote(ids, is_padded)
        num_cached_tokens = self._pages.batch.start(ids, is_padded)
        self._pages.load_states()
        return num_cached_tokens

    def last_snapshot(self, num_tokens: int) -> int:
        """Return where a snapshot of the states of a prompt of so many tokens is worth keeping: 0 if there are none.

        A forward pass that ends there keeps one, and the next pass of the prompt begins there.
        """
        size = self.manager.block_size
        return (num_tokens - 1) // size * size if self._is_reusable and self.manager.total_states else 0

    def serve(self, model: compat.PreTrainedModel, *, reuses_prefixes: bool = True) -> None:
        """Bind the cache to a model: from now on K and V of any other are refused.

        Parameters
        ----------
        model : PreTrainedModel
        reuses_prefixes : bool
            False if what is stored must not be reused for this model, whatever its config says.

        Raises
        ------
        InvalidOperation
            If it has served another one.
        TierError
            If a tier cannot be had; the cache serves nobody then.
        """
        if self._model is None:
            is_reusable = self._is_reusable and reuses_prefixes
            self._tiers.serve(model, self, is_reusable)
            self._model, self._is_reusable = weakref.ref(model), is_reusable
        elif self._model() is not model:
            raise bad_argument("model", "the one whose K and V this cache holds; make another PagedCache")

    def expect(self, input_ids: Tensor | npt.NDArray[np.integer]) -> None:
        """Tell the token ids [batch, tokens] of exactly the next forward pass, of generated tokens for instance.

        Raises
        ------
        InvalidOperation
            If the ids are none.
        """
        ids = as_ids(input_ids)
        self._pages.finish()
        rows = len(self._pages.batch)
        if self.manager.total_states and rows and len(ids) % rows == 0 and len(ids) > rows:
            # For beams and samples: before layers look at their states.
            repeated = torch.arange(rows).repeat_interleave(len(ids) // rows)
            self.reorder_cache(repeated)  # type: ignore[arg-type]
        self._pages.batch.expect(ids)

    def release(self) -> None:
        """Free the sequences; full blocks of known ids stay findable. The cache is ready for the next prompt."""
        self._pages.release()
        if not all(type(layer) is PagedLayer for layer in self.layers):
            self.layers = self._new_layers()  # states are of a number of rows, which the next prompt may not have

    def close(self) -> None:
        """Do as :meth:`release` does, finish what is being stored and close the tiers; the cache goes on without."""
        self.release()
        self._tiers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def reset(self) -> None:
        """Do as :meth:`release` does, and forget `num_cached_tokens`."""
        self.release()
        self._pages.batch.num_cached_tokens = 0

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
            raise bad_argument("tokens_to_remove", f"at most {length}", f"{-tokens_to_remove}")
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
            raise bad_argument("rows", f"a flat list of rows 0 … {count - 1}", f"{numbers.tolist()}")
        self._pages.batch.select(numbers)
