"""Quantised keys and values: small numbers, and a float32 scale for each head of each token.

Symmetric and without a zero point, as a head's greatest element becomes the greatest number of the dtype: ``scale =
amax / 127`` for int8 and ``amax / 448`` for float8_e4m3fn, ``number = round(element / scale)``, half to even. A scale
of one token's head is fixed when the token is written, so nothing that was written is ever rounded again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pagedkv.errors import bad_argument

GREATEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The greatest number of each quantised dtype."""


def torch_dtype(name: str) -> torch.dtype:
    """Return what torch calls a dtype of :class:`pagedkv.KvCacheSpec`."""
    dtype: torch.dtype = torch.float8_e4m3fn if name == "fp8" else getattr(torch, name)
    return dtype


def quantised(name: str, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return tokens ``[n, heads, dim]``, the argument `name`, as contiguous numbers and scales, float32 ``[n, heads]``.

    An element is its number times the scale; that is 0 where a head is all zeros. NaN or an infinity (or more than
    float32 can hold) is refused; on an accelerator that is not looked for, as the host would have to wait.
    """
    greatest = GREATEST[dtype]
    elements = tokens.to(torch.float32)
    # By a tensor: torch multiplies by the reciprocal of a number on a GPU, which rounds otherwise.
    scales = elements.abs().amax(dim=2).div_(elements.new_full((), greatest))
    if scales.device.type == "cpu" and not torch.isfinite(scales).all():
        raise bad_argument(name, "finite numbers, which alone can be quantised", "NaN or infinity")
    divisors = torch.where(scales > 0, scales, 1.0).unsqueeze(2)
    # A scale so small that it has few digits left may be too small by more than rounding.
    numbers = elements.div(divisors).clamp_(-greatest, greatest)
    numbers = numbers.round_() if dtype == torch.int8 else numbers  # a cast to int8 cuts off, one to float8 rounds
    return numbers.to(dtype).contiguous(), scales


def dequantised(numbers: Tensor, scales: Tensor | None) -> Tensor:
    """Return ``numbers * scales`` in float32, a scale for each last dimension; without scales what they are."""
    return numbers if scales is None else numbers.to(torch.float32).mul_(scales.unsqueeze(-1))


def checked_scales(
    keys: Tensor, values: Tensor, key_scales: Any, value_scales: Any, layout: str
) -> tuple[Tensor | None, Tensor | None]:
    """Return the scales as ``[num_blocks, block_size, num_kv_heads]``, None where keys and values are not quantised.

    They are given in `layout`, while keys and values are ``[num_blocks, block_size, num_kv_heads, dim]``.
    """
    if keys.dtype not in GREATEST:
        for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
            if scales is not None:
                raise bad_argument(name, f"None for {keys.dtype} keys, which are not quantised")
        return None, None
    first = _checked("key_scales", key_scales, keys, layout)
    second = _checked("value_scales", value_scales, keys, layout)
    if second.stride() != first.stride():
        raise bad_argument(
            "value_scales", f"the strides {list(first.stride())} of key_scales", f"{list(second.stride())}"
        )
    return first, second


def _checked(name: str, scales: Any, keys: Tensor, layout: str) -> Tensor:
    shape = keys.shape[:3] if layout == "NHD" else torch.Size((keys.shape[0], keys.shape[2], keys.shape[1]))
    if not isinstance(scales, Tensor) or scales.dtype != torch.float32:
        kind = scales.dtype if isinstance(scales, Tensor) else type(scales).__name__
        raise bad_argument(name, f"a float32 torch.Tensor for {keys.dtype} keys", f"{kind}")
    if scales.shape != shape:
        raise bad_argument(name, f"shape {list(shape)}", f"{list(scales.shape)}")
    if scales.device != keys.device:
        raise bad_argument(name, f"a tensor on {keys.device} as keys", f"one on {scales.device}")
    plain: Tensor = scales.detach()
    return plain if layout == "NHD" else plain.transpose(1, 2)
