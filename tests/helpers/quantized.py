"""Quantised weights of every format: rows of blocks as a GGUF file holds them, and a tiny llama that mixes formats."""

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from helpers.tiny_gguf import TinyLlama, gguf_name, interleave_rotary, write_tiny_gguf

FORMATS = ("Q8_0", "Q5_0", "Q4_0", "Q4_1", "Q6_K", "Q4_K")
# Bytes at which a block of a format has a float16: a scale, or a factor of several.
_SCALES = {"Q8_0": (0,), "Q5_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q6_K": (208,), "Q4_K": (0, 2)}
# Of the scales of random blocks, so that weights are of the order of 1.
_SIZE = {"Q8_0": 0.014, "Q5_0": 0.11, "Q4_0": 0.22, "Q4_1": 0.22, "Q6_K": 7e-4, "Q4_K": 5e-3}


def kind_of(name):
    """The format as the gguf library has it."""
    return GGMLQuantizationType[name]


def random_blocks(name, rows, columns, random):
    """Draw rows of blocks, uint8 [rows, bytes]: every bit at random, but for scales of sensible sizes."""
    block, size = GGML_QUANT_SIZES[kind_of(name)]
    raw = random.integers(0, 256, (rows, columns // block * size), dtype=np.uint8)
    return with_scales_of(name, raw, lambda shape: random.uniform(0.5, 1.5, shape))


def with_scales_of(name, raw, factors=np.ones):
    """Put scales of sensible sizes into rows of blocks."""
    blocks = raw.reshape(len(raw), -1, GGML_QUANT_SIZES[kind_of(name)][1]).copy()
    for index, at in enumerate(_SCALES[name]):
        # The second one is the smallest value, or what is subtracted from sums: the middle of the range.
        sign = {"Q4_1": -7.5, "Q4_K": 7.5}.get(name, 1) if index else 1
        scales = (factors(blocks.shape[:2]) * _SIZE[name] * sign).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(len(raw), -1)


def draw_raw(name, outputs, inputs, random):
    """Draw the bytes [outputs, bytes] of a matrix: any values, and scales of both signs below 0.02, some subnormal."""
    inputs_of_block, size = GGML_QUANT_SIZES[kind_of(name)]
    raw = random.integers(0, 256, (outputs, inputs // inputs_of_block, size), dtype=np.uint8)
    for at in _SCALES[name]:
        scales = ((random.random(raw.shape[:2]) - 0.5) * 0.04 * random.choice([1, 1e-4], raw.shape[:2])).astype(
            np.float16
        )
        raw[..., at : at + 2] = scales[..., None].view(np.uint8)
    return raw.reshape(outputs, -1)


def dequantized(name, raw):
    """What the gguf library makes of rows of blocks, float32."""
    return np.asarray(gguf.quants.dequantize(raw, kind_of(name)), np.float32)


# Each projection in another format; hidden and inner sizes are multiples of the K formats' 256.
MIXED = {
    "attn_q": "Q5_0", "attn_k": "Q8_0", "attn_v": "Q6_K", "attn_output": "Q4_K", "ffn_gate": "Q4_0", "ffn_up": "Q4_1",
    "ffn_down": "Q6_K", "token_embd": "Q8_0", "output": "Q4_1",
}  # fmt: skip
MODEL = TinyLlama(hidden=256, inner=512, heads=16, kv_heads=4, head_dim=16)


def write_quantized(path, model=MODEL, formats=MIXED, *, metadata=None, seed=0):
    """Write a tiny llama whose matrices are quantised, by the part of their name; return the path."""
    random, tensors = np.random.default_rng(seed), {}
    for name, weight in model.weights().items():
        tensor = gguf_name(name)
        format_ = formats.get(tensor.split(".")[-2])
        if format_ is None:
            continue
        heads = {"q_proj": model.heads, "k_proj": model.kv_heads}.get(name.split(".")[-2])
        rows = interleave_rotary(weight, heads) if heads else weight
        tensors[tensor] = _quantized(format_, rows, random), kind_of(format_)
    return write_tiny_gguf(path, model, metadata=metadata, tensors=tensors)


def _quantized(name, rows, random):
    try:
        return gguf.quants.quantize(rows, kind_of(name))
    except NotImplementedError:  # the library reads the K formats only
        raw = random_blocks(name, *rows.shape, random)
        blocks = raw.reshape(-1, GGML_QUANT_SIZES[kind_of(name)][1])
        for at in _SCALES[name]:
            scales = blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) / np.sqrt(rows.shape[1])
            blocks[:, at : at + 2] = scales.astype(np.float16).view(np.uint8)
        return raw
