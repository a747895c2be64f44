"""Rows by the matrix that they go to: the products of a mixture of experts, and the order that they take rows in.

Each of T rows is to pass K of X experts. `group` gives the T * K choices places in the order of experts, without a
sort. `grouped_matmul` multiplies rows that lie so by a stack of X matrices, each group of rows by the matrix of its
expert. It is the one seam between experts and kernels: what `jax.lax.ragged_dot` computes, which is not used, because
it computes every expert for every row. A kernel for a device takes the place of the loop over blocks below:

    (x [M, k], w [X, k, n] or a quantised stack, sizes [X] int32) -> [M, n]

    rows sizes[0] + ... + sizes[e - 1] and on, sizes[e] of them, times w[e]; matrices without rows are not read, and
    rows past the sum of the sizes are neither read nor, of necessity, written

On CPUs that is `cpu/stacks.py`, on Hopper GPUs `grouped_matmul.py`, which also combines the products of two stacks.
Every other device, and a CPU without kernels, takes the loop: it multiplies blocks of a fixed number of rows by a copy
of their expert's matrix, and is right on every device.

Invariant: what a row becomes depends on that row alone, for a number of rows M. Not here: routers, weights and
activations (`models/moe.py`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from . import dispatch
from .block_tiles import OUTPUTS, Tiles
from .cpu import stacks
from .matmul import PLAIN, Products, is_on_one_cpu, matmul_part
from .quantized import QuantizedArray

# Rows of a block: products cost about the same for 1 to 8 rows, and use a CPU's arithmetic from 64 on.
FEWEST_ROWS, _MOST = 8, 64
# Choices up to which all pairs of them are compared, in one pass over so many times so many.
MOST_COMPARED = 512


class Groups(NamedTuple):
    """M = T * K choices of experts in the order of experts; of one expert in the order of rows; none at the end."""

    rows: Array  # [M] int32, the row of each place
    experts: Array  # [M] int32, the expert of each place; X: none
    sizes: Array  # [X] int32, places of each expert
    places: Array  # [T, K] int32, the place of each choice


def group(chosen: Array, experts: int) -> Groups:
    """Give choices their places.

    Args:
        chosen: [T, K] int32 up to `experts`, which means none.
        experts: X.
    """
    flat = chosen.reshape(-1)
    sizes = jnp.sum(flat[:, None] == jnp.arange(experts, dtype=jnp.int32), axis=0, dtype=jnp.int32)
    index = jnp.arange(flat.shape[0], dtype=jnp.int32)
    places = _by_pairs(flat, index) if flat.shape[0] <= MOST_COMPARED else _by_counts(flat, experts)
    order = jnp.zeros_like(index).at[places].set(index, unique_indices=True)
    return Groups(order // chosen.shape[1], flat[order], sizes, places.reshape(chosen.shape))


def _by_pairs(flat: Array, index: Array) -> Array:
    """Count for each choice those that come before it: of lower experts, and of its own in front of it."""
    is_before = (flat < flat[:, None]) | ((flat == flat[:, None]) & (index < index[:, None]))
    return jnp.sum(is_before, axis=1, dtype=jnp.int32)


def _by_counts(flat: Array, experts: int) -> Array:
    """Do the same by a running count over one column for each expert."""
    is_of = (flat[:, None] == jnp.arange(experts + 1, dtype=jnp.int32)).astype(jnp.int32)  # [M, X + 1]
    upto = jnp.cumsum(is_of, axis=0, dtype=jnp.int32)
    first = jnp.cumsum(upto[-1], dtype=jnp.int32) - upto[-1]
    return jnp.sum((upto + first) * is_of, axis=1, dtype=jnp.int32) - 1


def grouped_matmul(
    x: Array,
    w: Array | QuantizedArray,
    sizes: Array,
    *,
    products: Products = PLAIN,
    dtype: DTypeLike | None = None,
) -> Array:
    """Multiply groups of rows by a matrix each, of a stack that this device has, whole or the part `shard_map` gives.

    Args:
        x: [M, k], the rows of the first matrix, those of the second, and so on.
        w: [X, k, n]; or a quantised stack of projections.
        sizes: [X] int32, rows of each matrix, M or less together.
        products: the program's.
        dtype: the result's; None: x's.

    Returns:
        [M, n]; rows that belong to no matrix hold anything.
    """
    made = x.dtype if dtype is None else jnp.dtype(dtype)
    if is_on_one_cpu():
        product = _on_cpu(x, w, sizes, products, made)
        if product is not None:
            return product

    def plain(x: Array, stacks: tuple[Array | QuantizedArray], _: tuple[()], sizes: Array) -> Array:
        return _by_blocks(x, stacks[0], sizes, products, made)

    return dispatch.grouped_matmul(x, (w,), (), sizes, dtype=made, plain=plain)


def grouped_unit(
    x: Array,
    stacks: tuple[Array | QuantizedArray, ...],
    biases: tuple[Array, ...],
    groups: Groups,
    combine: Callable[..., Array],
    products: Products = PLAIN,
) -> Array:
    """Multiply groups of rows by several stacks, and combine what comes of them elementwise.

    Args:
        x: [M, k], as `grouped_matmul` takes them.
        stacks: of the same shape and format.
        biases: [X, n] of each stack, or none.
        groups: of the M rows.
        combine: from the products of each stack, with their biases; two that do the same must be equal.
        products: the program's.

    Returns:
        [M, n] of x's dtype; rows that belong to no matrix hold anything.
    """

    def plain(
        x: Array, stacks: tuple[Array | QuantizedArray, ...], biases: tuple[Array, ...], sizes: Array
    ) -> Array:  # fmt: skip
        made = [grouped_matmul(x, w, sizes, products=products) for w in stacks]
        if biases:
            own = (bias.at[groups.experts].get(mode="clip") for bias in biases)
            made = [a + b for a, b in zip(made, own, strict=True)]
        return combine(*made)

    if is_on_one_cpu():
        return plain(x, stacks, biases, groups.sizes)
    return dispatch.grouped_matmul(x, stacks, biases, groups.sizes, combine=combine, dtype=x.dtype, plain=plain)


def _on_cpu(x: Array, w: Array | QuantizedArray, sizes: Array, products: Products, dtype: jnp.dtype) -> Array | None:
    if not isinstance(w, QuantizedArray):
        return stacks.product(x, w, sizes, dtype=dtype)
    # A part has whole tiles; `w.shape` is still that of the whole.
    outputs = min(w.matrix[0], w.values.shape[1] * OUTPUTS)
    tiles, activations = Tiles(w.values, w.scales, w.mins), products.activations
    return stacks.product_of_tiles(x, tiles, sizes, w.format, outputs, dtype=dtype, activations=activations)


def block_rows(rows: int, matrices: int) -> int:
    """Choose the rows of a block for so many rows that go to so many matrices: about as many as one gets."""
    share = -(-rows // matrices)
    return min(rows, max(FEWEST_ROWS, min(_MOST, 1 << (share - 1).bit_length())))


def _by_blocks(x: Array, w: Array | QuantizedArray, sizes: Array, products: Products, dtype: jnp.dtype) -> Array:
    """Multiply a block of rows after the other; a group's last block goes on into the next, whose own comes later."""
    count = block_rows(x.shape[0], sizes.shape[0])
    blocks = -(-sizes // count)  # [X]
    last, first_row = jnp.cumsum(blocks, dtype=jnp.int32), jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    padded = jnp.pad(x, ((0, count), (0, 0)))

    def multiply(rows: Array, index: Array) -> Array:
        matrix = w.matrix_at(index) if isinstance(w, QuantizedArray) else w[index]
        return matmul_part(rows, matrix, products=products, dtype=dtype)

    def step(block: Array, out: Array) -> Array:
        index = jnp.sum(last <= block, dtype=jnp.int32)
        start = first_row[index] + (block - last[index] + blocks[index]) * count
        done = multiply(jax.lax.dynamic_slice_in_dim(padded, start, count), index)
        return jax.lax.dynamic_update_slice_in_dim(out, done, start, axis=0)

    like = jax.eval_shape(multiply, padded[:count], sizes[0])
    empty = jnp.zeros((padded.shape[0], like.shape[1]), like.dtype)
    result: Array = jax.lax.fori_loop(0, last[-1], step, empty)
    return result[: x.shape[0]]
