"""Arrays in memory that nobody has written to, on CPUs: they take room as they are used, not when they are made.

XLA has no such array on CPUs: `jnp.zeros` writes every page of the memory, and then the process holds it. The result of
a custom call is memory straight from the allocator, which the system gives out page by page at the first write; the
call itself (`_leave_alone`) does nothing. What a large array holds is zero then, but nothing may rely on it. The call
is a Python function, once per array: the target is found by its name, so that no address is in a program.

Layouts: xla/ffi/api/c_api.h in `jax.ffi.include_dir()`, in words of 8 bytes.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import DTypeLike

TARGET = "twinmesh_unwritten"
# glibc gives an allocation of this size pages of its own, always; a smaller one may have been used before.
FEWEST_BYTES = 32 << 20
# XLA_FFI_CallFrame: its extensions. XLA_FFI_Metadata_Extension: type, and what is to be filled in, of which the version
# of the interface is the fourth word, as major | minor << 32.
_EXTENSIONS, _TYPE, _METADATA, _VERSION = 1, 1, 3, 3
_IS_METADATA = 1
_VERSION_0_1 = 1 << 32  # every jaxlib takes it; a version newer than the jaxlib is refused


def _leave_alone(frame: int) -> None:
    """Answer the question for the version, which comes once; otherwise do nothing. No result is no error."""
    extension = _words(frame)[_EXTENSIONS]
    if extension and _words(extension)[_TYPE] & 0xFFFFFFFF == _IS_METADATA:
        _words(_words(extension)[_METADATA])[_VERSION] = _VERSION_0_1


def _words(address: int) -> Any:
    return ctypes.cast(address, ctypes.POINTER(ctypes.c_int64))


_HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(_leave_alone)  # must live as long as the process


@functools.cache
def register() -> None:
    """Make the target known to XLA, before a program with such arrays is compiled or read from where it is kept."""
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(_HANDLER), platform="cpu")


def unwritten(shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
    """Make an array of any values while tracing a program for one CPU device."""
    register()
    array: jax.Array = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(tuple(shape), dtype))()
    return array
