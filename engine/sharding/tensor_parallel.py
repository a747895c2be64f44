"""Repeats a model's key/value heads where a mesh has more devices than it has heads (`sizing/heads.py`).

Host arrays only; `mesh.py` places arrays on devices.
"""

from collections.abc import Sequence

import numpy as np

from ...models.config import ModelConfig


def expand(
    array: np.ndarray, axes: Sequence[str], model: ModelConfig, tp: int, index: tuple[slice, ...] | None = None
) -> np.ndarray:
    """Convert a parameter of `model` to the shape it has in `model_on(model, tp)` by repeating its key/value heads.

    Query head h of the model reads head h // (num_heads / num_kv_heads), so repeating each head next to itself keeps
    every query head with the head that it reads.

    Args:
        array: the parameter in the checkpoint's shape.
        axes: its logical axes, one name per dimension.
        model: the checkpoint's model.
        tp: devices of the mesh.
        index: a slice per dimension of the result, to return that part only; None: all.
    """
    if tp <= model.num_kv_heads or "kv_heads" not in axes:
        return array if index is None else array[index]
    index = index or (slice(None),) * array.ndim
    axis = axes.index("kv_heads")
    heads = np.arange(tp)[index[axis]] // (tp // model.num_kv_heads)
    rest = tuple(slice(None) if dimension == axis else part for dimension, part in enumerate(index))
    return array[rest].take(heads, axis)
