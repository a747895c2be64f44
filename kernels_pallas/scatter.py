"""Writes rows into an array, in place if it is donated, whatever the number of rows.

Page pools, page tables and the state of requests are all written by these functions, which know nothing about pages.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array


def write_rows(target: Array, index: Array | tuple[Array, ...], rows: Array, axis: int = 0) -> Array:
    """Set `rows` in `target` at `index` along `axis`.

    Args:
        target: the array to write to.
        index: [R] int32, not negative: where each row goes along `axis`; one past the end writes nothing, others are
            distinct. Several such arrays index `axis` and the axes after it together.
        rows: of `target`'s shape, with R in place of the indexed axes.

    Returns:
        The updated array.
    """
    places, rows = _places(target, index, rows, axis)
    written: Array = places.set(rows, mode="drop", unique_indices=True)
    return written


def add_to_rows(target: Array, index: Array | tuple[Array, ...], rows: Array, axis: int = 0) -> Array:
    """Add `rows` to the values of `target` at `index` along `axis`; arguments are as for `write_rows`."""
    places, rows = _places(target, index, rows, axis)
    written: Array = places.add(rows, mode="drop", unique_indices=True)
    return written


def _places(target: Array, index: Array | tuple[Array, ...], rows: Array, axis: int) -> tuple[Any, Array]:
    """Return the places to scatter to, and the rows: at least two, one of which may be past the end."""
    ids = index if isinstance(index, tuple) else (index,)
    if ids[0].shape[0] == 1:
        # XLA turns a scatter of one row into a select and an update whose fusion copies the whole target.
        past_end = jnp.full_like(ids[0], target.shape[axis])
        ids = tuple(jnp.concatenate(pair) for pair in zip(ids, (past_end, *ids[1:]), strict=True))
        rows = jnp.concatenate([rows, rows], axis=axis)
    return target.at[(*(slice(None),) * axis, *ids)], rows
