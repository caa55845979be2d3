"""Sixteen float32 numbers as one Numba value, so that a kernel says itself what runs side by side.

LLVM's own vectoriser gives up where several rows are written at once, or makes a reduction of every dot product. Here
one value is one AVX-512 register (two of AVX2, four of NEON), and the few functions below are all that the kernels do
with it. bfloat16, float16 and float8_e4m3fn have no NumPy type that Numba knows: they come as their bit patterns,
**uint16 for bfloat16, int16 for float16 and uint8 for float8_e4m3fn**, and are widened as they are loaded, as int8 is.

Indices are trusted: nothing checks them and nothing wraps around. With ``NUMBA_DISABLE_JIT=1`` every function is its
plain twin over NumPy arrays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba

from pagedkv.data.simd_python import LANES, ROWS

if TYPE_CHECKING or numba.config.DISABLE_JIT:
    from pagedkv.data.simd_python import (
        add,
        any_greater,
        exp2,
        fetch_add,
        finite_or_zero,
        fma,
        load,
        load_part,
        maximum,
        maximum_by_row,
        mul,
        narrowed,
        prefetch,
        splat,
        spread,
        store,
        store_half,
        sub,
        sum_by_row,
        sums,
        tanh,
        zeros,
    )
else:
    from pagedkv.data.simd_llvm import (
        add,
        any_greater,
        exp2,
        fetch_add,
        finite_or_zero,
        fma,
        load,
        load_part,
        maximum,
        maximum_by_row,
        mul,
        narrowed,
        prefetch,
        splat,
        spread,
        store,
        store_half,
        sub,
        sum_by_row,
        sums,
        tanh,
        zeros,
    )

__all__ = [
    "LANES",
    "ROWS",
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
    "spread",
    "store",
    "store_half",
    "sub",
    "sum_by_row",
    "sums",
    "tanh",
    "zeros",
]
