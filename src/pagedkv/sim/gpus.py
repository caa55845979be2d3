"""GPUs by name: memory and rates from one file, and what one replica of a model has of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.format import format_bytes, short
from pagedkv.sim.model_shape import ModelShape
from pagedkv.sim.plan_types import Hardware
from pagedkv.validate import likely, require_int, require_number

_FILE = Path(__file__).resolve().parent / "gpus.json"
_GIB = 2**30
MEMORY_SHARE = 0.9
"""Of the memory of a GPU, what an engine takes; the rest is for activations and what else runs."""
BANDWIDTH_SHARE = 0.6
"""Of the rate of its memory, what decoding reaches."""
LINK_SHARE = 0.8
"""Of the rate of its link to the host, what copies reach."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, as its data sheet has it.

    Attributes
    ----------
    name : str
    memory_bytes : int
    bf16_tflops : float
        10¹² FLOP/s of dense matrices in bfloat16.
    fp8_tflops : float or None
        The same in fp8; None where it has none.
    memory_bytes_per_second, host_bytes_per_second : float
        Of its own memory, and of its link to the memory of the host, one way.
    """

    name: str
    memory_bytes: int
    bf16_tflops: float
    fp8_tflops: float | None
    memory_bytes_per_second: float
    host_bytes_per_second: float


def gpu_names() -> tuple[str, ...]:
    """Return the names of the GPUs that are known."""
    return tuple(_known())


def read_gpu(name: str) -> Gpu:
    """Return a GPU by its name, ``"h100"`` say; `InvalidOperation` with one like it where it is not known."""
    known = _known()
    key = name.strip().lower().replace("_", "-").replace(" ", "-") if isinstance(name, str) else ""
    if key not in known:
        raise InvalidOperation(f"gpu: expected one of {', '.join(known)}, got {name!r}", "gpu", likely(name, known))
    facts = known[key]
    return Gpu(
        key,
        round(facts["memory_gib"] * _GIB),
        facts["bf16_tflops"],
        facts["fp8_tflops"],
        facts["memory_gb_per_second"] * 1e9,
        facts["host_gb_per_second"] * 1e9,
    )


@cache
def _known() -> dict[str, dict[str, Any]]:
    known: dict[str, dict[str, Any]] = msgspec.json.decode(_FILE.read_bytes())
    return known


@dataclass(frozen=True)
class ReplicaHardware:
    """What one replica of a model has on its GPUs.

    Attributes
    ----------
    gpu : Gpu
    count : int
        GPUs of the replica, which share the weights and the work.
    weight_bytes, pool_bytes : int
        Memory of all of them that the weights take, and what is left for the KV cache.
    hardware : Hardware
        Rates of prefill and decoding. One request decodes as fast as its active weights are read.
    host_bytes_per_second : float
        At which blocks come from the memory of the host.
    """

    gpu: Gpu
    count: int
    weight_bytes: int
    pool_bytes: int
    hardware: Hardware
    host_bytes_per_second: float

    def __str__(self) -> str:
        memory = format_bytes(self.weight_bytes + self.pool_bytes)
        weights, pool = format_bytes(self.weight_bytes), format_bytes(self.pool_bytes)
        return (
            f"a replica has {memory} of {self.count} × {self.gpu.name}: {weights} for the weights, {pool} for its pool"
        )


def replica_on(
    gpu: Gpu,
    model: ModelShape,
    *,
    count: int = 1,
    weight_bits: int = 16,
    memory_share: float = MEMORY_SHARE,
    mfu: float = 0.5,
) -> ReplicaHardware:
    """Return what one replica of a model has on GPUs.

    Parameters
    ----------
    gpu : Gpu
    model : ModelShape
    count : int
        GPUs of one replica, 1 … 1024.
    weight_bits : int
        Of a weight, 2 … 32: 8 for fp8, and prefill then runs at that rate where the GPU has it.
    memory_share : float
        Of the memory of every GPU that the engine takes, in (0, 1].
    mfu : float
        Share of the peak that prefill reaches, in (0, 1].

    Returns
    -------
    ReplicaHardware

    Raises
    ------
    InvalidOperation
        If an argument is out of range, or the weights leave no memory.
    """
    count = require_int("gpus_per_replica", count, 1, 1024)
    bits = require_int("weight_bits", weight_bits, 2, 32)
    memory = round(gpu.memory_bytes * count * require_number("gpu_memory_share", memory_share, 0, 1, above=True))
    weights = model.parameters.total * bits // 8
    if weights >= memory:
        enough = weights * count // memory + 1
        told = f"{short(model.parameters.total, giga='B')} weights of {bits} bits take {format_bytes(weights)}"
        have = f"{count} × {gpu.name} give {format_bytes(memory)}"
        raise bad_argument("gpus_per_replica", f"at least {enough}: {told}", f"{count}: {have}")
    tflops = gpu.fp8_tflops if bits == 8 and gpu.fp8_tflops is not None else gpu.bf16_tflops
    active = model.parameters.active * bits / 8
    decode = gpu.memory_bytes_per_second * count * BANDWIDTH_SHARE / active
    return ReplicaHardware(
        gpu,
        count,
        weights,
        memory - weights,
        Hardware(tflops * count, mfu, decode),
        gpu.host_bytes_per_second * count * LINK_SHARE,
    )
