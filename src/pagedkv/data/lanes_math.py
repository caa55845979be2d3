# mypy: ignore-errors
"""Lanes as LLVM vectors: what combines lanes, and functions of them."""

from __future__ import annotations

import math

import numpy as np
from numba.extending import intrinsic

from pagedkv.data.simd_llvm import INTS, VECTOR, _every, _every_int, _greater_of, _shuffled, lanes, llvm
from pagedkv.data.simd_python import LANES, ROWS

__all__ = [
    "exp2",
    "maximum_by_row",
    "sum_by_row",
    "sums",
    "tanh",
]


def _pair_sums(builder, x, y):
    """Return the sums of neighbours: those of x in the first half, those of y in the second."""
    evens = _shuffled(builder, x, y, range(0, 2 * LANES, 2))
    odds = _shuffled(builder, x, y, range(1, 2 * LANES, 2))
    return builder.fadd(evens, odds)


@intrinsic
def sums(typing, a, b, c, d, e, f, g, h):
    """Return the sum over all lanes of each of eight values, in the first eight lanes."""

    def generate(context, builder, signature, args):
        parts = list(args)
        while len(parts) > 1:
            parts = [_pair_sums(builder, *pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
        return _pair_sums(builder, parts[0], parts[0])

    return lanes(*[lanes] * 8), generate


def _by_row(builder, x, combine):
    """Combine all lanes of one row; each of them gets the result."""
    step = ROWS
    while step < LANES:
        x = combine(x, _shuffled(builder, x, x, [(i + step) % LANES for i in range(LANES)]))
        step *= 2
    return x


@intrinsic
def maximum_by_row(typing, x):
    """Return the maximum of each row in all of the row's lanes."""

    def generate(context, builder, signature, args):
        return _by_row(builder, args[0], lambda x, y: _greater_of(builder, x, y))

    return lanes(lanes), generate


@intrinsic
def sum_by_row(typing, x):
    """Return the sum of each row in all of the row's lanes."""
    return lanes(lanes), lambda context, builder, signature, args: _by_row(builder, args[0], builder.fadd)


def _exp2(builder, x):
    """2 ** x for x <= 0: the Taylor series over -½ … ½, then the exponent's bits. Below 2 ** -126 it is 0."""
    low = _every(-126.0)
    bounded = builder.select(builder.fcmp_ordered(">", x, low), x, low)
    whole = llvm(builder, "floor", builder.fadd(bounded, _every(0.5)))
    rest = builder.fsub(bounded, whole)
    result = _every(_TAYLOR[-1])
    for coefficient in _TAYLOR[-2::-1]:
        result = llvm(builder, "fma", result, rest, _every(coefficient))
    exponent = builder.shl(builder.fptosi(whole, INTS), _every_int(23))
    result = builder.bitcast(builder.add(builder.bitcast(result, INTS), exponent), VECTOR)
    result = builder.select(builder.fcmp_ordered("<", x, low), _every(0.0), result)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, result)


_TAYLOR = [float(np.float32(math.log(2) ** k / math.factorial(k))) for k in range(8)]
_SMALL = 0.625


def _fitted_tanh():
    """Return c with tanh(x) = x + x³(c₀ + c₁x² + …) for |x| <= _SMALL: the other formula would lose digits there."""
    squares = (np.polynomial.chebyshev.chebpts1(64) + 1) / 2 * _SMALL**2
    x = np.sqrt(squares)
    fit = np.polynomial.Polynomial.fit(squares, (np.tanh(x) / x - 1) / squares, 5)
    return [float(np.float32(c)) for c in fit.convert().coef]


_TANH = _fitted_tanh()


@intrinsic
def exp2(typing, x):
    """Return 2 ** x for x <= 0, to float32's precision."""
    return lanes(lanes), lambda context, builder, signature, args: _exp2(builder, args[0])


@intrinsic
def tanh(typing, x):
    """Return tanh(x), to float32's precision."""

    def generate(context, builder, signature, args):
        x = args[0]
        square = builder.fmul(x, x)
        small = _every(_TANH[-1])
        for coefficient in _TANH[-2::-1]:
            small = llvm(builder, "fma", small, square, _every(coefficient))
        small = llvm(builder, "fma", builder.fmul(small, square), x, x)
        size = llvm(builder, "fabs", x)
        power = _exp2(builder, builder.fmul(size, _every(-2.0 / math.log(2))))
        large = builder.fdiv(builder.fsub(_every(1.0), power), builder.fadd(_every(1.0), power))
        large = llvm(builder, "copysign", large, x)
        return builder.select(builder.fcmp_unordered("<", size, _every(_SMALL)), small, large)

    return lanes(lanes), generate
