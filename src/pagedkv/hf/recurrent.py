"""Recurrent states: what recurrent, convolution and linear-attention layers keep of a text, in slots of the cache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from pagedkv.cache import PagedKvCache
from pagedkv.control.arguments import sequence_number
from pagedkv.control.plan import BatchPlan
from pagedkv.data.states import StateStorage
from pagedkv.errors import bad_argument
from pagedkv.hf.compat import (
    ModuleState,
    StatePart,
    has_states,
    module_states,
    paged_layers,
    record_past,
    state_parts,
    stock_layers,
)


class RecurrentStates:
    """What the layers of one model keep besides K and V, in the slots that the books give to sequences.

    The stock layers of transformers work on rows of the slots in place: `load` binds them to a sequence before it goes
    through the model, `store` notes how far its state is then. What parts a state has shows in the first forward pass.

    Parameters
    ----------
    model : PreTrainedModel
    cache : PagedKvCache

    Attributes
    ----------
    paged : set of int
        Layers whose K and V live in blocks.
    is_empty : bool
        Whether there are no others with a state.

    Raises
    ------
    InvalidOperation
        If the model has no attention layer, or an encoder.
    """

    def __init__(self, model: Any, cache: PagedKvCache) -> None:
        self.paged, _ = paged_layers("model", model.config)
        self._modules = module_states(model)
        self.is_empty = not has_states(model)
        self._config, self._cache = model.config, cache
        self.layers = stock_layers(model.config)
        self.parts: list[StatePart | ModuleState] = []
        self._writes = itertools.count(1)
        # By the number of a write in the last forward pass: how many tokens it computed, and all of its columns.
        self._recent: dict[int, tuple[int, list[Tensor]]] = {}
        self._new: dict[int, tuple[int, list[Tensor]]] = {}

    def slots(self, plan: BatchPlan) -> list[int]:
        """Return the slot of each sequence of a plan whose forward pass begins; none where there are no states."""
        if self.is_empty:
            return [-1] * plan.num_sequences
        self._recent, self._new = self._new, {}
        slots: list[int] = self._cache.state_slots(plan).tolist()
        return slots

    def load(self, slot: int, past: int, num_new: int, seq_id: int) -> list[Any]:
        """Return the stock layers, bound to the state of a sequence of `past` tokens that gets `num_new` more.

        Tokens of the last forward pass can be taken back, where all states are convolutions'.

        Raises
        ------
        InvalidOperation
            If the state is of another number of tokens and cannot be brought back.
        """
        if self.is_empty:
            return self.layers
        states = self._cache.states
        if past and past != states.num_tokens[slot]:
            self._take_back(slot, past, seq_id)
        if not self.parts:
            self.layers = stock_layers(self._config)
            for module in self._modules:
                module.set(self.layers, None, False)
        rows = [tensor[slot : slot + 1] for tensor in states.tensors]
        for part, row in zip(self.parts, rows, strict=True):
            part.set(self.layers, row, past > 0)
        record_past(self.layers, num_new > 1 and self._are_croppable)
        states.num_tokens[slot] = -1
        return self.layers

    def store(self, slot: int, past: int, num_new: int) -> None:
        """Note how many tokens the state of the layers is of now, and write what they do not hold in place."""
        if self.is_empty:
            return
        states, number = self._cache.states, next(self._writes)
        if not self.parts:
            modules = [module for module in self._modules if module.get(self.layers) is not None]
            self.parts = [*state_parts(self.layers), *modules]
            _make_room(states, self.parts, self.layers)
        held = [part.get(self.layers) for part in self.parts]
        for part, tensor, state in zip(self.parts, states.tensors, held, strict=True):
            row = tensor[slot : slot + 1]
            if state.data_ptr() != row.data_ptr():
                row.copy_(_kept(part, state, row.shape[-1]))
        if num_new > 1 and self._are_croppable:
            self._new[number] = (num_new, held)
        states.num_tokens[slot], states.writes[slot] = past + num_new, number

    def follow(self, other: RecurrentStates) -> None:
        """Make room for the parts, of the same shapes, that `other` has."""
        self.parts = list(other.parts)
        for tensor in other._cache.states.tensors:
            self._cache.states.add(tuple(tensor.shape[1:]), tensor.dtype, tensor.device)

    @property
    def _are_croppable(self) -> bool:
        return bool(self.parts) and all(part.name == "conv" for part in self.parts)

    def _take_back(self, slot: int, past: int, seq_id: int) -> None:
        """Bring a state back to `past` tokens: the columns of the last forward pass are still there."""
        states = self._cache.states
        seen, (most, recent) = int(states.num_tokens[slot]), self._recent.get(int(states.writes[slot]), (0, []))
        count = seen - past
        if not 0 < count <= most:
            raise bad_argument(
                "plan",
                f"S{sequence_number(seq_id)} to go on after token {seen}",
                f"{past}: what recurrent layers keep cannot be taken back so far; "
                "free the sequence and compute it anew",
            )
        for tensor, columns in zip(states.tensors, recent, strict=True):
            tensor[slot : slot + 1] = _last_columns(columns[..., : columns.shape[-1] - count], tensor.shape[-1])


class BatchStates:
    """The states of the rows of a batch, which stock layers hold, and the slots of their sequences.

    Parameters
    ----------
    cache : PagedKvCache
    """

    def __init__(self, cache: PagedKvCache) -> None:
        self._cache = cache
        self._parts: list[StatePart] = []

    def store(self, layers: list[Any], seq_ids: Any) -> None:
        """Copy the states of all rows into the slots of their sequences."""
        states = self._cache.states
        if not self._parts:
            self._parts = state_parts(layers)
            _make_room(states, self._parts, layers)
        slots = self._cache.state_slots(seq_ids).tolist()
        for part, tensor in zip(self._parts, states.tensors, strict=True):
            tensor[slots] = _kept(part, part.get(layers), tensor.shape[-1])

    def load(self, layers: list[Any], seq_ids: Any) -> None:
        """Let fresh stock layers hold copies of the states in the slots of sequences."""
        slots = self._cache.state_slots(seq_ids).tolist()
        for part, tensor in zip(self._parts, self._cache.states.tensors, strict=True):
            part.set(layers, tensor[slots], True)


def _make_room(states: StateStorage, parts: Sequence[StatePart | ModuleState], layers: list[Any]) -> None:
    """Make a tensor for each part of a state, as wide as what is kept of it."""
    for part in parts:
        state = part.get(layers)
        width = part.width(layers) or state.shape[-1]
        states.add((*state.shape[1:-1], width), state.dtype, state.device)


def _kept(part: StatePart | ModuleState, state: Tensor, width: int) -> Tensor:
    """Return what is kept of a part: the last columns of a convolution's."""
    return _last_columns(state, width) if part.name == "conv" else state


def _last_columns(state: Tensor, width: int) -> Tensor:
    """Return the last `width` columns, with zeros before them where there are fewer."""
    missing = width - state.shape[-1]
    return functional.pad(state, (missing, 0)) if missing > 0 else state[..., -width:]
