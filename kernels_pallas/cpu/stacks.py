"""Products with stacks of matrices from programs: what the kernels take, and the shapes that they give. Traced; no
numba.

Weights are an array of floats, or a quantised stack in tiles; `stacks_kernel.py` multiplies by either where it lies.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from ..block_tiles import BLOCK, LAYOUTS, OUTPUTS, Tiles
from . import blocks, loader
from .blocks_records import ROWS, Activations, record_bytes, rounded_to
from .calls import DTYPES


def kernels_of(dtype: DTypeLike, formats: Iterable[str], activations: Activations) -> list[str]:
    """Name the kernels for stacks of these formats, or with none of them of `dtype`, as `compile_ahead` takes them."""
    found = [":".join(["stack_blocks", *map(str, blocks.parameters(name, activations))]) for name in formats]
    name = jnp.dtype(dtype).name
    return found or ([f"stack_{name}"] if name in DTYPES else [])


def product(x: Array, w: Array, sizes: Array, *, dtype: DTypeLike) -> Array | None:
    """Multiply groups of rows x [M, k] by matrices w [X, k, n], as `grouped.grouped_matmul`; None where XLA has to."""
    if x.dtype != w.dtype or w.dtype.name not in DTYPES or 0 in (*x.shape, *w.shape):
        return None
    target = loader.target(f"stack_{w.dtype.name}")
    if target is None:
        return None
    taken = x if loader.takes_bfloat16() else x.astype(jnp.float32)
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[2]), jnp.float32)
    called: Array = jax.ffi.ffi_call(target, out, vmap_method="sequential")(taken, sizes, w)
    return called.astype(dtype)


def product_of_tiles(
    x: Array, w: Tiles, sizes: Array, format_name: str, outputs: int, *, dtype: DTypeLike, activations: Activations
) -> Array | None:
    """Multiply groups of rows by quantised matrices [n, k] of a stack, whose arrays have an axis in front.

    Args:
        x: [M, k] float32, bfloat16 or float16.
        w: the stack.
        sizes: [X] int32, rows of each matrix.
        format_name: of `LAYOUTS`.
        outputs: n; the last tile may have fewer than 16.
        dtype: of the result, one of those of x.
        activations: what x is rounded to.

    Returns:
        [M, n]; None where XLA has to.
    """
    made, taken = blocks.TAKEN.get(np.dtype(dtype).name), blocks.TAKEN.get(x.dtype.name)
    if made is None or taken is None or 0 in (*x.shape, outputs) or not blocks.takes(format_name):
        return None
    target = loader.target("stack_blocks", *blocks.parameters(format_name, activations))
    if target is None:
        return None
    matrices, tiles, inputs = w.values.shape[:3]
    if x.shape[1] != inputs * BLOCK or -(-outputs // OUTPUTS) != tiles or sizes.shape != (matrices,):
        raise ValueError(
            f"x has shape {x.shape}, there are {sizes.shape} sizes and {outputs} outputs: the weights have {matrices} "
            f"matrices, {tiles} tiles of {OUTPUTS} outputs and {inputs} blocks of {BLOCK} inputs."
        )
    rows = x.shape[0]
    # A matrix's rows begin a record of their own.
    records, layout = (rows // ROWS + min(rows, matrices)) * inputs, LAYOUTS[format_name]
    room = jax.ShapeDtypeStruct((records * record_bytes(layout, rounded_to(layout, activations)),), np.uint8)
    arrays = [x.astype(taken), sizes, *(array for array in w if array is not None)]
    attributes = {"out_bytes": np.int64(made.itemsize), "x_bytes": np.int64(taken.itemsize)}
    results = [jax.ShapeDtypeStruct((rows, outputs), made), room]
    called = jax.ffi.ffi_call(target, results, vmap_method="sequential")(*arrays, **attributes)
    result: Array = called[0]
    return result.astype(dtype)
