"""Tries the products with stacks of matrices before their first use; see `checks.py`. Without numba."""

import ml_dtypes
import numpy as np

from ..block_tiles import BLOCK, LAYOUTS, OUTPUTS, Tiles, dequantize
from .blocks_check import random_tiles
from .blocks_records import NUMBER_BYTES, ROWS, record_bytes
from .frames import Call
from .levels import Level

_SIZES = np.array([3, 0, 9, 1], np.int32)  # rows of each matrix
_ROWS = 15  # of which the last two have no matrix
_TOLERANCE = 1e-4


def check_stack(call: Call, level: Level, dtype: str) -> bool:
    """Say whether products of few and many rows with matrices of floats are right, of sizes even and awkward."""
    random = np.random.default_rng(0)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    for depth, columns in ((99, 7 * level.lanes + 3), (104, 4 * level.lanes)):
        x = random.random((_ROWS, depth), np.float32).astype(kind)
        w = random.random((len(_SIZES), depth, columns), np.float32).astype(kind)
        if kind != np.float32 and not level.has_bf16:
            x = x.astype(np.float32)
        out = np.full((_ROWS, columns), np.nan, np.float32)
        call([x, _SIZES, w], [out], [])
        if not _is_right(out, x.astype(np.float64), w.astype(np.float64)):
            return False
    return True


def check_stack_blocks(call: Call, level: Level, layout: int, activations: int) -> bool:
    """Say whether products with quantised matrices are right; activations are those of `check_blocks`."""
    random, kind = np.random.default_rng(0), list(NUMBER_BYTES)[activations]
    name, form = list(LAYOUTS.items())[layout]
    inputs, outputs = 4 * BLOCK, 2 * OUTPUTS + 3
    x = random.integers(-127, 128, (_ROWS, inputs)).astype(np.float32)
    x[:, ::BLOCK] = 127
    each = [random_tiles(random, form, outputs, inputs) for _ in _SIZES]
    w = Tiles(*(None if parts[0] is None else np.stack(parts) for parts in zip(*each, strict=True)))
    exact = np.stack([dequantize(name, tiles)[:outputs].T for tiles in each]).astype(np.float64)
    out = np.full((_ROWS, outputs), np.nan, np.float32)
    records = (_ROWS // ROWS + len(_SIZES)) * inputs // BLOCK
    room = np.zeros(records * record_bytes(form, kind), np.uint8)
    call([x, _SIZES, *(array for array in w if array is not None)], [out, room], [4, 4])
    return _is_right(out, x.astype(np.float64), exact)


def _is_right(found: np.ndarray, x: np.ndarray, w: np.ndarray) -> bool:
    of_matrix = np.repeat(np.arange(len(_SIZES)), _SIZES)
    expected = np.einsum("mk,mkn->mn", x[: len(of_matrix)], w[of_matrix])
    close = np.abs(found[: len(of_matrix)] - expected) <= _TOLERANCE * np.abs(expected).max()
    return bool(close.all() and np.isnan(found[len(of_matrix) :]).all())
