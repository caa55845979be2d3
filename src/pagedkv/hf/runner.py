"""ModelRunner: one model over one paged cache, for ragged batches of prefill chunks and decode tokens."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.control.arguments import sequence_key
from pagedkv.control.plan import BatchPlan
from pagedkv.errors import InvalidOperation
from pagedkv.hf.compat import attention_by, has_changing_rope
from pagedkv.hf.direct import DIRECT, Plan
from pagedkv.hf.forward_cache import GatherWriter, RaggedWriter, forward_cache
from pagedkv.hf.graphs import DecodeGraphs, Record, on_device
from pagedkv.hf.pages import LayerTable, ModelKvCache
from pagedkv.hf.products import Products
from pagedkv.hf.runner_streams import RunnerStreams
from pagedkv.hf.states import SequenceStates

__all__ = ["ModelRunner"]

Ids = npt.NDArray[np.int64]

TILE = 4
"""Rows of a matrix product are a multiple of it: for fewer, or for those left over when several threads share them, the
products of float32 add in another order. Those of bfloat16 were found to have one order for any number."""


class ModelRunner:
    """Runs a model over the sequences of a paged cache; made by :func:`pagedkv.hf.load_runner`.

    One step is ``plan = runner.cache.append_batch(…)`` (or ``plan(…)``), ``runner.forward(plan, …)`` and
    ``runner.cache.commit(plan)``. Not for several threads at once.

    In ``"ragged"`` mode the tokens of all sequences go through the model as one row, without padding, and attention
    reads the blocks in place. In ``"gather"`` mode the model sees one sequence after the other, with all of its K and V
    as dense tensors: slower, for every model.

    Attributes
    ----------
    cache : PagedKvCache
    mode : {"ragged", "gather"}
    model : PreTrainedModel
    vocab_size : int
        Elements of a row of logits.
    max_positions : int or None
        The longest text that the model was made for, in tokens.
    reuses_prefixes : bool
        Whether all that a layer keeps is in blocks, and holds for longer texts too; if not, prefixes cannot be reused.
    """

    def __init__(
        self, model: Any, cache: ModelKvCache, mode: str, kv_dtype: Any = None, batch_invariant: bool = True
    ) -> None:
        self.model, self.cache, self.mode = model, cache, mode
        self._text = model.config.get_text_config(decoder=True)
        self.vocab_size = int(self._text.vocab_size)
        limit = getattr(self._text, "max_position_embeddings", None)
        self.max_positions: int | None = limit if isinstance(limit, int) and limit > 0 else None
        self._states = SequenceStates(model.config)
        self.reuses_prefixes = self._states.is_empty and not has_changing_rope(model.config)
        self.table = LayerTable(cache, kv_dtype)
        on_cpu = model.device.type == "cpu"
        self._tile = TILE if batch_invariant and on_cpu and model.dtype == torch.float32 else 1
        self._ragged = RaggedWriter(cache, self.table, "cpu_invariant" if batch_invariant and on_cpu else "auto")
        self._gather = GatherWriter(cache, self.table)
        self._products = Products(model)
        self._ragged_cache = forward_cache(self._states.fresh(), self._states.paged, self._ragged)
        self._streaming = RunnerStreams(model, cache)
        self._graphs: DecodeGraphs | None = None
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_rows = "logits_to_keep" in accepted

    @property
    def bytes_per_block(self) -> int:
        """Bytes of K and V of one block over all layers; 0 before the first forward pass."""
        return self.cache.block_memory_bytes

    @property
    def num_recordings(self) -> int:
        """How many kinds of decode steps are replayed from a recording: 0 without CUDA graphs."""
        return 0 if self._graphs is None else len(self._graphs)

    def record_decoding(self, record: Record) -> None:
        """Record decode steps and replay them from now on, in ragged mode.

        Parameters
        ----------
        record : callable
            As :class:`pagedkv.hf.graphs.CudaRecorder`.
        """
        if self.mode == "ragged":
            name = type(self.model).__name__
            self._graphs = DecodeGraphs(self.cache, self._ragged_logits, self.vocab_size, record, name)

    def forward(self, plan: BatchPlan, token_ids: Any, wanted: Any) -> Tensor:
        """Compute K and V of the query tokens of a plan and the logits of some of them. Commits nothing.

        Parameters
        ----------
        plan : BatchPlan
            Of ``runner.cache``, and of its present state.
        token_ids : int64 [total_tokens]
            The query tokens of all sequences, in the order of the plan.
        wanted : int64 [k]
            The query tokens whose logits are wanted, as places in `token_ids`.

        Returns
        -------
        float32 Tensor [k, vocab_size]

        Raises
        ------
        InvalidOperation
            If an argument does not fit the plan or the model; or a sequence streams and the model has no rotary
            positions that allow it, or its blocks are shared or findable (allocate it by a count of tokens).
        """
        ids, rows = self._checked(plan, token_ids, wanted)
        if not len(ids):
            return torch.empty(0, self.vocab_size, device=self.model.device)
        positions = self._streaming.positions(plan) if plan.num_dropped.any() else plan.positions.copy()
        with torch.no_grad():
            if self.mode == "ragged":
                return self._forward_ragged(plan, ids, positions, rows)
            return self._forward_gather(plan, ids, positions, rows)

    def fork(self, src: int, dst: int) -> None:
        """Go before ``cache.fork(src, dst)`` with what is kept outside of the blocks.

        Raises
        ------
        InvalidOperation
            If `src` streams and has dropped tokens: its keys move, so they cannot be shared.
        """
        source, target = sequence_key(src), sequence_key(dst)
        self._streaming.refuse_fork(source)
        self._states.fork(source, target)

    def release(self, seq_id: int) -> None:
        """Follow ``cache.free(seq_id)``: forget what is kept outside of the blocks."""
        key = sequence_key(seq_id)
        self._states.release(key)
        self._streaming.release(key)

    def _forward_ragged(self, plan: BatchPlan, ids: Ids, positions: Ids, rows: Ids) -> Tensor:
        graphs = self._graphs
        logits = None if graphs is None else graphs.replay(plan, ids, positions, rows)
        if logits is not None:
            return logits
        padded = (on_device(_padded(array, self._tile), self.model.device) for array in (ids, positions, rows))
        logits = self._ragged_logits(plan, *padded)[: len(rows)].float()
        if graphs is not None:
            graphs.learn(plan, ids, positions)
        return logits

    def _ragged_logits(self, plan: Plan, ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """Return the logits of some rows of a batch, in the model's dtype; nothing here waits for the device."""
        self._ragged.plan = plan
        try:
            with attention_by(DIRECT, self._text), self._products:
                return self._run(self._ragged_cache, ids, positions, rows)
        finally:
            self._ragged.plan = None

    def _forward_gather(self, plan: BatchPlan, ids: Ids, positions: Ids, rows: Ids) -> Tensor:
        logits = torch.empty(len(rows), self.vocab_size, device=self.model.device)
        cuts = plan.cu_seqlens_q
        for i, past in enumerate(self._gather.sequences(plan)):
            first, last = int(cuts[i]), int(cuts[i + 1])
            if first == last:
                continue
            layers = self._states.layers(int(plan.seq_ids[i]), past, last - first)
            cache = forward_cache(layers, self._states.paged, self._gather)
            chosen = (rows >= first) & (rows < last)
            parts = (ids[first:last], positions[first:last], rows[chosen] - first)
            tensors = (on_device(part, self.model.device) for part in parts)
            logits[torch.from_numpy(chosen)] = self._run(cache, *tensors).float()
        return logits

    def _run(self, cache: Any, ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"logits_to_keep": rows} if self._takes_rows else {}
        if self._takes_positions:
            inputs["position_ids"] = positions[None]
        output = self.model(input_ids=ids[None], past_key_values=cache, use_cache=True, **inputs)
        logits: Tensor = output.logits[0]
        return logits if self._takes_rows else logits[rows]

    def _checked(self, plan: BatchPlan, token_ids: Any, wanted: Any) -> tuple[Ids, Ids]:
        if not isinstance(plan, BatchPlan):
            raise InvalidOperation(f"plan: expected a BatchPlan, got {type(plan).__name__}")
        ids = _integers("token_ids", token_ids, self.vocab_size)
        if len(ids) != plan.total_tokens:
            raise InvalidOperation(f"token_ids: expected {plan.total_tokens} as the plan has, got {len(ids)}")
        return ids, _integers("wanted", wanted, plan.total_tokens)


def _padded(array: Ids, multiple: int) -> Ids:
    """Return the array with zeros behind it, up to a multiple of some length."""
    missing = -len(array) % multiple
    return np.concatenate((array, np.zeros(missing, np.int64))) if missing else array


def _integers(name: str, given: Any, limit: int) -> Ids:
    """Return a flat array of numbers 0 … limit - 1."""
    array = np.asarray(given)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise InvalidOperation(f"{name}: expected a flat array of int, got {array.dtype} {list(array.shape)}")
    array = np.array(array, np.int64)  # a copy: torch wants arrays that it may write
    # As unsigned numbers negative ones are huge: one pass finds both kinds.
    if len(array) and int(array.view(np.uint64).max()) >= limit:
        wrong = array[array.view(np.uint64) >= limit][0]
        raise InvalidOperation(f"{name}: expected numbers in 0 … {limit - 1}, got {wrong}")
    return array
