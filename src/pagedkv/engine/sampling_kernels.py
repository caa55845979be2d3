"""Kernels of the sampler: random numbers by counter, and one draw a row among the tokens that are kept.

Nothing is sorted but a few tokens. A histogram over the logits finds the bin in which the k-th token, or the token
that completes the probability `top_p`, must lie; only the tokens of this bin are put in order. Each row is worked on
by itself, with the same operations in the same order wherever it stands: no bit of it depends on the batch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagedkv.jit import compiled, mix64

BINS = 2048
WIDEST = 64.0  # tokens further than this below the highest logit share the last bin
NARROWEST = 1e-6
BLOCK = 256  # tokens that are compared at once
LANES = 8  # sums that run side by side
BITS = 32  # of a word of a mask
GOLDEN = 0x9E3779B97F4A7C15

# exp(x) = 2**k * polynomial(x - k ln 2), as Moshier's Cephes library has it for float32.
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
ROUNDING = np.float32(1.5 * 2**23)  # adding and subtracting it rounds to an integer
C0, C1, C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
C3, C4, C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
ONE = np.float32(1)
FAR = np.float32(-200)
SMALLEST_EXPONENT = -125  # what is less likely counts as impossible

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.int32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def _mixed(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """One step of SplitMix64 (Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators")."""
    return mix64(state + np.uint64(GOLDEN))


def uniforms(seeds: npt.NDArray[np.uint64], choices: Ints, positions: Ints) -> Doubles:
    """Return one number in [0, 1) a row, a function of its seed, choice and position alone; float64 [n]."""
    state = _mixed(_mixed(_mixed(seeds) ^ choices.astype(np.uint64)) ^ positions.astype(np.uint64))
    numbers: Doubles = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


@compiled
def weigh(
    logits: Floats, highest: np.float32, heat: np.float32, min_p: float, masses: Floats, bits: Words, exponents: Words
) -> None:
    """Set ``masses`` to exp((logits - highest) / heat), 0 below 2**-125 and below ``min_p``; float32 [vocab] each.

    Every loop is one that the compiler turns into vector instructions. ``bits`` is the memory of the masses as int32,
    ``exponents`` int32 [vocab] is scratch.
    """
    for token in range(len(logits)):
        x = (logits[token] - highest) / heat
        x = x if x > FAR else FAR
        k = (x * LOG2_E + ROUNDING) - ROUNDING
        r = (x - k * LN2_HIGH) - k * LN2_LOW
        masses[token] = (((((C0 * r + C1) * r + C2) * r + C3) * r + C4) * r + C5) * (r * r) + r + ONE
        exponents[token] = np.int32(k)
    for token in range(len(logits)):
        exponent = exponents[token]
        bits[token] = bits[token] + (exponent << 23) if exponent >= SMALLEST_EXPONENT else 0
    if min_p > 0:
        for token in range(len(logits)):
            masses[token] = masses[token] if masses[token] >= min_p else 0


@compiled
def _sorted_members(which: int, count: int, places: Words, patterns: Words) -> Ints:
    """Return the tokens of one bin, the likeliest first, of equals the lowest id."""
    keys = np.empty(count, np.int64)
    found = 0
    for token in range(len(places)):
        if places[token] == which:
            pattern = np.int64(patterns[token])
            ordered = pattern if pattern >= 0 else -(pattern & 0x7FFFFFFF)
            keys[found] = (-ordered << 32) | token
            found += 1
    keys.sort()
    return keys & 0xFFFFFFFF


@compiled
def nucleus(
    logits: Floats,
    patterns: Words,
    masses: Floats,
    highest: np.float32,
    lowest: np.float32,
    top_k: int,
    top_p: float,
    places: Words,
) -> tuple[np.float32, int]:
    """Return the least likely token that may still be drawn, as its logit and id: what is kept lies above, or equals
    the logit with an id that is no higher.

    Parameters
    ----------
    logits : float32 [vocab]
        Without NaN and +inf.
    patterns : int32 [vocab]
        The same memory, as bit patterns.
    masses : float32 [vocab]
        In proportion to the probabilities; tokens with 0 are out already.
    highest, lowest : float32
        Of the logits.
    top_k : int
        0 keeps all.
    top_p : float
        1 keeps all. It is a part of what top-k left.
    places : int32 [vocab]
        Scratch.
    """
    scale = np.float32(BINS / min(max(np.float64(highest) - np.float64(lowest), NARROWEST), WIDEST))
    final = np.float32(BINS - 1)
    for token in range(len(logits)):
        place = (highest - logits[token]) * scale
        place = place if place < final else final
        places[token] = np.int32(place) if masses[token] > 0 else BINS
    counts, weights = np.zeros(BINS, np.int64), np.zeros(BINS)
    for token in range(len(logits)):
        if places[token] < BINS:
            counts[places[token]] += 1
            weights[places[token]] += masses[token]
    floor, last, total, kept = np.float32(-np.inf), len(logits), 0.0, 0
    for place in range(BINS):
        if top_k > 0 and kept + counts[place] >= top_k:
            members = _sorted_members(place, counts[place], places, patterns)
            for token in members[: top_k - kept]:
                total += masses[token]
                floor, last = logits[token], token
            break
        kept += counts[place]
        total += weights[place]
    if top_p >= 1:
        return floor, last
    goal, reached = top_p * total, 0.0
    for place in range(BINS):
        if counts[place] > 0 and reached + weights[place] >= goal:
            members = _sorted_members(place, counts[place], places, patterns)
            for token in members:
                reached += masses[token]
                if reached >= goal or token == last:
                    return logits[token], token
        else:
            reached += weights[place]
    return floor, last


@compiled
def _pick(masses: Floats, uniform: float) -> int:
    """Invert the cumulative distribution: first all tokens whose id is 0 modulo LANES, then 1, and so on."""
    length = len(masses)
    whole = length - length % LANES
    sums = np.zeros(LANES)
    for start in range(0, whole, LANES):
        for lane in range(LANES):
            sums[lane] += masses[start + lane]
    for token in range(whole, length):
        sums[token - whole] += masses[token]
    goal, reached, picked = uniform * sums.sum(), 0.0, 0
    for lane in range(LANES):
        if reached + sums[lane] <= goal and lane < LANES - 1:
            reached += sums[lane]
            continue
        inside = 0.0
        for token in range(lane, length, LANES):
            if masses[token] > 0:
                inside += masses[token]
                picked = token
                if reached + inside > goal:
                    return picked
        reached += sums[lane]
    return picked


@compiled
def draw(
    logits: Floats,
    patterns: Words,
    extremes: Floats,
    heat: Floats,
    top_k: Ints,
    top_p: Doubles,
    min_p: Doubles,
    uniform: Doubles,
    tokens: Ints,
) -> None:
    """Draw one token a row, among what min-p, then top-k, then top-p leave: vLLM's order.

    Parameters
    ----------
    logits : float32 [n, vocab]
        Without NaN and +inf; -inf are tokens that must not be drawn. At least one a row is finite.
    patterns : int32 [n, vocab]
        The same memory, as bit patterns.
    extremes : float32 [n, 2]
        Highest and lowest logits.
    heat : float32 [n]
        Temperatures, above 0.
    top_k : int64 [n]
    top_p, min_p, uniform : float64 [n]
        The last in [0, 1): they decide.
    tokens : int64 [n]
        For the result.
    """
    vocab = logits.shape[1]
    masses, scratch = np.empty(vocab, np.float32), np.empty(vocab, np.int32)
    bits = masses.view(np.int32)
    for row in range(len(tokens)):
        one, highest = logits[row], extremes[row, 0]
        weigh(one, highest, heat[row], min_p[row], masses, bits, scratch)
        if top_k[row] > 0 or top_p[row] < 1:
            lowest = extremes[row, 1]
            floor, last = nucleus(one, patterns[row], masses, highest, lowest, top_k[row], top_p[row], scratch)
            for token in range(vocab):
                kept = one[token] > floor or (one[token] == floor and token <= last)
                masses[token] = masses[token] if kept else 0
        tokens[row] = _pick(masses, uniform[row])


@compiled
def first_of(logits: Floats, values: Floats, tokens: Ints) -> None:
    """Set ``tokens``, int64 [n], to the lowest ids with these values: float32 [n, vocab] and [n]. NaN is nowhere."""
    vocab = logits.shape[1]
    for row in range(len(values)):
        value, tokens[row] = values[row], 0
        for start in range(0, vocab, BLOCK):
            end, found = min(start + BLOCK, vocab), np.int32(0)
            for token in range(start, end):
                found |= np.int32(logits[row, token] == value)
            if found:
                while logits[row, start] != value:
                    start += 1
                tokens[row] = start
                break


SIZE, INFINITY = np.int32(0x7FFFFFFF), np.int32(0x7F800000)  # of a float32: all bits but the sign, and infinity's


@compiled
def _extremes(words: Words) -> tuple[np.int32, np.int32]:
    """Return the highest of some float32, given as bit patterns, and the largest whatever its sign: NaN is largest.

    The highest one is told as its pattern without the sign, which is negated where it has one: these have the order of
    the floats, but that both zeros are equal. Compilers put integers into vectors, but not floats that may be NaN.
    """
    highest, largest = np.int32(-SIZE), np.int32(0)
    for place in range(len(words)):
        word = words[place]
        size = np.int32(word & SIZE)
        highest = max(highest, word if word >= 0 else np.int32(-size))
        largest = max(largest, size)
    return highest, largest


@compiled
def likeliest(logits: Floats, patterns: Words, values: Floats, bits: Words, tokens: Ints) -> bool:
    """Find the highest logit of each row and the lowest id that has it; tells whether all are finite.

    Parameters
    ----------
    logits : float32 [n, vocab]
    patterns : int32 [n, vocab]
        The same memory, as bit patterns.
    values : float32 [n]
        For the highest logits; NaN where a row has one.
    bits : int32 [n]
        The same memory.
    tokens : int64 [n]
        For their ids; 0 where a row has NaN.
    """
    finite = True
    for row in range(len(tokens)):
        highest, largest = _extremes(patterns[row])
        bits[row] = highest if highest >= 0 else np.int32(np.int32(-highest) - SIZE - np.int32(1))
        if largest > INFINITY:
            bits[row] = largest
        finite = finite and bool(largest <= INFINITY and -INFINITY < highest < INFINITY)
    first_of(logits, values, tokens)
    return finite


@compiled
def forbid(logits: Floats, rows: Ints, masks: Words) -> None:
    """Set the logits of tokens that may not come to -inf, in place.

    Parameters
    ----------
    logits : float32 [n, vocab]
    rows : int64 [k]
        Those that have a mask.
    masks : int32 [k, words]
        One bit a token, the lowest first; 1 is a token that may come.
    """
    vocab, never = logits.shape[1], np.float32(-np.inf)
    for place in range(len(rows)):
        one, mask = logits[rows[place]], masks[place]
        for start in range(0, vocab, BITS):
            word, end = mask[start // BITS], min(start + BITS, vocab)
            if word == 0:  # most words are all of one kind
                for token in range(start, end):
                    one[token] = never
            elif word != -1:
                for token in range(start, end):
                    if not (word >> (token - start)) & 1:
                        one[token] = never
