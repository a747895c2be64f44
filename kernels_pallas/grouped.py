"""Rows by the matrix that they go to: what a mixture of experts needs around its products, in plain XLA.

Each of T rows is to pass K of X experts. `group` puts the T * K choices into blocks of a fixed number of rows that all
go to one expert, without a sort: places are counted. `over_blocks` then runs a function over the blocks that are in
use, so that only the experts that some row has chosen are read, each once for as many rows as a block holds. This is
the CPU's way, and right on every device; `jax.lax.ragged_dot` computes every expert for every row.

Invariant: what a row becomes depends on that row and on the number of rows of a block, not on the rows beside it.
Not here: routers, weights and activations (`models/moe.py`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Rows of a block: a CPU's products cost about the same for 1 to 8 rows, and use its arithmetic from 64 on.
_FEWEST, _MOST = 8, 64


class Blocks(NamedTuple):
    """Choices of experts in M blocks of B rows."""

    rows: Array  # [M, B] int32, the row that each place takes; T: none
    expert: Array  # [M] int32, whose rows these are
    used: Array  # [] int32: the blocks from this one on are empty
    place: Array  # [T, K] int32, where among the M * B places each choice lies


def block_rows(rows: int, per_row: int, experts: int) -> int:
    """Choose the rows of a block for so many rows that pass `per_row` experts each: about as many as an expert gets."""
    share = -(-rows * per_row // experts)
    return min(rows, max(_FEWEST, min(_MOST, 1 << (share - 1).bit_length())))


def group(chosen: Array, experts: int, size: int) -> Blocks:
    """Put choices into blocks.

    Args:
        chosen: [T, K] int32 below `experts`, distinct in a row.
        experts: X.
        size: B, rows of a block.
    """
    rows, per_row = chosen.shape
    choices = rows * per_row
    most = min(choices, experts + choices // size)  # M: blocks that end before their last row, and full ones
    flat = chosen.reshape(-1)
    is_of = (flat[:, None] == jnp.arange(experts, dtype=jnp.int32)).astype(jnp.int32)  # [T * K, X]
    rank = jnp.sum((jnp.cumsum(is_of, axis=0, dtype=jnp.int32) - is_of) * is_of, axis=1, dtype=jnp.int32)
    blocks = -(-jnp.sum(is_of, axis=0, dtype=jnp.int32) // size)  # [X]
    end = jnp.cumsum(blocks, dtype=jnp.int32)
    place = (end - blocks)[flat] * size + rank
    row = jnp.arange(choices, dtype=jnp.int32) // per_row
    taken = jnp.full(most * size, rows, jnp.int32).at[place].set(row, unique_indices=True)
    is_past = end <= jnp.arange(most, dtype=jnp.int32)[:, None]  # [M, X]
    expert = jnp.minimum(jnp.sum(is_past, axis=1, dtype=jnp.int32), experts - 1)
    return Blocks(taken.reshape(most, size), expert, end[-1], place.reshape(rows, per_row))


def over_blocks(x: Array, blocks: Blocks, transform: Callable[[Array, Array], Array]) -> Array:
    """Transform rows in the blocks that are in use.

    Args:
        x: [T, k].
        blocks: of its T rows.
        transform: from [B, k] rows and their expert [] int32 to [B, n]; where a block has no row it gets zeros.

    Returns:
        [M * B, n]; zeros in blocks that are not in use.
    """
    most, size = blocks.rows.shape
    like = jax.eval_shape(transform, jax.ShapeDtypeStruct((size, x.shape[1]), x.dtype), blocks.expert[0])

    def step(index: Array, out: Array) -> Array:
        rows = x.at[blocks.rows[index]].get(mode="fill", fill_value=0)
        done = transform(rows, blocks.expert[index])
        return jax.lax.dynamic_update_slice_in_dim(out, done, index * size, axis=0)

    result: Array = jax.lax.fori_loop(0, blocks.used, step, jnp.zeros((most * size, like.shape[1]), like.dtype))
    return result
