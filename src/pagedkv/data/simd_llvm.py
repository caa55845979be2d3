"""Numba intrinsics of :mod:`pagedkv.data.simd`: sixteen float32 lanes as one LLVM vector."""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

# mypy: ignore-errors

LANES = 16
ROWS = 4
FLOAT, INT = ir.FloatType(), ir.IntType(32)
VECTOR, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)


class LanesType(types.Type):
    """The Numba type."""

    def __init__(self):
        super().__init__(name="Lanes")


@register_model(LanesType)
class LanesModel(models.PrimitiveModel):
    """One LLVM vector."""

    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, VECTOR)


lanes = LanesType()


def _every(number):
    return ir.Constant(VECTOR, [number] * LANES)


def _every_int(number):
    return ir.Constant(INTS, [number] * LANES)


def llvm(builder, name, *args):
    """Call an LLVM intrinsic whose arguments and result are vectors."""
    kind = ir.FunctionType(VECTOR, [VECTOR] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32"), args)


def _shuffled(builder, x, y, order):
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(INT, len(order)), list(order)))


def _spread(builder, scalar, kind):
    """Return a vector of one number."""
    undefined = ir.Constant(kind, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, scalar, INT(0)), undefined, _every_int(0))


def _greater_of(builder, x, y):
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _address(context, builder, signature, args):
    """Return the address of ``array[index]``; array and index are the first two arguments."""
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.gep(array.data, [args[1]], inbounds=True)


def _widened(builder, bits, dtype):
    if dtype == types.float32:
        return bits
    if dtype == types.int8:
        return builder.sitofp(builder.sext(bits, INTS), VECTOR)
    if dtype == types.uint8:
        return _from_e4m3(builder, bits)
    if dtype == types.uint16:
        return builder.bitcast(builder.shl(builder.zext(bits, INTS), _every_int(16)), VECTOR)
    return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), LANES)), VECTOR)


def _from_e4m3(builder, bits):
    """Widen by way of float16, whose exponent has one bit more and is greater by 8; NaN comes out as a number."""
    shorts = ir.VectorType(ir.IntType(16), LANES)
    places = builder.shl(builder.sext(bits, shorts), ir.Constant(shorts, [7] * LANES))
    half = builder.and_(places, ir.Constant(shorts, [0xBFFF] * LANES))  # the sign was extended into the exponent
    half = builder.bitcast(half, ir.VectorType(ir.HalfType(), LANES))
    return builder.fmul(builder.fpext(half, VECTOR), _every(256.0))


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
        count = _spread(builder, builder.trunc(args[2], INT), INTS)
        mask = builder.icmp_unsigned("<", ir.Constant(INTS, list(range(LANES))), count)
        bits = array.dtype.bitwidth
        name = f"llvm.masked.load.v{LANES}{'f32' if bits == 32 else f'i{bits}'}.p0"
        signature = ir.FunctionType(kind, [pointer.type, INT, mask.type, kind])
        function = cgutils.get_or_insert_function(builder.module, signature, name)
        bits = builder.call(function, [pointer, INT(_item_bytes(array.dtype)), mask, ir.Constant(kind, None)])
        return _widened(builder, bits, array.dtype)

    return lanes(array, types.int64, types.int64), generate


@intrinsic
def spread(typing, array, index):
    """Return ``array[index : index + LANES / ROWS]``, float32, each number in the lanes of all rows."""

    def generate(context, builder, signature, args):
        kind = ir.VectorType(FLOAT, LANES // ROWS)
        some = builder.load(builder.bitcast(_address(context, builder, signature, args), kind.as_pointer()))
        some.align = _item_bytes(array.dtype)
        return _shuffled(builder, some, some, [lane // ROWS for lane in range(LANES)])

    return lanes(array, types.int64), generate


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
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, INT, INT, INT])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, INT(0), INT(3), INT(1)])  # to read, keep in all levels, data
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@intrinsic
def zeros(typing):
    """Return zeros."""
    return lanes(), lambda context, builder, signature, args: _every(0.0)


@intrinsic
def splat(typing, number):
    """Return one float32 in every lane."""
    return lanes(types.float32), lambda context, builder, signature, args: _spread(builder, args[0], VECTOR)


@intrinsic
def fma(typing, x, y, z):
    """Return ``x * y + z``, rounded once."""
    return lanes(lanes, lanes, lanes), lambda context, builder, signature, args: llvm(builder, "fma", *args)


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
        return builder.select(builder.fcmp_ordered("==", args[0], _every(-math.inf)), _every(0.0), args[0])

    return lanes(lanes), generate


@intrinsic
def any_greater(typing, x, y):
    """Tell whether any lane of x is greater than that of y."""

    def generate(context, builder, signature, args):
        bits = builder.bitcast(builder.fcmp_ordered(">", *args), ir.IntType(LANES))
        return builder.icmp_unsigned("!=", bits, ir.IntType(LANES)(0))

    return types.boolean(lanes, lanes), generate


@intrinsic
def narrowed(typing, number, array):
    """Return a float32 as an element of ``array``: itself, or the bits of the nearest bfloat16 or float16."""

    def generate(context, builder, signature, args):
        number, short = args[0], ir.IntType(16)
        if array.dtype == types.float32:
            return number
        if array.dtype == types.int16:
            return builder.bitcast(builder.fptrunc(number, ir.HalfType()), short)
        bits = builder.bitcast(number, INT)
        high = builder.lshr(bits, INT(16))
        nearest = builder.add(builder.add(bits, INT(0x7FFF)), builder.and_(high, INT(1)))  # ties to even
        high = builder.select(
            builder.fcmp_unordered("uno", number, number), INT(0x7FC0), builder.lshr(nearest, INT(16))
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


# What combines lanes, and functions of them.


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
