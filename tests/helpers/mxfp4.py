"""MXFP4 in plain numpy: weights rounded to it, and packed as Hugging Face's GPT-OSS files and as GGUF files hold them.

Also run by Python 3.11 in `tests/make_family_fixtures.py`: no import of twinmesh here.
"""

import numpy as np

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
BLOCK = 32


def codes(weights):
    """Round weights [..., k] to codes [..., k / 32, 32] and exponents plus 127 [..., k / 32], both uint8."""
    blocks = weights.reshape(*weights.shape[:-1], -1, BLOCK)
    exponents = np.floor(np.log2(np.abs(blocks).max(-1))) - 2
    scaled = blocks / np.exp2(exponents)[..., None]
    nearest = np.abs(scaled[..., None] - VALUES).argmin(-1)
    return nearest.astype(np.uint8), (exponents + 127).astype(np.uint8)


def values(nearest, exponents):
    """Compute the weights [..., k] of codes and exponents, float64."""
    blocks = VALUES[nearest] * np.exp2(exponents.astype(float) - 127)[..., None]
    return blocks.reshape(*nearest.shape[:-2], -1)


def rounded(weights):
    """Round weights [..., k] to what MXFP4 holds."""
    return values(*codes(weights))


def hugging_face(weights):
    """Pack weights [..., k]: blocks [..., k / 32, 16] with neighbours in a byte, and scales [..., k / 32]."""
    nearest, exponents = codes(weights)
    packed = nearest[..., 0::2] | nearest[..., 1::2] << 4
    # safetensors writes the bytes of an array as they lie, whatever its order of axes.
    return np.ascontiguousarray(packed), np.ascontiguousarray(exponents)


def gguf_blocks(weights):
    """Pack weights [..., k] as uint8 [..., k / 32 * 17]: a scale, and elements 0 to 15 below 16 to 31."""
    nearest, exponents = codes(weights)
    blocks = np.concatenate([exponents[..., None], nearest[..., :16] | nearest[..., 16:] << 4], axis=-1)
    return blocks.reshape(*weights.shape[:-1], -1)
