"""What a model's parameters may be: arrays, or matrices that stay in the format of their file.

`QuantizedArray` is `kernels_pallas/quantized.py`'s, because products take it; here is what surrounds it: the
description of a parameter that is to be placed, and the way from floats to a format. Which parameters stay quantised is
not decided here.
"""

import math
from collections.abc import Callable

import jax
import numpy as np

from ..kernels_pallas.block_tiles import pack
from ..kernels_pallas.quantized import QuantizedArray, abstract

__all__ = ["Described", "QuantizedArray", "Weight", "nbytes", "placed", "quantize"]

# A parameter, and the description of one: shape, dtype and, where it is to be placed, sharding of its arrays.
type Weight = jax.Array | QuantizedArray
type Described = jax.ShapeDtypeStruct | QuantizedArray


def nbytes(described: Described) -> int:
    """Return the size of a parameter of this description."""
    return sum(math.prod(array.shape) * int(array.dtype.itemsize) for array in jax.tree.leaves(described))


def placed(described: Described, sharding: Callable[[jax.ShapeDtypeStruct], jax.sharding.Sharding]) -> Described:
    """Describe a parameter as it is to be placed: `sharding` gives the sharding of each of its arrays."""
    result: Described = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)), described
    )  # fmt: skip
    return result


def quantize(array: np.ndarray | jax.Array, like: QuantizedArray) -> QuantizedArray:
    """Round a parameter to a format, as llama.cpp's own tools do.

    Args:
        array: floats, of `like`'s shape.
        like: a quantised parameter, or its description (`AbstractParams.specs`).

    Raises:
        ValueError: another shape, or a format that this library reads and cannot write.
    """
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize as to_blocks

    if tuple(np.shape(array)) != like.shape:
        raise ValueError(f"array has shape {list(np.shape(array))}: it must be {list(like.shape)}.")
    if like.stacked:
        one = abstract(like.format, like.shape[1:], like.inputs)
        parts = [dict(quantize(matrix, one).parts()) for matrix in np.asarray(array)]
        return like.with_parts({name: np.stack([part[name] for part in parts]) for name in parts[0]})
    n, k = like.matrix
    floats = np.asarray(array).astype(np.float32)
    matrix = floats.reshape(k, n).T if like.inputs else floats.reshape(n, k)
    try:
        raw = to_blocks(np.ascontiguousarray(matrix), GGMLQuantizationType[like.format])
    except NotImplementedError:
        raise ValueError(
            f"array cannot be rounded to {like.format} here: quantise the model with llama.cpp, or start the engine "
            "with quantization='none', which takes floats."
        ) from None
    return like.with_tiles(pack(like.format, raw))
