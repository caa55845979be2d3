"""ModelRunner: one model over one paged cache, for ragged batches of prefill chunks and decode tokens."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import Linear, functional

from pagedkv.control.arguments import sequence_key
from pagedkv.control.plan import BatchPlan
from pagedkv.data.call import Batch
from pagedkv.data.decoder import Decoder
from pagedkv.data.forward import NO_ENDS, Forward
from pagedkv.data.huge_pages import MappedFiles
from pagedkv.data.storage import SlotIndex
from pagedkv.data.team import is_interpreted
from pagedkv.data.weights import packed, quantised
from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.hf.compat import (
    Cache,
    LayerStore,
    attention_by,
    common_window,
    forget_long_texts,
    has_changing_rope,
    longest_text,
    paged_layer,
    restarts_beyond,
)
from pagedkv.hf.description import describe, state_of, tensors_of
from pagedkv.hf.direct import DIRECT, PagedStates, Plan
from pagedkv.hf.graphs import DecodeGraphs, Record, on_device
from pagedkv.hf.pool import LayerTable, ModelKvCache, block_format, by_token, visible_slots
from pagedkv.hf.recurrent import RecurrentStates
from pagedkv.hf.rotary import RunnerStreams
from pagedkv.tiers.tier import BlockFormat
from pagedkv.typing import Backend, Dtype, Ints, TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Forward caches: what a ModelRunner hands to a model for one pass, over a ragged batch or over one sequence.
#
# transformers knows one way from a model to keys and values: ``Cache.update()``. Behind it stands a store, which knows
# the plan of the step.

Slots = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


def forward_cache(stock: list[Any], paged: set[int], store: LayerStore) -> Cache:
    """Return a cache whose paged layers go to `store` and whose other layers are the stock ones."""
    layers = [paged_layer(store, number, layer) if number in paged else layer for number, layer in enumerate(stock)]
    return Cache(layers=layers)


class RaggedWriter:
    """All sequences of a plan in one row: attention gets handles and reads the blocks by the plan.

    The model is made to believe that the row is one prompt with nothing before it; who sees whom is in the plan, and
    positions are told. The row may be longer than the plan: what is behind is padding.

    Parameters
    ----------
    pool : ModelKvCache
    table : LayerTable
    backend : str
        Of :func:`pagedkv.paged_attention`.
    """

    def __init__(self, pool: ModelKvCache, table: LayerTable, backend: Backend) -> None:
        self._pool, self._table, self._backend = pool, table, backend
        self.plan: Plan | None = None

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store K and V; the handles stand for everything that the sequences see."""
        plan = self.plan
        if plan is None:
            raise bad_argument("past_key_values", "a forward pass of its ModelRunner")
        number = self._table.place(layer, keys, values)
        total = plan.total_tokens
        self._pool.write(number, by_token(keys)[:total], by_token(values)[:total], plan)
        where = (self._pool, number, plan, keys.shape[2], self._backend)
        return PagedStates.of(keys, *where), PagedStates.of(values, *where)

    def length(self, layer: int) -> int:
        """Tell the model that there is nothing yet."""
        return 0


class GatherWriter:
    """One sequence of a plan after the other: attention gets all K and V of the sequence as dense tensors."""

    def __init__(self, pool: ModelKvCache, table: LayerTable) -> None:
        self._pool, self._table = pool, table
        self._past = 0
        self._new: Slots = np.empty(0, np.int64)
        self._all: Slots = np.empty(0, np.int64)
        self._written: set[int] = set()
        self._index: tuple[SlotIndex, SlotIndex] | None = None

    def sequences(self, plan: BatchPlan) -> Iterator[int]:
        """Turn to the sequences of a plan, one after the other, and yield how many tokens each has behind it."""
        every = visible_slots(plan, self._pool.block_size)
        first = 0
        for i, length in enumerate(plan.seq_lens.tolist()):
            self._new = plan.slot_mapping[plan.cu_seqlens_q[i] : plan.cu_seqlens_q[i + 1]]
            self._all = every[first : first + length]
            self._past = length - len(self._new)
            self._written.clear()
            self._index = None
            first += length
            yield self._past

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store K and V and gather what the sequence sees."""
        number = self._table.place(layer, keys, values)
        storage = self._pool.storage
        if self._index is None:
            self._index = storage.slot_index(self._new), storage.slot_index(self._all)
        storage.write(number, by_token(keys), by_token(values), self._index[0])
        self._written.add(layer)
        if not self._past and keys.dtype == storage.dtype:
            return keys, values
        all_keys, all_values = storage.gather(number, self._index[1])
        return all_keys.transpose(0, 1)[None].to(keys), all_values.transpose(0, 1)[None].to(values)

    def length(self, layer: int) -> int:
        """Tell how many tokens of the sequence the layer holds by now."""
        return len(self._all) if layer in self._written else self._past


# oneDNN: the matrix products of a model's linear layers, while a runner runs the model.
#
# For float32, torch hands them to MKL, which leaves the wide vectors of other makers' processors unused: on an AMD
# processor with AVX-512, oneDNN multiplies twice as fast. Its results are also the same bits for every number of rows
# but one, in any number of threads, where MKL's need four rows.
# The compiled mode multiplies by itself, so this is for models that run by their own modules in ragged mode: without
# it a step of a small Llama in float32 takes 1.6 times the processor's time for one sequence and 1.9 times for 16.


class OneDnnLinears:
    """A context in which the plain linear layers of a model multiply by oneDNN, where that is worth it.

    The layers and their weights stay as they are; outside of the context the model is torch's own again.

    Parameters
    ----------
    model : Module
        Whose layers these are. Layers of other classes, and those whose ``forward`` was replaced, are left alone.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        layers = [layer for layer in model.modules() if _is_plain(layer)] if _is_worth_it(model) else []
        self._forwards = [(vars(layer), _forward(layer)) for layer in layers]

    def __enter__(self) -> None:
        for attributes, forward in self._forwards:
            attributes["forward"] = forward

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for attributes, _ in self._forwards:
            attributes.pop("forward", None)


def _is_worth_it(model: Any) -> bool:
    has_operator = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_operator and torch.backends.cpu.get_cpu_capability() == "AVX512" and model.device.type == "cpu"


def _is_plain(layer: Any) -> bool:
    return type(layer) is Linear and "forward" not in vars(layer)


def _forward(layer: Any) -> Callable[[Tensor], Tensor]:
    multiply = torch.ops.mkldnn._linear_pointwise

    def forward(x: Tensor) -> Tensor:
        if x.dtype is not torch.float32 or layer.weight.dtype is not torch.float32 or not x.numel():
            return functional.linear(x, layer.weight, layer.bias)
        product: Tensor = multiply(x, layer.weight, layer.bias, "none", [], "")
        return product

    return forward


Ids = npt.NDArray[np.int64]


# Compiled: one call a step, or for several steps of few sequences whose tokens are the likeliest. Most of the time that
# Python takes for a step goes to fetch what the weights have driven out of the caches; of steps that follow each other
# closely only the first one has to.

MOST_PASSES, LONGEST_CALL = 16, 0.04
"""Steps of a call, and its seconds by default: so long a token may have to wait for those behind it, and a new request
for all.
"""


class Ahead:
    """Logits of steps that are still to be asked for, and what they were computed from.

    Parameters
    ----------
    forward : Forward
    plan : BatchPlan
        Of the first step, which was asked for, and that of each step behind it but for places that are one more.
    rows : int64 [n]
    logits : float32 [count, n, vocab_size]
    tokens : int64 [count, n]
    num_writes : int
        To the storage, those of these steps included.
    """

    def __init__(
        self, forward: Forward, plan: BatchPlan, rows: Ids, logits: Logits, tokens: Ids, num_writes: int
    ) -> None:
        self._forward, self._logits, self._num_writes = forward, logits, num_writes
        self.tokens, self._number = tokens, 0
        later = np.arange(len(tokens))[:, None]
        slots, positions, lens = (array + later for array in (plan.slot_mapping, plan.positions, plan.seq_lens))
        self._growing = tokens, slots, positions, lens.astype(np.int32)
        self._constant = _contents(*_constant(plan), rows)

    def next(self, forward: Forward | None, plan: BatchPlan, ids: Any, rows: Any, num_writes: int) -> Logits | None:
        """Return the logits of the next step if that is what is asked for and all is as it was; else None."""
        self._number += 1
        if self._number == len(self.tokens) or forward is not self._forward or num_writes != self._num_writes:
            return None
        if not isinstance(ids, np.ndarray) or not isinstance(rows, np.ndarray):
            return None
        expected = self._constant + _contents(*[each[self._number] for each in self._growing])
        asked = _contents(*_constant(plan), rows, ids, plan.slot_mapping, plan.positions, plan.seq_lens)
        logits: Logits = self._logits[self._number]
        return logits if asked == expected else None


def _constant(plan: BatchPlan) -> tuple[Any, ...]:
    return plan.block_tables, plan.cu_seqlens_q, plan.holes, plan.num_dropped


def _contents(*arrays: Any) -> list[bytes]:
    """Return what is in arrays, to be compared."""
    return [array.tobytes() for array in arrays]


def _decodes(plan: BatchPlan, rows: Ids) -> bool:
    """Tell whether each sequence has one token, whose logits are wanted, and has dropped none."""
    places = np.arange(plan.total_tokens + 1)
    each = _contents(places.astype(np.int32), places[:-1])
    return _contents(plan.cu_seqlens_q, rows) == each and not plan.num_dropped.any()


class CompiledModel:
    """A model over a pool, run by :class:`pagedkv.data.forward.Forward`.

    Parameters
    ----------
    model : PreTrainedModel
    cache : ModelKvCache
    table : LayerTable
        Of the pool; every layer gets the place of its number.

    Raises
    ------
    InvalidOperation
        If the model has no description, or nothing is compiled (``NUMBA_DISABLE_JIT=1``).
    """

    def __init__(self, model: Any, cache: ModelKvCache, table: LayerTable) -> None:
        if is_interpreted():
            raise InvalidOperation("Numba does not compile here")
        self._model, self._cache, self._table = model, cache, table
        self._vocab_size = int(model.config.get_text_config(decoder=True).vocab_size)
        self._num_clears = cache.num_clears
        self._decoder: Decoder | None = None
        self._forward: Forward | None = None
        self._is_quantised = self._is_emptied = False
        self._ahead: Ahead | None = None
        self._pass_seconds = float("inf")
        self._take_up()

    def quantise(self, *, keeps_model: bool) -> None:
        """Compute with weights in int8 from here on; unless the model is kept, its own are let go layer by layer."""
        decoder, let_go = self._take_up(), None if keeps_model else _Emptied(self._model)
        self._decoder, self._forward = self._quantised(decoder, let_go), None
        self._is_quantised, self._is_emptied = True, not keeps_model
        self._state = state_of(self._model, self._decoder)
        if let_go is not None:
            let_go.close()

    def _quantised(self, decoder: Decoder, let_go: _Emptied | None = None) -> Decoder:
        return packed(quantised(decoder, let_go), self._model.dtype)

    def pack(self) -> None:
        """Put the model's own weights in the order in which they are multiplied: it runs no more."""
        self._decoder, self._forward = packed(self._take_up(), self._model.dtype), None
        self._is_emptied = True
        _Emptied(self._model).close()

    def weights(self) -> dict[str, Tensor]:
        """Return all tensors that are computed with."""
        return {f"{i}": tensor for i, tensor in enumerate(tensors_of(self._decoder or self._take_up()))}

    def _take_up(self) -> Decoder:
        """Return the description of the model as it is now: made anew if it is another than was described."""
        decoder = self._decoder
        if decoder is not None and (self._is_emptied or state_of(self._model, decoder) == self._state):
            return decoder
        self._decoder = self._forward = None
        decoder = describe(self._model)
        self._decoder = self._quantised(decoder) if self._is_quantised else decoder
        self._state = state_of(self._model, self._decoder)
        return self._decoder

    def forward(self, plan: BatchPlan, ids: Ids, positions: Ids, rows: Ids) -> Tensor:
        """Write K and V of the query tokens of a plan and return the logits of some of them, float32."""
        forward, batch, slots = self._prepared(plan, positions)
        return forward(batch, slots, ids, positions, rows)

    def known(self, plan: BatchPlan, ids: Any, rows: Any) -> Logits | None:
        """Return logits that were computed ahead, if they are what is asked for."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or self._num_clears != self._cache.num_clears:
            return None
        logits = ahead.next(self._forward, plan, ids, rows, self._cache.storage.num_writes)
        if logits is not None:
            self._cache.require_fresh(plan)
            self._ahead = ahead
        return logits

    def forward_in_place(
        self, plan: BatchPlan, ids: Ids, positions: Ids, rows: Ids, ahead: int, ends: Ids, longest_call: float
    ) -> Logits:
        """Do as `forward`; the logits are an array that the next call may write anew."""
        forward, batch, slots = self._prepared(plan, positions)
        if not _decodes(plan, rows):
            return forward.in_place(batch, slots, ids, positions, rows)
        ahead = min(ahead, MOST_PASSES - 1, int(longest_call / self._pass_seconds) - 1)
        count = 1 + (min(ahead, forward.room_for_passes(batch, slots, positions)) if ahead > 0 else 0)
        started, num_writes = time.perf_counter(), self._cache.storage.num_writes + 1
        if count == 1:
            logits = forward.in_place(batch, slots, ids, positions, rows)
        else:
            of_all, tokens = forward.passes(batch, slots, ids, positions, count, ends)
            count = int((tokens.min(1) >= 0).sum())
            self._ahead = Ahead(forward, plan, rows, of_all, tokens, num_writes)
            logits = of_all[0]
        self._pass_seconds = (time.perf_counter() - started) / count
        return logits

    def _prepared(self, plan: BatchPlan, positions: Ids) -> tuple[Forward, Batch, Ids]:
        batch, slots = self._cache.checked(plan)
        longest = int((plan.seq_lens + plan.num_dropped).max())
        if positions.size and int(positions.max()) >= longest:
            raise bad_argument("plan", f"positions below {longest}, the length of a text", f"{positions.max()}")
        if self._forward is None or self._num_clears != self._cache.num_clears:
            self._num_clears = self._cache.num_clears  # since prefixes were forgotten weights may be others
            decoder = self._take_up()
            if self._forward is None:
                self._forward = self._made(decoder)
        return self._forward, batch, slots

    def _made(self, decoder: Decoder) -> Forward:
        if len(decoder.embedding) < self._vocab_size:
            raise bad_argument("model", f"embeddings of {self._vocab_size} tokens", f"{len(decoder.embedding)}")
        for number, layer in enumerate(decoder.layers):
            if number not in self._table.numbers:
                sizes = layer.attention.head_dim, layer.attention.v_head_dim
                kept = (
                    torch.empty(1, layer.attention.num_kv_heads, 0, size, dtype=self._model.dtype, device="cpu")
                    for size in sizes
                )
                self._table.place(number, *kept)
        if self._cache.spec.is_quantised:
            raise InvalidOperation("keys and values are quantised")
        return Forward(decoder, self._cache.storage, self._model.dtype)


class _Emptied:
    """A model whose weights are let go: it keeps its modules, its config and its dtype, and runs no more."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._owners: dict[int, list[torch.nn.Parameter]] = {}
        self._files = MappedFiles()
        for parameter in model.parameters():
            self._owners.setdefault(parameter.untyped_storage().data_ptr(), []).append(parameter)

    def __call__(self, matrices: list[Tensor]) -> None:
        for matrix in matrices:
            if matrix.is_contiguous():
                self._files.give_back(matrix)
            for parameter in self._owners.pop(matrix.untyped_storage().data_ptr(), []):
                parameter.data = parameter.data.new_empty(0)

    def close(self) -> None:
        """Let go of the rest."""
        for parameter in self._model.parameters():
            parameter.data = parameter.data.new_empty(0)
        self._owners, self._model.forward = {}, _refuse_to_run


def _refuse_to_run(*args: Any, **kwargs: Any) -> None:
    raise bad_argument("model", "one that has its weights", "one whose runner alone has them: load the folder anew")


# The runner.

TILE = 4
"""Rows of a matrix product are a multiple of it: for fewer, or for those left over when several threads share them, the
products of float32 add in another order. Those of bfloat16 were found to have one order for any number."""


class ModelRunner:
    """Runs a model over the sequences of a paged cache; made by :func:`pagedkv.hf.load_runner`.

    One step is ``plan = runner.cache.append_batch(…)`` (or ``plan(…)``), ``runner.forward(plan, …)`` and
    ``runner.cache.commit(plan)``. Not for several threads at once.

    In ``"compiled"`` mode a step is one compiled call over the model's own weights (see docs/huggingface.md). In
    ``"ragged"`` mode the tokens of all sequences go through the model as one row, without padding, and attention
    reads the blocks in place. In ``"gather"`` mode the model sees one sequence after the other, with all of its K and V
    as dense tensors: slower, for every model.

    Attributes
    ----------
    cache : PagedKvCache
    mode : {"compiled", "ragged", "gather"}
    model : PreTrainedModel
    vocab_size : int
        Elements of a row of logits.
    max_positions : int or None
        The longest text that the model was made for, in tokens.
    reuses_prefixes : bool
        Whether what layers keep of a text holds for longer texts too; if not, prefixes cannot be reused.
    has_states : bool
        Whether layers keep a state of each text besides K and V. A prefix is reused up to a snapshot of it then, and
        tokens cannot be taken back.
    window : int or None
        How many tokens a token sees at most, itself included, where all layers have a sliding window: what lies before
        may be given back by ``cache.apply_streaming_llm(seq_id, 0, window - 1)``, and the logits are the same.
    chunkable : bool
        Whether a text may be computed in pieces of any length. If not, a prompt goes through the model whole, and every
        token behind it alone, as in ``generate()``.
    restarts_beyond : int or None
        A text that grows beyond so many tokens is computed anew, whole, as ``generate()`` does for this model.
    streams : RunnerStreams
        The sequences that have dropped tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: ModelKvCache,
        mode: str,
        kv_dtype: Dtype | None = None,
        batch_invariant: bool = True,
        chunkable: bool = True,
    ) -> None:
        self.model, self.cache, self.mode = model, cache, mode
        cache.numerics = f"{mode}, batch invariant" if batch_invariant else mode
        self._text = model.config.get_text_config(decoder=True)
        self.vocab_size = int(self._text.vocab_size)
        self.max_positions = longest_text(model.config)
        self._recurrent = RecurrentStates(model, cache)
        self.has_states = not self._recurrent.is_empty
        self.chunkable = chunkable and not has_changing_rope(model.config)
        self.reuses_prefixes = self.chunkable
        self.restarts_beyond = restarts_beyond(model)
        self.window = common_window(model.config)
        self.table = LayerTable(cache, kv_dtype)
        on_cpu = model.device.type == "cpu"
        self._tile = TILE if batch_invariant and on_cpu and model.dtype == torch.float32 else 1
        self._ragged = RaggedWriter(cache, self.table, "cpu_invariant" if batch_invariant and on_cpu else "auto")
        self._gather = GatherWriter(cache, self.table)
        self._linears = OneDnnLinears(model)
        self._ragged_cache = forward_cache(self._recurrent.layers, self._recurrent.paged, self._ragged)
        self.streams = RunnerStreams(model, cache)
        self._graphs: DecodeGraphs | None = None
        self._compiled = CompiledModel(model, cache, self.table) if mode == "compiled" else None
        self._has_own_weights = False
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

    def follow(self, other: ModelRunner) -> None:
        """Make room for K, V and states of the shapes that another runner of the same model has found."""
        self.window = other.window
        self.table.follow(other.table)
        self._recurrent.follow(other._recurrent)

    def quantise_weights(self, *, keeps_model: bool = True) -> None:
        """Compute with weights in int8 from here on, in compiled mode.

        Parameters
        ----------
        keeps_model : bool
            Whether the model keeps its own weights. If not, their memory is free afterwards and it cannot run.
        """
        if self._compiled is None:
            raise InvalidOperation(f"weights: int8 is for mode 'compiled', not {self.mode!r}")
        self._compiled.quantise(keeps_model=keeps_model)
        self._has_own_weights = True
        self.cache.numerics += ", int8 weights"

    def pack_weights(self) -> None:
        """Put the model's own weights in the order in which the compiled mode multiplies them: it runs no more.

        The same numbers are added in the same order as before; prompts and one stream are faster.
        """
        if self._compiled is not None:
            self._compiled.pack()
            self._has_own_weights = True

    def block_format(self) -> BlockFormat:
        """Return what a tier must know of the blocks of the pool: see :func:`pagedkv.hf.block_format`."""
        weights = self._compiled.weights() if self._compiled is not None and self._has_own_weights else None
        return block_format(self.model, self.cache, weights)

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

    def forward(self, plan: BatchPlan, token_ids: TokenIds, wanted: Ints) -> Tensor:
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
        positions = self._positions(plan)
        if self._compiled is not None:
            return self._compiled.forward(plan, ids, positions, rows)
        positions = positions.copy()  # torch wants arrays that it may write
        with torch.no_grad():
            if self.mode == "ragged":
                return self._forward_ragged(plan, ids, positions, rows)
            return self._forward_gather(plan, ids, positions, rows)

    def forward_in_place(
        self,
        plan: BatchPlan,
        token_ids: TokenIds,
        wanted: Ints,
        ahead: int = 0,
        ends: Ids = NO_ENDS,
        longest_call: float | None = None,
    ) -> Tensor | Logits:
        """Do as `forward` for one who is done with the logits before the next call.

        In compiled mode they are an array, and where they are few they lie where those of the last call did: a step of
        one sequence does without torch.

        Parameters
        ----------
        ahead : int
            How many more steps will follow in which each sequence gets its likeliest token. As many as are worth it
            may be computed in this call; K and V behind the end of a sequence, in its last block, are written then.
            A step that was computed ahead is found when it is asked for, and computed again where anything is
            different: a token, a place, a sequence more, or what the pool holds.
        ends : int64 [any]
            Tokens after which nothing is computed ahead.
        longest_call : float, optional
            Seconds that a call with steps ahead may take; 0.04 by default.
        """
        if self._compiled is None or not isinstance(plan, BatchPlan) or not plan.total_tokens:
            return self.forward(plan, token_ids, wanted)
        known = self._compiled.known(plan, token_ids, wanted)
        if known is not None:
            return known
        ids, rows = self._checked(plan, token_ids, wanted)
        longest = LONGEST_CALL if longest_call is None else longest_call
        return self._compiled.forward_in_place(plan, ids, self._positions(plan), rows, ahead, ends, longest)

    def _positions(self, plan: BatchPlan) -> Ids:
        """Return the rotary positions of the query tokens of a plan, whose sequences may have dropped some.

        Where no query could see them, nothing has changed by that.
        """
        if not plan.num_dropped.any():
            return plan.positions
        dropped = plan.num_dropped
        past = plan.seq_lens - plan.num_query_tokens
        unseen = (plan.holes[:, 0] == 0) & (past >= self.window - 1) if self.window else np.zeros(len(dropped), bool)
        streaming = replace(plan, num_dropped=np.where(unseen, 0, dropped))
        positions = self.streams.positions(streaming) if streaming.num_dropped.any() else plan.positions
        moved: Ids = positions + np.repeat(np.where(unseen, dropped, 0), plan.num_query_tokens)
        return moved

    def require_streaming(self, sink_tokens: int, window_tokens: int) -> None:
        """See that the model can keep only so many first and last tokens of a text.

        Raises
        ------
        InvalidOperation
            If it has no rotary positions that allow it, or a sliding window of its own that is shorter.
        """
        self.streams.measure(sink_tokens, sink_tokens + window_tokens + 1)

    def fork(self, src: int, dst: int) -> None:
        """Go before ``cache.fork(src, dst)``.

        Raises
        ------
        InvalidOperation
            If `src` streams and has dropped tokens: its keys move, so they cannot be shared.
        """
        sequence_key(dst, "dst")
        self.streams.refuse_fork(sequence_key(src, "src"))

    def release(self, seq_id: int) -> None:
        """Follow ``cache.free(seq_id)``: forget what is kept outside of the blocks."""
        self.streams.release(sequence_key(seq_id))

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
            with attention_by(DIRECT, self._text), self._linears:
                return self._run(self._ragged_cache, ids, positions, rows)
        finally:
            self._ragged.plan = None

    def _forward_gather(self, plan: BatchPlan, ids: Ids, positions: Ids, rows: Ids) -> Tensor:
        logits = torch.empty(len(rows), self.vocab_size, device=self.model.device)
        cuts, slots = plan.cu_seqlens_q, self._recurrent.slots(plan)
        for i, past in enumerate(self._gather.sequences(plan)):
            first, last = int(cuts[i]), int(cuts[i + 1])
            if first == last:
                continue
            seen = past + int(plan.num_dropped[i])  # a state has seen what streaming dropped
            layers = self._recurrent.load(slots[i], seen, last - first, int(plan.seq_ids[i]))
            cache = forward_cache(layers, self._recurrent.paged, self._gather)
            chosen = (rows >= first) & (rows < last)
            parts = (ids[first:last], positions[first:last], rows[chosen] - first)
            tensors = (on_device(part, self.model.device) for part in parts)
            if not self.chunkable:
                forget_long_texts(self.model)
            logits[torch.from_numpy(chosen)] = self._run(cache, *tensors).float()
            self._recurrent.store(slots[i], seen, last - first)
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
            raise bad_argument("plan", "a BatchPlan", f"{type(plan).__name__}")
        ids = _integers("token_ids", token_ids, self.vocab_size)
        if len(ids) != plan.total_tokens:
            raise bad_argument("token_ids", f"{plan.total_tokens} as the plan has", f"{len(ids)}")
        return ids, _integers("wanted", wanted, plan.total_tokens)


def _padded(array: Ids, multiple: int) -> Ids:
    """Return the array with zeros behind it, up to a multiple of some length."""
    missing = -len(array) % multiple
    return np.concatenate((array, np.zeros(missing, np.int64))) if missing else array


def _integers(name: str, given: Any, limit: int) -> Ids:
    """Return a flat array of numbers 0 … limit - 1."""
    array = np.asarray(given)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise bad_argument(name, "a flat array of int", f"{array.dtype} {list(array.shape)}")
    array = np.array(array, np.int64)  # a copy: torch wants arrays that it may write
    # As unsigned numbers negative ones are huge: one pass finds both kinds.
    if len(array) and int(array.view(np.uint64).max()) >= limit:
        wrong = array[array.view(np.uint64) >= limit][0]
        raise bad_argument(name, f"numbers in 0 … {limit - 1}", f"{wrong}")
    return array
