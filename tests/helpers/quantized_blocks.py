"""Blocks of GGUF's formats with drawn contents, and what the gguf package says that they mean."""

import gguf
import numpy as np

FORMATS = ["Q8_0", "Q5_0", "Q4_0", "Q4_1", "Q6_K", "Q4_K"]
_SCALES_AT = {"Q8_0": (0,), "Q5_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q6_K": (208,), "Q4_K": (0, 2)}


def draw_raw(name, outputs, inputs, random):
    """Draw the bytes [outputs, bytes] of a matrix: any values, and scales of both signs below 0.02, some subnormal."""
    inputs_of_block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    raw = random.integers(0, 256, (outputs, inputs // inputs_of_block, size), dtype=np.uint8)
    for at in _SCALES_AT[name]:
        scales = ((random.random(raw.shape[:2]) - 0.5) * 0.04 * random.choice([1, 1e-4], raw.shape[:2])).astype(
            np.float16
        )
        raw[..., at : at + 2] = scales[..., None].view(np.uint8)
    return raw.reshape(outputs, -1)


def reference(name, raw):
    """Return the weights [outputs, inputs] in float32 that the gguf package makes of blocks."""
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
