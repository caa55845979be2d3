"""Autotuning of the GPU kernels: configurations are measured once for each kind of call and device, kept in a file.

Measuring waits for the device, so it happens at the first eager call of a kind only that is large enough to tell one
from another, never while a CUDA graph is captured and never in the interpreter. There, and with ``PAGEDKV_AUTOTUNE=0``,
the choice is a pure function. ``triton.autotune`` is no substitute: it times one kernel over given arguments, and here
a configuration decides about the number of splits, the memory of their partial results and a second launch as well.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.testing
from triton.runtime.errors import OutOfResources

from pagedkv.data.call import AttentionCall
from pagedkv.data.gpu_device import Config, Heads, candidates, device_of, is_capturing, is_interpreted
from pagedkv.errors import bad_argument

_TRIED = 5
"""So many candidates are measured; each has to be compiled first, which takes seconds. The others are smaller."""
_ENOUGH_WORK = 1 << 15
_chosen: dict[str, Config] | None = None
_unmeasured: dict[str, Config] = {}
"""What this process uses where nothing could be measured, or nothing that was measured fits."""


def run_best(heads: Heads, call: AttentionCall, run: Callable[[Config], None], work: int) -> None:
    """Launch a call as `config_for` says, or where the device has no room for that, with a smaller configuration."""
    config = config_for(heads, call, run, work)
    try:
        run(config)
    except OutOfResources:
        device, key = device_of(call.queries.device), _key(heads, call)
        for smaller in candidates(heads, device):
            with contextlib.suppress(OutOfResources):
                run(smaller)
                _known().pop(key, None)
                _unmeasured[key] = smaller
                return
        raise bad_argument(
            "queries",
            f"heads that {device.name} has the memory for",
            f"heads of {heads.head_dim} and {heads.v_head_dim} in groups of {heads.group} "
            "(backend='reference' takes any)",
        ) from None


def config_for(heads: Heads, call: AttentionCall, run: Callable[[Config], None], work: int) -> Config:
    """Return the configuration for a call, which `run` launches, perhaps several times.

    `work` is how many keys are read, of all query tiles together, in tokens; 0 where the host does not know.
    """
    device = call.queries.device
    configs = candidates(heads, device_of(device))
    if is_interpreted():
        return configs[0]
    key = _key(heads, call)
    is_tuned = os.environ.get("PAGEDKV_AUTOTUNE", "1") != "0"
    config = (_known().get(key) if is_tuned else None) or _unmeasured.get(key)
    if config in configs:
        return config
    if not is_tuned or work < _ENOUGH_WORK or is_capturing(device):
        return configs[0]
    with torch.cuda.device_of(call.queries):  # type: ignore[no-untyped-call]
        best = _fastest(configs[:_TRIED], run)
    if best is None:
        _unmeasured[key] = configs[0]
        return configs[0]
    _known()[key] = best
    _save()
    return best


def _known() -> dict[str, Config]:
    """Return what was chosen here or by another process before; the file is read once."""
    global _chosen
    if _chosen is None:
        _chosen = _load()
    return _chosen


def _key(heads: Heads, call: AttentionCall) -> str:
    """Return what tells one kind of call from another: all that is compiled in, and no size that changes by step."""
    flags = [call.causal, call.window is not None, call.softcap is not None, call.sinks is not None]
    parts = [
        device_of(call.queries.device).name,
        f"triton {triton.__version__}",
        f"torch {torch.__version__}",
        f"{call.queries.dtype} {call.keys.dtype}",
        f"block {call.keys.shape[1]} strides {call.keys.stride(1)} {call.keys.stride(2)}",
        f"group {heads.group} dims {heads.head_dim} {heads.v_head_dim} rows {heads.rows}",
        "".join("01"[flag] for flag in flags),
    ]
    return "; ".join(parts)


def _fastest(configs: tuple[Config, ...], run: Callable[[Config], None]) -> Config | None:
    """Return the configuration with the smallest median time, of those that the device has room for.

    Measuring takes 256 MiB itself; without them it is left.
    """
    times: dict[Config, float] = {}
    for config in configs:
        with contextlib.suppress(OutOfResources, torch.cuda.OutOfMemoryError):
            times[config] = _median_time(config, run)
    return min(times, key=times.__getitem__) if times else None


def _median_time(config: Config, run: Callable[[Config], None]) -> float:
    """Return milliseconds; the L2 cache is cleared before each run, and meanwhile the host gets ahead of the device."""
    return float(triton.testing.do_bench(functools.partial(run, config), warmup=5, rep=25, return_mode="median"))


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
        text = json.dumps({**_load(), **_known()}, indent=0, sort_keys=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
