"""XLA's call of a kernel as typed Python sees it: the frame with its buffers and attributes, and raw memory.

Layouts are those of `xla/ffi/api/c_api.h` in `jax.ffi.include_dir()`, in words of 8 bytes; they have been the same from
API 0.1 on, and a frame only grows at its end. numba turns what is here, and what is written with it, into LLVM's
intermediate form (`build.py`); nothing here runs as Python.

An address is an int64. Nothing here may be a number that belongs to a process, such as the address of an array: numba
writes globals into the code, and the code is kept on disk.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# How every function of a kernel is compiled: without Python's errors, which could not be raised in XLA's threads.
NUMBA = {"nogil": True, "error_model": "numpy"}

# XLA_FFI_CallFrame: size, extensions, api, context, stage; arguments and results, five words each: size, extensions,
# count, types, pointers; attributes, six: names come before pointers.
EXTENSIONS, API, CONTEXT, ARGUMENTS, RESULTS, ATTRIBUTES = 8, 16, 24, 40, 80, 120
_POINTERS, _ATTRIBUTE_POINTERS = 32, 40
# XLA_FFI_Buffer: size, extensions, dtype, data, rank, dimensions. XLA_FFI_Scalar: dtype, pointer to the value.
_DATA, _DIMENSIONS, _VALUE = 24, 40, 8
# XLA_FFI_Metadata_Extension: size, type, next, metadata. XLA_FFI_Metadata: size, then size, extensions, major|minor.
METADATA_TYPE, EXTENSION_TYPE, METADATA, VERSION = 1, 8, 24, 24
API_VERSION = 0 | 1 << 32  # 0.1: every jaxlib takes it; 0.0 and what is newer than the jaxlib are refused
# XLA_FFI_Api: size, extensions, version (3 words), internal, then functions.
SCHEDULE, DESTROY_ERROR = 136, 64

_I64, _ORDER = ir.IntType(64), "seq_cst"


@intrinsic
def load(typing: Any, address: Any, dtype: Any) -> Any:
    """Read a number of type `dtype` at an address."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = context.get_value_type(signature.return_type)
        return builder.load(builder.inttoptr(arguments[0], kind.as_pointer()))

    return dtype.dtype(address, dtype), code


@intrinsic
def store(typing: Any, address: Any, value: Any) -> Any:
    """Write a number at an address."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], builder.inttoptr(arguments[0], arguments[1].type.as_pointer()))
        return context.get_dummy_value()

    return types.void(address, value), code


@intrinsic
def add_at(typing: Any, address: Any, value: Any) -> Any:
    """Add to the word at an address and return what it was before. Atomic."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], _I64.as_pointer()), arguments[1], _ORDER)

    return types.int64(types.int64, types.int64), code


@intrinsic
def swap_at(typing: Any, address: Any, expected: Any, value: Any) -> Any:
    """Write a value into the word at an address if that is the expected one; returns 1 if it was. Atomic."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = builder.inttoptr(arguments[0], _I64.as_pointer())
        result = builder.cmpxchg(where, arguments[1], arguments[2], _ORDER, _ORDER)
        return builder.zext(builder.extract_value(result, 1), _I64)

    return types.int64(types.int64, types.int64, types.int64), code


@intrinsic
def call(typing: Any, function: Any, argument: Any) -> Any:
    """Call the C function at an address with one word."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_I64, [_I64])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])

    return types.int64(types.int64, types.int64), code


def room(size: int) -> Any:
    """Make a function that returns the address of `size` bytes on the stack, which are gone when its caller returns."""

    @intrinsic
    def allocate(typing: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.ArrayType(ir.IntType(8), size)
            # Not by numba's own helper, which writes zeros there as one value: minutes to compile for some kilobytes.
            with builder.goto_entry_block():
                place = builder.alloca(kind)
            place.align = 64
            return builder.ptrtoint(place, _I64)

        return types.int64(), code

    return allocate


def _read(builder: Any, address: Any, offset: int) -> Any:
    """Read the word that lies `offset` bytes behind an address."""
    place = builder.add(address, ir.Constant(_I64, offset))
    return builder.load(builder.inttoptr(place, _I64.as_pointer()))


def _place(builder: Any, address: Any, index: Any) -> Any:
    """Return the place of word `index` at an address."""
    offset = builder.mul(index, ir.Constant(_I64, 8))
    return builder.inttoptr(builder.add(address, offset), _I64.as_pointer())


def _word_at(*offsets: int, then: int | None = None) -> Any:
    """Make code that follows pointers from an address: by offsets, to word `index` there, on from that by `then`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, index = arguments
        for offset in offsets:
            address = _read(builder, address, offset)
        found = builder.load(_place(builder, address, index))
        return found if then is None else builder.load(
            builder.inttoptr(_read(builder, found, then), _I64.as_pointer())
        )  # fmt: skip

    return code


# These are no functions of numba's, which would compile one for each constant that they are called with.


@intrinsic
def word(typing: Any, address: Any, index: Any) -> Any:
    """Read word `index` at an address."""
    return types.int64(types.int64, types.int64), _word_at()


@intrinsic
def set_word(typing: Any, address: Any, index: Any, value: Any) -> Any:
    """Write word `index` at an address."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, index, value = arguments
        builder.store(value, _place(builder, address, index))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


@intrinsic
def argument(typing: Any, frame: Any, index: Any) -> Any:
    """Return the address of the description of a call's argument."""
    return types.int64(types.int64, types.int64), _word_at(ARGUMENTS + _POINTERS)


@intrinsic
def result(typing: Any, frame: Any, index: Any) -> Any:
    """Return the address of the description of a call's result."""
    return types.int64(types.int64, types.int64), _word_at(RESULTS + _POINTERS)


@intrinsic
def attribute(typing: Any, frame: Any, index: Any) -> Any:
    """Return the value of an attribute, an int64; they are in the order of their names."""
    return types.int64(types.int64, types.int64), _word_at(ATTRIBUTES + _ATTRIBUTE_POINTERS, then=_VALUE)


@intrinsic
def size(typing: Any, buffer: Any, axis: Any) -> Any:
    """Return the length of one of a buffer's axes."""
    return types.int64(types.int64, types.int64), _word_at(_DIMENSIONS)


@intrinsic
def data(typing: Any, buffer: Any) -> Any:
    """Return the address of a buffer's elements."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _read(builder, arguments[0], _DATA)

    return types.int64(types.int64), code
