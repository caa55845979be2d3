"""Decorators of compiled functions: ``@compiled`` is Numba's ``njit`` with our settings and our disk cache."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

from pagedkv.compiling import manage, watch_compiles
from pagedkv.kernel_cache import cache_directory

__all__ = ["borrowed", "cache_directory", "called", "compiled", "inlined", "packed", "watch_compiles"]

Arrays = TypeVar("Arrays")
Function = TypeVar("Function", bound=Callable[..., Any])


def _as_plain_python(function: Function) -> Function:
    """Let a function of the hot path run uncompiled: its integers wrap around as they do in machine code."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with np.errstate(over="ignore"):
            return function(*args)

    return run  # type: ignore[return-value]


def compiled(function: Function) -> Function:
    """Compile a function of the hot path: cached on disk, without the GIL, exact arithmetic, always inlined.

    With ``NUMBA_DISABLE_JIT=1`` in the environment the function runs as plain Python.
    """
    if numba.config.DISABLE_JIT:
        return _as_plain_python(function)
    decorated: Function = manage(numba.njit(nogil=True, forceinline=True, error_model="numpy")(function), on_disk=True)
    return decorated


def inlined(function: Function) -> Function:
    """Compile a part of other compiled functions that Python never calls: it is kept on disk within them."""
    if numba.config.DISABLE_JIT:
        return _as_plain_python(function)
    decorated: Function = manage(numba.njit(nogil=True, forceinline=True, error_model="numpy")(function), on_disk=False)
    return decorated


def called(function: Function) -> Function:
    """Compile a part that is long and rarely runs: as `inlined`, but it is called, so its callers stay small."""
    if numba.config.DISABLE_JIT:
        return _as_plain_python(function)
    decorated: Function = manage(numba.njit(nogil=True, error_model="numpy")(function), on_disk=False)
    return decorated


# The tuples that were packed: Numba's name for them, by the name of the field that holds the addresses.
_kinds: dict[str, Any] = {}


def packed(arrays: Arrays) -> Arrays:
    """Return what stands for a named tuple of arrays, and of such tuples, where Python calls a compiled function.

    Numba takes 3 µs to find out the types of two dozen arrays and to count each of them, at every call; this is one
    array of their addresses. The function begins with `borrowed`, which gives it the tuple. The arrays must be
    contiguous, and be kept as long as this is in use. With ``NUMBA_DISABLE_JIT=1`` it is the tuple itself.
    """
    if numba.config.DISABLE_JIT:
        return arrays
    kind = numba.typeof(arrays)
    # Named after all the types within, because Numba keeps functions on disk by the types of their arguments.
    name = "packed_" + hashlib.sha256(str(kind).encode()).hexdigest()[:16]
    _kinds[name] = kind
    words = [word for array in _leaves(arrays) for word in (array.ctypes.data, *array.shape)]
    addresses = np.empty(1, [(name, np.int64, (len(words),))])
    addresses[name] = words
    return addresses  # type: ignore[return-value]


def _leaves(arrays: Any) -> Iterator[npt.NDArray[Any]]:
    for part in arrays:
        if isinstance(part, tuple):
            yield from _leaves(part)
        else:
            yield part


def _unpacked(context: Any, builder: Any, kind: Any, words: Iterator[Any]) -> Any:
    """Put a tuple of arrays without owners together from their addresses and shapes."""
    if not isinstance(kind, types.Array):
        parts = [_unpacked(context, builder, part, words) for part in kind.types]
        return context.make_tuple(builder, kind, parts)
    array = make_array(kind)(context, builder)
    data = builder.inttoptr(next(words), array.data.type)
    shape = [next(words) for _ in range(kind.ndim)]
    itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
    strides = [itemsize]
    for length in shape[:0:-1]:
        strides.insert(0, builder.mul(strides[0], length))
    populate_array(array, data=data, shape=shape, strides=strides, itemsize=itemsize, meminfo=None)
    return array._getvalue()


def _words(context: Any, builder: Any, addresses: Any) -> Iterator[Any]:
    start = builder.bitcast(addresses, context.get_value_type(types.CPointer(types.int64)))
    for place in itertools.count():
        yield builder.load(cgutils.gep_inbounds(builder, start, place))


def _without_owner(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    if not isinstance(kind, numba.types.Array):
        for place, part in enumerate(kind.types):
            inner = _without_owner(context, builder, part, builder.extract_value(value, place))
            value = builder.insert_value(value, inner, place)
        return value
    array = cgutils.create_struct_proxy(kind)(context, builder, value=value)
    array.meminfo = cgutils.get_null_value(array.meminfo.type)
    array.parent = cgutils.get_null_value(array.parent.type)
    return array._getvalue()


@intrinsic
def _borrowed(typing_context: Any, arrays: Any) -> Any:
    is_packed = isinstance(arrays, types.Array) and isinstance(arrays.dtype, types.Record)
    kind = _kinds.get(next(iter(arrays.dtype.fields)), arrays) if is_packed else arrays

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if kind is arrays:
            return _without_owner(context, builder, kind, args[0])
        addresses = make_array(arrays)(context, builder, args[0]).data
        return _unpacked(context, builder, kind, _words(context, builder, addresses))

    return kind(arrays), generate


def borrowed(arrays: Arrays) -> Arrays:
    """Inside a compiled function: the same array, or named tuple of arrays and such tuples, without counts.

    What is `packed` becomes the tuple that it stands for. Something else must keep the arrays alive meanwhile; the
    caller does so for arguments. Without this every inner call would count each of them up and down, atomically, which
    takes longer than the work itself.
    """
    return arrays


if not TYPE_CHECKING and not numba.config.DISABLE_JIT:
    borrowed = _borrowed
