"""The attention part of ``pagedkv bench``: decoding and prefill over blocks, beside torch's fused attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pagedkv.cli.bench import BenchRequest, Figure, median_seconds
from pagedkv.cli.loading import torch_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pagedkv.cache import PagedKvCache

__all__ = ["measure"]

_COPIED_BYTES = 1 << 28


def measure(request: BenchRequest) -> Iterator[Figure]:
    """Measure every dtype; memory is read from the pool, which is larger than most caches of a processor.

    Raises
    ------
    InvalidOperation
        For a dtype or a device that there is not.
    """
    import torch

    device = torch_device(request.device)
    with torch.no_grad():
        yield _copy(device, request.seconds)
        for dtype in request.dtypes:
            yield from _decode(request, dtype, device)
        for dtype in request.dtypes:
            yield _prefill(request, dtype, device)


def _copy(device: torch.device, seconds: float) -> Figure:
    import torch

    source = torch.ones(_COPIED_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    (time,) = median_seconds([_awaited(lambda: target.copy_(source), device)], seconds)
    note = f"read and written, {_where(device)}"
    return Figure("attention", "memory copied", 2 * _COPIED_BYTES / time / 1e9, "GB/s", note)


def _decode(request: BenchRequest, dtype: str, device: torch.device) -> Iterator[Figure]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    count, context = request.batch, request.context
    cache, plan, queries = _filled(request, dtype, device, count, 1)
    shape = count, request.kv_heads, context, request.head_dim
    keys, values = (torch.randn(shape, device=device).to(queries.dtype) for _ in range(2))

    def dense() -> Tensor:
        return scaled_dot_product_attention(queries[:, :, None], keys, values, enable_gqa=True)

    ways = [lambda: cache.attend(0, queries, plan), dense]
    ours, theirs = median_seconds([_awaited(way, device) for way in ways], request.seconds)
    read = cache.spec.bytes_per_token * count * context
    note = f"{count} × {context:,} tokens; reads {read / ours / 1e9:.1f} GB/s of K and V"
    yield Figure("attention", f"decode, {dtype}", ours * 1e3, "ms", note)
    note = f"so much longer takes torch's attention over {_name(queries.dtype)} K and V in one piece"
    yield Figure("attention", "", theirs / ours, "×", note)


def _prefill(request: BenchRequest, dtype: str, device: torch.device) -> Figure:
    cache, plan, queries = _filled(request, dtype, device, 1, request.context)
    (time,) = median_seconds([_awaited(lambda: cache.attend(0, queries, plan), device)], request.seconds)
    note = f"{request.context:,} tokens; {request.context / time:,.0f} tokens/s"
    return Figure("attention", f"prefill, {dtype}", time * 1e3, "ms", note)


def _filled(
    request: BenchRequest, dtype: str, device: torch.device, count: int, new: int
) -> tuple[PagedKvCache, Any, Tensor]:
    """Return a cache with sequences whose blocks lie scattered, the plan of their last tokens, and its queries."""
    import numpy as np
    import torch

    from pagedkv.cache import PagedKvCache

    size = request.block_size
    blocks = -(-request.context // size)
    cache = PagedKvCache(count * blocks, size, request.kv_heads, request.head_dim, dtype=dtype, device=str(device))
    order = np.random.default_rng(0).permutation(count)
    for seq_id in order.tolist():
        cache.allocate(seq_id, min(size, request.context))
    while (left := request.context - cache.get_sequence(0).num_tokens) > 0:
        cache.append_batch(order, min(size, left))
    plan = cache.plan(order, request.context)
    generator = torch.Generator(device).manual_seed(0)
    working = torch.bfloat16 if cache.spec.is_quantised else cache.storage.dtype

    def drawn(tokens: int, heads: int) -> Tensor:
        shape = tokens, heads, request.head_dim
        return torch.randn(shape, generator=generator, device=device).to(working)

    total = count * request.context
    cache.write(0, drawn(total, request.kv_heads), drawn(total, request.kv_heads), plan)
    cache.commit(plan)
    return cache, cache.plan(order, new), drawn(count * new, request.q_heads)


def _awaited(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Return a call that waits until the device has done the work."""
    import torch

    if device.type != "cuda":
        return call

    def both() -> None:
        call()
        torch.cuda.synchronize(device)

    return both


def _where(device: torch.device) -> str:
    import torch

    if device.type == "cpu":
        return f"{torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
