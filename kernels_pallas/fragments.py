"""Quantised weights as the tensor cores of a Hopper GPU take them: 64 outputs by 32 inputs in registers, in 16 bits.

A warp's rows of such a tile are the 16 outputs of one of `block_tiles.py`'s tiles, and the four threads of a row read
one quad of inputs each, so a weight is read from the layout as it lies. The four inputs of a quad are then not
neighbours in the tile's columns: column 16 * h + 8 * b + 2 * q + a is input 16 * h + 4 * q + 2 * a + b. The order of
inputs is free in a sum, so `ordered` brings activations into it, and outputs stay in theirs. The pair (a = 0, a = 1) of
one register lies 16 bits apart in the quad's 32, so one instruction serves both.

MXFP4 becomes bfloat16 by moving sign and the other three bits of each code to where bfloat16 has its sign and the end
of its exponent, which makes the number times 2**-126, and by two products with powers of two: exact, also for the
smallest code. Other formats become float32, are scaled, and rounded once, as `block_tiles.dequantize` says. A scale of
MXFP4 that is stored as 0, 2**-127, counts as zero.

Not here: copies into shared memory, and products. On the CPU (`interpret`) the same is computed by JAX's operations,
because the interpreter does not know code of Mosaic's own level; tests read that code's registers by the layouts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector

from . import block_tiles
from .block_tiles import BLOCK, LAYOUTS, OUTPUTS, QUAD, Tiles

ROWS = 64  # of a tile, outputs
RUN = 256  # bytes of values that a copy takes in a row at most; a block of 4 bits has one run, of 8 bits two
_TILES = ROWS // OUTPUTS  # of `block_tiles.py`, one for each warp

SCALES = plgpu.Layout.TILED(plgpu.Tiling(((_TILES, OUTPUTS), (8,), (1,))), (-4,), (-2, plgpu.Replicated(4)), -1)
VALUES = {
    4: plgpu.Layout.TILED(plgpu.Tiling(((_TILES, RUN), (64,), (32,), (QUAD,))), (-5,), (-2, -4), -1),
    8: plgpu.Layout.TILED(plgpu.Tiling(((_TILES, 2, RUN), (64,), (32,), (QUAD,))), (-6,), (-2, -4), -1),
}


def ordered(x: Array) -> Array:
    """Bring the last axis, whole blocks of inputs, into the order of a tile's columns."""
    parts = x.reshape(*x.shape[:-1], -1, 4, 2, 2)  # [.., halves of a block, q, a, b]
    return jnp.moveaxis(parts, -1, -3).reshape(x.shape)


def fragment(format_name: str, tiles: Tiles, dtype: jax.typing.DTypeLike, *, interpret: bool) -> Array:
    """Read one block of inputs of 64 outputs from shared memory, [64, 32] of a 16-bit dtype.

    Args:
        format_name: one of `formats.hopper.HOPPER_FORMATS`.
        tiles: references, values [4, 256] of 4 bits or [4, 2, 256] of 8, scales and mins [4, 16].
        dtype: bfloat16 or float16.
        interpret: whether the kernel runs on the CPU.
    """
    layout, parts = LAYOUTS[format_name], [tiles.scales] if tiles.mins is None else [tiles.scales, tiles.mins]
    if interpret:
        return _plain(format_name, tiles, dtype)
    lies = (VALUES[layout.bits], *[SCALES] * len(parts))
    arrays = [plgpu.load(part, layout=lie) for part, lie in zip((tiles.values, *parts), lies, strict=True)]
    made = plgpu.ShapeDtypeStruct((ROWS, BLOCK), jnp.dtype(dtype), layout=plgpu.Layout.WGMMA)
    write = Code(jnp.dtype(dtype)).codes if layout.codes else Code(jnp.dtype(dtype), layout.zero).numbers
    computed: Array = plgpu.inline_mgpu(arg_types=lies, return_type=made)(in_registers(write, layout.bits))(*arrays)
    return computed


def store_transposed(result: Array, target: Any, *, interpret: bool) -> None:
    """Write outputs by rows [64, N] as rows [N, 64] to shared memory that copies of single rows leave from."""
    if interpret:
        target[...] = result.T
        return

    def run(_: Any, result: Any, target: Any) -> tuple[()]:
        if mgpu.bitwidth(result.mlir_dtype) == 16:
            result.store_untiled(mgpu.memref_transpose(target, (1, 0)), optimized=False)
        else:
            result.foreach(lambda number, index: memref.store(number, target, index[::-1]))
        return ()

    # By hand, because Mosaic looks for a layout of shared memory that serves both stores and copies without end.
    plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()), return_type=())(run)(result, target)


def _plain(format_name: str, tiles: Tiles, dtype: jax.typing.DTypeLike) -> Array:
    layout = LAYOUTS[format_name]
    blocked = [None if part is None else part[...].reshape(_TILES, 1, -1) for part in tiles]
    u = block_tiles.unpack_values(blocked[0], layout.bits)
    scales: Any = block_tiles.unpack_scales(blocked[1])
    mins: Any = None if blocked[2] is None else block_tiles.unpack_scales(blocked[2])
    if layout.codes:
        w = _e2m1(u.astype(jnp.int32)) * jax.lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)
    else:
        w = (u.astype(jnp.float32) - layout.zero) * scales.astype(jnp.float32)
    return ordered(w if mins is None else w + mins.astype(jnp.float32)).astype(dtype)


def _e2m1(u: Array) -> Array:
    """Compute the numbers of codes, by arithmetic: a kernel may hold no table."""
    exponent, last = u >> 1 & 3, u & 1
    size = jnp.where(exponent == 0, last, (2 + last) << jnp.maximum(exponent - 1, 0)).astype(jnp.float32) * 0.5
    return jnp.where(u < 8, size, -size)


class _Row(NamedTuple):
    """What one thread has of one row of a tile."""

    words: list[Any]  # of four bytes: one of 4-bit values, two of 8 bits
    scale: Any  # vector of one
    smallest: Any | None


def in_registers(write: Callable[[_Row, int, int], Any], bits: int) -> Callable[..., Any]:
    """Make the code that fills a tile's registers by `write`, from a row, the half h of a block and b."""

    def run(_: Any, values: Any, scales: Any, mins: Any = None) -> Any:
        words = values.registers.reshape(-1, 2)  # [h, half of the 16 rows] of 8 bits, else [1, half]
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((ROWS, BLOCK)), object)
        flat = registers.reshape(2, 2, 2)  # [h, b, half of the rows], a view
        for half in range(2):
            smallest = None if mins is None else mins.registers.flat[half]
            row = _Row([_word(word) for word in words[:, half]], scales.registers.flat[half], smallest)
            for h in range(2):
                for b in range(2):
                    flat[h, b, half] = write(row, h, b)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    return run


class Code:
    """Writes the instructions for two weights at a time: those of inputs 16 * h + 4 * q + b and + 2."""

    def __init__(self, dtype: jnp.dtype, zero: int = 0) -> None:
        self.zero = zero
        self.is_wide = dtype == jnp.bfloat16

    @property
    def kind(self) -> ir.Type:
        """Return the type of a number."""
        return ir.BF16Type.get() if self.is_wide else ir.F16Type.get()

    def codes(self, row: _Row, h: int, b: int) -> Any:
        """Write MXFP4's numbers."""
        word = _shifted(row.words[0], 8 * b)
        if self.is_wide:
            # Two copies of the four bits, of which a mask leaves the sign and the others; they do not overlap.
            spread = _times(_masked(word, 0xF000F0 if h else 0xF000F), 0x104 if h else 0x1040)
            bits, exponent, scale = _masked(spread, 0x81C081C0), 126, _times(_extended(row.scale), 0x800080)
            return arith.mulf(arith.mulf(self._pair(bits), self._power(exponent)), self._pair(scale))
        sign, rest = (_times(word, 1 << 8 if h else 1 << 12), _times(word, 1 << 5 if h else 1 << 9))
        bits = arith.ori(_masked(sign, 0x80008000), _masked(rest, 0x0E000E00))
        codes = arith.mulf(self._pair(bits), self._power(14))
        # Through float32, whose exponents are as many as a scale may have.
        scale = arith.bitcast(f32(), _times(_extended(row.scale), 1 << 23))
        numbers = arith.extf(vector_of(2, f32()), codes)
        return arith.truncf(vector_of(2, self.kind), arith.mulf(numbers, _splat(scale)))

    def numbers(self, row: _Row, h: int, b: int) -> Any:
        """Write the numbers of a format with scales that are factors, rounded once."""
        word = _shifted(row.words[-1 if h else 0], 8 * b)
        if len(row.words) == 1:
            word = _masked(_shifted(word, 4 * h), 0xF000F)
        scale, smallest = (None if part is None else number_of(part) for part in (row.scale, row.smallest))
        pair = []
        for a in range(2):
            # The number 2**23 + u by its bits: conversions of integers are slow.
            bits = arith.ori(_masked(_shifted(word, 16 * a), 0xFF), integer(0x4B000000))
            u = arith.subf(arith.bitcast(f32(), bits), _constant(f32(), float(2**23 + self.zero)))
            w = arith.mulf(u, scale)
            pair.append(w if smallest is None else arith.addf(w, smallest))
        return arith.truncf(vector_of(2, self.kind), vector.from_elements(vector_of(2, f32()), pair))

    def _pair(self, word: Any) -> Any:
        return vector.bitcast(vector_of(2, self.kind), vector.broadcast(vector_of(1, i32()), word))

    def _power(self, exponent: int) -> Any:
        bits = (exponent + 127) << 7 if self.is_wide else (exponent + 15) << 10
        return self._pair(integer(bits * 0x10001))


def i32() -> ir.Type:
    """Return the type of 32-bit integers."""
    return ir.IntegerType.get_signless(32)


def f32() -> ir.Type:
    """Return the type of float32."""
    return ir.F32Type.get()


def vector_of(size: int, kind: ir.Type) -> ir.Type:
    """Return the type of a vector."""
    return ir.VectorType.get((size,), kind)


def integer(value: int) -> Any:
    """Write a 32-bit constant; one from 2**31 on by its bits."""
    signed = value - (1 << 32) if value >= 1 << 31 else value
    return _constant(i32(), ir.IntegerAttr.get(i32(), signed))


def _constant(kind: ir.Type, value: Any) -> Any:
    constant: Any = arith.constant  # annotated as if it took no arguments
    return constant(kind, value)


def _word(four: Any) -> Any:
    """Read a vector of four bytes as one integer."""
    return vector.extract(vector.bitcast(vector_of(1, i32()), four), [], [0])


def _masked(word: Any, mask: int) -> Any:
    return arith.andi(word, integer(mask))


def _shifted(word: Any, right: int) -> Any:
    return arith.shrui(word, integer(right)) if right else word


def _times(word: Any, factor: int) -> Any:
    return arith.muli(word, integer(factor))


def _extended(one: Any) -> Any:
    """Read a vector of one byte as an integer."""
    return arith.extui(i32(), vector.extract(one, [], [0]))


def number_of(one: Any) -> Any:
    """Read a vector of one float as float32."""
    value = vector.extract(one, [], [0])
    return value if value.type == f32() else arith.extf(f32(), value)


def _splat(value: Any) -> Any:
    return vector.broadcast(vector_of(2, f32()), value)
