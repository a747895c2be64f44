"""Rounds floats to those formats of `kernels_pallas/formats/layouts.py` that are not GGUF's: which scale and number.

    FP8, INT8      one scale for an output: its largest magnitude over 448 or 127
    INT4           one scale for a group: its largest magnitude over 7
    UINT4, UINT8   a scale and a zero point for a group, such that its least and its largest number, and 0, are held
    MXFP4          a power of two for a block: that of its largest magnitude, less by two (OCP Microscaling Formats 1.0,
                   section 6.3), beyond which numbers saturate; gguf and compressed-tensors choose others

Numbers go to the nearest, of two as near to the even one. A group of zeros has the scale 1: none becomes NaN.
"""

import numpy as np
from ml_dtypes import float8_e4m3fn

from ..kernels_pallas.block_tiles import LAYOUTS, Layout, Parts

_FP8_LARGEST = np.float32(448)
_FP4_LARGEST, _FP4_EXPONENT, _BIAS = 7, 2, 127
# Halfway between neighbours of the codes 0 to 7.
_FP4_BETWEEN = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)


def round_rows(name: str, weights: np.ndarray) -> Parts:
    """Round finite weights [n, k] float32 to a format; k is a multiple of its group."""
    layout = LAYOUTS[name]
    groups = weights.reshape(len(weights), -1, layout.group)
    if layout.codes is not None:
        return _mxfp4(groups)
    if layout.has_zeros:
        return _with_zeros(layout, groups)
    whole = layout.bits == 8
    largest = np.abs(groups).max(axis=(1, 2) if whole else 2, keepdims=True)
    most = _FP8_LARGEST if layout.float_dtype else np.float32(layout.zero - 1)
    scales = _stored(largest / most, layout)
    scaled = np.clip(groups / scales.astype(np.float32), -most, most)
    if layout.float_dtype is not None:
        values = scaled.astype(float8_e4m3fn).view(np.uint8)
    else:
        values = (np.rint(scaled) + layout.zero).astype(np.uint8)
    return Parts(values.reshape(weights.shape), np.broadcast_to(scales, (*groups.shape[:2], 1))[..., 0], None)


def _stored(scales: np.ndarray, layout: Layout) -> np.ndarray:
    """Round scales to the dtype that they are kept in; those that are 0 then are 1."""
    stored = scales.astype(layout.scale_dtype)
    return np.where(stored == 0, np.ones((), stored.dtype), stored)


def _with_zeros(layout: Layout, groups: np.ndarray) -> Parts:
    least = np.minimum(groups.min(2, keepdims=True), 0)
    largest, most = np.maximum(groups.max(2, keepdims=True), 0), 2**layout.bits - 1
    scales = _stored((largest - least) / np.float32(most), layout)
    by = scales.astype(np.float32)
    zeros = np.clip(np.rint(-least / by), 0, most)
    values = np.clip(np.rint(groups / by) + zeros, 0, most).astype(np.uint8)
    return Parts(values.reshape(len(groups), -1), scales[..., 0], zeros[..., 0].astype(np.uint8))


def _mxfp4(groups: np.ndarray) -> Parts:
    largest = np.abs(groups).max(2)
    exponents = np.where(largest > 0, np.frexp(largest)[1] - 1 - _FP4_EXPONENT, 0)
    exponents = np.clip(exponents, -_BIAS, _BIAS)
    size = np.abs(np.ldexp(groups, -exponents[..., None]))
    lower = np.searchsorted(_FP4_BETWEEN, size)
    is_even_above = (lower % 2 == 1) & (size == _FP4_BETWEEN[np.minimum(lower, _FP4_LARGEST - 1)])
    codes = lower + is_even_above + 8 * np.signbit(groups)
    return Parts(codes.astype(np.uint8).reshape(len(groups), -1), (exponents + _BIAS).astype(np.uint8), None)
