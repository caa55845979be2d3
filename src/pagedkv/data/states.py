"""StateStorage: the memory of recurrent states, one row of every tensor a slot."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.errors import OutOfMemory, bad_argument


class StateStorage:
    """States of recurrent, convolution and linear-attention layers, of one size for each tensor.

    Parameters
    ----------
    num_slots : int

    Attributes
    ----------
    tensors : list of Tensor [num_slots, *shape]
        Zeros at first; whoever runs the model writes into them.
    num_tokens : int64 [num_slots]
        How many tokens a state has seen, as its writer noted; -1 while it is being written.
    writes : int64 [num_slots]
        A number of its writer's for each content: copies have the same.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.tensors: list[Tensor] = []
        self.num_tokens: npt.NDArray[np.int64] = np.zeros(num_slots, np.int64)
        self.writes: npt.NDArray[np.int64] = np.zeros(num_slots, np.int64)

    @property
    def slot_memory_bytes(self) -> int:
        """Bytes of one state."""
        return sum(tensor[:1].nbytes for tensor in self.tensors) if self.num_slots else 0

    @property
    def total_memory_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def add(self, shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> int:
        """Add a tensor to every state and return its place in ``tensors``.

        Parameters
        ----------
        shape : tuple of int
            Of one state.
        dtype : torch.dtype
        device : str or torch.device

        Raises
        ------
        InvalidOperation
            If there are no slots.
        OutOfMemory
            If the system has no room for it.
        """
        if not self.num_slots:
            raise bad_argument("num_states", "at least 1, for states", "0")
        try:
            self.tensors.append(torch.zeros((self.num_slots, *shape), dtype=dtype, device=device))
        except (RuntimeError, MemoryError) as error:
            hint = f"{self.num_slots} times {list(shape)} of {dtype} cannot be allocated on {device}"
            raise OutOfMemory(self.num_slots, 0, hint, "slots for states") from error
        return len(self.tensors) - 1

    def copy(self, copies: npt.NDArray[np.int32]) -> None:
        """Copy states, ``[k, 2]`` of slots (source, destination), one after the other; one to itself is emptied.

        No other source is a destination.
        """
        last = {destination: source for source, destination in copies.tolist()}
        empty = [slot for slot, source in last.items() if source == slot]
        self.num_tokens[empty] = self.writes[empty] = 0
        last = {destination: source for destination, source in last.items() if source != destination}
        sources, destinations = list(last.values()), list(last)
        for tensor in self.tensors if last else ():
            where = torch.tensor(destinations, device=tensor.device)
            tensor.index_copy_(0, where, tensor.index_select(0, torch.tensor(sources, device=tensor.device)))
        for column in (self.num_tokens, self.writes):
            column[destinations] = column[sources]
