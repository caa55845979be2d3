"""Triton and the device, found when they are first needed; the package works without them."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch

from pagedkv.data.gpu_shapes import Device
from pagedkv.errors import InvalidOperation, MissingExtra

__all__ = [
    "device_of",
    "has_triton",
    "is_capturing",
    "is_debugging",
    "is_interpreted",
    "require_runnable",
    "tl_dtype",
    "uses_triton",
]

_INTERPRETED = Device("interpreter", 4, 1 << 20, 80)


@functools.cache
def has_triton() -> bool:
    """Tell whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _triton() -> Any:
    try:
        import triton
    except ImportError as error:
        raise MissingExtra("triton", "gpu") from error
    return triton


@functools.cache
def is_interpreted() -> bool:
    """Tell whether kernels run in Triton's interpreter: ``TRITON_INTERPRET=1`` when they are first used."""
    return bool(_triton().knobs.runtime.interpret)


def is_debugging() -> bool:
    """Tell whether what is on the device is checked too, at the price of waiting for it: ``PAGEDKV_DEBUG=1``."""
    return os.environ.get("PAGEDKV_DEBUG", "") not in ("", "0")


def is_capturing(device: torch.device) -> bool:
    """Tell whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def require_runnable(name: str, device: torch.device) -> None:
    """Refuse a device that the kernels cannot run on.

    Raises
    ------
    MissingExtra
        Triton is not installed.
    InvalidOperation
        Neither a CUDA device nor the interpreter.
    """
    if device.type == "cuda" and not is_interpreted():
        return
    if not is_interpreted():
        raise InvalidOperation(
            f"{name}: backend 'triton' expects a tensor on a CUDA device (or TRITON_INTERPRET=1), got one on {device}"
        )
    if device.type not in ("cpu", "cuda"):
        raise InvalidOperation(f"{name}: backend 'triton' expects a tensor on a CPU or CUDA device, got {device}")


def uses_triton(backend: str, device: torch.device) -> bool:
    """Tell whether a storage on this device moves its memory by Triton's kernels.

    Raises
    ------
    MissingExtra
        The backend is ``"triton"`` and it is not installed.
    InvalidOperation
        It cannot use the device, or there is no such backend.
    """
    if backend not in ("auto", "torch", "triton"):
        raise InvalidOperation(f"backend: expected one of auto, torch, triton, got {backend!r}")
    if backend == "triton":
        require_runnable("device", device)
    return backend == "triton" or (backend == "auto" and device.type == "cuda" and has_triton())


@functools.cache
def device_of(device: torch.device) -> Device:
    """Return what configurations depend on."""
    if device.type != "cuda":
        return _INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    capability = 10 * properties.major + properties.minor
    return Device(properties.name, properties.multi_processor_count, int(shared), capability)


def tl_dtype(dtype: torch.dtype) -> Any:
    """Return Triton's name of a dtype."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
