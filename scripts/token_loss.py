"""Cross-entropy of the next token that never holds all logits at once."""

from __future__ import annotations

from typing import Any

import torch

ROWS = 1024


class _NextTokenLoss(torch.autograd.Function):
    """Loss and gradient together, some rows at a time, so that the logits stay in the processor's cache."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden, low = hidden.bfloat16(), weight.bfloat16()
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        total = torch.zeros(())
        for start in range(0, len(targets), ROWS):
            rows = hidden[start : start + ROWS]
            target = targets[start : start + ROWS, None]
            logits = (rows @ low.T).float()
            logits -= logits.amax(-1, keepdim=True)
            wanted = logits.gather(1, target)
            mass = logits.exp_().sum(-1, keepdim=True)
            total += (mass.log() - wanted).sum()
            # d loss / d logits = softmax - one_hot(target)
            slope = logits.div_(mass).scatter_add_(1, target, torch.full_like(wanted, -1.0)).bfloat16()
            grad_hidden[start : start + ROWS] = slope @ low
            grad_weight += slope.T @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.count = len(targets)
        return total / ctx.count

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * (grad / ctx.count), grad_weight * (grad / ctx.count), None


def next_token_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy in nats, with products in bfloat16 and the softmax in float32.

    Parameters
    ----------
    hidden : float[n, hidden_size]
        Last hidden states.
    weight : float32[vocab_size, hidden_size]
        The output embedding.
    targets : int64[n]
        The tokens to predict.
    """
    return _NextTokenLoss.apply(hidden, weight, targets)
