"""Products with quantised weights from programs: what the kernel takes, and the shapes that it gives. Traced; no numba.

Activations are rounded to 8 or 16 bits, 32 inputs at a time, unless they are to stay floats, as weights that are floats
take them in any case. For any number of rows, so
that a row's bits are the same whatever the step that it is in.
"""

from collections.abc import Iterable

import jax
import ml_dtypes
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from ..block_tiles import BLOCK, LAYOUTS, OUTPUTS, Tiles
from . import loader
from .blocks_records import NUMBER_BYTES, Activations, room_bytes, rounded_to

# What the kernel reads and writes; float16 is widened in front of it, and rounded behind it.
TAKEN = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float32)}


def takes(format_name: str) -> bool:
    """Return whether the kernel is written for a format."""
    return format_name in LAYOUTS


def kernels_of(formats: Iterable[str], activations: Activations) -> list[str]:
    """Name the kernels for formats, as `loader.compile_ahead` takes them."""
    return [":".join(["blocks", *map(str, parameters(name, activations))]) for name in formats if takes(name)]


def _target(format_name: str, activations: Activations) -> str | None:
    """Return the name under which XLA knows the kernel for a format, loaded on its first use; None: XLA has to do."""
    return loader.target("blocks", *parameters(format_name, activations))


def parameters(format_name: str, activations: Activations) -> tuple[int, int]:
    """Return what a kernel for a format and a kind of activations is compiled for."""
    made = rounded_to(LAYOUTS[format_name], activations)
    return list(LAYOUTS).index(format_name), list(NUMBER_BYTES).index(made)


def product(
    x: Array, w: Tiles, format_name: str, outputs: int, *, dtype: DTypeLike, activations: Activations
) -> Array | None:
    """Multiply activations [T, k] by a matrix [n, k] in tiles; None where XLA has to.

    Args:
        x: [T, k] float32, bfloat16 or float16.
        w: the matrix.
        format_name: of `LAYOUTS`.
        outputs: n; the last tile may have fewer than 16.
        dtype: of the result, one of those of x.
        activations: what x is rounded to.

    Returns:
        [T, n].
    """
    dtype = np.dtype(dtype)
    if x.dtype.name not in TAKEN or dtype.name not in TAKEN or 0 in (*x.shape, outputs) or not takes(format_name):
        return None
    name = _target(format_name, activations)
    if name is None:
        return None
    _check(x, w, outputs)
    x, made = x.astype(TAKEN[x.dtype.name]), TAKEN[dtype.name]
    results = [jax.ShapeDtypeStruct((x.shape[0], outputs), made), _room(x, format_name, activations)]
    arrays = [array for array in (x, *w) if array is not None]
    sizes = {"out_bytes": np.int64(made.itemsize), "x_bytes": np.int64(x.dtype.itemsize)}
    called = jax.ffi.ffi_call(name, results, vmap_method="sequential")(*arrays, **sizes)
    result: Array = called[0]
    return result.astype(dtype)


def _check(x: Array, w: Tiles, outputs: int) -> None:
    """The kernel reads what shapes say and can refuse nothing, so they are looked at here, while tracing."""
    tiles, blocks = w.values.shape[:2]
    if x.shape[1] != blocks * BLOCK or -(-outputs // OUTPUTS) != tiles:
        raise ValueError(
            f"x has shape {x.shape} and there are {outputs} outputs: the weights have {tiles} tiles of {OUTPUTS} "
            f"outputs and {blocks} blocks of {BLOCK} inputs."
        )


def _room(x: Array, format_name: str, activations: Activations) -> jax.ShapeDtypeStruct:
    layout = LAYOUTS[format_name]
    size = room_bytes(x.shape[0], x.shape[1], layout, rounded_to(layout, activations))
    return jax.ShapeDtypeStruct((size,), np.uint8)
