"""Random numbers that are the same everywhere: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) and a few distributions.

The state is a uint64 array of one element.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagedkv.jit import compiled

__all__ = ["exponential", "lognormal", "mix", "normal_of", "popular", "uniform", "uniform_of"]

State = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT_30, _SHIFT_27, _SHIFT_31, _SHIFT_12 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(12)


@compiled
def mix(bits: np.uint64, more: np.uint64) -> np.uint64:
    """Return 64 well-mixed bits that stand for a pair."""
    bits = (bits ^ more) + _GAMMA
    bits = (bits ^ (bits >> _SHIFT_30)) * _FIRST
    bits = (bits ^ (bits >> _SHIFT_27)) * _SECOND
    return bits ^ (bits >> _SHIFT_31)


@compiled
def uniform_of(bits: np.uint64) -> float:
    """Turn random bits into a number within (0, 1), the ends left out."""
    return (float(bits >> _SHIFT_12) + 0.5) * 2.0**-52


@compiled
def normal_of(bits: np.uint64) -> float:
    """Turn random bits into a standard normal number (Box and Muller)."""
    angle = 2.0 * np.pi * uniform_of(mix(bits, _GAMMA))
    return float(np.sqrt(-2.0 * np.log(uniform_of(bits))) * np.cos(angle))


@compiled
def _bits(state: State) -> np.uint64:
    state[0] += _GAMMA
    return mix(state[0], _SECOND)


@compiled
def uniform(state: State) -> float:
    """Draw from (0, 1)."""
    return uniform_of(_bits(state))


@compiled
def exponential(state: State, mean: float) -> float:
    """Draw a waiting time."""
    return float(-mean * np.log(uniform(state)))


@compiled
def lognormal(state: State, median: float, spread: float) -> float:
    """Draw from the log-normal distribution; `spread` is the standard deviation of the logarithm."""
    return float(median * np.exp(spread * normal_of(_bits(state))))


@compiled
def popular(state: State, count: int, exponent: float) -> int:
    """Draw one of 0 … count − 1 with a probability of about (i + 1) ** −exponent: the power law, made continuous."""
    u = uniform(state)
    if abs(exponent - 1.0) < 1e-9:
        place = (count + 1.0) ** u
    else:
        place = ((((count + 1.0) ** (1.0 - exponent)) - 1.0) * u + 1.0) ** (1.0 / (1.0 - exponent))
    return min(int(place) - 1, count - 1)
