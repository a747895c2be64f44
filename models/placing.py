"""Puts host arrays on devices, and says which parts of an array a process needs where others drive the rest of a mesh.

`jax.device_put` onto a mesh over processes sends the whole array between them, to see that all have been given the same
(jax 0.12.0.1). Here every process puts its own shards and nothing is sent: whoever calls gives all of them one array.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Sharding
from jax.typing import ArrayLike


def put(array: ArrayLike, sharding: Sharding, *, may_alias: bool | None = None) -> jax.Array:
    """Put an array where `sharding` says, of which this process fills the shards of its own devices.

    `may_alias` is that of `jax.device_put`; over processes, CPU devices may share the memory of `array`.
    """
    if sharding.is_fully_addressable:
        placed: jax.Array = jax.device_put(array, sharding, may_alias=may_alias)
        return placed
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def own_rows(
    places: Sequence[jax.ShapeDtypeStruct], rows: int, *, transposed: bool = False, matrix: int | None = None
) -> np.ndarray | None:
    """Find which rows of a matrix this process needs for its devices: [rows] bool; None: all of them.

    Args:
        places: where the parameter goes, one description for each mesh; one without a sharding needs all rows.
        rows: of the matrix, which are the parameter's first axes, or where it is `transposed` its last ones.
        transposed: whether the parameter is the matrix's transpose.
        matrix: which of the matrices along the parameter's first axis it is; None: it is the only one.
    """
    if any(place.sharding is None for place in places) or all(place.sharding.is_fully_addressable for place in places):
        return None
    shape = places[0].shape[matrix is not None :]
    axes = _axes_of(shape[::-1] if transposed else shape, rows)
    if axes is None:
        return None
    chosen = slice(len(shape) - axes, None) if transposed else slice(axes)
    needed = np.zeros(shape[chosen], bool)
    for place in places:
        for index in place.sharding.addressable_devices_indices_map(place.shape).values():
            assert index is not None
            if matrix is None or matrix in range(place.shape[0])[index[0]]:
                needed[index[matrix is not None :][chosen]] = True
    return needed.reshape(-1)


def _axes_of(shape: Sequence[int], size: int) -> int | None:
    """Return how many of the first axes count `size` elements; None: the matrix is cut elsewhere than between axes."""
    return next((count for count in range(len(shape) + 1) if math.prod(shape[:count]) == size), None)
