"""Facts of the GPU, whether Triton can run on it, and the configurations of its kernels; imports no Triton."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from pagedkv.errors import InvalidOperation, MissingExtra, bad_argument
from pagedkv.validate import require_choice


def checked_device(device: Any) -> torch.device:
    """Return the device with its index, or refuse one that torch cannot use here."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = f"torch says: {str(error).splitlines()[0].partition('Expected one of')[0] or 'no such device type'}"
        hint = "; ".join((reason.rstrip(" ."), "'cpu' always works, 'cuda' with a CUDA build of torch and a GPU"))
        raise bad_argument("device", "a device that torch can use here", f"{device!r}", hint) from error


def tensor_for(value: object) -> str:
    """Return what makes a tensor of something that is none."""
    return "torch.from_numpy(…) makes one" if isinstance(value, np.ndarray) else "torch.as_tensor(…) makes one"


def shape_for(got: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Return what brings a tensor to another shape."""
    if len(got) == len(wanted) + 1 and got[0] == 1 and got[1:] == wanted:
        return "squeeze(0): there is no batch dimension, tokens of all sequences follow each other"
    if sorted(got) == sorted(wanted):
        return "transpose() it: tokens come first, then heads"
    if np.prod(got) == np.prod(wanted):
        return f"reshape{wanted} it"
    if got[1:] == wanted[1:]:
        return f"give {wanted[0]} rows, one for each query token of the plan"
    return "make the cache for these heads, or pass the others"


def require_slots(slots: np.ndarray[Any, Any], num_slots: int) -> None:
    """Refuse int64 slots outside of the pool."""
    # As unsigned numbers negative slots are huge: one pass finds both kinds.
    numbers = slots.view(np.uint64)
    if len(numbers) and int(numbers.max()) >= num_slots:
        wrong = int(slots[numbers >= num_slots][0])
        raise bad_argument("slot_mapping", f"slots in 0 … {num_slots - 1}", f"{wrong}")


# Tile sizes, warps and splits of the GPU kernels: pure functions of the shape of a call and of the device.

SMALLEST_DOT = 16
"""Triton multiplies no smaller matrices."""
FEW_ROWS = 64
"""Query rows (tokens times heads of a group) that the split kernel takes at most, if a token has no more."""
MOST_FEW_TOKENS = 8
MOST_SPLITS = 64
TILES_PER_SPLIT = 4
"""A split has to be worth its partial result."""
PROGRAMS_PER_CORE = 2
"""As many read all that the memory gives; more only leave more behind to add up."""


class Config(NamedTuple):
    """How a kernel is compiled."""

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int


class Device(NamedTuple):
    """What decides about configurations.

    ``cores`` are streaming multiprocessors, ``shared_bytes`` what a program may have of one's shared memory, and
    ``capability`` is 90 for compute capability 9.0.
    """

    name: str
    cores: int
    shared_bytes: int
    capability: int


@dataclass(frozen=True, slots=True)
class Heads:
    """What a kernel is compiled for.

    ``item_bytes`` is the size of an element in the dot products, ``stored_bytes`` of one in the pool. ``most`` is the
    number of query tokens that the split kernel serves in a sequence, 0 for the kernel that serves longer ones.
    """

    group: int
    head_dim: int
    v_head_dim: int
    item_bytes: int
    stored_bytes: int
    most: int

    @property
    def few(self) -> int:
        """Up to how many query tokens of a sequence the split kernel takes."""
        return max(1, min(MOST_FEW_TOKENS, FEW_ROWS // self.group))

    @property
    def rows(self) -> int:
        """Rows of a tile of the split kernel; 0 for the other, whose tiles differ."""
        return max(SMALLEST_DOT, power_of_two(self.group * self.most)) if self.most else 0

    @property
    def tile_d(self) -> int:
        """Elements of a row of keys in a tile."""
        return max(SMALLEST_DOT, power_of_two(self.head_dim))

    @property
    def tile_dv(self) -> int:
        """Elements of a row of values in a tile."""
        return max(SMALLEST_DOT, power_of_two(self.v_head_dim))


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below the number."""
    return 1 << (number - 1).bit_length()


@functools.cache
def candidates(heads: Heads, device: Device) -> tuple[Config, ...]:
    """Return the configurations that may fit, the likeliest to be fast first; never empty."""
    if heads.most:
        likely = sorted(_FEW, key=lambda one: abs(one[0].bit_length() - _keys_of_tile(heads).bit_length()))
        wanted = [(heads.rows, n, warps, stages) for n, warps, stages in likely]
    else:
        smallest = max(SMALLEST_DOT, power_of_two(heads.group))
        likely_rows = 64 if heads.tile_d <= 64 else 128
        many = sorted(_MANY, key=lambda one: one[0] != likely_rows)
        wanted = [(max(m, smallest), n, warps, stages) for m, n, warps, stages in many]
    configs = [Config(*numbers) for numbers in wanted]
    fitting = [
        config for config in dict.fromkeys(configs) if shared_bytes(config, heads, device) <= device.shared_bytes
    ]
    smallest_of_all = Config(configs[-1].tile_m, 16, 4, 1)
    return tuple([c for c in fitting if _fits_registers(c, heads, device)] or fitting or [smallest_of_all])


def _keys_of_tile(heads: Heads) -> int:
    """Return how many keys of one sequence make a tile of 16 KiB; quantised ones are converted to twice as much."""
    return min(128, max(32, (1 << 14) // (heads.tile_d * max(2, heads.stored_bytes))))


# Tiles of keys, warps, stages; for many queries rows of them before. The order is that of times on an H200, with long
# sequences and short ones: choosing by the times of single calls, at the first call of a kind, did worse.
_FEW = [(64, 4, 3), (32, 4, 3), (32, 4, 4), (64, 8, 3), (128, 8, 3), (64, 4, 2), (32, 8, 2), (32, 4, 2), (16, 4, 1)]
_MANY = [
    (128, 128, 8, 3),
    (128, 64, 8, 3),
    (128, 32, 8, 3),
    (64, 64, 4, 3),
    (64, 64, 4, 2),
    (64, 32, 4, 3),
    (32, 64, 8, 2),
    (32, 32, 4, 2),
    (16, 16, 4, 1),
]


def shared_bytes(config: Config, heads: Heads, device: Device) -> int:
    """Return what a program takes of shared memory, as the compiler lays it out."""
    reads_shared = _multiplies_from_shared(config, device)
    ahead = max(1, config.num_stages - 1)
    # A warp group's product may still read its keys when the next ones are to be copied.
    buffers = ahead + 1 if reads_shared and heads.stored_bytes > 1 else ahead
    tiles = buffers * config.tile_n * (heads.tile_d + heads.tile_dv) * heads.stored_bytes
    operands = config.tile_m * heads.tile_d
    if not reads_shared:
        operands += config.tile_m * config.tile_n  # the weights go from warp to warp
    if heads.item_bytes == 4:
        operands *= 2  # a second part with the digits that are cut off the first
    if heads.stored_bytes == 1:
        tiles += ahead * config.tile_n * 8  # scales
        if reads_shared:
            operands += config.tile_n * max(heads.tile_d, heads.tile_dv)  # a tile of keys or values, converted
    if reads_shared and device.capability >= 100:  # sums are in tensor memory
        tiles += 1 << 13 if heads.stored_bytes > 1 else config.tile_n * max(heads.tile_d, heads.tile_dv) * 2
        tiles += 32  # barriers
    return tiles + operands * heads.item_bytes


def _multiplies_from_shared(config: Config, device: Device) -> bool:
    """Tell whether tensor cores read keys and values from shared memory: those of data centers can, since Hopper."""
    return device.capability // 10 in (9, 10) and config.tile_m >= 64


def _fits_registers(config: Config, heads: Heads, device: Device) -> bool:
    """Tell whether the 255 registers of a thread suffice; the limits are read off compiled kernels."""
    reads_shared = _multiplies_from_shared(config, device)
    if reads_shared and config.tile_m < 16 * config.num_warps:
        return False  # two warp groups would share the rows and exchange what they found
    if not heads.most and config.tile_n > 64 and (heads.stored_bytes == 1 or not reads_shared):
        return False  # keys and values go through registers, too
    floats = config.tile_m * (heads.tile_dv + config.tile_n)
    if heads.item_bytes == 4:  # operands too, in two parts
        floats += (config.tile_m + config.tile_n) * max(heads.tile_d, heads.tile_dv)
        return floats <= 104 * 32 * config.num_warps
    return floats <= (144 if config.num_warps > 4 else 112) * 32 * config.num_warps


def num_splits(num_programs: int, longest: int, config: Config, device: Device) -> int:
    """Return among how many programs the keys of the longest sequence, which sees `longest` of them, are split.

    Without splitting there are `num_programs`: sequences times kv heads, if every sequence were as long as the longest.
    """
    worthwhile = min(longest // (config.tile_n * TILES_PER_SPLIT), MOST_SPLITS)
    return max(1, min(worthwhile, PROGRAMS_PER_CORE * device.cores // max(1, num_programs)))


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
    """Refuse a device that the kernels cannot run on: neither CUDA nor the interpreter; or Triton is not installed."""
    if device.type == "cuda" and not is_interpreted():
        return
    if not is_interpreted():
        reason = f"{name}: backend 'triton': expected a tensor on a CUDA device (or TRITON_INTERPRET=1)"
        raise InvalidOperation(f"{reason}, got one on {device}", name, "backend='auto' takes what runs here")
    if device.type not in ("cpu", "cuda"):
        raise InvalidOperation(f"{name}: backend 'triton': expected a tensor on a CPU or CUDA device, got {device}")


def uses_triton(backend: str, device: torch.device) -> bool:
    """Tell whether a storage on this device moves its memory by Triton's kernels; refuse a backend that cannot."""
    require_choice("backend", backend, ("auto", "torch", "triton"))
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
