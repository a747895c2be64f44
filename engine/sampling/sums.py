"""Sums, counts and positions over the vocabulary, by blocks.

XLA's own scans and index reductions over a whole vocabulary are many times slower on CPUs, and its running sums of
floats are not monotone.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

# Running sums are taken of block sums and within one block.
_BLOCK = 256
_PARTS = 8


def ids_of(values: Array) -> Array:
    """Number the last axis of [R, n] from 0 to n - 1, [1, n] int32."""
    return jnp.arange(values.shape[1], dtype=jnp.int32)[None]


def in_blocks(values: Array, fill: float) -> Array:
    """Reshape [R, n] to [R, blocks, _BLOCK], padding the last block with `fill`."""
    rows, count = values.shape
    return jnp.pad(values, ((0, 0), (0, -count % _BLOCK)), constant_values=fill).reshape(rows, -1, _BLOCK)


def padded(values: Array, fill: float) -> Array:
    """Pad [R, n] with `fill` so that `add_up` can take it."""
    return jnp.pad(values, ((0, 0), (0, -values.shape[1] % _PARTS)), constant_values=fill)


def add_up(amounts: Callable[..., Array], *values: Array) -> Array:
    """Add up what `amounts`, an element-wise function to ints or bools, makes of padded values, [R, n] each: [R, 1].

    On CPUs XLA computes and adds the parts of a row side by side, and only their sums one after the other: five times
    as fast as one sum over the whole.
    """
    parts = zip(*(jnp.split(x, _PARTS, axis=1) for x in values), strict=True)
    return sum(amounts(*part).astype(jnp.int32) for part in parts).sum(axis=-1, keepdims=True)  # type: ignore[union-attr]


def argmax(values: Array) -> Array:
    """Find the lowest index of the largest of [R, n], [R] int32; 0 where all are -inf, a last one where some are NaN.

    Two passes, which are several times as fast as XLA's argmax.
    """
    peak = values.max(axis=-1, keepdims=True)
    last = values.shape[1] - 1
    return jnp.where(values == peak, ids_of(values), last).min(axis=-1)


def nth(mask: Array, count: Array) -> Array:
    """Find where the `count`-th [R, 1] true value of a mask [R, n] stands, [R, 1] int32; behind all where there are
    fewer."""
    blocks = in_blocks(mask, False)
    sums = blocks.sum(axis=-1, dtype=jnp.int32)  # [R, blocks]
    running = jnp.cumsum(sums, axis=-1)
    block = (running < count).sum(axis=-1, dtype=jnp.int32)
    before = jnp.where(ids_of(sums) == block[:, None], running - sums, 0).sum(axis=-1, keepdims=True)
    within = jnp.cumsum(pick_block(blocks, jnp.minimum(block, sums.shape[1] - 1)), axis=-1, dtype=jnp.int32)
    index = (within < count - before).sum(axis=-1, dtype=jnp.int32)
    return (block * _BLOCK + index)[:, None]


def pick_block(blocks: Array, index: Array) -> Array:
    """Pick one block of every row: [R, blocks, _BLOCK], [R] -> [R, _BLOCK]."""
    return jnp.take_along_axis(blocks, index[:, None, None], axis=1)[:, 0]


def where_sum_passes(weights: Array, share: Array) -> Array:
    """Find the index [R] int32 where the running sum of weights [R, n] passes the share [R] of their sum."""
    blocks = in_blocks(weights, 0.0)
    sums = blocks.sum(axis=-1)  # [R, blocks]
    block, rest = _first_above(sums, share * sums.sum(axis=-1))
    within, _ = _first_above(pick_block(blocks, block), rest)
    return block * _BLOCK + within


def _first_above(weights: Array, target: Array) -> tuple[Array, Array]:
    """Find the first index whose running sum exceeds `target`, and how far `target` reaches into it; [R] each."""
    running = jnp.cumsum(weights, axis=-1)
    # Sums are rounded: a running sum may grow by an ulp at weight 0, and the last one may fall short of the target.
    is_possible = weights > 0
    passed = (running > target[:, None]) & is_possible
    last = jnp.where(is_possible, ids_of(weights), 0).max(axis=-1)
    index = jnp.where(passed, ids_of(weights), last[:, None]).min(axis=-1)
    start = jnp.where(ids_of(weights) == index[:, None], running - weights, 0.0).sum(axis=-1)
    return index, jnp.maximum(target - start, 0.0)
