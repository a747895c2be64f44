"""The layout of quantised weights: tiles of 16 outputs by blocks of 32 inputs, for kernels that multiply by them.

A weight is a matrix W [n, k] of n outputs and k inputs, in one of the formats of `formats/layouts.py`: `u` of few bits,
and a scale, in some formats a smallest value too, for each group of inputs of an output: w = scale * (u - zero) + min.
In some u is the code of a number instead, and in MXFP4 a scale the exponent of two plus 127. Here

    values [T, B, 64 * bits] uint8    T = ceil(n / 16) tiles, B = k / 32 blocks
    scales [T, G, 16], mins alike     G = k / group; mins are uint8 where they are values that stand for 0

so that arrays can be cut along outputs at tiles (first axis) and along inputs at blocks (second axis), and a kernel
reads each of them from one end to the other. The last tile is padded with outputs that are zero.

The 512 values of a tile and block lie as vectors of 64 want them, 4 neighbouring inputs (a quad) of each output in 32
bits, the operand of instructions for products of bytes on CPUs and GPUs. With j the quad of the block, c the output of
the tile and i the input of the quad:

    8 bits      byte 64 * j + 4 * c + i
    4 bits      byte 64 * (j % 4) + 4 * c + i, low half for j < 4, else high half
    5 bits      as 4 bits, then the fifth bits: bit 64 * j + 4 * c + i of 64 bytes
    6 bits      as 4 bits, then the upper two: byte 64 * (j // 4) + 4 * c + i of 128, bits 2 * (j % 4) and up

Invariants: `dequantize(pack(...))` of GGUF's blocks is what gguf's own `dequantize` gives, to the last bit. Pure
functions of numpy arrays, those that unpack of JAX's too. Not here: what a parameter is, and where it is placed.
"""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .formats.layouts import BLOCK, LAYOUTS, OUTPUTS, Layout

__all__ = [
    "BLOCK", "LAYOUTS", "OUTPUTS", "QUAD", "Layout", "Parts", "Tiles", "dequantize", "numbers", "pack", "pack_parts",
    "pack_scales", "pack_values", "scale_values", "scaled", "shapes", "take_apart", "unpack_scales",
    "unpack_values",
]  # fmt: skip

QUAD = 4  # inputs of a quad
_EXPONENT_BIAS, _NAN_EXPONENT = 127, 255


class Parts(NamedTuple):
    """Rows of a matrix as its format has them: values, scales, and mins where it has those."""

    values: np.ndarray  # [n, k] uint8
    scales: np.ndarray  # [n, G]
    mins: np.ndarray | None  # [n, G]


class Tiles(NamedTuple):
    """A matrix in tiles, of numpy's arrays, JAX's, or descriptions of some."""

    values: Any  # [T, B, 64 * bits] uint8
    scales: Any  # [T, G, 16]
    mins: Any  # as the scales, or None


def shapes(name: str, n: int, k: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return shape and dtype of each array of a matrix [n, k] in a format; k is a multiple of 32."""
    layout, tiles = LAYOUTS[name], -(-n // OUTPUTS)
    scales = (tiles, k // layout.group, OUTPUTS), np.dtype(layout.scale_dtype)
    values = (tiles, k // BLOCK, 64 * layout.bits), np.dtype(np.uint8)
    mins = scales[0], np.dtype(np.uint8) if layout.has_zeros else scales[1]
    return {"values": values, "scales": scales} | ({"mins": mins} if layout.has_mins else {})


def pack(name: str, raw: np.ndarray) -> Tiles:
    """Bring rows of GGUF's blocks into tiles.

    Args:
        name: a format of `LAYOUTS`.
        raw: [n, bytes] uint8, the blocks of each output.
    """
    return pack_parts(name, take_apart(name, raw))


def pack_parts(name: str, parts: Parts) -> Tiles:
    """Bring rows into tiles."""
    layout = LAYOUTS[name]
    values = pack_values(_pad(parts.values, layout.zero), layout.bits)
    return Tiles(values, pack_scales(parts.scales), None if parts.mins is None else pack_scales(parts.mins))


def pack_values(u: np.ndarray, bits: int) -> np.ndarray:
    """Bring values [n, k] uint8 into tiles."""
    u = _pad(u, 0)
    tiles, blocks = u.shape[0] // OUTPUTS, u.shape[1] // BLOCK
    quads = u.reshape(tiles, OUTPUTS, blocks, BLOCK // QUAD, QUAD).transpose(0, 2, 3, 1, 4)  # [T, B, 8, 16, 4]
    quads = quads.reshape(tiles, blocks, 8, 64)
    if bits == 8:
        return np.ascontiguousarray(quads).reshape(tiles, blocks, 512)
    out = np.empty((tiles, blocks, 64 * bits), np.uint8)
    out[..., :256] = (quads[:, :, :4] & 15 | quads[:, :, 4:] << 4).reshape(tiles, blocks, 256)
    if bits == 5:
        out[..., 256:] = np.packbits(quads >> 4, axis=-1, bitorder="little").reshape(tiles, blocks, 64)
    if bits == 6:
        upper = (quads >> 4).reshape(tiles, blocks, 2, 4, 64)
        shifted = upper << np.array([0, 2, 4, 6], np.uint8)[:, None]
        out[..., 256:] = np.bitwise_or.reduce(shifted, axis=3).reshape(tiles, blocks, 128)
    return out


def pack_scales(scales: np.ndarray) -> np.ndarray:
    """Bring scales or mins [n, G] into tiles."""
    scales = _pad(scales, 0)
    return np.ascontiguousarray(scales.reshape(-1, OUTPUTS, scales.shape[1]).transpose(0, 2, 1))


def unpack_values(values: Any, bits: int) -> Any:
    """Return the values [T * 16, k] uint8 of tiles, the padding's with them."""
    xp = _module(values)
    tiles, blocks = values.shape[:2]
    if bits == 8:
        quads = values.reshape(tiles, blocks, 8, 64)
    else:
        low = values[..., :256].reshape(tiles, blocks, 4, 64)
        quads = xp.concatenate([low & 15, low >> 4], axis=2)
    if bits == 5:
        fifth = values[..., 256:].reshape(tiles, blocks, 8, 8, 1) >> xp.arange(8, dtype=np.uint8) & 1
        quads = quads | fifth.reshape(tiles, blocks, 8, 64) << 4
    if bits == 6:
        shifts = (xp.arange(4, dtype=np.uint8) * 2).astype(np.uint8)[:, None]
        upper = values[..., 256:].reshape(tiles, blocks, 2, 1, 64) >> shifts & 3
        quads = quads | upper.reshape(tiles, blocks, 8, 64) << 4
    rows = quads.reshape(tiles, blocks, 8, OUTPUTS, QUAD).transpose(0, 3, 1, 2, 4)
    return rows.reshape(tiles * OUTPUTS, blocks * BLOCK)


def unpack_scales(scales: Any) -> Any:
    """Return the scales or mins [T * 16, G] of tiles."""
    return scales.transpose(0, 2, 1).reshape(-1, scales.shape[1])


def dequantize(name: str, tiles: Tiles) -> Any:
    """Compute the matrix in float32, [T * 16, k]; the padding's outputs are 0."""
    layout, scales = LAYOUTS[name], scale_values(name, unpack_scales(tiles.scales))
    u = unpack_values(tiles.values, layout.bits)
    mins = None if tiles.mins is None else unpack_scales(tiles.mins)
    return scaled(name, u.reshape(*scales.shape, layout.group), scales, mins).reshape(u.shape)


def scaled(name: str, u: Any, scales: Any, mins: Any) -> Any:
    """Compute the weights of values [..., group] with scales [...] in float32 and mins, which may be None, [...]."""
    if LAYOUTS[name].has_zeros:
        return (u.astype(np.float32) - mins.astype(np.float32)[..., None]) * scales[..., None]
    w = numbers(name, u) * scales[..., None]
    return w if mins is None else w + mins.astype(np.float32)[..., None]


def numbers(name: str, u: Any) -> Any:
    """Return the numbers that values stand for before they are scaled, float32."""
    layout = LAYOUTS[name]
    if layout.codes is not None:
        return _module(u).asarray(layout.codes, np.float32)[u]
    if layout.float_dtype is not None:
        dtype = jnp.dtype(layout.float_dtype)
        floats = u.view(dtype) if isinstance(u, np.ndarray) else jax.lax.bitcast_convert_type(u, dtype)
        return floats.astype(np.float32)
    return u.astype(np.float32) - np.float32(layout.zero)


def scale_values(name: str, scales: Any) -> Any:
    """Return the numbers that a format's scales stand for, float32: powers of two where they are exponents."""
    if LAYOUTS[name].scale_dtype != "uint8":
        return scales.astype(np.float32)
    xp = _module(scales)
    exponents = xp.minimum(scales, np.uint8(_NAN_EXPONENT - 1)).astype(np.int32) - _EXPONENT_BIAS
    powers = xp.ldexp(np.float32(1), exponents)
    return xp.where(scales == _NAN_EXPONENT, np.float32(np.nan), powers)


def take_apart(name: str, raw: np.ndarray) -> Parts:
    """Take rows of GGUF's blocks, uint8 [n, bytes], apart."""
    block_bytes, parts = _BLOCKS[name]
    u, scales, *mins = parts(raw.reshape(raw.shape[0], -1, block_bytes))
    rows = raw.shape[0]
    return Parts(u.reshape(rows, -1), scales.reshape(rows, -1), mins[0].reshape(rows, -1) if mins else None)


def _pad(rows: np.ndarray, value: int) -> np.ndarray:
    missing = -rows.shape[0] % OUTPUTS
    return np.pad(rows, ((0, missing), (0, 0)), constant_values=value) if missing else rows


def _module(array: Any) -> ModuleType:
    return np if isinstance(array, np.ndarray) else jnp


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """Read the float16 at a byte of each block."""
    return blocks[..., start : start + 2].copy().view(np.float16)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Divide bytes [..., m] into values [..., 2 * m], the low halves first."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _q8_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return blocks[..., 2:] ^ 128, _half(blocks, 0)


def _q4_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return _nibbles(blocks[..., 2:]), _half(blocks, 0)


def _q4_1(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return _nibbles(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    fifth = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little")
    return _nibbles(blocks[..., 6:]) | fifth << 4, _half(blocks, 0)


def _q4_k(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    scale, smallest = (_half(blocks, at).astype(np.float32) for at in (0, 2))
    packed = blocks[..., 4:16].reshape(*blocks.shape[:2], 3, 4)
    first, second, both = packed[..., 0, :], packed[..., 1, :], packed[..., 2, :]
    # Six bits each: of the last four groups, four bits are in `both` and two above those of the first four.
    scales = np.concatenate([first & 63, both & 15 | first >> 2 & 48], axis=-1)
    mins = np.concatenate([second & 63, both >> 4 | second >> 2 & 48], axis=-1)
    u = _nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32))
    return u, scale * scales, -(smallest * mins)


def _q6_k(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    halves = blocks.shape[:2]
    lower = blocks[..., :128].reshape(*halves, 2, 1, 64)
    lower = np.concatenate([lower & 15, lower >> 4], axis=-2).reshape(*halves, 8, 32)
    upper = blocks[..., 128:192].reshape(*halves, 2, 1, 32)
    upper = np.concatenate([upper >> shift & 3 for shift in (0, 2, 4, 6)], axis=-2).reshape(*halves, 8, 32)
    scales = blocks[..., 192:208].copy().view(np.int8).astype(np.float32) * _half(blocks, 208).astype(np.float32)
    return lower | upper << 4, scales


def _mxfp4(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return _nibbles(blocks[..., 1:]), blocks[..., 0]


# Bytes of a block, and what takes an array [n, blocks, bytes] of them apart; the formats are those of ggml-common.h.
_BLOCKS: Mapping[str, tuple[int, Callable[[np.ndarray], tuple[np.ndarray, ...]]]] = {
    "Q8_0": (34, _q8_0),
    "Q5_0": (22, _q5_0),
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q6_K": (210, _q6_k),
    "Q4_K": (144, _q4_k),
    "MXFP4": (17, _mxfp4),
}
