"""A parameter that stays quantised: a pytree of the arrays that `block_tiles.py` describes, and what it stands for.

The arrays hold a matrix of outputs by inputs in tiles: axis 0 of each counts tiles of `OUTPUTS` outputs, axis 1 blocks
of inputs. So a parameter is divided over devices by the same axis of every array: outputs by axis 0, inputs by axis 1.
A stack of matrices, such as experts, is one parameter too: its arrays have an axis in front that counts them.
Nothing here depends on a device. How a tile is packed is `block_tiles.py`'s to know, but for `take_rows`, which reads
one row of a tile and leaves the others.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import block_tiles
from .block_tiles import BLOCK, LAYOUTS, OUTPUTS, Tiles


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales", "mins"], meta_fields=["format", "shape", "inputs", "stacked"],
)  # fmt: skip
@dataclass(frozen=True, eq=False)
class QuantizedArray:
    """A parameter that is kept in a quantised format: a pytree of two or three arrays.

    They may be arrays of JAX or numpy, or descriptions of some (`jax.ShapeDtypeStruct`).
    """

    values: Any  # [*stack, tiles, blocks, bytes] uint8
    scales: Any  # [*stack, tiles, groups, OUTPUTS] of floats or, if they are exponents, uint8
    mins: Any  # as the scales, or uint8 if they are values that stand for 0; None: the format has none
    format: str  # one of `LAYOUTS`
    shape: tuple[int, ...]  # of the parameter that it stands for
    # Leading axes of `shape` that a product sums over: the parameter is [*inputs, *outputs], and the matrix its
    # transpose. 0: it is a table, [outputs, inputs], whose rows are looked up as well.
    inputs: int
    stacked: int = 0  # 1: the first axis of `shape` counts matrices, of which the above describes one; 0: there is one

    @property
    def block(self) -> int:
        """Return how many inputs share a scale."""
        return LAYOUTS[self.format].group

    @property
    def matrix(self) -> tuple[int, int]:
        """Return the number of outputs and of inputs of each matrix."""
        shape = self.shape[self.stacked :]
        first = math.prod(shape[: self.inputs or 1])
        rest = math.prod(shape[self.inputs or 1 :])
        return (rest, first) if self.inputs else (first, rest)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all its arrays."""
        return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(self))

    def matrix_at(self, index: Any) -> "QuantizedArray":
        """Return one matrix of a stack as a parameter of its own; `index` may be traced."""
        one: QuantizedArray = jax.tree.map(lambda array: array[index], self)
        return replace(one, shape=self.shape[1:], stacked=0)

    def parts(self) -> Iterator[tuple[str, Any]]:
        """Iterate over the arrays that it has, by name."""
        yield from (("values", self.values), ("scales", self.scales))
        if self.mins is not None:
            yield "mins", self.mins

    def with_parts(self, parts: Mapping[str, Any]) -> "QuantizedArray":
        """Return the same parameter over other arrays, by name."""
        return replace(self, values=parts["values"], scales=parts["scales"], mins=parts.get("mins"))

    def with_tiles(self, tiles: Tiles) -> "QuantizedArray":
        """Return the same parameter over other arrays."""
        return replace(self, values=tiles.values, scales=tiles.scales, mins=tiles.mins)


def is_column(axis: int, inputs: int) -> bool:
    """Return whether a parameter's axis lies along its matrix's inputs; `inputs` as in `QuantizedArray`."""
    return axis < inputs if inputs else axis > 0


def abstract(format_name: str, shape: tuple[int, ...], inputs: int, stacked: int = 0) -> QuantizedArray:
    """Describe a parameter of this shape in a format, without arrays; its inputs must be whole blocks."""
    empty, stack = QuantizedArray(None, None, None, format_name, tuple(shape), inputs, stacked), shape[:stacked]
    shapes = block_tiles.shapes(format_name, *empty.matrix)
    described = {name: jax.ShapeDtypeStruct((*stack, *one), dtype) for name, (one, dtype) in shapes.items()}
    return empty.with_parts(described)


def dequantize(w: QuantizedArray) -> Any:
    """Compute the matrix in float32, [tiles * OUTPUTS, k]: the last tile's rows may go on past the outputs.

    The parameter must be no stack; `matrix_at` gives each of its matrices.
    Of numpy arrays it makes one of numpy; of arrays with fewer tiles or blocks a part of the matrix.
    """
    return block_tiles.dequantize(w.format, Tiles(w.values, w.scales, w.mins))


def parameter(w: QuantizedArray) -> Any:
    """Compute the whole parameter in float32, in its own shape; of numpy arrays as one of numpy."""
    if w.stacked:
        stack = np.stack if isinstance(w.values, np.ndarray) else jnp.stack
        return stack([parameter(w.matrix_at(index)) for index in range(w.shape[0])])
    full = dequantize(w)[: w.matrix[0]]
    return (full.T if w.inputs else full).reshape(w.shape)


def take_rows(w: QuantizedArray, rows: jax.Array) -> jax.Array:
    """Compute rows [T] of a table in float32, [T, k]. Numbers past its end are clipped."""
    rows = jnp.clip(rows, 0, w.matrix[0] - 1)
    tile, row = rows // OUTPUTS, rows % OUTPUTS
    u = _values(w, tile, row)  # [T, B, 32]
    scales = block_tiles.scale_values(w.format, w.scales[tile, :, row])
    mins = None if w.mins is None else w.mins[tile, :, row]
    out: jax.Array = block_tiles.scaled(w.format, u.reshape(*scales.shape, -1), scales, mins)
    return out.reshape(rows.shape[0], -1)


def _values(w: QuantizedArray, tile: jax.Array, row: jax.Array) -> jax.Array:
    """Read the numbers of one row of each tile, [T, B, 32] uint8: quads of inputs, of all rows of a tile in turn."""
    tiles, blocks, _ = w.values.shape
    bits = LAYOUTS[w.format].bits
    quads: jax.Array
    if bits == 8:
        quads = w.values.reshape(tiles, blocks, 8, OUTPUTS, 4)[tile, :, :, row]
        return quads.reshape(-1, blocks, BLOCK)
    low = w.values[..., :256].reshape(tiles, blocks, 4, OUTPUTS, 4)[tile, :, :, row]
    quads = jnp.concatenate([low & 0xF, low >> 4], axis=2)  # [T, B, 8, 4]
    if bits == 5:
        # A bit for each number of a quad of inputs: half of a byte for each row.
        byte = w.values[..., 256:].reshape(tiles, blocks, 8, OUTPUTS // 2)[tile, :, :, row // 2]
        shift = 4 * (row % 2)[:, None] + jnp.arange(4)
        high = byte[..., None] >> shift[:, None, None].astype(jnp.uint8) & 1
        quads = quads | high << 4
    if bits == 6:
        byte = w.values[..., 256:].reshape(tiles, blocks, 2, 1, OUTPUTS, 4)[tile, :, :, :, row]
        high = byte >> 2 * jnp.arange(4, dtype=jnp.uint8)[:, None] & 3
        quads = quads | high.reshape(quads.shape) << 4
    return quads.reshape(-1, blocks, BLOCK)
