"""Finds weights that are not finite numbers, and makes the sentence that refuses them.

A damaged file, or a model that diverged in training, holds NaN or infinity, and one of them makes every token the same.
The test reads each value once while it is in the core's cache. It looks at bits for 16-bit types, whose comparisons
numpy does one by one.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ..errors import CheckpointError

_BLOCK = 1 << 18  # values looked at together
# Bits of infinity; NaN's are larger.
_INFINITY = {np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80}
_SIGN = 0x8000


def is_finite(values: np.ndarray) -> bool:
    """Return whether all of `values`, a contiguous array of floats, are finite."""
    infinity = _INFINITY.get(values.dtype)
    if infinity is None:
        return bool(np.isfinite(values).all())
    positive = values.view(np.int16).max(initial=0) < infinity
    return bool(positive and values.view(np.uint16).max(initial=0) < infinity + _SIGN)


def refusal(
    path: Path, tensor: str, first_row: int, rows: np.ndarray, dtype: np.dtype, *, row_step: int = 1
) -> CheckpointError:
    """Make the error for rows of a tensor that hold a value that is not finite in `dtype`; the caller raises it.

    Args:
        path: the file that holds the tensor.
        tensor: its name.
        first_row: number of the first of the rows in the tensor.
        rows: [rows, columns] as the file has them.
        dtype: what they are to be loaded as.
        row_step: how far apart they are in the tensor.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        found = np.argwhere(~np.isfinite(rows.astype(dtype).astype(np.float32)))
    row, column = found[0]
    value = float(rows[row, column])
    where = f"{path}: tensor {tensor!r} holds {value:g} in row {first_row + row * row_step}"
    if np.isfinite(value):
        return CheckpointError(f"{where}, which {np.dtype(dtype).name} cannot hold: load it as another dtype.")
    return CheckpointError(
        f"{where}, which is no finite number: fetch the model again, or load it as it is with allow_nonfinite "
        "(--allow-nonfinite)."
    )


def check_array(path: Path, name: str, array: jax.Array) -> None:
    """Check an array on devices.

    Raises:
        CheckpointError: a value that is not finite; names the parameter and the first row that holds one.
    """
    for shard in array.addressable_shards:
        if shard.replica_id or (shard.device.platform != "cpu" and bool(jnp.isfinite(shard.data).all())):
            continue
        host = np.asarray(shard.data)
        first = shard.index[0].start or 0 if shard.index else 0
        for start, rows in _blocks(host.reshape(host.shape[0] if host.ndim else 1, -1)):
            if not is_finite(rows):
                raise refusal(path, name, first + start, rows, rows.dtype)


def _blocks(matrix: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    step = max(1, _BLOCK // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        yield start, np.ascontiguousarray(matrix[start : start + step])
