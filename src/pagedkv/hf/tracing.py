"""A trace of a model: what each of its modules made of a few tokens, and what its attention was asked for.

Whatever a model's code does between its modules shows in it: which norm reads what, what is scaled, what is turned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pagedkv.hf.compat import AttentionInterface, AttentionMaskInterface, attention_by
from pagedkv.hf.direct import PagedMask, paged_mask, require_plain

TRACED = "pagedkv_traced"
"""The attention function of a trace: each token sees itself alone."""


def same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are the same memory, in whatever shape."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


@dataclass(slots=True, eq=False)
class Call:
    """One call of a module: what it got and what it returned."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: Any

    @property
    def given(self) -> list[Any]:
        """All that it got."""
        return [*self.args, *self.kwargs.values()]

    @property
    def input(self) -> Tensor | None:
        """The first tensor that it got."""
        return next((each for each in self.given if isinstance(each, Tensor)), None)

    @property
    def output(self) -> Tensor | None:
        """The first tensor that it returned."""
        first = self.returned[0] if isinstance(self.returned, tuple) and self.returned else self.returned
        return first if isinstance(first, Tensor) else None


@dataclass(slots=True, eq=False)
class AttentionCall:
    """One call of an attention function, for one text.

    Attributes
    ----------
    query, key, value : Tensor [num_heads, num_tokens, head_dim]
    output : Tensor [num_tokens, num_q_heads * v_head_dim]
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


@dataclass(slots=True, eq=False)
class Trace:
    """All calls of one forward pass, in the order in which they ended.

    Attributes
    ----------
    token_ids, positions : int64 Tensor [num_tokens]
    logits : Tensor [num_tokens, vocab_size]
    """

    token_ids: Tensor
    positions: Tensor
    calls: list[Call | AttentionCall] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


_current: ContextVar[Trace | None] = ContextVar("pagedkv_trace", default=None)


def trace(model: Any, token_ids: Tensor, positions: Tensor) -> Trace:
    """Run a model on a few tokens without a cache, and return what its modules did.

    Parameters
    ----------
    model : PreTrainedModel
    token_ids, positions : int64 Tensor [num_tokens]
        Positions ascend; they may have gaps.

    Raises
    ------
    InvalidOperation
        If attention is not causal, or is asked for more than the attention functions of pagedkv do.
    """
    seen = Trace(token_ids, positions)
    config = model.config.get_text_config(decoder=True)
    token = _current.set(seen)
    try:
        with torch.no_grad(), attention_by(TRACED, config), _hooked(model, seen):
            mask = torch.ones(1, len(token_ids), dtype=torch.int64)  # without one, gaps would be taken for many texts
            out = model(token_ids[None], position_ids=positions[None], attention_mask=mask, use_cache=False)
    finally:
        _current.reset(token)
    seen.logits = out.logits[0]
    return seen


@contextmanager
def _hooked(model: nn.Module, seen: Trace) -> Iterator[None]:
    """Let every call of a module be written down, for the time being."""

    def write_down(module: nn.Module, args: Any, kwargs: Any, returned: Any) -> None:
        if _current.get() is seen:  # another thread may run the same model
            seen.calls.append(Call(module, args, kwargs, returned))

    handles = [module.register_forward_hook(write_down, with_kwargs=True) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attend_alone(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Write down what attention is asked for, and return to each token its own value."""
    seen = _current.get()
    window = attention_mask.window if isinstance(attention_mask, PagedMask) else None
    require_plain(module, dropout, is_causal, sliding_window, window, kwargs)
    out = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2).contiguous()
    if seen is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        flat = out[0].flatten(1)
        seen.calls.append(AttentionCall(module, query[0], key[0], value[0], flat, scale, window, softcap, s_aux))
    return out, None


AttentionInterface.register(TRACED, _attend_alone)
AttentionMaskInterface.register(TRACED, paged_mask)
