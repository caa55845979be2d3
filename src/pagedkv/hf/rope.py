"""Rotary positions outside of the model: keys that move to another position after they were written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pagedkv.errors import InvalidOperation

__all__ = ["Rope", "rope_of"]


@dataclass(frozen=True, eq=False)
class Rope:
    """The frequencies with which a model turns its queries and keys.

    Pair ``i`` of a head is elements ``i`` and ``i + r / 2`` of its first ``r`` elements (the "rotate half" convention);
    elements from ``r`` on are not turned. Turning keeps lengths, so a factor that the model puts on its cosines and
    sines (``attention_scaling``) stays in the keys as it is, and nothing here needs to know it.

    Source: Su et al. 2021, "RoFormer", section 3.2.2.

    Attributes
    ----------
    inv_freq : float64 Tensor [r / 2]
        Radians per position, on the CPU.
    """

    inv_freq: Tensor

    def turn(self, keys: Tensor, steps: Tensor) -> Tensor:
        """Move keys by whole positions, backwards where negative.

        Angles are taken in float64, so a long way costs no accuracy.

        Parameters
        ----------
        keys : Tensor [..., n, num_kv_heads, head_dim]
        steps : int64 Tensor [n]

        Returns
        -------
        float32 Tensor [..., n, num_kv_heads, head_dim]
        """
        angles = steps.to(torch.float64)[:, None, None] * self.inv_freq
        cos, sin = angles.cos().to(keys.device, torch.float32), angles.sin().to(keys.device, torch.float32)
        half = len(self.inv_freq)
        keys = keys.float()
        first, second, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def rope_of(model: Any) -> Rope:
    """Read the frequencies of a transformers model.

    Raises
    ------
    InvalidOperation
        If the model does not have exactly one rotary embedding: it has other positions, or differing ones.
    """
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    if len(found) != 1 or not isinstance(getattr(found[0], "inv_freq", None), Tensor):
        raise InvalidOperation(
            f"model expects one rotary embedding for all layers, got {len(found)} in {type(model).__name__}"
            if len(found) != 1
            else f"model expects a rotary embedding with one inv_freq, got {type(found[0]).__name__}"
        )
    return Rope(found[0].inv_freq.detach().to("cpu", torch.float64, copy=True))
