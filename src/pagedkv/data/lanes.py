# mypy: ignore-errors
"""Sixteen float32 numbers as one Numba value, so that a kernel says itself what runs side by side.

LLVM's own vectoriser gives up where several rows are written at once, or makes a reduction of every dot product. Here
one value is one AVX-512 register (two of AVX2, four of NEON), and the few functions below are all that the kernels do
with it. bfloat16 and float16 have no NumPy type that Numba knows: they come as their bit patterns, **uint16 for
bfloat16 and int16 for float16**, and are widened as they are loaded.

Indices are trusted: nothing checks them and nothing wraps around. With ``NUMBA_DISABLE_JIT=1`` every function here is
replaced by its twin in :mod:`pagedkv.data.lanes_python`, over NumPy arrays.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

__all__ = [
    "LANES",
    "add",
    "any_greater",
    "exp2",
    "fetch_add",
    "finite_or_zero",
    "fma",
    "load",
    "load_part",
    "maximum",
    "maximum_by_row",
    "mul",
    "narrowed",
    "prefetch",
    "splat",
    "store",
    "store_half",
    "sub",
    "sum_by_row",
    "sums",
    "tanh",
    "zeros",
]

LANES = 16
ROWS = 4
"""Query rows that are worked on together; lane ``i`` belongs to row ``i % ROWS`` where lanes hold scores."""

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_VECTOR, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)


class LanesType(types.Type):
    """The Numba type."""

    def __init__(self):
        super().__init__(name="Lanes")


@register_model(LanesType)
class LanesModel(models.PrimitiveModel):
    """One LLVM vector."""

    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, _VECTOR)


lanes = LanesType()


def _all(number):
    return ir.Constant(_VECTOR, [number] * LANES)


def _all_ints(number):
    return ir.Constant(_INTS, [number] * LANES)


def _llvm(builder, name, *args):
    """Call an LLVM intrinsic whose arguments and result are vectors."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32"), args)


def _shuffled(builder, x, y, order):
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_INT, len(order)), list(order)))


def _spread(builder, scalar, kind):
    """Return a vector of one number."""
    undefined = ir.Constant(kind, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, scalar, _INT(0)), undefined, _all_ints(0))


def _greater_of(builder, x, y):
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _address(context, builder, signature, args):
    """Return the address of ``array[index]``; array and index are the first two arguments."""
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.gep(array.data, [args[1]], inbounds=True)


def _widened(builder, bits, dtype):
    if dtype == types.float32:
        return bits
    if dtype == types.uint16:
        return builder.bitcast(builder.shl(builder.zext(bits, _INTS), _all_ints(16)), _VECTOR)
    return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), LANES)), _VECTOR)


def _item_bytes(dtype):
    return dtype.bitwidth // 8


@intrinsic
def load(typing, array, index):
    """Return ``array[index : index + LANES]`` as float32."""

    def generate(context, builder, signature, args):
        kind = ir.VectorType(context.get_data_type(array.dtype), LANES)
        bits = builder.load(builder.bitcast(_address(context, builder, signature, args), kind.as_pointer()))
        bits.align = _item_bytes(array.dtype)
        return _widened(builder, bits, array.dtype)

    return lanes(array, types.int64), generate


@intrinsic
def load_part(typing, array, index, count):
    """Return ``array[index : index + count]`` and zeros behind; nothing else is read."""

    def generate(context, builder, signature, args):
        kind = ir.VectorType(context.get_data_type(array.dtype), LANES)
        pointer = builder.bitcast(_address(context, builder, signature, args), kind.as_pointer())
        count = _spread(builder, builder.trunc(args[2], _INT), _INTS)
        mask = builder.icmp_unsigned("<", ir.Constant(_INTS, list(range(LANES))), count)
        name = f"llvm.masked.load.v{LANES}{'f32' if array.dtype == types.float32 else 'i16'}.p0"
        signature = ir.FunctionType(kind, [pointer.type, _INT, mask.type, kind])
        function = cgutils.get_or_insert_function(builder.module, signature, name)
        bits = builder.call(function, [pointer, _INT(_item_bytes(array.dtype)), mask, ir.Constant(kind, None)])
        return _widened(builder, bits, array.dtype)

    return lanes(array, types.int64, types.int64), generate


def _stored(builder, vector, address):
    builder.store(vector, builder.bitcast(address, vector.type.as_pointer())).align = 4


@intrinsic
def store(typing, array, index, value):
    """Write all lanes to ``array[index:]``, float32."""

    def generate(context, builder, signature, args):
        _stored(builder, args[2], _address(context, builder, signature, args))
        return context.get_dummy_value()

    return types.void(array, types.int64, lanes), generate


@intrinsic
def store_half(typing, array, index, value):
    """Write the first eight lanes to ``array[index:]``, float32."""

    def generate(context, builder, signature, args):
        half = _shuffled(builder, args[2], args[2], range(8))
        _stored(builder, half, _address(context, builder, signature, args))
        return context.get_dummy_value()

    return types.void(array, types.int64, lanes), generate


@intrinsic
def prefetch(typing, array, index):
    """Ask for the cache line of ``array[index]``, which may lie anywhere."""

    def generate(context, builder, signature, args):
        pointer = builder.bitcast(_address(context, builder, signature, args), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _INT, _INT, _INT])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, _INT(0), _INT(3), _INT(1)])  # to read, keep in all levels, data
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@intrinsic
def zeros(typing):
    """Return zeros."""
    return lanes(), lambda context, builder, signature, args: _all(0.0)


@intrinsic
def splat(typing, number):
    """Return one float32 in every lane."""
    return lanes(types.float32), lambda context, builder, signature, args: _spread(builder, args[0], _VECTOR)


@intrinsic
def fma(typing, x, y, z):
    """Return ``x * y + z``, rounded once."""
    return lanes(lanes, lanes, lanes), lambda context, builder, signature, args: _llvm(builder, "fma", *args)


@intrinsic
def add(typing, x, y):
    """Return ``x + y``."""
    return lanes(lanes, lanes), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic
def sub(typing, x, y):
    """Return ``x - y``."""
    return lanes(lanes, lanes), lambda context, builder, signature, args: builder.fsub(*args)


@intrinsic
def mul(typing, x, y):
    """Return ``x * y``."""
    return lanes(lanes, lanes), lambda context, builder, signature, args: builder.fmul(*args)


@intrinsic
def maximum(typing, x, y):
    """Return the greater of each; ``y`` where ``x`` is NaN."""
    return lanes(lanes, lanes), lambda context, builder, signature, args: _greater_of(builder, *args)


@intrinsic
def finite_or_zero(typing, x):
    """Return x, with 0 in place of -inf."""

    def generate(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered("==", args[0], _all(-math.inf)), _all(0.0), args[0])

    return lanes(lanes), generate


@intrinsic
def any_greater(typing, x, y):
    """Tell whether any lane of x is greater than that of y."""

    def generate(context, builder, signature, args):
        bits = builder.bitcast(builder.fcmp_ordered(">", *args), ir.IntType(LANES))
        return builder.icmp_unsigned("!=", bits, ir.IntType(LANES)(0))

    return types.boolean(lanes, lanes), generate


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
    low = _all(-126.0)
    bounded = builder.select(builder.fcmp_ordered(">", x, low), x, low)
    whole = _llvm(builder, "floor", builder.fadd(bounded, _all(0.5)))
    rest = builder.fsub(bounded, whole)
    result = _all(_TAYLOR[-1])
    for coefficient in _TAYLOR[-2::-1]:
        result = _llvm(builder, "fma", result, rest, _all(coefficient))
    exponent = builder.shl(builder.fptosi(whole, _INTS), _all_ints(23))
    result = builder.bitcast(builder.add(builder.bitcast(result, _INTS), exponent), _VECTOR)
    result = builder.select(builder.fcmp_ordered("<", x, low), _all(0.0), result)
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
        small = _all(_TANH[-1])
        for coefficient in _TANH[-2::-1]:
            small = _llvm(builder, "fma", small, square, _all(coefficient))
        small = _llvm(builder, "fma", builder.fmul(small, square), x, x)
        size = _llvm(builder, "fabs", x)
        power = _exp2(builder, builder.fmul(size, _all(-2.0 / math.log(2))))
        large = builder.fdiv(builder.fsub(_all(1.0), power), builder.fadd(_all(1.0), power))
        large = _llvm(builder, "copysign", large, x)
        return builder.select(builder.fcmp_unordered("<", size, _all(_SMALL)), small, large)

    return lanes(lanes), generate


@intrinsic
def narrowed(typing, number, array):
    """Return a float32 as an element of ``array``: itself, or the bits of the nearest bfloat16 or float16."""

    def generate(context, builder, signature, args):
        number, short = args[0], ir.IntType(16)
        if array.dtype == types.float32:
            return number
        if array.dtype == types.int16:
            return builder.bitcast(builder.fptrunc(number, ir.HalfType()), short)
        bits = builder.bitcast(number, _INT)
        high = builder.lshr(bits, _INT(16))
        nearest = builder.add(builder.add(bits, _INT(0x7FFF)), builder.and_(high, _INT(1)))  # ties to even
        high = builder.select(
            builder.fcmp_unordered("uno", number, number), _INT(0x7FC0), builder.lshr(nearest, _INT(16))
        )
        return builder.trunc(high, short)

    return array.dtype(types.float32, array), generate


@intrinsic
def fetch_add(typing, counters, index, amount):
    """Add to ``counters[index]`` as one step for all threads and return what it was.

    What a thread wrote before is seen by every thread that adds later.
    """

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", _address(context, builder, signature, args), args[2], "acq_rel")

    return types.int64(counters, types.int64, types.int64), generate


if numba.config.DISABLE_JIT:
    from pagedkv.data.lanes_python import *  # noqa: F403
