"""Tries the product with quantised weights before its first use; see `checks.py`. Without numba."""

import numpy as np

from ..block_tiles import BLOCK, LAYOUTS, OUTPUTS, Layout, Tiles, dequantize, pack_scales, pack_values
from .blocks_records import NUMBER_BYTES, room_bytes
from .frames import Call
from .levels import Level

_ROWS, _BLOCKS, _OUTPUTS = 15, 4, 2 * OUTPUTS + 3
_NAN = 0x7F  # of floats of 8 bits, whatever the sign
_TOLERANCE = 1e-5  # of the largest sum
_LARGEST = 127


def check_blocks(call: Call, level: Level, layout: int, activations: int) -> bool:
    """Say whether a product of 15 rows is right, and each row's bits the same when it is alone.

    Activations are integers of which each block has one of 127, so that rounding them changes nothing.
    """
    kind = list(NUMBER_BYTES)[activations]
    name, form = list(LAYOUTS.items())[layout]
    random = np.random.default_rng(0)
    x = random.integers(-_LARGEST, _LARGEST + 1, (_ROWS, _BLOCKS * BLOCK)).astype(np.float32)
    x[:, ::BLOCK] = _LARGEST
    w = random_tiles(random, form, _OUTPUTS, _BLOCKS * BLOCK)
    exact = dequantize(name, w)[:_OUTPUTS].astype(np.float64)
    expected = x.astype(np.float64) @ exact.T

    def multiply(rows: np.ndarray) -> np.ndarray:
        out = np.full((len(rows), _OUTPUTS), np.nan, np.float32)
        room = np.zeros(room_bytes(rows.shape[0], rows.shape[1], form, kind), np.uint8)
        call([rows, *(array for array in w if array is not None)], [out, room], [4, 4])
        return out

    found, alone = multiply(x), multiply(x[-1:])
    is_right = np.abs(found - expected).max() <= _TOLERANCE * np.abs(expected).max()
    return bool(is_right and np.array_equal(alone[0], found[-1]))


def random_tiles(random: np.random.Generator, form: Layout, outputs: int, inputs: int) -> Tiles:
    """Draw a matrix in a format."""
    u = random.integers(0, 2**form.bits, (outputs, inputs)).astype(np.uint8)
    if form.float_dtype is not None:
        u[u & _NAN == _NAN] = 0
    groups = outputs, inputs // form.group
    scales, mins = ((random.random(groups) - 0.5).astype(form.scale_dtype) for _ in range(2))
    if form.scale_dtype == "uint8":
        scales = random.integers(120, 130, groups).astype(np.uint8)
    if form.has_zeros:
        mins = random.integers(0, 2**form.bits, groups).astype(np.uint8)
    packed = pack_scales(mins) if form.has_mins else None
    return Tiles(pack_values(u, form.bits), pack_scales(scales), packed)
