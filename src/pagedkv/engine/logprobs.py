"""Log probabilities of chosen and of likeliest tokens, of the raw distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Logprob", "token_logprobs"]


class Logprob(NamedTuple):
    """How likely the model found a token.

    Attributes
    ----------
    logprob : float
        Natural logarithm of its probability under the raw logits: before penalties, biases and temperature.
    rank : int
        1 for the likeliest token; how many tokens are likelier, and one.
    """

    logprob: float
    rank: int


def token_logprobs(logits: Tensor, token_ids: Sequence[int], top: Sequence[int]) -> list[dict[int, Logprob]]:
    """Return for each row the chosen token and, likeliest first, the `top` likeliest ones.

    As vLLM does by default (``logprobs_mode="raw_logprobs"``). Of equally likely tokens the lowest ids come first.

    Parameters
    ----------
    logits : float [n, vocab]
        As the model gave them.
    token_ids : sequence of int
        The chosen tokens, n.
    top : sequence of int
        How many likeliest tokens each row wants, n; 0 for the chosen one alone.

    Returns
    -------
    list of dict
        n of token id to :class:`Logprob`, the chosen one first, `top` or `top` + 1 entries each.
    """
    logits = logits.float()
    chosen = torch.as_tensor(token_ids, dtype=torch.int64, device=logits.device)[:, None]
    values = logits.gather(1, chosen)
    norms = torch.logsumexp(logits, dim=-1, keepdim=True)
    ranks = 1 + (logits > values).sum(dim=-1)
    most = min(max(top, default=0), logits.shape[1])
    likeliest, ids = _likeliest(logits, most)
    rows = zip(
        chosen[:, 0].tolist(),
        (values - norms)[:, 0].tolist(),
        ranks.tolist(),
        ids.tolist(),
        (likeliest - norms).tolist(),
        top,
        strict=True,
    )
    return [_entries(*row) for row in rows]


def _likeliest(logits: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the `most` highest logits of each row and their ids, equals by their ids."""
    if most == 0:
        return logits[:, :0], torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    values, ids = torch.topk(logits, min(most + 1, logits.shape[1]), dim=-1)
    tied = values[:, most:] == values[:, most - 1 : most]  # topk took some of several equals: any of them
    for row in tied.any(dim=-1).nonzero()[:, 0].tolist():
        ids[row, :most] = torch.sort(logits[row], descending=True, stable=True)[1][:most]
    ids = ids[:, :most].sort(dim=-1)[0]
    values, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _entries(
    token: int, logprob: float, rank: int, ids: list[int], logprobs: list[float], top: int
) -> dict[int, Logprob]:
    entries = {token: Logprob(logprob, rank)}
    for place, (other, value) in enumerate(zip(ids[:top], logprobs[:top], strict=True)):
        entries.setdefault(other, Logprob(value, place + 1))
    return entries
