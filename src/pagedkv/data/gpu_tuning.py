"""Which configuration a kernel runs with: measured once for each kind of call on each device, and kept in a file.

Measuring waits for the device, so it happens at the first eager call of a kind only that is large enough to tell one
from another, never while a CUDA graph is captured and never in the interpreter. There, and with ``PAGEDKV_AUTOTUNE=0``,
the choice is a pure function.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from pagedkv.data.arguments import AttentionCall
from pagedkv.data.gpu_device import device_of, is_capturing, is_interpreted
from pagedkv.data.gpu_shapes import Config, Heads, candidates, default_config

__all__ = ["config_for"]

_REPEATS = 5
_ENOUGH_WORK = 1 << 15
_chosen: dict[str, Config] = {}


def config_for(heads: Heads, call: AttentionCall, run: Callable[[Config], None], work: int) -> Config:
    """Return the configuration for a call.

    Parameters
    ----------
    heads : Heads
    call : AttentionCall
    run : callable
        Launches the call with a configuration; may be called several times.
    work : int
        Keys that are read, of all query tiles together, in tokens; 0 where the host does not know.
    """
    device = call.queries.device
    if is_interpreted() or os.environ.get("PAGEDKV_AUTOTUNE", "1") == "0":
        return default_config(heads, device_of(device))
    key = _key(heads, call)
    if not _chosen:
        _chosen.update(_load())
    config = _chosen.get(key)
    if config is None or config not in candidates(heads, device_of(device)):
        if work < _ENOUGH_WORK or is_capturing(device):
            return default_config(heads, device_of(device))
        config = _chosen[key] = _fastest(candidates(heads, device_of(device)), run)
        _save()
    return config


def _key(heads: Heads, call: AttentionCall) -> str:
    """Return what tells one kind of call from another: all that is compiled in, and no size that changes by step."""
    flags = [call.causal, call.window is not None, call.softcap is not None, call.sinks is not None]
    parts = [
        device_of(call.queries.device).name,
        f"triton {triton.__version__}",
        f"torch {torch.__version__}",
        f"{call.queries.dtype} {call.keys.dtype}",
        f"block {call.keys.shape[1]} strides {call.keys.stride(1)} {call.keys.stride(2)}",
        f"group {heads.group} dims {heads.head_dim} {heads.v_head_dim} most {heads.most}",
        "".join("01"[flag] for flag in flags),
    ]
    return "; ".join(parts)


def _fastest(configs: list[Config], run: Callable[[Config], None]) -> Config:
    """Return the configuration with the smallest median time; one that the device has no room for is left out."""
    times: dict[Config, float] = {}
    for config in configs:
        with contextlib.suppress(triton.runtime.errors.OutOfResources):
            times[config] = _median_time(config, run)
    return min(times, key=times.__getitem__) if times else configs[-1]


def _median_time(config: Config, run: Callable[[Config], None]) -> float:
    run(config)  # compiles
    times: list[float] = []
    for _ in range(_REPEATS):
        start, end = _event(), _event()
        start.record()
        run(config)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[_REPEATS // 2]


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _file() -> Path:
    root = os.environ.get("PAGEDKV_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "pagedkv" / "gpu-configurations.json"


def _load() -> dict[str, Config]:
    """Return what was kept; nothing where there is no file, or one that cannot be understood."""
    try:
        return {str(key): Config(*map(int, numbers)) for key, numbers in json.loads(_file().read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _save() -> None:
    """Keep what is known, beside what other processes have found; a file system that refuses is no error."""
    path = _file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**_load(), **_chosen}, indent=0, sort_keys=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
