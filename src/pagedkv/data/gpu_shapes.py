"""Tile sizes, warps and splits of the GPU kernels: pure functions of the shape of a call and of the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Config", "Device", "Heads", "candidates", "default_config", "num_splits", "power_of_two"]

SMALLEST_DOT = 16
"""Triton multiplies no smaller matrices."""
FEW_ROWS = 64
"""Query rows (tokens times heads of a group) that the split kernel takes at most, if a token has no more."""
MOST_FEW_TOKENS = 8
MOST_SPLITS = 64
TILES_PER_SPLIT = 4
"""A split has to be worth its partial result."""
PROGRAMS_PER_CORE = 4


class Config(NamedTuple):
    """How a kernel is compiled."""

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int


class Device(NamedTuple):
    """What decides about configurations: cores (streaming multiprocessors) and shared memory of one, in bytes."""

    name: str
    cores: int
    shared_bytes: int


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


def candidates(heads: Heads, device: Device) -> list[Config]:
    """Return the configurations worth a try, the likeliest first; never empty."""
    if heads.most:
        tile_m = max(SMALLEST_DOT, power_of_two(heads.group * heads.most))
        wanted = [(tile_m, n, warps, stages) for n, warps, stages in _FEW]
    else:
        smallest = max(SMALLEST_DOT, power_of_two(heads.group))
        wanted = [(max(m, smallest), n, warps, stages) for m, n, warps, stages in _MANY]
    configs = [Config(*numbers) for numbers in wanted]
    fitting = [config for config in dict.fromkeys(configs) if _shared_bytes(config, heads) <= device.shared_bytes]
    smallest_of_all = Config(configs[-1].tile_m, 16, 4, 1)
    return [config for config in fitting if _fits_registers(config, heads)] or fitting or [smallest_of_all]


_FEW = [(64, 4, 3), (128, 4, 2), (128, 8, 3), (32, 4, 4), (64, 4, 2), (32, 4, 2), (32, 4, 1), (16, 4, 1)]
_MANY = [
    (128, 64, 8, 3),
    (128, 128, 8, 2),
    (128, 64, 4, 3),
    (64, 64, 4, 3),
    (64, 64, 4, 2),
    (64, 32, 4, 2),
    (32, 32, 4, 2),
    (16, 32, 4, 1),
    (16, 16, 4, 1),
]


def _shared_bytes(config: Config, heads: Heads) -> int:
    """Return what a tile of queries and the keys and values under way take in shared memory, about."""
    tiles = config.num_stages * config.tile_n * (heads.tile_d + heads.tile_dv) * heads.stored_bytes
    queries = config.tile_m * heads.tile_d * heads.item_bytes
    if heads.stored_bytes == heads.item_bytes == 2:
        return tiles + queries
    # What is converted, or multiplied in parts, is there a second time.
    return tiles + queries + config.tile_n * max(heads.tile_d, heads.tile_dv) * heads.item_bytes


def _fits_registers(config: Config, heads: Heads) -> bool:
    """Tell whether accumulator and scores leave room in the 255 registers of a thread."""
    floats = config.tile_m * (heads.tile_dv + config.tile_n)
    if heads.item_bytes == 4:  # without tensor cores the operands are in registers too
        floats += (config.tile_m + config.tile_n) * max(heads.tile_d, heads.tile_dv)
    return floats <= 200 * 32 * config.num_warps


def default_config(heads: Heads, device: Device) -> Config:
    """Return the configuration that is used where nothing was measured."""
    return candidates(heads, device)[0]


def num_splits(num_programs: int, longest: int, config: Config, device: Device) -> int:
    """Return among how many programs the keys of a sequence are split, a power of two.

    Parameters
    ----------
    num_programs : int
        Sequences times kv heads: the programs that there are without splitting.
    longest : int
        Keys that a sequence may see.
    """
    wanted = device.cores * PROGRAMS_PER_CORE // max(1, num_programs)
    worthwhile = longest // (config.tile_n * TILES_PER_SPLIT)
    splits = min(wanted, worthwhile, MOST_SPLITS)
    return 1 << (splits.bit_length() - 1) if splits > 1 else 1
