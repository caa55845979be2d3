"""Decorators of compiled functions: ``@compiled`` is Numba's ``njit`` with our settings and our disk cache."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.errors import NumbaTypeError
from numba.core.imputils import builtin_registry
from numba.core.pythonapi import PythonAPI
from numba.core.registry import CPUDispatcher
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, models, overload, register_jitable, register_model
from numba.np.arrayobj import make_array, populate_array

from pagedkv.kernel_cache import cache_directory, manage, uninterrupted, watch_compiles

__all__ = [
    "borrowed",
    "call_kernel",
    "cache_directory",
    "called",
    "compiled",
    "enter",
    "entry_of",
    "formula",
    "inlined",
    "mix64",
    "packed",
    "pointed",
    "stretch",
    "watch_compiles",
]

Arrays = TypeVar("Arrays")
Function = TypeVar("Function", bound=Callable[..., Any])

_WORDS = ir.IntType(64).as_pointer()


def _as_plain_python(function: Function) -> Function:
    """Let a function of the hot path run uncompiled: its integers wrap around as they do in machine code."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with np.errstate(over="ignore"):
            return function(*args)

    return run  # type: ignore[return-value]


class _NoEnvironment:
    """What a library that is never run has for its `codegen` when Numba tells it the environment of its functions."""

    def set_env(self, name: str, environment: Any) -> None:
        """Do nothing: without an address there is no place for it."""


class _PartLibrary(JITCodeLibrary):
    """The code of a part, which is only linked into its callers: neither optimised nor put into machine code.

    Numba would do both for every part by itself, and then again within each of its callers.
    """

    @property
    def codegen(self) -> Any:
        return _NoEnvironment()

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0

    def serialize_using_object_code(self) -> tuple[str, str, bytes]:
        return self.serialize_using_bitcode()  # type: ignore[no-any-return]


class _PartCompiler(Compiler):
    """Numba's compiler, which puts its result into such a library."""

    def compile_extra(self, function: Any) -> Any:
        self.state.library = _PartLibrary(self.state.targetctx.codegen(), function.__qualname__)
        return super().compile_extra(function)


# What the two rely on is not public: where Numba has it no longer, parts are compiled like other functions.
_SEAMS = ("_optimize_final_module", "_finalize_final_module", "_finalize_dynamic_globals", "serialize_using_bitcode")
_PART_COMPILER = _PartCompiler if all(hasattr(JITCodeLibrary, name) for name in _SEAMS) else Compiler


class _ConstantAPI(PythonAPI):
    """What Numba makes of results for Python; classes of arrays and of named tuples are kept beside the function.

    Numba unpickles them by a function in Python, at every call, and does not look whether that failed: Ctrl-C at this
    moment gave a tuple with holes, which ends the process, or SystemError.
    """

    def __init__(self, context: Any, builder: Any) -> None:
        super().__init__(context, builder)
        self._objects: list[tuple[Any, Any]] = []
        self._environment: Any = None

    def get_env_manager(self, env: Any, env_body: Any, env_ptr: Any) -> Any:
        self._environment = super().get_env_manager(env, env_body, env_ptr)
        return self._environment

    def serialize_object(self, obj: Any) -> Any:
        pickled = super().serialize_object(obj)
        self._objects.append((pickled, obj))
        return pickled

    def unserialize(self, structptr: Any) -> Any:
        known = next((obj for pickled, obj in self._objects if pickled is structptr), None)
        if known is None or self._environment is None:
            return super().unserialize(structptr)
        found = self._environment.read_const(self._environment.add_const(known))
        self.incref(found)
        return found


class _KernelCompiler(Compiler):
    """Numba's compiler, whose results are handed to Python in that way."""

    def compile_extra(self, function: Any) -> Any:
        context = self.state.targetctx = self.state.targetctx.subtarget()
        context.get_python_api = functools.partial(_ConstantAPI, context)
        return super().compile_extra(function)


class _Kernel(CPUDispatcher):
    """A compiled function that Python calls and other kernels call, compiled apart for the two.

    For other kernels it needs no wrapper that unpacks Python objects, which takes longer to compile than most kernels,
    and a literal number is an argument like any other: else each would compile it anew.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        on_disk: bool = False,
        part_on_disk: bool = False,
        has_address: bool = False,
        **for_kernels: bool,
    ) -> None:
        options = {"nopython": True, "nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
        super().__init__(function, targetoptions=options, pipeline_class=_KernelCompiler)
        self._part = CPUDispatcher(
            function,
            targetoptions=options | {"no_cpython_wrapper": True} | for_kernels,
            pipeline_class=Compiler if has_address else _PART_COMPILER,
        )
        manage(self, on_disk=on_disk)
        manage(self._part, on_disk=part_on_disk)

    def _compile_for_args(self, *args: Any, **kws: Any) -> Any:
        # What C calls where it knows no code for the types of the arguments.
        with uninterrupted():
            return super()._compile_for_args(*args, **kws)  # type: ignore[misc]

    def get_call_template(self, args: Any, kws: Any) -> Any:
        return self._part.get_call_template(tuple(map(types.unliteral, args)), kws)

    def get_overload(self, sig: Any) -> Any:
        return self._part.get_overload(sig)

    def address(self, state: Borrowed) -> int:
        """Return where the machine code of a `pointed` kernel lies."""
        with uninterrupted():
            compiled = self._part.get_compile_result(types.int64(state, types.int64))
            return compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)  # type: ignore[no-any-return]


def compiled(function: Function) -> Function:
    """Compile a function of the hot path that Python calls: cached on disk, without the GIL, exact arithmetic.

    Where other kernels call it, it is inlined. With ``NUMBA_DISABLE_JIT=1`` in the environment the function runs as
    plain Python.
    """
    if numba.config.DISABLE_JIT:
        return _as_plain_python(function)
    return _Kernel(function, on_disk=True, part_on_disk=True, forceinline=True)  # type: ignore[return-value]


def inlined(function: Function) -> Function:
    """Compile a part of other compiled functions that Python never calls: it is kept on disk within them."""
    if numba.config.DISABLE_JIT:
        return _as_plain_python(function)
    return _Kernel(function, forceinline=True)  # type: ignore[return-value]


def called(function: Function) -> Function:
    """Compile a part that is long or rarely runs: as `inlined`, but it is called, so its callers stay small."""
    if numba.config.DISABLE_JIT:
        return _as_plain_python(function)
    return _Kernel(function)  # type: ignore[return-value]


def pointed(function: Function) -> Function:
    """Compile a kernel that a state holds as a field: ``call_kernel(state.field, state, number)`` returns its int.

    So its callers are compiled once for all kernels that may be there, and it only where it is in use. It never raises.
    """
    if numba.config.DISABLE_JIT:
        return _as_plain_python(function)
    return _Kernel(function, part_on_disk=True, has_address=True)  # type: ignore[return-value]


def formula(function: Function) -> Function:
    """Let kernels call a small function that Python calls as it is: of a record there, of whole columns here."""
    return register_jitable(forceinline=True, error_model="numpy")(function)


@formula
def mix64(bits: Any) -> Any:
    """Mix 64 bits, uint64: the finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014)."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


class Borrowed(types.Type):
    """Numba's type of `packed` arrays within compiled code: a pointer to their addresses and shapes.

    It has the fields of the named tuple `kind`. An array is put together where it is read, from words that never
    change, so LLVM loads each of them once; handing all of them on takes one register.
    """

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        super().__init__(name=f"Borrowed({_digest(kind)})")

    @property
    def key(self) -> Any:
        """What Numba compares."""
        return self.kind


class _KernelPointer(types.Type):
    """Numba's type of the address of a `pointed` kernel, which is false where there is none."""

    def __init__(self) -> None:
        super().__init__(name="KernelPointer")


register_model(_KernelPointer)(models.OpaqueModel)


@register_model(Borrowed)
class _BorrowedModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Borrowed) -> None:
        super().__init__(dmm, fe_type, _WORDS)


@infer_getattr
class _BorrowedFields(AttributeTemplate):
    key = Borrowed

    def generic_resolve(self, borrowed: Borrowed, field: str) -> Any:  # type: ignore[override]
        if field not in borrowed.kind.fields:
            return None
        part = borrowed.kind.types[borrowed.kind.fields.index(field)]
        if part == types.voidptr:
            return _KernelPointer()
        return part if isinstance(part, types.Array) else Borrowed(part)


@builtin_registry.lower_getattr_generic(Borrowed)  # type: ignore[untyped-decorator]
def _field(context: Any, builder: Any, borrowed: Borrowed, words: Any, field: str) -> Any:
    kinds = borrowed.kind.types
    place = borrowed.kind.fields.index(field)
    words = cgutils.gep_inbounds(builder, words, sum(map(_num_words, kinds[:place])))
    if kinds[place] == types.voidptr:
        return builder.inttoptr(_word(builder, words, 0), context.get_value_type(_KernelPointer()))
    return _array_at(context, builder, kinds[place], words) if isinstance(kinds[place], types.Array) else words


def _num_words(kind: Any) -> int:
    if kind == types.voidptr:
        return 1
    return 1 + kind.ndim if isinstance(kind, types.Array) else sum(map(_num_words, kind.types))


@intrinsic
def _is_not_null(typing_context: Any, kernel: Any) -> Any:
    return types.boolean(kernel), lambda context, builder, signature, args: cgutils.is_not_null(builder, args[0])


# Numba compares the names and the annotations of the two functions, hence two without annotations.
overload(bool)(
    lambda kernel: (lambda kernel: _is_not_null(kernel)) if isinstance(kernel, _KernelPointer) else None  # type: ignore[call-arg]
)


def _array_at(context: Any, builder: Any, kind: Any, words: Any) -> Any:
    """Put an array without an owner together from its address and shape."""
    address, *shape = (_word(builder, words, place) for place in range(1 + kind.ndim))
    array = make_array(kind)(context, builder)
    itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
    strides = [itemsize]
    for length in shape[:0:-1]:
        strides.insert(0, builder.mul(strides[0], length))
    data = builder.inttoptr(address, array.data.type)
    populate_array(array, data=data, shape=shape, strides=strides, itemsize=itemsize, meminfo=None)
    return array._getvalue()


def _word(builder: Any, words: Any, place: int) -> Any:
    word = builder.load(cgutils.gep_inbounds(builder, words, place))
    word.set_metadata("invariant.load", builder.module.add_metadata([]))
    return word


# The tuples that were packed: Numba's name for them, by the name of the field that holds the addresses.
_kinds: dict[str, Any] = {}


def _digest(kind: Any) -> str:
    return hashlib.sha256(str(kind).encode()).hexdigest()[:16]


def packed(arrays: Arrays) -> Arrays:
    """Return what stands for a named tuple where Python calls a compiled function.

    Its fields are arrays, `pointed` kernels or None in their place, and named tuples of such.

    Numba takes 3 µs to find out the types of two dozen arrays and to count each of them, at every call; this is one
    array of their addresses. The function begins with `borrowed`, which gives it their fields. The arrays must be
    contiguous, and be kept as long as this is in use. With ``NUMBA_DISABLE_JIT=1`` it is the tuple itself.
    """
    if numba.config.DISABLE_JIT:
        return arrays
    kind = _kind_of(arrays)
    # Named after all the types within, because Numba keeps functions on disk by the types of their arguments.
    name = "packed_" + _digest(kind)
    _kinds[name] = kind
    words = [word for leaf in _leaves(arrays) for word in _words_of(leaf, kind)]
    addresses = np.empty(1, [(name, np.int64, (len(words),))])
    addresses[name] = words
    return addresses  # type: ignore[return-value]


def _kind_of(part: Any) -> Any:
    if isinstance(part, tuple):
        return types.NamedTuple([_kind_of(inner) for inner in part], type(part))
    return numba.typeof(part) if isinstance(part, np.ndarray) else types.voidptr


def _words_of(leaf: Any, kind: Any) -> tuple[int, ...]:
    if isinstance(leaf, np.ndarray):
        return leaf.ctypes.data, *leaf.shape
    return (leaf.address(Borrowed(kind)) if leaf else 0,)


def _leaves(arrays: Any) -> Iterator[Any]:
    for part in arrays:
        if isinstance(part, tuple):
            yield from _leaves(part)
        else:
            yield part


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
    if isinstance(arrays, Borrowed):
        return arrays(arrays), lambda context, builder, signature, args: args[0]
    is_packed = isinstance(arrays, types.Array) and isinstance(arrays.dtype, types.Record)
    kind = _kinds.get(next(iter(arrays.dtype.fields))) if is_packed else None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if kind is None:
            return _without_owner(context, builder, arrays, args[0])
        return builder.bitcast(make_array(arrays)(context, builder, args[0]).data, _WORDS)

    return (arrays if kind is None else Borrowed(kind))(arrays), generate


def borrowed(arrays: Arrays) -> Arrays:
    """Inside a compiled function: the same array, or named tuple of arrays and such tuples, without counts.

    What is `packed` gets the fields of the tuple that it stands for. Something else must keep the arrays alive
    meanwhile; the caller does so for arguments. Without this every inner call would count each of them up and down,
    atomically, which takes longer than the work itself.
    """
    return arrays


@intrinsic
def _stretch(typing_context: Any, array: Any, start: Any, length: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole, part = make_array(array)(context, builder, args[0]), make_array(array)(context, builder)
        data = builder.gep(whole.data, [args[1]])
        shape, strides = [args[2]], cgutils.unpack_tuple(builder, whole.strides)
        populate_array(part, data=data, shape=shape, strides=strides, itemsize=whole.itemsize, meminfo=None)
        return part._getvalue()

    return array(array, types.int64, types.int64), generate


def stretch(array: Arrays, start: int, length: int) -> Arrays:
    """Inside a compiled function: ``array[start : start + length]`` of a flat array that is `borrowed`.

    Nothing is checked, which takes longer than to read a block table; the part must lie within the array.
    """
    return array[start : start + length]  # type: ignore[index, no-any-return]


# What Numba compiles takes places for its result and for an exception before its arguments, and returns a status.
_NATIVE = ir.FunctionType(ir.IntType(32), [_WORDS, ir.IntType(8).as_pointer(), _WORDS, ir.IntType(64)])


@intrinsic
def _call_kernel(typing_context: Any, kernel: Any, state: Any, number: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = builder.bitcast(args[0], _NATIVE.as_pointer())
        result = cgutils.alloca_once(builder, ir.IntType(64))
        builder.call(function, [result, ir.Constant(_NATIVE.args[1], None), *args[1:]])
        return builder.load(result)

    return types.int64(kernel, state, types.int64), generate


def call_kernel(kernel: Callable[[Any, int], int], state: Any, number: int) -> int:
    """Inside a compiled function: call a `pointed` kernel by its address, past the wrapper for C, which is not inlined.

    That wrapper took as long as a short kernel: strategies replayed traces 3 to 6% slower.
    """
    return kernel(state, number)


# The types of the arguments of each entry, by the name of the field that holds its address.
_entries: dict[str, tuple[Any, ...]] = {}


def entry_of(kernel: Callable[..., None], arguments: tuple[Any, ...]) -> Any:
    """Return what `enter` calls inside compiled functions: a `compiled` kernel, for arguments of the types of these.

    So its machine code is made once, for Python and for all kernels that call it, and none of them waits for the
    compiler anew. With ``NUMBA_DISABLE_JIT=1`` it is the kernel itself.
    """
    if numba.config.DISABLE_JIT:
        return kernel
    kinds = tuple(map(numba.typeof, arguments))
    with uninterrupted():
        code = kernel.get_compile_result(types.none(*kinds))
    name = "entry_" + _digest(kinds)
    _entries[name] = kinds
    address = np.empty(1, [(name, np.int64)])
    address[name] = code.library.get_pointer_to_function(code.fndesc.llvm_func_name)
    return address


@intrinsic
def _enter(typing_context: Any, entry: Any, *arguments: Any) -> Any:
    if _entries[next(iter(entry.dtype.fields))] != arguments:
        raise NumbaTypeError(f"expected arguments of the types of the entry's, got {arguments}")

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = builder.load(builder.bitcast(make_array(entry)(context, builder, args[0]).data, _WORDS))
        kind = context.call_conv.get_function_type(types.none, arguments)
        function = builder.inttoptr(address, kind.as_pointer())
        values = cgutils.unpack_tuple(builder, args[1])
        status, _ = context.call_conv.call_function(builder, function, types.none, arguments, values)
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return types.void(entry, types.StarArgTuple(arguments)), generate


def enter(entry: Any, *arguments: Any) -> None:
    """Inside a compiled function: call the kernel of an entry. The types of the arguments must be those of its own."""
    entry(*arguments)


if not TYPE_CHECKING and not numba.config.DISABLE_JIT:
    borrowed = _borrowed
    stretch = _stretch
    call_kernel = _call_kernel
    enter = _enter
