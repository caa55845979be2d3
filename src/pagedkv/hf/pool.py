"""The pool of a model: a PagedKvCache that learns the shapes of its layers as the model runs; what its blocks are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pagedkv.cache import PagedKvCache
from pagedkv.control.arguments import sequence_key
from pagedkv.control.plan import BatchPlan
from pagedkv.control.sequence_table import find_row
from pagedkv.data.call import Batch
from pagedkv.data.gpu_device import require_slots
from pagedkv.data.storage import KvStorage
from pagedkv.errors import bad_argument
from pagedkv.format import format_bytes
from pagedkv.tiers.fingerprint import fingerprint_of
from pagedkv.tiers.tier import BlockFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Ids = npt.NDArray[np.int64]


class ModelKvCache(PagedKvCache):
    """A PagedKvCache that takes its dtype and device from the first keys it sees."""

    numerics = ""
    """How K and V are computed, besides what the config of the model says; a part of the fingerprint of its blocks."""
    num_clears = 0
    """How often ``clear_prefix_cache()`` was called: the weights of the model may be others since the last time."""
    _follow_clear: Callable[[], None] | None = None

    def settle(self, dtype: Any, device: Any) -> None:
        """Fix dtype and device of the storage while it has no layers."""
        self._storage = KvStorage(replace(self._storage.spec, dtype=dtype), device)

    def are_private(self, block_ids: npt.NDArray[np.int64]) -> bool:
        """Tell whether these blocks are held once, not pinned and not findable, so that their keys may change."""
        records = self._state.blocks[block_ids]
        return bool(((records["ref_count"] == 1) & (records["pins"] == 0) & (records["indexed"] == 0)).all())

    def findable_ids(self, seq_id: int) -> Ids:
        """Return the token ids of the leading blocks of a sequence that others can find."""
        with self._lock:
            table = self.get_sequence(seq_id).block_table
            state = self._state
            record = state.sequence(find_row(state.packed, sequence_key(seq_id)))
            ids: Ids = state.contents.reshape(-1, self.block_size)[table[: record.num_indexed]].ravel()
            return ids

    def require_fresh(self, plan: BatchPlan) -> None:
        """Refuse a plan that is stale."""
        self._finish_what_was_interrupted()
        self._require_fresh_now(plan)

    def checked(self, plan: BatchPlan) -> tuple[Batch, Ids]:
        """Return the arrays of a plan and its slots, after seeing that it is of now and names nothing outside."""
        self.require_fresh(plan)
        slots = plan.slot_mapping
        if slots.dtype != np.int64 or slots.ndim != 1:
            raise bad_argument("slot_mapping", "int64 [total_tokens]", f"{slots.dtype} {list(slots.shape)}")
        require_slots(slots, self.total_blocks * self.block_size)
        batch = self._batch_of(plan)
        assert isinstance(batch, Batch)  # a BatchPlan has no other
        batch.check(self.total_blocks, self.block_size)
        batch.require_total(len(slots))
        return batch, slots

    def when_cleared(self, follow: Callable[[], None]) -> None:
        """Call this after each ``clear_prefix_cache()``."""
        self._follow_clear = follow

    def clear_prefix_cache(self) -> int:
        """Make every cached block free, those of tiers that are open behind the pool, too; returns how many here."""
        self.num_clears += 1
        count = super().clear_prefix_cache()
        if self._follow_clear is not None:
            self._follow_clear()
        return count


class LayerTable:
    """Which layer of a model is which layer of its pool: each gets its place, and its shape, with its first keys.

    Parameters
    ----------
    pool : ModelKvCache
    dtype, device : optional
        Of the storage; those of the first keys by default.
    """

    def __init__(self, pool: ModelKvCache, dtype: Any = None, device: Any = None) -> None:
        self._pool = pool
        self._dtype, self._device = dtype, device
        self.numbers: dict[int, int] = {}
        """layer of the model: layer of the pool, for layers that were written"""

    def place(self, layer: int, keys: Tensor, values: Tensor) -> int:
        """Return the place of a layer, made for K and V ``[batch, heads, tokens, dim]`` where it has none."""
        number = self.numbers.get(layer)
        if number is None:
            if not self.numbers:
                self._pool.settle(self._dtype or keys.dtype, self._device or keys.device)
            number = self._pool.add_layer(keys.shape[1], keys.shape[3], values.shape[3])
            self.numbers[layer] = number
        return number

    def follow(self, other: LayerTable) -> None:
        """Make the places, of the same shapes, that `other` has."""
        spec = other._pool.spec
        self._pool.settle(self._dtype or spec.dtype, self._device or other._pool.storage.device)
        for shape in spec.layer_specs:
            self._pool.add_layer(shape.num_kv_heads, shape.head_dim, shape.v_head_dim)
        self.numbers = dict(other.numbers)


def by_token(states: Tensor) -> Tensor:
    """Turn ``[batch, heads, tokens, dim]`` into ``[batch * tokens, heads, dim]``."""
    return states.transpose(1, 2).flatten(0, 1)


def by_row(states: Tensor, rows: int) -> Tensor:
    """Turn ``[batch * tokens, heads, dim]`` into ``[batch, heads, tokens, dim]``."""
    return states.view(rows, -1, *states.shape[1:]).transpose(1, 2)


def visible_slots(plan: BatchPlan, block_size: int, chosen: slice = slice(None)) -> npt.NDArray[np.int64]:
    """Return the slots of all tokens that the (chosen) sequences of a plan see, one sequence after the other."""
    lengths, holes = plan.seq_lens[chosen].astype(np.int64), plan.holes[chosen].astype(np.int64)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    places += np.where(places >= holes[rows, 0], (holes[:, 1] - holes[:, 0])[rows], 0)
    blocks = plan.block_tables[chosen][rows, places // block_size].astype(np.int64)
    slots: npt.NDArray[np.int64] = blocks * block_size + places % block_size
    return slots


# What callers give: token ids and masks.


def as_ids(input_ids: Any) -> Ids:
    """Return token ids ``[batch, tokens]`` as an array; an error where these are none."""
    ids = input_ids.detach().cpu().numpy() if isinstance(input_ids, Tensor) else np.asarray(input_ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not len(ids):
        raise bad_argument("input_ids", "token ids [batch, tokens]", f"{ids.dtype} {list(ids.shape)}")
    if ids.size and ids.min() < 0:
        raise bad_argument("input_ids", "token ids of at least 0", f"{ids.min()}")
    return ids.astype(np.int64)


def padding(attention_mask: Any, ids: Ids) -> npt.NDArray[np.bool_]:
    """Return which rows have padding; an error where the mask has another shape."""
    if attention_mask is None:
        return np.zeros(len(ids), bool)
    mask = attention_mask.detach().cpu().numpy() if isinstance(attention_mask, Tensor) else np.asarray(attention_mask)
    if mask.shape != ids.shape:
        raise bad_argument("attention_mask", f"shape {list(ids.shape)}", f"{list(mask.shape)}")
    padded: npt.NDArray[np.bool_] = (mask == 0).any(axis=1)
    return padded


# What came of it.


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """What the sequences of one call of ``generate()`` found, shared and held, all rows together; ``print`` it.

    Attributes
    ----------
    rows : int
        0 where nothing was written yet.
    prompt_tokens, cached_tokens : int
        Of the prompts, beams and samples not counted; and those of them that were found in the cache, or beyond it in
        a tier, and not computed.
    tokens : int
        Whose K and V the sequences held in the end.
    blocks_used, blocks_shared : int
        Blocks that held these; and those of them that two or more sequences held.
    paged_bytes, contiguous_bytes, preallocated_bytes : int
        Of K and V: in these blocks; in one cache for each row, of its length; in one of the model's longest length.
    block_size, cached_blocks, total_blocks : int
        Of the pool; `cached_blocks` are findable ones that no sequence held then.
    """

    rows: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    blocks_used: int = 0
    blocks_shared: int = 0
    paged_bytes: int = 0
    contiguous_bytes: int = 0
    preallocated_bytes: int = 0
    block_size: int = 0
    cached_blocks: int = 0
    total_blocks: int = 0

    @classmethod
    def of(cls, pool: ModelKvCache, batch: Any, config: Any) -> CacheReport:
        """Return the figures of the sequences of a batch, which are all of one length; `config` is the text model's."""
        held = np.concatenate([pool.get_sequence(seq_id).block_table for seq_id in batch.seq_ids.tolist()])
        rows, length = len(batch), batch.length
        size, counts = pool.block_size, np.unique(held, return_counts=True)[1]
        token_bytes = pool.block_memory_bytes / size
        longest = max(length, getattr(config, "max_position_embeddings", None) or 0)
        return cls(
            rows=rows,
            prompt_tokens=batch.num_prompts * batch.num_prompt_tokens,
            cached_tokens=batch.num_prompts * batch.num_cached_tokens,
            tokens=rows * length,
            blocks_used=len(counts),
            blocks_shared=int((counts > 1).sum()),
            paged_bytes=len(counts) * pool.block_memory_bytes,
            contiguous_bytes=round(rows * length * token_bytes),
            preallocated_bytes=round(rows * longest * token_bytes),
            block_size=size,
            cached_blocks=pool.cached_block_count,
            total_blocks=pool.total_blocks,
        )

    def __str__(self) -> str:
        if not self.rows:
            return "nothing was written yet"
        return (
            f"prompts: {self.prompt_tokens:,} tokens, {self.cached_tokens:,} of them found and not computed\n"
            f"blocks: {self.blocks_used:,} of {self.block_size} tokens for {self.tokens:,}, {self.blocks_shared:,} "
            f"shared; {self.cached_blocks:,} more of {self.total_blocks:,} can be found\n"
            f"memory: {format_bytes(self.paged_bytes)}; contiguous: {format_bytes(self.contiguous_bytes)}; "
            f"preallocated: {format_bytes(self.preallocated_bytes)}"
        )


# What the blocks of a pool are: the same for every process that computes the same K and V.

_NO_PART = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
    "return_dict",
}
_NO_PART |= {"id2label", "label2id", "problem_type", "output_attentions", "output_hidden_states"}
_NO_PART |= {"bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"}
"""Settings in which K and V have no part, and that differ between a model that was made and the same one loaded."""


def block_format(
    model: PreTrainedModel, cache: ModelKvCache, weights: Mapping[str, Tensor] | None = None
) -> BlockFormat:
    """Return what a tier must know of the blocks of a pool: their size, and whatever K and V depend on.

    The fingerprint is over all weights and buffers of the model, which are read, its config, adapters of PEFT that are
    in force, its attention, the kind of its device, how the pool is filled, the shapes and dtype of its blocks, and the
    versions of torch and transformers (major and minor): another one of these may change K and V.

    Parameters
    ----------
    model : PreTrainedModel
    cache : ModelKvCache
        Which has seen K and V of the model, and so knows their shapes.
    weights : mapping of str to Tensor, optional
        What is computed with in place of the model's own weights and buffers.

    Returns
    -------
    BlockFormat

    Raises
    ------
    InvalidOperation
        If the pool does not know the shapes yet, or a weight cannot be read, as where it is on no device.
    """
    if not cache.block_memory_bytes:
        raise bad_argument("cache", "one that knows the shapes of its blocks", "one that no model has run over")
    text = model.config.get_text_config(decoder=True)
    settings = {
        "config": _parts_of(model.config.to_dict()),
        "attention": text._attn_implementation,
        "numerics": cache.numerics,
        "training": model.training,
        "device": model.device.type,
        "adapters": _adapters(model),
        "versions": [version(name).split(".")[:2] for name in ("torch", "transformers")],
    }
    if weights is None:
        weights = dict(model.named_buffers()) | model.state_dict()
        if any(not parameter.numel() for parameter in model.parameters()):
            raise bad_argument("model", "one that has its weights", "one that a runner has taken them from")
    try:
        fingerprint = fingerprint_of(weights, settings, cache.spec)
    except (NotImplementedError, AttributeError) as error:
        raise bad_argument("model", "one whose weights can all be read", str(error)) from error
    return BlockFormat(fingerprint, cache.block_size, cache.block_memory_bytes)


def _parts_of(settings: Any) -> Any:
    """Leave out what has no part, in the configs within a config, too."""
    if not isinstance(settings, Mapping):
        return settings
    return {str(name): _parts_of(value) for name, value in settings.items() if name not in _NO_PART}


def _adapters(model: Any) -> list[Any]:
    """Return which adapters of PEFT are in force in which layers, and by how much: no weight tells."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(_switch(layer), bool)]
    return [(name, layer.active_adapters, _switch(layer), getattr(layer, "scaling", None)) for name, layer in layers]


def _switch(layer: Any) -> Any:
    return getattr(layer, "disable_adapters", None)
