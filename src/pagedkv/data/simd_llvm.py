"""SIMD vectors: sixteen float32 numbers as one Numba value, so that a kernel says itself what runs side by side.

LLVM's own vectoriser gives up where several rows are written at once, or makes a reduction of every dot product. Here
one value is one AVX-512 register (two of AVX2, four of NEON), and `simd` and `simd_products` are all that the kernels
do with it; here stands how their functions are compiled, and what they are built of. bfloat16, float16 and
float8_e4m3fn have no NumPy type that Numba knows: they come as their bit patterns, **uint16 for bfloat16, int16 for
float16 and uint8 for float8_e4m3fn**, and are widened as they are loaded, as int8 is.

Indices are trusted: nothing checks them and nothing wraps around. The bodies of the functions are plain Python over
NumPy arrays, for ``NUMBA_DISABLE_JIT=1``: slow, and the same. Compiled, each is what its decorator builds of LLVM.
"""

from __future__ import annotations

import inspect
import math
import platform
import sys
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
CACHE_LINE = 64
"""Bytes."""
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


def typed(typing: Callable[..., Any]) -> Callable[[Function], Function]:
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


def of_lanes(build: Build, result: Any = lanes) -> Callable[[Function], Function]:
    """Compile a function of lanes to ``build(builder, *values)``."""
    return typed(
        lambda *kinds: (
            result(*[lanes] * len(kinds)),
            lambda context, builder, signature, args: build(builder, *args),
        )
    )


def at_index(build: Build, result: Any, *others: Any) -> Callable[[Function], Function]:
    """Compile a function of an array, an index and more to ``build(builder, dtype, address, *more)``."""

    def typing(array: Any, *_: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = context.make_array(array)(context, builder, args[0]).data
            built = build(builder, array.dtype, builder.gep(data, [args[1]], inbounds=True), *args[2:])
            return context.get_dummy_value() if result == types.void else built

        return result(array, types.int64, *others), generate

    return typed(typing)


# What is built of LLVM.


def has(feature: str) -> bool:
    """Tell whether the processor that Numba compiles for has a feature, by LLVM's name."""
    features = numba.config.CPU_FEATURES
    if features is None and not numba.config.CPU_NAME:
        return bool(llvmlite.binding.get_host_cpu_features().get(feature))
    return f"+{feature}" in (features or "").split(",")


IS_WIDE = has("avx512f")
"""Whether a register is a whole vector, and there are 32 of them; else one is half a vector at most."""


def every(number: float) -> Any:
    """Return a constant vector of one float32."""
    return ir.Constant(VECTOR, [number] * LANES)


def every_int(number: int, kind: Any = INTS) -> Any:
    """Return a constant vector of one integer."""
    return ir.Constant(kind, [number] * kind.count)


def call(builder: Any, name: str, *args: Any) -> Any:
    """Call an LLVM intrinsic whose arguments and result are vectors."""
    kind = ir.FunctionType(VECTOR, [VECTOR] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32"), args)


def shuffled(builder: Any, x: Any, y: Any, order: Any) -> Any:
    """Return the lanes of x, and those of y behind them, in an order."""
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(INT, len(order)), list(order)))


def spread(builder: Any, scalar: Any, kind: Any) -> Any:
    """Return a vector of one number."""
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, scalar, INT(0))
    return builder.shuffle_vector(first, undefined, every_int(0, ir.VectorType(INT, kind.count)))


def greater_of(builder: Any, x: Any, y: Any) -> Any:
    """Return the greater of each lane; that of y where x is NaN."""
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def widened_bits(builder: Any, bits: Any, dtype: Any) -> Any:
    """Return the bits of some numbers of a dtype as float32."""
    if dtype == types.float32:
        return bits
    if dtype == types.int8:
        return builder.sitofp(builder.sext(bits, INTS), VECTOR)
    if dtype == types.uint8:
        return _from_e4m3(builder, bits)
    if dtype == types.uint16:
        return builder.bitcast(builder.shl(builder.zext(bits, INTS), every_int(16)), VECTOR)
    return builder.fpext(builder.bitcast(bits, HALVES), VECTOR)


def _from_e4m3(builder: Any, bits: Any) -> Any:
    """Widen by way of float16, whose exponent has one bit more and is greater by 8; NaN comes out as a number."""
    places = builder.shl(builder.sext(bits, SHORTS), every_int(7, SHORTS))
    half = builder.and_(places, every_int(0xBFFF, SHORTS))  # the sign was extended into the exponent
    return builder.fmul(builder.fpext(builder.bitcast(half, HALVES), VECTOR), every(256.0))


def vector_at(builder: Any, address: Any, count: int) -> Any:
    """Return an address as that of some numbers."""
    return builder.bitcast(address, ir.VectorType(address.type.pointee, count).as_pointer())


def read(builder: Any, dtype: Any, address: Any, count: int) -> Any:
    """Return the bits of some numbers of a dtype."""
    bits = builder.load(vector_at(builder, address, count))
    bits.align = dtype.bitwidth // 8
    return bits


def read_part(builder: Any, dtype: Any, address: Any, count: Any, size: int = LANES) -> Any:
    """Return the first `count` numbers and zeros behind, `size` of them; nothing else is read."""
    pointer = vector_at(builder, address, size)
    kind, width, places = pointer.type.pointee, dtype.bitwidth, ir.VectorType(INT, size)
    limit = spread(builder, builder.trunc(count, INT), places)
    mask = builder.icmp_unsigned("<", ir.Constant(places, list(range(size))), limit)
    name = f"llvm.masked.load.v{size}{'f32' if width == 32 else f'i{width}'}.p0"
    signature = ir.FunctionType(kind, [pointer.type, INT, mask.type, kind])
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, [pointer, INT(width // 8), mask, ir.Constant(kind, None)])


def write(builder: Any, address: Any, vector: Any, align: int = 4) -> None:
    """Write a vector to where any of its numbers may lie, which take so many bytes."""
    builder.store(vector, builder.bitcast(address, vector.type.as_pointer())).align = align


def prefetch(builder: Any, dtype: Any, address: Any, *, to_write: bool = False) -> None:
    """Ask for the cache line of an address: to read it, but not in the first cache, or to write it."""
    pointer = builder.bitcast(address, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, INT, INT, INT])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # Into the second cache: a processor has few places to wait for lines of the first one. The last number is "data".
    builder.call(function, [pointer, INT(int(to_write)), INT(3 if to_write else 2), INT(1)])


def load_count(builder: Any, dtype: Any, address: Any) -> Any:
    """Read a counter anew, and see what was written before it was added to."""
    return builder.load_atomic(address, "acquire", dtype.bitwidth // 8)


_PAUSE = {
    "x86_64": ("llvm.x86.sse2.pause", []),
    "amd64": ("llvm.x86.sse2.pause", []),
    "aarch64": ("llvm.aarch64.hint", [INT(1)]),
    "arm64": ("llvm.aarch64.hint", [INT(1)]),
}
"""How a processor is told that a loop only waits, by the name of its kind."""
_GIVE_WAY = "SwitchToThread" if sys.platform == "win32" else "sched_yield"


def nothing_but(build: Build) -> Callable[[Function], Function]:
    """Compile a function without arguments and result to ``build(builder)``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        build(builder)
        return context.get_dummy_value()

    return typed(lambda: (types.void(), generate))


def pause(builder: Any) -> None:
    """Tell the processor that a loop only waits."""
    if platform.machine().lower() in _PAUSE:
        name, args = _PAUSE[platform.machine().lower()]
        kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def give_way(builder: Any) -> None:
    """Call what the system has for that."""
    kind = ir.FunctionType(INT, [])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, _GIVE_WAY), [])


def any_greater(builder: Any, x: Any, y: Any) -> Any:
    """Tell whether any lane of x is greater than that of y."""
    bits = builder.bitcast(builder.fcmp_ordered(">", x, y), ir.IntType(LANES))
    return builder.icmp_unsigned("!=", bits, ir.IntType(LANES)(0))


def narrowed_to(builder: Any, dtype: Any, number: Any) -> Any:
    """Return a float32, or a vector, as a number of a dtype, or several, rounded to the nearest; int8 must be whole."""
    if dtype == types.float32:
        return number
    count = number.type.count if isinstance(number.type, ir.VectorType) else 0

    def of(kind: Any) -> Any:
        return ir.VectorType(kind, count) if count else kind

    if dtype == types.int8:
        return builder.fptosi(number, of(ir.IntType(8)))
    ints, shorts = of(INT), of(SHORT)
    if dtype == types.int16:
        return builder.bitcast(builder.fptrunc(number, of(HALF)), shorts)

    def every_one(value: int) -> Any:
        return every_int(value, ints) if count else ints(value)

    bits = builder.bitcast(number, ints)
    high = builder.lshr(bits, every_one(16))
    nearest = builder.add(builder.add(bits, every_one(0x7FFF)), builder.and_(high, every_one(1)))  # ties to even
    is_nan = builder.fcmp_unordered("uno", number, number)
    return builder.trunc(builder.select(is_nan, every_one(0x7FC0), builder.lshr(nearest, every_one(16))), shorts)


def by_row(builder: Any, x: Any, combine: Build) -> Any:
    """Combine all lanes of one row; each of them gets the result."""
    step = ROWS
    while step < LANES:
        x = combine(x, shuffled(builder, x, x, [(i + step) % LANES for i in range(LANES)]))
        step *= 2
    return x


def _polynomial(builder: Any, x: Any, coefficients: list[float]) -> Any:
    result = every(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = call(builder, "fma", result, x, every(coefficient))
    return result


def exp2(builder: Any, x: Any) -> Any:
    """2 ** x for x that rounds to no more than 127."""
    return _power_of_two(builder, x, _POWERS)


def exp2_to_bfloat16(builder: Any, x: Any) -> Any:
    """2 ** x, three multiplications sooner: what it is off by is a tenth of what bfloat16 rounds off."""
    return _power_of_two(builder, x, _SHORT_POWERS)


def _power_of_two(builder: Any, x: Any, powers: list[float]) -> Any:
    """2 ** x by a polynomial over -½ … ½, then the exponent."""
    low = every(-126.0)
    if has("avx512f"):  # which scales by a power of two, to numbers below 2 ** -126, too
        low = every(-150.0)
    bounded = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    whole = call(builder, "roundeven", bounded)
    rest = builder.fsub(bounded, whole)
    result = call(builder, "fma", _polynomial(builder, rest, powers), rest, every(1.0))
    if has("avx512f"):
        kind = ir.FunctionType(VECTOR, [VECTOR, VECTOR, VECTOR, SHORT, INT])
        scale = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.scalef.ps.512")
        return builder.call(scale, [result, whole, every(0.0), SHORT(-1), INT(4)])
    exponent = builder.shl(builder.fptosi(whole, INTS), every_int(23))
    result = builder.bitcast(builder.add(builder.bitcast(result, INTS), exponent), VECTOR)
    result = builder.select(builder.fcmp_ordered("<", x, low), every(0.0), result)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, result)


def _fitted_powers(degree: int) -> list[float]:
    """Return c with 2 ** x = 1 + x(c₀ + c₁x + …) for |x| <= ½."""
    x = np.polynomial.chebyshev.chebpts1(64) / 2
    fit = np.polynomial.Polynomial.fit(x, np.expm1(x * math.log(2)) / x, degree)
    return [float(np.float32(c)) for c in fit.convert().coef]


_POWERS, _SHORT_POWERS = _fitted_powers(5), _fitted_powers(2)
_SMALL = 0.625


def _fitted_tanh() -> list[float]:
    """Return c with tanh(x) = x + x³(c₀ + c₁x² + …) for |x| <= _SMALL: the other formula would lose digits there."""
    squares = (np.polynomial.chebyshev.chebpts1(64) + 1) / 2 * _SMALL**2
    x = np.sqrt(squares)
    fit = np.polynomial.Polynomial.fit(squares, (np.tanh(x) / x - 1) / squares, 5)
    return [float(np.float32(c)) for c in fit.convert().coef]


_TANH = _fitted_tanh()


def tanh(builder: Any, x: Any) -> Any:
    """Tanh by a polynomial near zero, else by a power of two."""
    square = builder.fmul(x, x)
    small = _polynomial(builder, square, _TANH)
    small = call(builder, "fma", builder.fmul(small, square), x, x)
    size = call(builder, "fabs", x)
    power = exp2(builder, builder.fmul(size, every(-2.0 / math.log(2))))
    large = builder.fdiv(builder.fsub(every(1.0), power), builder.fadd(every(1.0), power))
    large = call(builder, "copysign", large, x)
    return builder.select(builder.fcmp_unordered("<", size, every(_SMALL)), small, large)


class Bfloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bfloat)

    def __hash__(self) -> int:
        return hash(Bfloat)


BFLOATS = ir.VectorType(Bfloat(), 2 * LANES)


def has_bfloat16_products() -> bool:
    """Tell whether the processor that Numba compiles for multiplies pairs of bfloat16 (AVX-512 BF16)."""
    return has("avx512bf16")


def widened(bits: Array) -> Lanes:
    """Return the bits of some numbers as float32."""
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
