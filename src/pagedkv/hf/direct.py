"""Direct mode: the attention function ``"pagedkv"``, which reads the blocks in place.

transformers hands an attention function what ``Cache.update()`` returned and what the mask function returned, never the
cache. So both return handles: tensors without memory that carry where K and V are and who sees whom. Whoever treats a
handle as numbers gets an error: a model that does more with K and V than attend (multi-head latent attention, ALiBi
written out in the model) is refused here and runs in gather mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.cache import PagedKvCache
from pagedkv.control.plan import BatchPlan
from pagedkv.data.gpu_plan import DevicePlan
from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.hf.compat import AttentionInterface, AttentionMaskInterface, is_causal_mask
from pagedkv.typing import Backend

DIRECT = "pagedkv"
"""The name to give as ``attn_implementation``."""

Plan = BatchPlan | DevicePlan

_GATHER = "use gather mode instead: attn_implementation='sdpa' or 'eager'"

# Arguments that models hand through to attention and that change nothing in it.
_HARMLESS = frozenset({"position_ids", "use_cache", "output_hidden_states", "output_router_logits", "return_dict"})


class _Handle(Tensor):
    """A tensor of a shape but without memory; every operation on it is refused."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _what = "a handle"

    @classmethod
    def _make(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Self:
        handle: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        return handle

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise InvalidOperation(f"attn_implementation={DIRECT!r}: the model calls {func} on {cls._what}; {_GATHER}")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype})"


class PagedStates(_Handle):
    """A handle for all keys or all values of the rows of a batch in one layer."""

    _what = "keys or values that are in blocks"
    pool: PagedKvCache
    layer: int
    plan: Plan
    backend: Backend

    @classmethod
    def of(
        cls, states: Tensor, pool: PagedKvCache, layer: int, plan: Plan, length: int, backend: Backend = "auto"
    ) -> PagedStates:
        """Return the handle for all K or V of the rows that `states` [batch, heads, tokens, dim] belongs to.

        It shows itself as `length` tokens long, which is what the mask is made for. Query tokens behind those of the
        plan are padding.
        """
        rows, heads, _, dim = states.shape
        handle = cls._make((rows, heads, length, dim), states.dtype, states.device)
        handle.pool, handle.layer, handle.plan, handle.backend = pool, layer, plan, backend
        return handle


@dataclass(slots=True)
class _Layout:
    """A plan as attention gets it: without its padding."""

    made_for: Plan
    plan: Plan
    queries: Tensor | None  # the query tokens that are no padding, where some are


class PagedMask(_Handle):
    """A handle for a causal mask: how far the window reaches and how much padding each row has on its left."""

    _what = "the mask of attention over blocks"
    window: int | None
    pads: npt.NDArray[np.int64]  # of each row, on the left
    _layout: _Layout | None

    @classmethod
    def of(cls, shape: tuple[int, int, int, int], window: int | None, pads: npt.NDArray[np.int64]) -> PagedMask:
        """Return the handle for a causal mask [batch, 1, queries, keys]."""
        handle = cls._make(shape, torch.bool, torch.device("cpu"))
        handle.window, handle.pads, handle._layout = window, pads, None
        return handle

    def without_padding(self, plan: Plan, num_queries: int) -> _Layout:
        """Return the plan without the padding, made once for all layers."""
        if self._layout is None or self._layout.made_for is not plan:
            if isinstance(plan, BatchPlan) and self.pads.any():
                self._layout = _without_padding(plan, self.pads)
            else:
                self._layout = _as_planned(plan, num_queries)
        return self._layout


def _as_planned(plan: Plan, num_queries: int) -> _Layout:
    queries = None if plan.total_tokens == num_queries else torch.arange(plan.total_tokens)
    return _Layout(plan, plan, queries)


def _without_padding(plan: BatchPlan, pads: npt.NDArray[np.int64]) -> _Layout:
    """Let the padding, which is stored like any token, be a hole at the beginning of each sequence."""
    seq_lens = (plan.seq_lens - pads).astype(np.int32)
    counts = np.minimum(plan.num_query_tokens, seq_lens)
    cu_seqlens = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=cu_seqlens[1:])
    holes = np.stack([np.zeros_like(pads), pads], axis=1).astype(np.int32)
    is_text = plan.positions >= np.repeat(pads, plan.num_query_tokens)
    queries = None if is_text.all() else torch.from_numpy(np.flatnonzero(is_text))
    return _Layout(plan, replace(plan, seq_lens=seq_lens, cu_seqlens_q=cu_seqlens, holes=holes), queries)


def paged_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> PagedMask:
    """Return a handle that says who sees whom, where transformers would write out a mask.

    Raises
    ------
    InvalidOperation
        If it is not causal with at most a sliding window, or padding is elsewhere than on the left.
    """
    if mask_function is None or not is_causal_mask(mask_function, local_size):
        raise InvalidOperation(f"attn_implementation={DIRECT!r}: expected a causal or sliding-window mask; {_GATHER}")
    if kv_offset or kv_length != q_offset + q_length:
        raise InvalidOperation(
            f"attn_implementation={DIRECT!r}: expected {q_offset} + {q_length} keys from 0 on, "
            f"got {kv_length} from {kv_offset} on: pass past_key_values=PagedCache(model.config)"
        )
    pads = np.zeros(batch_size, np.int64) if attention_mask is None else _left_padding(attention_mask, kv_length)
    return PagedMask.of((batch_size, 1, q_length, kv_length), local_size, pads)


def _left_padding(attention_mask: Tensor, kv_length: int) -> npt.NDArray[np.int64]:
    visible = attention_mask.detach().cpu().numpy().astype(bool)[:, :kv_length]
    pads: npt.NDArray[np.int64] = kv_length - visible.sum(axis=1)
    if visible.shape[1] != kv_length or not (visible == (np.arange(kv_length) >= pads[:, None])).all():
        raise bad_argument("attention_mask", f"zeros on the left only, for {kv_length} keys; {_GATHER}")
    return pads


def attend_blocks(
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
    """Attend over blocks, as an attention function of transformers.

    Parameters
    ----------
    module : Module
        The attention layer.
    query : Tensor [batch, num_q_heads, tokens, head_dim]
    key, value : PagedStates
        What ``PagedCache.update()`` returned.
    attention_mask : PagedMask
    dropout, scaling, is_causal, sliding_window, softcap, s_aux
        As transformers passes them; the mask's window counts.

    Returns
    -------
    tuple of Tensor [batch, tokens, num_q_heads, v_head_dim] and None
        Zeros for padding.

    Raises
    ------
    InvalidOperation
        For everything that would change the result and is not handled.
    """
    _require_handles(key, value, attention_mask)
    assert isinstance(key, PagedStates) and isinstance(attention_mask, PagedMask)
    require_plain(module, dropout, is_causal, sliding_window, attention_mask.window, kwargs)
    rows, heads, tokens, dim = query.shape
    if attention_mask.shape[0] not in (1, rows) or attention_mask.shape[2:] != (tokens, key.shape[2]):
        raise bad_argument("attention_mask", f"[{rows}, 1, {tokens}, {key.shape[2]}]", f"{list(attention_mask.shape)}")
    layout = attention_mask.without_padding(key.plan, rows * tokens)
    queries = query.transpose(1, 2).reshape(rows * tokens, heads, dim)
    text = queries if layout.queries is None else queries[layout.queries.to(query.device)]
    out = key.pool.attend(
        key.layer,
        text,
        layout.plan,
        scale=scaling,
        window=attention_mask.window,
        softcap=softcap,
        sinks=s_aux,
        backend=key.backend,
    )
    if layout.queries is not None:
        out = out.new_zeros(rows * tokens, *out.shape[1:]).index_copy_(0, layout.queries.to(out.device), out)
    return out.view(rows, tokens, heads, -1), None


def _require_handles(key: Any, value: Any, mask: Any) -> None:
    if not isinstance(key, PagedStates) or not isinstance(value, PagedStates) or key.plan is not value.plan:
        raise InvalidOperation(
            f"attn_implementation={DIRECT!r}: expected keys and values as a PagedCache returned them, got a "
            f"{type(key).__name__}: pass past_key_values=PagedCache(model.config), or {_GATHER}"
        )
    if not isinstance(mask, PagedMask):
        raise bad_argument(
            "attention_mask",
            f"the mask of {DIRECT!r}",
            f"{type(mask).__name__}: a mask of one's own is not supported; {_GATHER}",
        )


def require_plain(
    module: Any,
    dropout: float,
    is_causal: bool | None,
    sliding_window: int | None,
    window: int | None,
    kwargs: dict[str, Any],
) -> None:
    """Refuse every argument that would change the result."""
    if dropout:
        raise bad_argument("dropout", "0.0", f"{dropout}: call model.eval()")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise bad_argument("is_causal", f"causal attention; {_GATHER}")
    if sliding_window is not None and sliding_window != window:
        raise bad_argument("sliding_window", f"{window} as the mask says", f"{sliding_window}; {_GATHER}")
    unknown = {name for name, given in kwargs.items() if given is not None and given is not False} - _HARMLESS
    if unknown:
        raise InvalidOperation(f"{', '.join(sorted(unknown))}: not supported by {DIRECT!r} attention; {_GATHER}")


AttentionInterface.register(DIRECT, attend_blocks)
AttentionMaskInterface.register(DIRECT, paged_mask)
