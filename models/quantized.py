"""What a model's parameters may be: arrays, or matrices that stay in the format of their file.

`QuantizedArray` is `kernels_pallas/quantized.py`'s, because products take it; here is what surrounds it: the
description of a parameter that is to be placed, and the way from floats to a format. Which parameters stay quantised is
not decided here.
"""

import math
from collections.abc import Callable

import jax
import numpy as np

from ..kernels_pallas.block_tiles import pack, pack_parts
from ..kernels_pallas.quantized import QuantizedArray, abstract
from .rounding import round_rows

__all__ = ["Described", "QuantizedArray", "Weight", "nbytes", "placed", "quantize"]

# A parameter, and the description of one: shape, dtype and, where it is to be placed, sharding of its arrays.
type Weight = jax.Array | QuantizedArray
type Described = jax.ShapeDtypeStruct | QuantizedArray
# Formats that are rounded to by the gguf library; MXFP4 is not, as it chooses another scale than OCP's.
_GGUF = ("Q8_0", "Q5_0", "Q4_0", "Q4_1", "Q6_K", "Q4_K")


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
    """Round a parameter to a format: to one of GGUF's as llama.cpp's own tools do, to others as `rounding.py` says.

    Args:
        array: finite floats, of `like`'s shape.
        like: a quantised parameter, or its description (`AbstractParams.specs`).

    Raises:
        ValueError: another shape, or a format that this library reads and cannot write.
    """
    if tuple(np.shape(array)) != like.shape:
        raise ValueError(f"array has shape {list(np.shape(array))}: it must be {list(like.shape)}.")
    if like.stacked:
        one = abstract(like.format, like.shape[1:], like.inputs)
        parts = [dict(quantize(matrix, one).parts()) for matrix in np.asarray(array)]
        return like.with_parts({name: np.stack([part[name] for part in parts]) for name in parts[0]})
    n, k = like.matrix
    floats = np.asarray(array).astype(np.float32)
    matrix = floats.reshape(k, n).T if like.inputs else floats.reshape(n, k)
    matrix = np.ascontiguousarray(matrix)
    if like.format in _GGUF:
        return like.with_tiles(pack(like.format, _to_blocks(matrix, like.format)))
    return like.with_tiles(pack_parts(like.format, round_rows(like.format, matrix)))


def _to_blocks(matrix: np.ndarray, format_name: str) -> np.ndarray:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize as to_blocks

    try:
        raw: np.ndarray = to_blocks(matrix, GGMLQuantizationType[format_name])
    except NotImplementedError:
        raise ValueError(
            f"array cannot be rounded to {format_name} here: quantise the model with llama.cpp, or start the engine "
            "with quantization='none', which takes floats."
        ) from None
    return raw
