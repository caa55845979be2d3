"""Forward: a decoder over a paged cache, run as one compiled call from token ids to logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.data.call import Batch
from pagedkv.data.cpu import NO_WINDOW, rows_of
from pagedkv.data.cpu_kernels import Bases, attend_items
from pagedkv.data.cpu_plan import ITEM, PIECE, Plan, Rules, partial_size, plan_items, room_for_passes
from pagedkv.data.cpu_tiles import Strides
from pagedkv.data.decoder import Decoder, Experts
from pagedkv.data.forward_kernels import LINE, MOST_RUNS, run_program
from pagedkv.data.program import Program
from pagedkv.data.simd_llvm import LANES
from pagedkv.data.storage import KvStorage
from pagedkv.data.team import num_threads, run_in_threads
from pagedkv.data.weights import acts_dtype
from pagedkv.errors import bad_argument
from pagedkv.jit import entry_of

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

MOST_ROWS, FEWEST_ROWS = 512, 256
MAX_ROW_BYTES = 64 << 20
"""How many rows go through all layers together: as many as fit into so many bytes of activations, as each such block of
rows reads all weights once more; 256 are enough for products to be bound by arithmetic."""
SHORT_ITEMS, LONG_ITEMS = 4, 32
"""Items of attention that a thread should find, of sequences that are cut by positions or by queries: one of the latter
takes up to a millisecond, and threads wait for the last one."""
MIN_ANGLES = 2048
"""Positions whose cosines and sines are made at first; twice as many when a text is longer."""
NO_ENDS: Ints = np.empty(0, np.int64)
KEPT_LOGITS = 1 << 20
"""Up to so many numbers are logits in place: 4 MiB."""


def _rows_at_once(decoder: Decoder) -> int:
    hidden, inner = decoder.embedding.shape[1], 0
    for layer in decoder.layers:
        if isinstance(layer.mlp, Experts):
            inner = max(inner, layer.mlp.top_k * (len(layer.mlp.experts[0].up.weight) + hidden))
        else:
            inner = max(inner, len(layer.mlp.up.weight))
    row_bytes = 4 * (8 * hidden + inner)
    return max(FEWEST_ROWS, min(MOST_ROWS, MAX_ROW_BYTES // row_bytes))


class Forward:
    """A decoder over a storage, ready to run.

    Parameters
    ----------
    decoder : Decoder
        Its weights are read in place and must stay where they are.
    storage : KvStorage
        On the CPU, not quantised, with a layer for each of the decoder's.
    dtype : torch.dtype, optional
        What is multiplied by int8 weights: bfloat16 is narrowed to that where the processor multiplies it; anything
        else is float32.

    Raises
    ------
    InvalidOperation
        If the decoder has something that is not computed here.
    """

    def __init__(self, decoder: Decoder, storage: KvStorage, dtype: torch.dtype | None = None) -> None:
        of_acts = acts_dtype(decoder.embedding.dtype, dtype)
        self._program = Program(decoder, storage, _rows_at_once(decoder), of_acts.itemsize)
        program = self._program
        # Torch's memory begins at a cache line: vectors that cross two of them take twice as long to load.
        self._floats = torch.zeros(program.num_floats, dtype=torch.float32, device="cpu").numpy()
        self._acts = torch.zeros(program.num_acts, dtype=of_acts, device="cpu").numpy()
        # Attention multiplies what products do where keys and values are that, too.
        self._like = self._acts if program.memory.dtype == np.uint16 else self._floats
        self._queries, self._attended = rows_of(self._floats), rows_of(self._acts)
        self._attend: Any = None
        self._floats_at = self._floats.ctypes.data
        # Two of each: threads may still look at those of the pass before this one.
        self._counters = np.zeros((2, 0), np.int64)
        self._angles, self._num_angles = np.zeros(LANES, np.float32), 0
        # For each kind of layers the rules and the shape of attention, and how large its partials are.
        self._sets = [
            (Rules(np.float32(1), np.float32(0), True, window), shape, partial_size(shape.v_head_dim))
            for shape, window in program.sets
        ]
        self._set_counters, self._side = np.zeros((2, len(program.decoder.layers), 0), np.int64), 0
        self._partials = np.zeros(0, np.float32)
        self._routes = np.zeros(1 + program.most_experts + 2 * program.most_pairs, np.int64)
        self._shares = np.zeros(program.most_pairs, np.float32) if program.most_pairs else None
        self._vocab_size = len(decoder.head.weight)
        self._logits = torch.empty(KEPT_LOGITS, dtype=torch.float32, device="cpu").numpy()
        self._logits_at = self._logits.ctypes.data

    def __call__(self, batch: Batch, slots: Ints, ids: Ints, positions: Ints, wanted: Ints) -> Tensor:
        """Write K and V of a ragged batch and return some logits.

        Parameters
        ----------
        batch : Batch
            Checked for the storage.
        slots : int64 [total_tokens]
            Where K and V of the query tokens go.
        ids, positions : int64 [total_tokens]
            Token ids below the vocabulary's size, and rotary or learned positions.
        wanted : int64 [k]
            The query tokens whose logits are wanted.

        Returns
        -------
        float32 Tensor [k, vocab_size]

        Raises
        ------
        InvalidOperation
            If a position is negative, or beyond the learned ones; nothing is written.
        """
        places: Ints | None = None
        if not _is_increasing(wanted):
            wanted, places = np.unique(wanted, return_inverse=True)
        logits = torch.empty(len(wanted), self._vocab_size, dtype=torch.float32, device="cpu")
        self._write(batch, slots, ids, positions, wanted, logits.data_ptr())
        return logits if places is None else logits[torch.from_numpy(places)]

    def in_place(self, batch: Batch, slots: Ints, ids: Ints, positions: Ints, wanted: Ints) -> Floats:
        """Return an array of logits instead: a few of them are where those of the last such call were."""
        if len(wanted) * self._vocab_size > self._logits.size or not _is_increasing(wanted):
            return self(batch, slots, ids, positions, wanted).numpy()
        self._write(batch, slots, ids, positions, wanted, self._logits_at)
        return self._logits[: len(wanted) * self._vocab_size].reshape(len(wanted), self._vocab_size)

    def room_for_passes(self, batch: Batch, slots: Ints, positions: Ints) -> int:
        """Return how many more `passes` than one there may be, for sequences of a token each that dropped none."""
        windows = [rules.window for rules, _, _ in self._sets if rules.window != NO_WINDOW]
        room = room_for_passes(positions, slots, self._program.storage.spec.block_size, windows)
        most = self._logits.size // (len(slots) * self._vocab_size) - 1
        return max(0, min(room, most, self._program.num_positions - 1 - int(positions.max())))

    def passes(
        self, batch: Batch, slots: Ints, ids: Ints, positions: Ints, count: int, ends: Ints
    ) -> tuple[Floats, Ints]:
        """Do as `in_place` for so many passes, each by the likeliest tokens of the one before it, in the next slots.

        Returns
        -------
        float32 [count, n, vocab_size], int64 [count, n]
            The logits of each pass, and its tokens, of which the first are `ids`. No pass was made from that on which
            has a negative token, which would be one of `ends`.
        """
        rows = len(ids)
        self._require_positions(positions, rows)
        self._reach(int(positions.max()) + count - 1)
        tokens = np.full(count * rows, -1)
        tokens[:rows] = ids
        self._run(batch, tokens, positions, slots, np.arange(rows), self._logits_at, count, ends)
        logits = self._logits[: count * rows * self._vocab_size].reshape(count, rows, self._vocab_size)
        return logits, tokens.reshape(count, rows)

    def _write(self, batch: Batch, slots: Ints, ids: Ints, positions: Ints, wanted: Ints, logits_at: int) -> None:
        """Write K and V, and the logits of tokens in their order from an address on."""
        total, most, done = len(ids), self._program.max_rows, 0
        self._require_positions(positions, total)
        if total <= most:
            self._run(batch, ids, positions, slots, wanted, logits_at)
            return
        for first in range(0, total, most):
            last = min(total, first + most)
            low, high = np.searchsorted(wanted, (first, last)).tolist()
            part, span, at = batch.window(first, last), slice(first, last), logits_at + 4 * done * self._vocab_size
            self._run(part, ids[span], positions[span], slots[span], wanted[low:high] - first, at)
            done += high - low

    def _require_positions(self, positions: Ints, count: int) -> None:
        """Refuse positions that no table has; have cosines and sines for all others."""
        if positions.shape != (count,) or positions.dtype != np.int64:
            raise bad_argument("positions", f"{count} int64", f"{positions.dtype} {list(positions.shape)}")
        # As unsigned numbers negative ones are huge: one pass finds both kinds.
        greatest = int(positions.view(np.uint64).max()) if count else 0
        limit = self._program.num_positions
        if greatest >= limit:
            wrong = int(positions[positions.view(np.uint64) >= limit][0])
            raise bad_argument("positions", f"0 … {limit - 1}, as the model has", f"{wrong}")
        self._reach(greatest)

    def _reach(self, position: int) -> None:
        """Have cosines and sines for a position."""
        program = self._program
        if position < self._num_angles or not program.ropes:
            return
        count = max(MIN_ANGLES, 1 << position.bit_length())
        parts, starts, size = [], [], 0
        for rope in program.ropes:
            cosines, sines = rope.tables(count)
            parts.append(torch.cat((cosines, sines), 1).float().flatten().numpy())
            starts.append(size)
            size += len(parts[-1])
        self._angles, self._num_angles = np.concatenate(parts), count
        for operation, rope_number in program.rope_operations:
            program.operations[operation]["rope"] = starts[rope_number]

    def _run(
        self,
        batch: Batch,
        ids: Ints,
        positions: Ints,
        slots: Ints,
        picked: Ints,
        logits_at: int,
        passes: int = 1,
        ends: Ints = NO_ENDS,
    ) -> None:
        program, threads, layers = self._program, num_threads(), passes * len(self._program.decoder.layers)
        program.storage.num_writes += 1
        plans = [plan_items(*batch.arrays, rules, shape) for rules, shape, _ in self._sets]
        num_parts = self._num_parts(plans, threads)
        plans.append(self._plan_of_picked(batch, plans, picked))
        sizes = [kind[2] for kind in self._sets]
        size = max([plan.num_partials * size for plan, size in zip(plans, (*sizes, max(sizes)), strict=True)])
        if len(self._partials) < size:
            self._partials = np.empty(size, np.float32)
        num_counters = max([plan.num_counters for plan in plans])
        if self._set_counters.shape[1] < layers or self._set_counters.shape[2] < num_counters:
            self._set_counters = np.empty((2, layers, num_counters), np.int64)
        self._side = 1 - self._side
        set_counters, num_runs = self._set_counters[self._side, :layers], min(threads, MOST_RUNS)
        size = passes * LINE * (1 + num_runs) * (len(program.phases) - 1)
        if self._counters.shape[1] < size:
            self._counters = np.empty((2, size), np.int64)
        counters = self._counters[self._side, :size]
        set_counters[:, :num_counters] = counters[:] = 0
        if self._attend is None:
            self._attend = self._entry(batch, plans[0])
        arguments = (
            counters,
            num_runs,
            passes,
            program.phases,
            program.operations,
            len(slots),
            ids,
            ends,
            positions,
            slots,
            picked,
            program.weights,
            program.constants,
            self._angles,
            self._floats,
            self._acts,
            self._queries,
            self._attended,
            self._like,
            program.memory,
            self._attend,
            (logits_at - self._floats_at) // 4,
            # So that models of one kind of layers and of two share their code.
            tuple(plans) if len(plans) > 2 else (*plans, plans[-1]),
            num_parts,
            set_counters,
            self._partials,
            batch.block_tables,
            batch.holes,
            program.storage.spec.block_size,
            program.places,
            self._routes,
            self._shares,
        )
        run_in_threads(run_program, arguments, threads, joins=True)

    def _entry(self, batch: Batch, plan: Plan) -> Any:
        """Return the entry of attention, which the pool's keys and values are attended to by as well."""
        (rules, shape, _), memory = self._sets[0], self._program.memory
        arguments = (
            self._set_counters[0, 0],
            1,
            plan,
            self._partials,
            self._queries,
            memory,
            memory,
            None,
            None,
            self._attended,
            self._like,
            self._program.constants,
            batch.block_tables,
            batch.holes,
            Bases(*[0] * len(Bases._fields)),
            shape,
            Strides(*[0] * len(Strides._fields)),
            rules,
        )
        return entry_of(attend_items, arguments)

    def _plan_of_picked(self, batch: Batch, plans: list[Plan], picked: Ints) -> Plan:
        """Return what the last layer attends to: for rows that each end a sequence these alone, else for all."""
        kind = self._program.picked_set
        if kind is None or len(picked) == batch.cu_seqlens_q[-1]:
            return plans[kind or 0]
        ends = batch.cu_seqlens_q[1:] - 1
        rows = np.searchsorted(ends, picked)
        if not (ends[rows] == picked).all():
            return plans[kind]
        cuts = np.arange(len(rows) + 1, dtype=np.int32)
        rules, shape, _ = self._sets[kind]
        plan = plan_items(batch.block_tables[rows], batch.seq_lens[rows], cuts, batch.holes[rows], rules, shape)
        pieces = plan.pieces
        pieces[:, PIECE.sequence] = rows[pieces[:, PIECE.sequence]]
        pieces[:, PIECE.first_query] = picked[pieces[:, PIECE.first_query]]
        return plan

    def _num_parts(self, plans: list[Plan], threads: int) -> int:
        """Return into how many parts by heads an item of attention is cut, so that there is enough to share."""
        if threads == 1:
            return 1
        fewest = min([max(1, len(plan.items)) for plan in plans])
        wanted = LONG_ITEMS if any([plan.items[:, ITEM.is_whole].any() for plan in plans]) else SHORT_ITEMS
        return min(*[shape.num_kv_heads for _, shape, _ in self._sets], -(-wanted * threads // fewest))


def _is_increasing(numbers: Ints) -> bool:
    return len(numbers) < 2 or bool((numbers[1:] > numbers[:-1]).all())
