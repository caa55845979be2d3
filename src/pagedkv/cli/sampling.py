"""Draws the next token of an endless text; what ``generate()`` does for the others is left to transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["make_sampler"]


def make_sampler(temperature: float, top_p: float, seed: int) -> Callable[[Tensor], int]:
    """Return a function from logits ``[vocab_size]`` to a token id.

    Parameters
    ----------
    temperature : float
        0 takes the likeliest token.
    top_p : float
        Draw from the smallest set of likeliest tokens whose probabilities reach this sum (Holtzman et al. 2020).
    seed : int
        The same seed draws the same tokens.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def sample(logits: Tensor) -> int:
        if temperature == 0:
            return int(logits.argmax())
        chances, tokens = torch.softmax(logits.float().cpu() / temperature, -1).sort(descending=True, stable=True)
        # The likeliest token is always in: its own probability does not count against it.
        chances[chances.cumsum(0) - chances >= top_p] = 0
        return int(tokens[torch.multinomial(chances, 1, generator=generator)])

    return sample
