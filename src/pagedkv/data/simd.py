"""SIMD vectors: sixteen float32 numbers as one Numba value, so that a kernel says itself what runs side by side.

LLVM's own vectoriser gives up where several rows are written at once, or makes a reduction of every dot product. Here
one value is one AVX-512 register (two of AVX2, four of NEON), and the few functions below are all that the kernels do
with it. bfloat16, float16 and float8_e4m3fn have no NumPy type that Numba knows: they come as their bit patterns,
**uint16 for bfloat16, int16 for float16 and uint8 for float8_e4m3fn**, and are widened as they are loaded, as int8 is.

Indices are trusted: nothing checks them and nothing wraps around. The bodies of the functions are plain Python over
NumPy arrays, for ``NUMBA_DISABLE_JIT=1``: slow, and the same. Compiled, each is what its decorator builds of LLVM.
"""

from __future__ import annotations

import inspect
import math
import platform
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import llvmlite.binding  # type: ignore[import-untyped]
import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

Lanes = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., Any])
Build = Callable[..., Any]

LANES = 16
ROWS = 4
"""Query rows that are worked on together; lane ``i`` belongs to row ``i % ROWS`` where lanes hold scores."""

FLOAT, HALF, INT, SHORT = ir.FloatType(), ir.HalfType(), ir.IntType(32), ir.IntType(16)
VECTOR, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)
HALVES, SHORTS = ir.VectorType(HALF, LANES), ir.VectorType(SHORT, LANES)


class LanesType(types.Type):
    """The Numba type."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, VECTOR)


lanes = LanesType()


# How a function is compiled.


def _typed(typing: Callable[..., Any]) -> Callable[[Function], Function]:
    """Make a function the intrinsic of the signature and code that `typing` gives for the types of its arguments."""

    def replace(plain: Function) -> Function:
        if numba.config.DISABLE_JIT:
            return plain

        def define(context: Any, *kinds: Any) -> Any:
            return typing(*kinds)

        names = ["context", *inspect.signature(plain).parameters]
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        define.__signature__ = inspect.Signature(parameters)
        define.__name__, define.__doc__ = plain.__name__, plain.__doc__
        return intrinsic(define)  # type: ignore[return-value]

    return replace


def _of_lanes(build: Build, result: Any = lanes) -> Callable[[Function], Function]:
    """Compile a function of lanes to ``build(builder, *values)``."""
    return _typed(
        lambda *kinds: (
            result(*[lanes] * len(kinds)),
            lambda context, builder, signature, args: build(builder, *args),
        )
    )


def _at_index(build: Build, result: Any, *others: Any) -> Callable[[Function], Function]:
    """Compile a function of an array, an index and more to ``build(builder, dtype, address, *more)``."""

    def typing(array: Any, *_: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = context.make_array(array)(context, builder, args[0]).data
            built = build(builder, array.dtype, builder.gep(data, [args[1]], inbounds=True), *args[2:])
            return context.get_dummy_value() if result == types.void else built

        return result(array, types.int64, *others), generate

    return _typed(typing)


# What is built of LLVM.


def _has(feature: str) -> bool:
    """Tell whether the processor that Numba compiles for has a feature, by LLVM's name."""
    features = numba.config.CPU_FEATURES
    if features is None and not numba.config.CPU_NAME:
        return bool(llvmlite.binding.get_host_cpu_features().get(feature))
    return f"+{feature}" in (features or "").split(",")


def _every(number: float) -> Any:
    return ir.Constant(VECTOR, [number] * LANES)


def _every_int(number: int, kind: Any = INTS) -> Any:
    return ir.Constant(kind, [number] * kind.count)


def _llvm(builder: Any, name: str, *args: Any) -> Any:
    """Call an LLVM intrinsic whose arguments and result are vectors."""
    kind = ir.FunctionType(VECTOR, [VECTOR] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32"), args)


def _shuffled(builder: Any, x: Any, y: Any, order: Any) -> Any:
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(INT, len(order)), list(order)))


def _spread(builder: Any, scalar: Any, kind: Any) -> Any:
    """Return a vector of one number."""
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, scalar, INT(0))
    return builder.shuffle_vector(first, undefined, _every_int(0, ir.VectorType(INT, kind.count)))


def _greater_of(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _widened_bits(builder: Any, bits: Any, dtype: Any) -> Any:
    if dtype == types.float32:
        return bits
    if dtype == types.int8:
        return builder.sitofp(builder.sext(bits, INTS), VECTOR)
    if dtype == types.uint8:
        return _from_e4m3(builder, bits)
    if dtype == types.uint16:
        return builder.bitcast(builder.shl(builder.zext(bits, INTS), _every_int(16)), VECTOR)
    return builder.fpext(builder.bitcast(bits, HALVES), VECTOR)


def _from_e4m3(builder: Any, bits: Any) -> Any:
    """Widen by way of float16, whose exponent has one bit more and is greater by 8; NaN comes out as a number."""
    places = builder.shl(builder.sext(bits, SHORTS), _every_int(7, SHORTS))
    half = builder.and_(places, _every_int(0xBFFF, SHORTS))  # the sign was extended into the exponent
    return builder.fmul(builder.fpext(builder.bitcast(half, HALVES), VECTOR), _every(256.0))


def _vector_at(builder: Any, address: Any, count: int) -> Any:
    return builder.bitcast(address, ir.VectorType(address.type.pointee, count).as_pointer())


def _read(builder: Any, dtype: Any, address: Any, count: int) -> Any:
    bits = builder.load(_vector_at(builder, address, count))
    bits.align = dtype.bitwidth // 8
    return bits


def _read_part(builder: Any, dtype: Any, address: Any, count: Any, size: int = LANES) -> Any:
    """Return the first `count` numbers and zeros behind, `size` of them; nothing else is read."""
    pointer = _vector_at(builder, address, size)
    kind, width, places = pointer.type.pointee, dtype.bitwidth, ir.VectorType(INT, size)
    limit = _spread(builder, builder.trunc(count, INT), places)
    mask = builder.icmp_unsigned("<", ir.Constant(places, list(range(size))), limit)
    name = f"llvm.masked.load.v{size}{'f32' if width == 32 else f'i{width}'}.p0"
    signature = ir.FunctionType(kind, [pointer.type, INT, mask.type, kind])
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, [pointer, INT(width // 8), mask, ir.Constant(kind, None)])


def _write(builder: Any, address: Any, vector: Any) -> None:
    builder.store(vector, builder.bitcast(address, vector.type.as_pointer())).align = 4


def _prefetch(builder: Any, dtype: Any, address: Any) -> None:
    pointer = builder.bitcast(address, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, INT, INT, INT])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, INT(0), INT(3), INT(1)])  # to read, keep in all levels, data


def _load_count(builder: Any, dtype: Any, address: Any) -> Any:
    return builder.load_atomic(address, "acquire", dtype.bitwidth // 8)


_PAUSE = {
    "x86_64": ("llvm.x86.sse2.pause", []),
    "amd64": ("llvm.x86.sse2.pause", []),
    "aarch64": ("llvm.aarch64.hint", [INT(1)]),
    "arm64": ("llvm.aarch64.hint", [INT(1)]),
}
"""How a processor is told that a loop only waits, by the name of its kind."""
_GIVE_WAY = "SwitchToThread" if sys.platform == "win32" else "sched_yield"


def _nothing_but(build: Build) -> Callable[[Function], Function]:
    """Compile a function without arguments and result to ``build(builder)``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        build(builder)
        return context.get_dummy_value()

    return _typed(lambda: (types.void(), generate))


def _pause(builder: Any) -> None:
    if platform.machine().lower() in _PAUSE:
        name, args = _PAUSE[platform.machine().lower()]
        kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _give_way(builder: Any) -> None:
    kind = ir.FunctionType(INT, [])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, _GIVE_WAY), [])


def _any_greater(builder: Any, x: Any, y: Any) -> Any:
    bits = builder.bitcast(builder.fcmp_ordered(">", x, y), ir.IntType(LANES))
    return builder.icmp_unsigned("!=", bits, ir.IntType(LANES)(0))


def _narrowed_to(builder: Any, dtype: Any, number: Any) -> Any:
    if dtype == types.float32:
        return number
    if dtype == types.int16:
        return builder.bitcast(builder.fptrunc(number, HALF), SHORT)
    bits = builder.bitcast(number, INT)
    high = builder.lshr(bits, INT(16))
    nearest = builder.add(builder.add(bits, INT(0x7FFF)), builder.and_(high, INT(1)))  # ties to even
    is_nan = builder.fcmp_unordered("uno", number, number)
    return builder.trunc(builder.select(is_nan, INT(0x7FC0), builder.lshr(nearest, INT(16))), SHORT)


def _pair_sums(builder: Any, x: Any, y: Any) -> Any:
    """Return the sums of neighbours: those of x in the first half, those of y in the second."""
    evens = _shuffled(builder, x, y, range(0, 2 * LANES, 2))
    odds = _shuffled(builder, x, y, range(1, 2 * LANES, 2))
    return builder.fadd(evens, odds)


def _by_row(builder: Any, x: Any, combine: Build) -> Any:
    """Combine all lanes of one row; each of them gets the result."""
    step = ROWS
    while step < LANES:
        x = combine(x, _shuffled(builder, x, x, [(i + step) % LANES for i in range(LANES)]))
        step *= 2
    return x


def _polynomial(builder: Any, x: Any, coefficients: list[float]) -> Any:
    result = _every(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = _llvm(builder, "fma", result, x, _every(coefficient))
    return result


def _exp2(builder: Any, x: Any) -> Any:
    """2 ** x for x that rounds to no more than 127: a polynomial over -½ … ½, then the exponent."""
    low = _every(-126.0)
    if _has("avx512f"):  # which scales by a power of two, to numbers below 2 ** -126, too
        low = _every(-150.0)
    bounded = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    whole = _llvm(builder, "roundeven", bounded)
    rest = builder.fsub(bounded, whole)
    result = _llvm(builder, "fma", _polynomial(builder, rest, _POWERS), rest, _every(1.0))
    if _has("avx512f"):
        kind = ir.FunctionType(VECTOR, [VECTOR, VECTOR, VECTOR, SHORT, INT])
        scale = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.scalef.ps.512")
        return builder.call(scale, [result, whole, _every(0.0), SHORT(-1), INT(4)])
    exponent = builder.shl(builder.fptosi(whole, INTS), _every_int(23))
    result = builder.bitcast(builder.add(builder.bitcast(result, INTS), exponent), VECTOR)
    result = builder.select(builder.fcmp_ordered("<", x, low), _every(0.0), result)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, result)


def _fitted_powers() -> list[float]:
    """Return c with 2 ** x = 1 + x(c₀ + c₁x + …) for |x| <= ½."""
    x = np.polynomial.chebyshev.chebpts1(64) / 2
    fit = np.polynomial.Polynomial.fit(x, np.expm1(x * math.log(2)) / x, 5)
    return [float(np.float32(c)) for c in fit.convert().coef]


_POWERS = _fitted_powers()
_SMALL = 0.625


def _fitted_tanh() -> list[float]:
    """Return c with tanh(x) = x + x³(c₀ + c₁x² + …) for |x| <= _SMALL: the other formula would lose digits there."""
    squares = (np.polynomial.chebyshev.chebpts1(64) + 1) / 2 * _SMALL**2
    x = np.sqrt(squares)
    fit = np.polynomial.Polynomial.fit(squares, (np.tanh(x) / x - 1) / squares, 5)
    return [float(np.float32(c)) for c in fit.convert().coef]


_TANH = _fitted_tanh()


def _tanh(builder: Any, x: Any) -> Any:
    square = builder.fmul(x, x)
    small = _polynomial(builder, square, _TANH)
    small = _llvm(builder, "fma", builder.fmul(small, square), x, x)
    size = _llvm(builder, "fabs", x)
    power = _exp2(builder, builder.fmul(size, _every(-2.0 / math.log(2))))
    large = builder.fdiv(builder.fsub(_every(1.0), power), builder.fadd(_every(1.0), power))
    large = _llvm(builder, "copysign", large, x)
    return builder.select(builder.fcmp_unordered("<", size, _every(_SMALL)), small, large)


# The functions.


def _widened(bits: Array) -> Lanes:
    if bits.dtype == np.uint16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if bits.dtype == np.int16:
        return bits.view(np.float16).astype(np.float32)
    if bits.dtype == np.int8:
        return bits.astype(np.float32)
    if bits.dtype == np.uint8:
        places = bits.view(np.int8).astype(np.int16) << 7 & ~0x4000
        return places.view(np.float16).astype(np.float32) * np.float32(256)
    return bits.copy()


@_at_index(lambda builder, dtype, at: _widened_bits(builder, _read(builder, dtype, at, LANES), dtype), lanes)
def load(array: Array, index: int) -> Lanes:
    """Return ``array[index : index + LANES]`` as float32."""
    return _widened(array[index : index + LANES])


@_at_index(
    lambda builder, dtype, at, count: _widened_bits(builder, _read_part(builder, dtype, at, count), dtype),
    lanes,
    types.int64,
)
def load_part(array: Array, index: int, count: int) -> Lanes:
    """Return ``array[index : index + count]`` as float32 and zeros behind; nothing else is read."""
    result = np.zeros(LANES, np.float32)
    result[:count] = _widened(array[index : index + count])
    return result


def _read_spread(builder: Any, dtype: Any, address: Any) -> Any:
    some = _read(builder, dtype, address, LANES // ROWS)
    return _shuffled(builder, some, some, [lane // ROWS for lane in range(LANES)])


@_at_index(_read_spread, lanes)
def spread(array: Array, index: int) -> Lanes:
    """Return ``array[index : index + LANES / ROWS]``, float32, each number in the lanes of all rows."""
    return np.repeat(array[index : index + LANES // ROWS], ROWS)


@_at_index(lambda builder, dtype, at, value: _write(builder, at, value), types.void, lanes)
def store(array: Array, index: int, value: Lanes) -> None:
    """Write all lanes to ``array[index:]``, float32."""
    array[index : index + LANES] = value


@_at_index(_prefetch, types.void)
def prefetch(array: Array, index: int) -> None:
    """Ask for the cache line of ``array[index]``, which may lie anywhere."""
    return


@_at_index(lambda builder, dtype, at: _spread(builder, builder.load(at), VECTOR), lanes)
def splat_at(array: Array, index: int) -> Lanes:
    """Return ``array[index]``, float32, in every lane."""
    return np.full(LANES, array[index], np.float32)


@_of_lanes(lambda builder: _every(0.0))
def zeros() -> Lanes:
    """Return zeros."""
    return np.zeros(LANES, np.float32)


@_typed(lambda _: (lanes(types.float32), lambda context, builder, sig, args: _spread(builder, args[0], VECTOR)))
def splat(number: float | np.floating[Any]) -> Lanes:
    """Return one float32 in every lane."""
    return np.full(LANES, number, np.float32)


@_of_lanes(lambda builder, x, y, z: _llvm(builder, "fma", x, y, z))
def fma(x: Lanes, y: Lanes, z: Lanes) -> Lanes:
    """Return ``x * y + z``, rounded once."""
    return (x.astype(np.float64) * y + z).astype(np.float32)


@_of_lanes(lambda builder, x, y: builder.fadd(x, y))
def add(x: Lanes, y: Lanes) -> Lanes:
    """Return ``x + y``."""
    return x + y


@_of_lanes(lambda builder, x, y: builder.fsub(x, y))
def sub(x: Lanes, y: Lanes) -> Lanes:
    """Return ``x - y``."""
    return x - y


@_of_lanes(lambda builder, x, y: builder.fmul(x, y))
def mul(x: Lanes, y: Lanes) -> Lanes:
    """Return ``x * y``."""
    return x * y


@_of_lanes(_greater_of)
def maximum(x: Lanes, y: Lanes) -> Lanes:
    """Return the greater of each; ``y`` where ``x`` is NaN."""
    return np.where(x > y, x, y)


@_of_lanes(lambda builder, x: builder.select(builder.fcmp_ordered("==", x, _every(-math.inf)), _every(0.0), x))
def finite_or_zero(x: Lanes) -> Lanes:
    """Return x, with 0 in place of -inf."""
    return np.where(x == -np.inf, np.float32(0), x)


@_of_lanes(_any_greater, types.boolean)
def any_greater(x: Lanes, y: Lanes) -> bool:
    """Tell whether any lane of x is greater than that of y."""
    return bool((x > y).any())


@_of_lanes(
    lambda builder, x, y, gap: builder.select(builder.fcmp_ordered(">", x, builder.fadd(y, gap)), x, y),
)
def raised(x: Lanes, y: Lanes, gap: Lanes) -> Lanes:
    """Return x where it is greater than ``y + gap``, else y."""
    return np.where(x > y + gap, x, y)


def _seen(builder: Any, x: Any, first: Any, low: Any, high: Any) -> Any:
    token = builder.fadd(first, ir.Constant(VECTOR, [float(lane // ROWS) for lane in range(LANES)]))
    inside = builder.and_(builder.fcmp_ordered(">=", token, low), builder.fcmp_ordered("<", token, high))
    return builder.select(inside, x, _every(-math.inf))


@_of_lanes(_seen)
def seen(x: Lanes, first: Lanes, low: Lanes, high: Lanes) -> Lanes:
    """Return the scores of tokens from ``first`` on that lie in ``low`` … ``high``, and -inf for others."""
    token = first + np.arange(LANES, dtype=np.float32) // ROWS
    return np.where((low <= token) & (token < high), x, np.float32(-np.inf))


@_of_lanes(lambda builder, x: _by_row(builder, x, lambda a, b: _greater_of(builder, a, b)))
def maximum_by_row(x: Lanes) -> Lanes:
    """Return the maximum of each row in all of the row's lanes."""
    return np.tile(np.fmax.reduce(x.reshape(-1, ROWS)), LANES // ROWS)


@_of_lanes(lambda builder, x: _by_row(builder, x, builder.fadd))
def sum_by_row(x: Lanes) -> Lanes:
    """Return the sum of each row in all of the row's lanes."""
    return np.tile(x.reshape(-1, ROWS).sum(axis=0), LANES // ROWS)


@_of_lanes(_exp2)
def exp2(x: Lanes) -> Lanes:
    """Return 2 ** x for x below 127, to float32's precision; below 2 ** -126 it may be 0."""
    return np.exp2(x)


@_of_lanes(_tanh)
def tanh(x: Lanes) -> Lanes:
    """Return tanh(x), to float32's precision."""
    return np.tanh(x)


@_typed(
    lambda number, array: (
        array.dtype(types.float32, array),
        lambda context, builder, signature, args: _narrowed_to(builder, array.dtype, args[0]),
    )
)
def narrowed(number: float | np.floating[Any], array: Array) -> Any:
    """Return a float32 as an element of ``array``: itself, or the bits of the nearest bfloat16 or float16."""
    if array.dtype == np.int16:
        return np.float32(number).astype(np.float16).view(np.int16)
    if array.dtype == np.uint16:
        if np.isnan(number):
            return np.uint16(0x7FC0)
        bits = int(np.float32(number).view(np.uint32))
        return np.uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    return np.float32(number)


@_at_index(
    lambda builder, dtype, at, amount: builder.atomic_rmw("add", at, amount, "acq_rel"), types.int64, types.int64
)
def fetch_add(counters: Array, index: int, amount: int) -> int:
    """Add to ``counters[index]`` as one step for all threads and return what it was.

    What a thread wrote before is seen by every thread that adds later.
    """
    counters[index] += amount
    return int(counters[index]) - amount


# Dot products.


class _Bfloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat)

    def __hash__(self) -> int:
        return hash(_Bfloat)


_BFLOATS = ir.VectorType(_Bfloat(), 2 * LANES)


def has_bfloat16_products() -> bool:
    """Tell whether the processor that Numba compiles for multiplies pairs of bfloat16 (AVX-512 BF16)."""
    return _has("avx512bf16")


def _paired(builder: Any, bits: Any, dtype: Any) -> Any:
    """Return twice as many numbers as there are lanes as bfloat16, without rounding."""
    if dtype == types.uint16:
        return builder.bitcast(bits, _BFLOATS)
    numbers = builder.sitofp(builder.sext(bits, ir.VectorType(INT, 2 * LANES)), ir.VectorType(FLOAT, 2 * LANES))
    halves = [_shuffled(builder, numbers, numbers, range(first, first + LANES)) for first in (LANES, 0)]
    # One instruction for both halves: LLVM makes two of a truncation, and a third that joins them.
    kind = ir.FunctionType(_BFLOATS, [VECTOR, VECTOR])
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), halves)


def _multiplied(builder: Any, x: Any, y: Any, total: Any) -> Any:
    """Add the products of two vectors of float32, or of pairs of bfloat16, to a sum of each lane."""
    if x.type == VECTOR:
        return _llvm(builder, "fma", x, y, total)
    kind = ir.FunctionType(VECTOR, [VECTOR, _BFLOATS, _BFLOATS])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(function, [total, x, y])


class _Runs:
    """Some runs of one array, read side by side, as what is multiplied."""

    def __init__(self, context: Any, builder: Any, array: Any, value: Any, indices: Any, width: int) -> None:
        data = context.make_array(array)(context, builder, value).data
        self._places = cgutils.unpack_tuple(builder, indices)
        self._builder, self._dtype, self._width = builder, array.dtype, width
        self._starts = [builder.gep(data, [place]) for place in self._places]

    def fetch_next(self, offset: Any) -> None:
        """Ask for the runs behind these, as many and as far apart: of int8 the processor fetches too few by itself."""
        if self._dtype != types.int8 or len(self._places) < 2:
            return
        builder, places = self._builder, self._places
        step = builder.mul(builder.sub(places[1], places[0]), places[0].type(len(places)))
        for start in self._starts:
            _prefetch(builder, self._dtype, builder.gep(start, [builder.add(offset, step)]))

    def at(self, offset: Any, count: Any = None) -> list[Any]:
        """Return a vector of each run, behind `count` numbers of zeros if that is given."""
        builder, found = self._builder, []
        for start in self._starts:
            address = builder.gep(start, [offset])
            if count is None:
                bits = _read(builder, self._dtype, address, self._width)
            else:
                bits = _read_part(builder, self._dtype, address, count, self._width)
            widen = _widened_bits if self._width == LANES else _paired
            found.append(widen(builder, bits, self._dtype))
        return found


def _dot_tile(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Build the loop along the runs, and what is left of them behind whole vectors."""
    x, rows, y, columns, _, out = signature.args
    width = 2 * LANES if x.dtype == types.uint16 else LANES
    count = args[4]
    left = _Runs(context, builder, x, args[0], args[1], width)
    right = _Runs(context, builder, y, args[2], args[3], width)
    step, index = ir.Constant(count.type, width), count.type

    def added(totals: list[Any], offset: Any, rest: Any = None) -> list[Any]:
        weights, result = right.at(offset, rest), []
        for i, number in enumerate(left.at(offset, rest)):
            some = totals[i * len(weights) : (i + 1) * len(weights)]
            result += [_multiplied(builder, number, y, total) for y, total in zip(weights, some, strict=True)]
        return result

    start = builder.block
    head, body = builder.append_basic_block("head"), builder.append_basic_block("body")
    tail, done = builder.append_basic_block("tail"), builder.append_basic_block("done")
    whole = builder.sub(count, builder.urem(count, step))
    builder.branch(head)
    builder.position_at_end(head)
    offset = builder.phi(index)
    totals = [builder.phi(VECTOR) for _ in range(rows.count * columns.count)]
    builder.cbranch(builder.icmp_signed("<", offset, whole), body, tail)
    builder.position_at_end(body)
    if rows.count == 1:
        right.fetch_next(offset)
    sums_of_body, next_offset = added(totals, offset), builder.add(offset, step)
    builder.branch(head)
    for phi, first, later in zip(
        [offset, *totals], [index(0), *[_every(0.0)] * len(totals)], [next_offset, *sums_of_body], strict=True
    ):
        phi.add_incoming(first, start)
        phi.add_incoming(later, body)
    builder.position_at_end(tail)
    rest = builder.sub(count, whole)
    more = builder.append_basic_block("more")
    builder.cbranch(builder.icmp_signed(">", rest, index(0)), more, done)
    builder.position_at_end(more)
    sums_of_rest = added(totals, whole, rest)
    builder.branch(done)
    builder.position_at_end(done)
    ended = []
    for total, with_rest in zip(totals, sums_of_rest, strict=True):
        phi = builder.phi(VECTOR)
        phi.add_incoming(total, tail)
        phi.add_incoming(with_rest, more)
        ended.append(phi)
    data = context.make_array(out)(context, builder, args[5]).data
    for first in range(0, len(ended), LANES):
        _write(builder, builder.gep(data, [index(first)]), _totals(builder, ended[first : first + LANES]))
    return context.get_dummy_value()


def _totals(builder: Any, parts: list[Any]) -> Any:
    """Return the sum over all lanes of each part, in the first lanes; neighbours are added first."""
    parts = parts + [_every(0.0)] * ((1 << (len(parts) - 1).bit_length()) - len(parts))
    levels = LANES.bit_length() - 1
    for _ in range(levels):
        pairs = zip(parts[::2], parts[1::2], strict=True) if len(parts) > 1 else [(parts[0], parts[0])]
        parts = [_pair_sums(builder, *pair) for pair in pairs]
    return parts[0]


@_typed(lambda x, rows, y, columns, count, out: (types.void(x, rows, y, columns, types.int64, out), _dot_tile))
def dot_tile(x: Array, rows: tuple[int, ...], y: Array, columns: tuple[int, ...], count: int, out: Array) -> None:
    """Write the dot products of runs of `count` numbers of x, which begin at `rows`, and of y, at `columns`, to `out`.

    Rows and columns are tuples; ``out[row * len(columns) + column]``, float32, has room for a multiple of `LANES`. A
    product's order of additions depends on `count` alone. x is float32, and y any kind that `load` takes; or x is
    uint16, bfloat16, and y is uint16 or int8, where the processor `has_bfloat16_products`.
    """
    width = 2 * LANES if x.dtype == np.uint16 else LANES
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            products = np.zeros(-(-count // width) * width, np.float32)
            products[:count] = _widened(x[row : row + count]) * _widened(y[column : column + count])
            total = np.zeros(LANES, np.float32)
            for some in products.reshape(-1, LANES, width // LANES):
                total = total + some.sum(axis=1)
            while len(total) > 1:
                total = total[::2] + total[1::2]
            out[i * len(columns) + j] = total[0]


def _sigmoid(builder: Any, x: Any) -> Any:
    size = _llvm(builder, "fabs", x)
    power = _exp2(builder, builder.fmul(size, _every(-1 / math.log(2))))
    share = builder.fdiv(_every(1.0), builder.fadd(_every(1.0), power))
    return builder.select(builder.fcmp_unordered("<", x, _every(0.0)), builder.fmul(power, share), share)


@_of_lanes(_sigmoid)
def sigmoid(x: Lanes) -> Lanes:
    """Return 1 / (1 + e ** -x), to float32's precision."""
    with np.errstate(over="ignore"):
        return (1 / (1 + np.exp(-x.astype(np.float64)))).astype(np.float32)


def _write_narrowed(builder: Any, dtype: Any, address: Any, value: Any) -> None:
    if dtype == types.uint16:
        value = builder.bitcast(builder.fptrunc(value, ir.VectorType(_Bfloat(), LANES)), SHORTS)
    elif dtype == types.int16:
        value = builder.bitcast(builder.fptrunc(value, HALVES), SHORTS)
    builder.store(value, builder.bitcast(address, value.type.as_pointer())).align = dtype.bitwidth // 8


@_at_index(_write_narrowed, types.void, lanes)
def store_narrowed(array: Array, index: int, value: Lanes) -> None:
    """Write all lanes to ``array[index:]``: as they are, or the bits of the nearest bfloat16 or float16."""
    array[index : index + LANES] = [narrowed(number, array) for number in value]


@_at_index(_load_count, types.int64)
def load_count(counters: Array, index: int) -> int:
    """Return ``counters[index]``, int64, read anew each time, and see what was written before it was added to."""
    return int(counters[index])


@_nothing_but(_pause)
def pause() -> None:
    """Tell the processor that this loop waits for another thread: 20 to 50 ns."""
    return


@_nothing_but(_give_way)
def give_way() -> None:
    """Let another thread that is ready have this processor; return at once, within 1 µs, where there is none."""
    time.sleep(0)


@_at_index(lambda builder, dtype, address: builder.load(address), types.float32)
def take(array: Array, index: int) -> Any:
    """Return ``array[index]``, float32; the index may be negative, and is no wrap."""
    return array[index]


def _write_scalar(builder: Any, dtype: Any, address: Any, number: Any) -> None:
    builder.store(_narrowed_to(builder, dtype, number), address)


@_at_index(_write_scalar, types.void, types.float32)
def put(array: Array, index: int, number: float | np.floating[Any]) -> None:
    """Write one float32 to ``array[index]``, narrowed as by `narrowed`; the index may be negative, and is no wrap."""
    array[index] = narrowed(number, array)


# Four rows of four numbers, as a tile of sums has them.

_FOUR = ir.VectorType(FLOAT, LANES // 4)


def _of_array(build: Build, result: Any, *others: Any) -> Callable[[Function], Function]:
    """Compile a function of an array, places in it and more to ``build(builder, addresses, *more)``."""

    def typing(array: Any, places: Any, *_: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = context.make_array(array)(context, builder, args[0]).data
            at = cgutils.unpack_tuple(builder, args[1])
            addresses = [builder.bitcast(builder.gep(data, [place]), _FOUR.as_pointer()) for place in at]
            built = build(builder, addresses, *args[2:])
            return context.get_dummy_value() if result == types.void else built

        return result(array, places, *others), generate

    return _typed(typing)


def _read_fours(builder: Any, addresses: Any) -> Any:
    parts = []
    for address in addresses:
        part = builder.load(address)
        part.align = 4
        parts.append(part)
    while len(parts) > 1:
        size = 2 * parts[0].type.count
        parts = [_shuffled(builder, x, y, range(size)) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _write_fours(builder: Any, addresses: Any, value: Any) -> None:
    for i, address in enumerate(addresses):
        builder.store(_shuffled(builder, value, value, range(4 * i, 4 * i + 4)), address).align = 4


@_of_array(_read_fours, lanes)
def load_fours(array: Array, places: tuple[int, int, int, int]) -> Lanes:
    """Return four numbers, float32, from each of four places."""
    return np.concatenate([array[place : place + 4] for place in places])


@_of_array(_write_fours, types.void, lanes)
def store_fours(array: Array, places: tuple[int, int, int, int], value: Lanes) -> None:
    """Write four lanes, float32, to each of four places, one after the other."""
    for i, place in enumerate(places):
        array[place : place + 4] = value[4 * i : 4 * i + 4]


# Small products of matrices, whose sums stay in registers: left to itself LLVM would keep them in memory.


def _summed(builder: Any, parts: list[Any]) -> Any:
    """Return a vector of the sums over the lanes of sixteen vectors, in their order: halves are added to halves."""
    size = LANES // 2
    while len(parts) > 1:
        kept = [lane if not lane & size else LANES + lane for lane in range(LANES)]
        moved = [lane ^ size if not lane & size else LANES + (lane ^ size) for lane in range(LANES)]
        pairs = list(zip(parts[: len(parts) // 2], parts[len(parts) // 2 :], strict=True))
        parts = [builder.fadd(_shuffled(builder, *pair, kept), _shuffled(builder, *pair, moved)) for pair in pairs]
        size //= 2
    return parts[0]


def _counted(builder: Any, end: Any, step: int, sums: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> Any:
    """Build ``for i in range(0, end, step): sums = body(i, sums)``, with the sums in registers; return them."""
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.cbranch(builder.icmp_signed("<", end.type(0), end), loop, after)
    builder.position_at_end(loop)
    index, phis = builder.phi(end.type), [builder.phi(VECTOR) for _ in sums]
    new = body(index, phis)
    following, last = builder.add(index, end.type(step)), builder.block
    builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
    builder.position_at_end(after)
    index.add_incoming(end.type(0), before)
    index.add_incoming(following, last)
    results = []
    for start, phi, value in zip(sums, phis, new, strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(value, last)
        result = builder.phi(VECTOR)
        result.add_incoming(start, before)
        result.add_incoming(value, last)
        results.append(result)
    return results


def _dots_of(rows: Any, at: Any, width: Any, keys: Any, *_: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row_data, key_data = (
            context.make_array(kind)(context, builder, args[i]).data for i, kind in ((0, rows), (3, keys))
        )
        begin, apart, dim = args[1], args[2], args[8]
        row_at = [builder.gep(row_data, [builder.add(begin, builder.mul(apart, dim.type(i)))]) for i in range(ROWS)]
        key_at = [builder.gep(key_data, [place]) for place in args[4:8]]

        def multiply(index: Any, sums: list[Any], read: Callable[[Any], Any]) -> list[Any]:
            some = [_widened_bits(builder, read(builder.gep(place, [index])), keys.dtype) for place in key_at]
            each = [_read(builder, types.float32, builder.gep(place, [index]), LANES) for place in row_at]
            return [_llvm(builder, "fma", each[i % ROWS], some[i // ROWS], total) for i, total in enumerate(sums)]

        whole = builder.and_(dim, dim.type(-LANES))
        sums = [_every(0.0)] * LANES
        sums = _counted(
            builder,
            whole,
            LANES,
            sums,
            lambda i, sums: multiply(i, sums, lambda at: _read(builder, keys.dtype, at, LANES)),
        )
        # What is left of a row, at most once.
        rest = builder.sub(dim, whole)
        sums = _counted(
            builder,
            rest,
            LANES,
            sums,
            lambda i, sums: multiply(whole, sums, lambda at: _read_part(builder, keys.dtype, at, rest)),
        )
        return _summed(builder, sums)

    return lanes(rows, types.int64, types.int64, keys, *[types.int64] * 5), generate


@_typed(_dots_of)
def dots(rows: Array, at: int, width: int, keys: Array, a: int, b: int, c: int, d: int, dim: int) -> Lanes:
    """Return the products of four rows, ``width`` apart from ``at`` on, and the keys at a, b, c and d.

    Lane ``4 * key + row``. A lane's sum is over every sixteenth number in their order; then halves are added to halves.
    """
    result = np.empty(LANES, np.float32)
    for lane in range(LANES):
        sums = np.zeros(LANES, np.float32)
        for i in range(0, dim, LANES):
            key = (a, b, c, d)[lane // ROWS] + i
            some = load(keys, key) if i + LANES <= dim else load_part(keys, key, dim - i)
            sums = fma(load(rows, at + lane % ROWS * width + i), some, sums)
        result[lane] = sums.sum()
    return result


def _add_products_of(vectors: int) -> Callable[..., Any]:
    def typing(sums: Any, *_: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = [context.make_array(sums)(context, builder, args[i]).data for i in (0, 3, 5)]
            at, width, value_at, weight_at, count = args[1], args[2], args[4], args[6], args[7]
            number = width.type
            places = [
                builder.gep(data[0], [builder.add(at, builder.add(builder.mul(width, number(row)), number(i * LANES)))])
                for row in range(ROWS)
                for i in range(vectors)
            ]

            def add_token(token: Any, totals: list[Any]) -> list[Any]:
                value = builder.gep(data[1], [builder.add(value_at, builder.mul(width, token))])
                weight = builder.gep(data[2], [builder.add(weight_at, builder.mul(token, number(ROWS)))])
                some = [
                    _read(builder, types.float32, builder.gep(value, [number(i * LANES)]), LANES)
                    for i in range(vectors)
                ]
                each = [
                    _spread(builder, builder.load(builder.gep(weight, [number(row)])), VECTOR) for row in range(ROWS)
                ]
                return [
                    _llvm(builder, "fma", each[i // vectors], some[i % vectors], total)
                    for i, total in enumerate(totals)
                ]

            totals = [_read(builder, types.float32, place, LANES) for place in places]
            for place, total in zip(places, _counted(builder, count, 1, totals, add_token), strict=True):
                _write(builder, place, total)
            return context.get_dummy_value()

        integer = types.int64
        return types.void(sums, integer, integer, sums, integer, sums, integer, integer), generate

    return typing


def _add_products(
    vectors: int,
    sums: Array,
    at: int,
    width: int,
    values: Array,
    value_at: int,
    weights: Array,
    weight_at: int,
    count: int,
) -> None:
    for token in range(count):
        for row in range(ROWS):
            weight = splat_at(weights, weight_at + token * ROWS + row)
            for i in range(0, vectors * LANES, LANES):
                place = at + row * width + i
                store(sums, place, fma(weight, load(values, value_at + token * width + i), load(sums, place)))


@_typed(_add_products_of(4))
def add_products_64(
    sums: Array, at: int, width: int, values: Array, value_at: int, weights: Array, weight_at: int, count: int
) -> None:
    """Add ``count`` rows of 64 values, ``width`` apart, to four rows of sums, ``width`` apart, token by token.

    The weight of a token in a row is at ``4 * token + row``; all is float32.
    """
    _add_products(4, sums, at, width, values, value_at, weights, weight_at, count)


@_typed(_add_products_of(1))
def add_products_16(
    sums: Array, at: int, width: int, values: Array, value_at: int, weights: Array, weight_at: int, count: int
) -> None:
    """Do the same for sixteen values."""
    _add_products(1, sums, at, width, values, value_at, weights, weight_at, count)
