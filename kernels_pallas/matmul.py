"""Products of activations and weights: the one function that every linear layer and the head call.

Weights are an array of the activations' dtype, or a `QuantizedArray`, which is made floats of a bounded part at a time
while it is multiplied: no second copy of the weights ever exists. A product is right on every device; a faster kernel
takes its place where there is one. On CPUs a product of up to 64 rows with an array runs in a kernel of `cpu/`, which
reads the weights once for all rows and gives a row the same bits whatever the other rows are; what the kernels do not
take, more rows included, and all other devices run XLA's product. So does a program whose arrays are split over several
CPUs, where XLA would gather the weights in front of a kernel: its compiler has to say so by
`jax.sharding.use_abstract_mesh`.

Invariants: products are summed in float32 at least. A row's result does not depend on the rows beside it, for a number
of rows. With several devices quantised weights are read where they are: what is gathered or summed is activations.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike

from .block_tiles import BLOCK, OUTPUTS, Tiles
from .cpu import blocks, calls, loader
from .cpu.blocks_records import Activations
from .dispatch import device_kind, grouped_matmul, runs_on_cpu
from .formats.hopper import HOPPER_FORMATS, is_hopper
from .quantized import QuantizedArray, dequantize, is_column

# The most bytes of quantised weights that are floats at a time.
BUFFER_BYTES = 16 << 20

type Split = Literal["outputs", "inputs"]
"""Which axis of a matrix is divided over the devices of a mesh: its outputs, or the inputs that a product sums over."""


@dataclass(frozen=True)
class Products:
    """How a program multiplies by quantised weights, and the devices that these are divided over.

    Matrices are divided over all of a mesh, as are heads; experts, if at all, over one of its axes, and the columns of
    each over the other.
    """

    activations: Activations = "int16"  # what kernels multiply by, where there are any
    mesh: Mesh | AbstractMesh | None = None  # None: one device
    column_axis: str = ""  # of the mesh: over which an expert's columns are divided
    split_axes: frozenset[str] = frozenset()  # logical axes that are divided, where their length allows it
    expert_axis: str | None = (
        None  # of the mesh: over which experts are divided; None: every device has its part of all
    )

    @property
    def axis(self) -> str | tuple[str, ...]:
        """Return what divides all but experts: every axis of the mesh."""
        return self.column_axis if self.expert_axis is None else (self.expert_axis, self.column_axis)

    def ways(self, *, stacked: bool) -> int:
        """Return over how many devices a matrix is divided, or one of a stack."""
        if self.mesh is None:
            return 1
        return self.mesh.shape[self.column_axis] if stacked else self.mesh.size

    def split(self, axes: Sequence[str], w: QuantizedArray) -> Split | None:
        """Find how a parameter with these logical axes is divided; None: it is whole on every device.

        A table is whole if its rows do not divide into tiles. A projection that does not divide into tiles and blocks
        cannot be kept quantised: `cut` tells.
        """
        for index, (name, size) in enumerate(zip(axes[w.stacked :], w.shape[w.stacked :], strict=True)):
            parts = self.ways(stacked=w.stacked > 0)
            if self.mesh is not None and name in self.split_axes and parts > 1 and size % parts == 0:
                split: Split = "inputs" if is_column(index, w.inputs) else "outputs"
                return None if w.inputs == 0 and self.cut(split, w) else split
        return None

    def partition(self, axes: Sequence[str], w: Array | QuantizedArray) -> PartitionSpec:
        """Say how a parameter with these logical axes lies on the mesh, each array of a quantised one.

        Axes of floats that are divided must divide evenly.
        """
        over = self.column_axis if "experts" in axes else self.axis
        if not isinstance(w, QuantizedArray):
            kinds: dict[str, Any] = dict.fromkeys(self.split_axes, over) | {"experts": self.expert_axis}
            return PartitionSpec(*(kinds.get(name) for name in axes))
        split = self.split(axes, w)
        sides = (over if split == side else None for side in ("outputs", "inputs"))
        return PartitionSpec(*(self.expert_axis,) * w.stacked, *sides)

    def cut(self, split: Split | None, w: QuantizedArray) -> str | None:
        """Say what a split would cut in two, and how; None: it cuts nothing."""
        if split is None or self.mesh is None:
            return None
        blocks = "blocks" if w.block <= BLOCK else "groups", max(BLOCK, w.block), w.matrix[1]
        what, unit, size = blocks if split == "inputs" else ("tiles", OUTPUTS, w.matrix[0])
        devices = self.ways(stacked=w.stacked > 0)
        share = size // devices
        if share % unit == 0:
            return None
        return f"{share} {split} on each of {devices} devices are no multiple of {unit}, which {what} have"


PLAIN = Products()


def kernel_for(platform: str, format_name: str, kind: str | None = None) -> str | None:
    """Name the level of the kernel that multiplies by weights of a format on this machine's devices of a platform.

    Compiles nothing. None: there is none, and XLA makes floats of a part of the weights at a time, which it also does
    should the kernel turn out to be unusable. `kind`: of a GPU that need not be there.
    """
    if platform == "gpu":
        has_kernel = format_name in HOPPER_FORMATS and is_hopper(device_kind() if kind is None else kind)
        return "Hopper" if has_kernel else None
    tools = loader.toolchain() if platform == "cpu" and blocks.takes(format_name) else None
    return None if tools is None else tools.level.name


def matmul(x: Array, w: Array | QuantizedArray, *, split: Split | None = None, products: Products = PLAIN) -> Array:
    """Multiply activations by a weight.

    Args:
        x: [T, k].
        w: [k, n]; or a quantised projection.
        split: how a quantised weight is divided over devices; None: it is whole on each.
        products: the program's.

    Returns:
        [T, n] of x's dtype.
    """
    return _multiply(x, w, x.dtype, split, products, is_table=False)


def matmul_part(
    x: Array, w: Array | QuantizedArray, *, products: Products = PLAIN, dtype: DTypeLike | None = None
) -> Array:
    """Multiply by the part of a weight that this device has, which `shard_map` gives it, or by a whole one.

    Nothing is summed over devices. `dtype` is the result's; None: x's. Else as `matmul`.
    """
    made = x.dtype if dtype is None else jnp.dtype(dtype)
    if not isinstance(w, QuantizedArray):
        return _multiply(x, w, made, None, products, is_table=False)
    # A part has whole tiles; `w.shape` is still that of the whole.
    return _quantized(x, w, min(w.matrix[0], w.values.shape[0] * OUTPUTS), made, products)


def score(x: Array, w: Array | QuantizedArray, *, split: Split | None = None, products: Products = PLAIN) -> Array:
    """Multiply activations [T, k] by a table [n, k], a head over an embedding: [T, n] float32; else as `matmul`."""
    return _multiply(x, w, jnp.dtype(jnp.float32), split, products, is_table=True)


def _multiply(
    x: Array,
    w: Array | QuantizedArray,
    dtype: jnp.dtype,
    split: Split | None,
    products: Products,
    *,
    is_table: bool,
) -> Array:
    if not isinstance(w, QuantizedArray):
        product = calls.product(x, w, by_output=is_table) if is_on_one_cpu() else None
        return _by_xla(x, w, is_table, dtype) if product is None else product.astype(dtype)
    if split is None or products.mesh is None:
        return _quantized(x, w, w.matrix[0], dtype, products)
    return _on_each(x, w, dtype, split, products, products.mesh)


def is_on_one_cpu() -> bool:
    """Whether what is traced runs on one CPU device, or on each of several by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    is_manual = all(kind == jax.sharding.AxisType.Manual for kind in mesh.axis_types)
    return runs_on_cpu() and (mesh.size <= 1 or is_manual)


def _by_xla(x: Array, w: Array, is_table: bool, dtype: jnp.dtype) -> Array:
    precision, result = calls.precision(w.dtype), None if dtype == x.dtype else dtype
    if is_table:
        # An einsum: `x @ w.T` takes XLA's CPU backend 10 times as long.
        product: Array = jnp.einsum("tk,nk->tn", x, w, precision=precision, preferred_element_type=result)
        return product
    return jnp.matmul(x, w, precision=precision, preferred_element_type=result)


def _on_each(
    x: Array, w: QuantizedArray, dtype: jnp.dtype, split: Split, products: Products, mesh: Mesh | AbstractMesh
) -> Array:
    """Multiply on every device by the part of the weight that it has."""
    whole, axis = PartitionSpec(), products.axis
    if split == "outputs":
        weights, activations, out = PartitionSpec(axis), whole, PartitionSpec(None, axis)
    else:
        weights, activations, out = PartitionSpec(None, axis), PartitionSpec(None, axis), whole

    outputs = w.matrix[0] // (mesh.size if split == "outputs" else 1)

    def part(x: Array, w: QuantizedArray) -> Array:
        if split == "outputs":
            return _quantized(x, w, outputs, dtype, products)
        total: Array = jax.lax.psum(_quantized(x, w, outputs, jnp.dtype(jnp.float32), products), axis)
        return total.astype(dtype)

    on_each = jax.shard_map(
        part, mesh=mesh, in_specs=(activations, weights), out_specs=out, check_vma=False
    )  # fmt: skip
    result: Array = on_each(x, w)
    return result


def _quantized(x: Array, w: QuantizedArray, outputs: int, dtype: jnp.dtype, products: Products) -> Array:
    """Multiply by a matrix on one device; `outputs` may end inside its last tile."""
    if is_on_one_cpu():
        tiles = Tiles(w.values, w.scales, w.mins)
        product = blocks.product(x, tiles, w.format, outputs, dtype=dtype, activations=products.activations)
        if product is not None:
            return product

    def plain(x: Array, stacks: tuple[QuantizedArray], _: tuple[()], sizes: Array) -> Array:
        return _in_parts(x, stacks[0].matrix_at(0), outputs, dtype)

    one = replace(jax.tree.map(lambda array: array[None], w), shape=(1, *w.shape), stacked=1)
    sizes = jnp.full(1, x.shape[0], jnp.int32)
    return grouped_matmul(x, (one,), (), sizes, dtype=dtype, plain=plain)[:, :outputs]


def _in_parts(x: Array, w: QuantizedArray, outputs: int, dtype: jnp.dtype) -> Array:
    """Multiply by as many tiles at a time as `BUFFER_BYTES` hold as floats."""
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
    return _by_xla(x, dequantize(w).astype(x.dtype), True, dtype)
