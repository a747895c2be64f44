"""Products of activations and weights: the one function that every linear layer and the head call.

Weights are an array of the activations' dtype, or a `QuantizedArray`, which is made floats of a bounded part at a time
while it is multiplied: no second copy of the weights ever exists. A product is right on every device; a faster kernel
takes its place where there is one.

Invariants: products are summed in float32 at least. A row's result does not depend on the rows beside it, for a number
of rows. With several devices weights are read where they are: what is gathered or summed is activations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from .block_tiles import BLOCK, OUTPUTS
from .quantized import QuantizedArray, dequantize, is_column

# The most bytes of quantised weights that are floats at a time.
BUFFER_BYTES = 16 << 20

type Split = Literal["outputs", "inputs"]
"""Which axis of a matrix is divided over the devices of a mesh: its outputs, or the inputs that a product sums over."""


@dataclass(frozen=True)
class Devices:
    """The devices that a program's weights are divided over, along one axis of their mesh."""

    mesh: Mesh
    axis: str
    split_axes: frozenset[str]  # logical axes that are divided, where their length allows it

    def split(self, axes: Sequence[str], w: QuantizedArray) -> Split | None:
        """Find how a parameter with these logical axes is divided; None: it is whole on every device.

        A table is whole if its rows do not divide into tiles. A projection that does not divide into tiles and blocks
        cannot be kept quantised: `cut` tells.
        """
        for index, (name, size) in enumerate(zip(axes, w.shape, strict=True)):
            if name in self.split_axes and size % self.mesh.size == 0:
                split: Split = "inputs" if is_column(index, w.inputs) else "outputs"
                return None if w.inputs == 0 and self.cut(split, w) else split
        return None

    def cut(self, split: Split | None, w: QuantizedArray) -> str | None:
        """Say what a split would cut in two, and how; None: it cuts nothing."""
        if split is None:
            return None
        what, unit, size = ("blocks", BLOCK, w.matrix[1]) if split == "inputs" else ("tiles", OUTPUTS, w.matrix[0])
        share = size // self.mesh.size
        if share % unit == 0:
            return None
        return f"{share} {split} on each of {self.mesh.size} devices are no multiple of {unit}, which {what} have"


def kernel_for(platform: str, format_name: str) -> str | None:
    """Name the kernel that multiplies by weights of a format on this machine's devices of a platform.

    None: there is none, and XLA makes floats of a part of the weights at a time.
    """
    return None


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision:
    """Choose full precision for float32: a GPU would otherwise multiply in TF32, which keeps 10 bits of mantissa."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def matmul(
    x: Array,
    w: Array | QuantizedArray,
    *,
    is_table: bool = False,
    dtype: DTypeLike | None = None,
    split: Split | None = None,
    devices: Devices | None = None,
) -> Array:
    """Multiply activations by a weight.

    Args:
        x: [T, k].
        w: [k, n], or [n, k] of a table; or a quantised parameter, whichever way its matrix lies.
        is_table: whether `w` is [n, k].
        dtype: of the result; None: that of x.
        split: how `w` is divided over `devices`; None: it is whole on each.
        devices: the program's; None: it has one.

    Returns:
        [T, n].
    """
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    if not isinstance(w, QuantizedArray):
        return _plain(x, w, is_table, dtype)
    if split is None or devices is None:
        return _quantized(x, w, w.matrix[0], dtype)
    return _on_each(x, w, dtype, split, devices)


def _plain(x: Array, w: Array, is_table: bool, dtype: jnp.dtype) -> Array:
    precision, result = matmul_precision(w.dtype), None if dtype == x.dtype else dtype
    if is_table:
        # An einsum: `x @ w.T` takes XLA's CPU backend 10 times as long.
        product: Array = jnp.einsum("tk,nk->tn", x, w, precision=precision, preferred_element_type=result)
        return product
    return jnp.matmul(x, w, precision=precision, preferred_element_type=result)


def _on_each(x: Array, w: QuantizedArray, dtype: jnp.dtype, split: Split, devices: Devices) -> Array:
    """Multiply on every device by the part of the weight that it has."""
    whole, axis = PartitionSpec(), devices.axis
    if split == "outputs":
        weights, activations, out = PartitionSpec(axis), whole, PartitionSpec(None, axis)
    else:
        weights, activations, out = PartitionSpec(None, axis), PartitionSpec(None, axis), whole

    outputs = w.matrix[0] // (devices.mesh.size if split == "outputs" else 1)

    def part(x: Array, w: QuantizedArray) -> Array:
        if split == "outputs":
            return _quantized(x, w, outputs, dtype)
        total: Array = jax.lax.psum(_quantized(x, w, outputs, jnp.dtype(jnp.float32)), axis)
        return total.astype(dtype)

    on_each = jax.shard_map(
        part, mesh=devices.mesh, in_specs=(activations, weights), out_specs=out, check_vma=False
    )  # fmt: skip
    result: Array = on_each(x, w)
    return result


def _quantized(x: Array, w: QuantizedArray, outputs: int, dtype: jnp.dtype) -> Array:
    """Multiply by as many tiles at a time as `BUFFER_BYTES` hold as floats; `outputs` may end inside the last one."""
    # Ties the weights to the activations: XLA would otherwise make floats of them early, or once for all steps of a
    # loop, and keep them.
    x, w = jax.lax.optimization_barrier((x, w))
    tiles = w.values.shape[0]
    parts = -(-tiles * OUTPUTS * x.shape[1] * 4 // BUFFER_BYTES)
    if parts == 1:
        return _by_tiles(x, w, dtype)[:, :outputs]
    size = -(-tiles // parts)

    def step(index: Array, out: Array) -> Array:
        first = jnp.minimum(index * size, tiles - size)  # the last part begins where it is whole: some come twice
        some = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, size), w)
        return jax.lax.dynamic_update_slice_in_dim(out, _by_tiles(x, some, dtype), first * OUTPUTS, axis=1)

    result: Array = jax.lax.fori_loop(0, parts, step, jnp.zeros((x.shape[0], tiles * OUTPUTS), dtype))
    return result[:, :outputs]


def _by_tiles(x: Array, w: QuantizedArray, dtype: jnp.dtype) -> Array:
    return _plain(x, dequantize(w).astype(x.dtype), True, dtype)
