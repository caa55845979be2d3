"""What recurrent and convolution layers keep of each sequence, outside of the blocks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from pagedkv.control.arguments import sequence_number
from pagedkv.errors import InvalidOperation
from pagedkv.hf.compat import is_pageable, is_stateless, stock_layers

__all__ = ["SequenceStates"]


class SequenceStates:
    """The stock cache layers of one model that are not paged, for each sequence.

    Parameters
    ----------
    config : PreTrainedConfig
        ``model.config``.

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

    def __init__(self, config: Any) -> None:
        self._config = config
        layers = stock_layers(config)
        self.paged = {number for number, layer in enumerate(layers) if is_pageable(layer)}
        if not self.paged:
            raise InvalidOperation(f"model: expected one with attention layers, got {type(config).__name__}")
        self.is_empty = all(number in self.paged or is_stateless(layer) for number, layer in enumerate(layers))
        self._kept: dict[int, _Kept] = {}

    def layers(self, seq_id: int, past: int, num_new: int) -> list[Any]:
        """Return the stock layers of a sequence of `past` tokens, which is about to get `num_new` more.

        Tokens of the last forward pass can be taken back, as far as there is no recurrence.

        Raises
        ------
        InvalidOperation
            If the state is of another number of tokens and cannot be brought back.
        """
        if self.is_empty or past == 0:
            kept = _Kept(self.fresh())
        else:
            kept = self._kept.get(seq_id) or _Kept([])
            kept.take_back(kept.seen - past, seq_id)
        if not self.is_empty:
            self._kept[seq_id] = kept
        kept.seen, kept.newest = past + num_new, num_new
        return kept.layers

    def fork(self, src: int, dst: int) -> None:
        """Let `dst` begin with what is kept of `src`."""
        if src in self._kept:
            self._kept[dst] = copy.deepcopy(self._kept[src])

    def release(self, seq_id: int) -> None:
        """Forget a sequence."""
        self._kept.pop(seq_id, None)

    def fresh(self) -> list[Any]:
        """Return the stock layers of a sequence without tokens."""
        layers = stock_layers(self._config)
        for layer in layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
        return layers


@dataclass(slots=True)
class _Kept:
    """The layers of one sequence, how many tokens they have seen, and how many of these in the last forward pass."""

    layers: list[Any]
    seen: int = 0
    newest: int = 0

    def take_back(self, count: int, seq_id: int) -> None:
        recording = [layer for layer in self.layers if getattr(layer, "record_past", False)]
        if not 0 <= count <= self.newest or (count and not all(layer.is_croppable for layer in recording)):
            raise InvalidOperation(
                f"plan: expected S{sequence_number(seq_id)} to go on after token {self.seen}, got {self.seen - count}: "
                "what recurrent layers keep cannot be taken back so far; free the sequence and compute it anew"
            )
        for layer in recording:
            if layer.is_croppable:
                layer.crop(-count)
