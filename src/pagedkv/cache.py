"""PagedKvCache: the books of a BlockManager and the K and V that they describe, as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from pagedkv.control.manager import BlockManager
from pagedkv.control.plan import BatchPlan
from pagedkv.control.protocol import Strategy
from pagedkv.data.attention import attend
from pagedkv.data.call import AttentionCall, Batch, DeviceBatch
from pagedkv.data.gpu_plan import DevicePlan, require_plan_of
from pagedkv.data.states import StateStorage
from pagedkv.data.storage import KvStorage
from pagedkv.errors import bad_argument
from pagedkv.spec import KvCacheSpec, LayerSpec
from pagedkv.typing import Backend, Device, Dtype, Layout, OnFull


class PagedKvCache(BlockManager):
    """A paged KV cache that holds the real keys and values and attends over them.

    Parameters
    ----------
    num_blocks : int
        Size of the pool.
    block_size : int
        Tokens per block.
    num_kv_heads, head_dim : int
        Heads of K and V, and elements of one.
    num_layers : int
        Layers of one shape; 0 for none yet (see ``add_layer``).
    v_head_dim : int, optional
        Elements of one value head where they differ from ``head_dim``.
    dtype : {"float16", "bfloat16", "float32", "int8", "fp8"} or torch.dtype
        The last two are quantised as they are written, with a float32 scale for each head of each token: about half the
        memory of float16.
    device : str or torch.device
    layout : {"NHD", "HND"}
    strategy, eviction_threshold, prefix_caching, on_full, num_states, clock
        As in :class:`BlockManager`.

    Raises
    ------
    InvalidOperation
        If an argument is out of range.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        num_kv_heads: int = 8,
        head_dim: int = 64,
        *,
        num_layers: int = 1,
        v_head_dim: int | None = None,
        dtype: Dtype = "float16",
        device: Device = "cpu",
        layout: Layout = "NHD",
        strategy: Strategy = "lru",
        eviction_threshold: float = 0.9,
        prefix_caching: bool = True,
        on_full: OnFull = "raise",
        num_states: int = 0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(
            num_blocks,
            block_size,
            strategy=strategy,
            eviction_threshold=eviction_threshold,
            prefix_caching=prefix_caching,
            on_full=on_full,
            num_states=num_states,
            clock=clock,
        )
        spec = KvCacheSpec(
            num_blocks,
            block_size,
            num_kv_heads,
            head_dim,
            num_layers=num_layers,
            v_head_dim=v_head_dim,
            dtype=dtype,
            layout=layout,
        )
        self._storage = KvStorage(spec, device)
        self._states = StateStorage(num_states)
        self._staged: tuple[int, Any] = (0, None)  # what is being copied
        self._newest: tuple[BatchPlan | None, int] = (None, 0)  # the plan made or checked last, and at which change
        self._slots: tuple[BatchPlan | None, Any] = (None, None)
        self._batch: tuple[BatchPlan | None, Batch | None] = (None, None)

    @property
    def storage(self) -> KvStorage:
        """The memory of K and V."""
        self._finish_what_was_interrupted()
        return self._storage

    @property
    def states(self) -> StateStorage:
        """The memory of recurrent states, a row for each of ``num_states`` slots."""
        self._finish_what_was_interrupted()
        return self._states

    @property
    def spec(self) -> KvCacheSpec:
        """Shapes, dtype, layout and byte arithmetic."""
        return self._storage.spec

    @property
    def block_memory_bytes(self) -> int:
        """Bytes of one block, K and V, over all layers."""
        return self.spec.block_memory_bytes

    @property
    def total_memory_bytes(self) -> int:
        """Bytes of the whole pool, and of all slots for states."""
        return self.spec.total_memory_bytes + self._states.total_memory_bytes

    @property
    def used_memory_bytes(self) -> int:
        """Bytes of the blocks, and of the slots for states, that sequences hold."""
        blocks = self.spec.memory_bytes(self.used_block_count)
        return blocks + self.used_state_count * self._states.slot_memory_bytes

    def add_layer(self, num_kv_heads: int, head_dim: int, v_head_dim: int | None = None) -> int:
        """Add a layer of its own shape and return its number, for models that are sized as they run."""
        with self._lock:
            return self._storage.add_layer(LayerSpec(num_kv_heads, head_dim, v_head_dim))

    def write(self, layer: int, keys: Tensor, values: Tensor, plan: BatchPlan | DevicePlan) -> None:
        """Store K and V of the query tokens of `plan`.

        Parameters
        ----------
        layer : int
        keys : Tensor [total_tokens, num_kv_heads, head_dim]
        values : Tensor [total_tokens, num_kv_heads, v_head_dim]
            Cast to the dtype of the cache.
        plan : BatchPlan or DevicePlan
            A ``DevicePlan`` has room for ``max_tokens`` tokens and wants as many; those behind its plan go nowhere.

        Raises
        ------
        InvalidOperation
            If a shape does not fit, or the plan, for a ``DevicePlan`` the one loaded last, is stale: its query tokens
            have no longer these slots. The replay of a CUDA graph is no call of this and asks nobody.
        SequenceNotFound
            If a sequence of the plan has ended.
        """
        self._finish_what_was_interrupted()
        self._storage.write(layer, keys, values, self._slot_index(plan))

    def attend(
        self,
        layer: int,
        queries: Tensor,
        plan: BatchPlan | DevicePlan,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        backend: Backend = "auto",
    ) -> Tensor:
        """Let every query token read its own sequence's blocks, in place.

        Parameters
        ----------
        layer : int
        queries : Tensor [total_tokens, num_q_heads, head_dim]
        plan : BatchPlan or DevicePlan
            The arrays of a ``BatchPlan`` are copied and checked when it is first used, once for all layers. With a
            ``DevicePlan`` the call may be captured in a CUDA graph; only backends ``"auto"`` and ``"triton"``.
        scale : float, optional
            ``head_dim ** -0.5`` by default.
        window, softcap, sinks, backend
            As in :func:`paged_attention`.

        Returns
        -------
        Tensor [total_tokens, num_q_heads, v_head_dim]
        """
        storage = self.storage
        keys, values = storage.keys(layer), storage.values(layer)
        call = AttentionCall(
            queries,
            keys,
            values,
            self._batch_of(plan),
            scale=keys.shape[-1] ** -0.5 if scale is None else scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            key_scales=storage.key_scales(layer),
            value_scales=storage.value_scales(layer),
            layout=storage.spec.layout,
        )
        return attend(call, backend)

    def device_plan(
        self, max_seqs: int, max_blocks: int, max_tokens: int, max_query_tokens: int | None = None
    ) -> DevicePlan:
        """Return buffers on the cache's device that plans of this cache can be loaded into, for CUDA graphs.

        Parameters
        ----------
        max_seqs, max_blocks, max_tokens, max_query_tokens
            As in :class:`DevicePlan`.
        """
        return DevicePlan(
            max_seqs,
            max_blocks,
            max_tokens,
            block_size=self.block_size,
            num_blocks=self.total_blocks,
            max_query_tokens=max_query_tokens,
            device=self._storage.device,
        )

    def _slot_index(self, plan: BatchPlan | DevicePlan) -> Any:
        """Check the slots of a plan once for all layers, and again once the books have changed."""
        if isinstance(plan, DevicePlan):
            slots = self._storage.slots_of(plan)
            if isinstance(plan.loaded, BatchPlan):
                self._require_fresh_now(plan.loaded)
            return slots
        if not isinstance(plan, BatchPlan):
            raise bad_argument("plan", "a BatchPlan", f"{type(plan).__name__}", "plan([seq_id, …]) makes one")
        self._require_fresh_now(plan)
        made_for, slots = self._slots
        if made_for is not plan:
            slots = self._storage.slot_index(plan.slot_mapping)
            self._slots = (plan, slots)
        return slots

    def _require_fresh_now(self, plan: BatchPlan) -> None:
        """Refuse a stale plan; one that was made or looked at just now is not looked at again."""
        changes = self._state.counter("changes")
        if self._newest[0] is not plan or self._newest[1] != changes:
            self._require_fresh(plan)
            self._newest = (plan, changes)

    def _made(self, plan: BatchPlan) -> BatchPlan:
        self._newest = (plan, self._state.counter("changes"))
        return plan

    def _batch_of(self, plan: BatchPlan | DevicePlan) -> Batch | DeviceBatch:
        """Return the arrays of a plan, the same object for all layers, so that they are checked once."""
        if isinstance(plan, DevicePlan):
            require_plan_of(plan, self.spec.num_blocks, self.spec.block_size, self._storage.device)
            return plan.batch
        if not isinstance(plan, BatchPlan):
            raise bad_argument("plan", "a BatchPlan", f"{type(plan).__name__}", "plan([seq_id, …]) makes one")
        made_for, batch = self._batch
        if made_for is not plan or batch is None:
            arrays = plan.block_tables, plan.seq_lens, plan.cu_seqlens_q, plan.holes
            batch = Batch(*(array.copy() for array in arrays))  # what was checked must not change
            self._batch = (plan, batch)
        return batch

    def _copy(self, copies: Any) -> None:
        if not self._storage.num_layers:
            return
        if not np.isin(copies[:, 0], copies[:, 1]).any():
            self._storage.copy_blocks(copies)  # the sources stay as they are: it can be done twice
            return
        changes = self._state.counter("changes")
        if self._staged[0] != changes:
            self._staged = (changes, self._storage.read_blocks(copies[:, 0]))
        self._storage.write_blocks(copies[:, 1], self._staged[1])

    def _copy_states(self, copies: Any) -> None:
        self._states.copy(copies)

    def _finish_what_was_interrupted(self) -> None:
        if self._is_open:
            with self._lock:
                self._settle()

    def _block_keys(self, block: int) -> Tensor | list[Tensor]:
        self._finish_what_was_interrupted()
        return self._storage.block_keys(block)

    def _block_values(self, block: int) -> Tensor | list[Tensor]:
        self._finish_what_was_interrupted()
        return self._storage.block_values(block)

    def _report_lines(self) -> list[str]:
        used, total = self.used_memory_bytes / 1e6, self.total_memory_bytes / 1e6
        return [f"Memory: {used:.2f} MB / {total:.2f} MB ({self.spec.dtype}, {self._storage.device})"]
