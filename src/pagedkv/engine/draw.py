"""Kernels of the sampler: random numbers by counter, and one draw a row among the tokens that are kept.

Nothing is sorted but a few tokens. A histogram over the logits finds the bin in which the k-th token, or the token
that completes the probability `top_p`, must lie; only the tokens of this bin are put in order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagedkv.jit import compiled

__all__ = ["draw", "nucleus", "uniforms"]

BINS = 2048
WIDEST = 64.0  # a token that is e**-64 less likely shares the last bin with all that are less likely still
NARROWEST = 1e-6
GOLDEN = 0x9E3779B97F4A7C15

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def _mixed(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators")."""
    state = state + np.uint64(GOLDEN)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def uniforms(seeds: npt.NDArray[np.uint64], choices: Ints, positions: Ints) -> Doubles:
    """Return one number in [0, 1) a row, a function of its seed, choice and position alone; float64 [n]."""
    state = _mixed(_mixed(_mixed(seeds) ^ choices.astype(np.uint64)) ^ positions.astype(np.uint64))
    numbers: Doubles = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


@compiled
def _bin_of(logit: float, highest: float, scale: float) -> int:
    place = (highest - logit) * scale
    return BINS - 1 if place >= BINS - 1 else int(place)


@compiled
def _members(
    which: int,
    count: int,
    logits: Floats,
    bits: npt.NDArray[np.int32],
    masses: Floats,
    highest: float,
    scale: float,
    min_p: float,
) -> Ints:
    """Return the tokens of one bin, the likeliest first, of equals the lowest id."""
    keys = np.empty(count, np.int64)
    found = 0
    for token in range(len(logits)):
        logit = np.float64(logits[token])
        if masses[token] >= min_p and logit > -np.inf and _bin_of(logit, highest, scale) == which:
            pattern = np.int64(bits[token])
            ordered = pattern if pattern >= 0 else -(pattern & 0x7FFFFFFF)
            keys[found] = (-ordered << 32) | token
            found += 1
    keys.sort()
    return keys & 0xFFFFFFFF


@compiled
def nucleus(
    logits: Floats,
    bits: npt.NDArray[np.int32],
    masses: Floats,
    highest: float,
    lowest: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[float, int]:
    """Return the least likely token that may still be drawn, as its logit and id: what is kept lies above, or equals
    the logit with an id that is no higher.

    min-p comes first, then top-k, then top-p over what these two left: vLLM's order.

    Parameters
    ----------
    logits : float32 [vocab]
        After the temperature or before, without NaN; -inf are tokens that must not be drawn.
    bits : int32 [vocab]
        The same memory, as bit patterns.
    masses : float32 [vocab]
        exp((logits - highest) / temperature).
    highest, lowest : float
        Of the logits.
    top_k : int
        0 keeps all.
    top_p, min_p : float
        1 and 0 keep all.
    """
    scale = BINS / min(max(highest - lowest, NARROWEST), WIDEST)
    counts, weights = np.zeros(BINS, np.int64), np.zeros(BINS)
    for token in range(len(logits)):
        logit = np.float64(logits[token])
        if masses[token] >= min_p and logit > -np.inf:
            place = _bin_of(logit, highest, scale)
            counts[place] += 1
            weights[place] += masses[token]
    floor, last, total, kept = -np.inf, len(logits), 0.0, 0
    for place in range(BINS):
        if top_k > 0 and kept + counts[place] >= top_k:
            members = _members(place, counts[place], logits, bits, masses, highest, scale, min_p)
            for token in members[: top_k - kept]:
                total += masses[token]
                floor, last = np.float64(logits[token]), token
            break
        kept += counts[place]
        total += weights[place]
    if top_p >= 1:
        return floor, last
    goal, reached = top_p * total, 0.0
    for place in range(BINS):
        if counts[place] > 0 and reached + weights[place] >= goal:
            members = _members(place, counts[place], logits, bits, masses, highest, scale, min_p)
            for token in members:
                reached += masses[token]
                if reached >= goal or token == last:
                    return np.float64(logits[token]), token
        else:
            reached += weights[place]
    return floor, last


@compiled
def _pick(logits: Floats, masses: Floats, floor: float, last: int, min_p: float, uniform: float) -> int:
    """Invert the cumulative distribution of what is kept, in the order of the ids."""
    total = 0.0
    for token in range(len(logits)):
        if masses[token] >= min_p and (logits[token] > floor or (logits[token] == floor and token <= last)):
            total += masses[token]
    goal, reached, picked = uniform * total, 0.0, 0
    for token in range(len(logits)):
        if masses[token] >= min_p and (logits[token] > floor or (logits[token] == floor and token <= last)):
            if masses[token] > 0:
                reached += masses[token]
                picked = token
                if reached > goal:
                    break
    return picked


@compiled
def draw(
    logits: Floats,
    bits: npt.NDArray[np.int32],
    masses: Floats,
    extremes: Doubles,
    top_k: Ints,
    top_p: Doubles,
    min_p: Doubles,
    numbers: Doubles,
    tokens: Ints,
) -> None:
    """Draw one token a row into ``tokens``: the arguments of :func:`nucleus` for n rows, [n, vocab] and [n].

    ``extremes`` float64 [n, 2] are highest and lowest logits, ``numbers`` float64 [n] in [0, 1) decide.
    """
    for row in range(len(tokens)):
        floor, last = -np.inf, logits.shape[1]
        if top_k[row] > 0 or top_p[row] < 1:
            floor, last = nucleus(
                logits[row],
                bits[row],
                masses[row],
                extremes[row, 0],
                extremes[row, 1],
                top_k[row],
                top_p[row],
                min_p[row],
            )
        tokens[row] = _pick(logits[row], masses[row], floor, last, min_p[row], numbers[row])
