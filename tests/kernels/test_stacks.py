"""The Hopper kernel for stacks of matrices, in the interpreter: races raise, memory and outputs begin as NaN.

Tolerance: weights are those of the format, rounded to the activations' dtype; sums are float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from twinmesh.kernels_pallas.block_tiles import LAYOUTS, Tiles, dequantize, pack_scales, pack_values
from twinmesh.kernels_pallas.quantized import abstract
from twinmesh.kernels_pallas.stacks import One, biased, item_rows, list_work, stack_product

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


class Gated(NamedTuple):
    def __call__(self, sums, biases):
        gate, up = (biased(total, bias) for total, bias in zip(sums, biases, strict=True))
        return gate * jax.nn.sigmoid(gate) * up


def drawn_stack(rng, name, matrices, k, n):
    """A quantised stack whose values, scales and smallest values are all drawn, and its matrices [X, k, n] in float32."""
    layout, parts, floats = LAYOUTS[name], [], []
    for _ in range(matrices):
        values = pack_values(rng.integers(0, 1 << layout.bits, (n, k), np.uint8), layout.bits)
        groups = n, k // layout.group
        if layout.codes:
            scales = rng.integers(110, 130, groups, np.uint8)
        else:
            scales = rng.uniform(0.01, 0.1, groups).astype(layout.scale_dtype)
        mins = pack_scales(rng.uniform(-1, 1, groups).astype(layout.scale_dtype)) if layout.has_mins else None
        parts.append(Tiles(values, pack_scales(scales), mins))
        floats.append(dequantize(name, parts[-1]).T)
    described = abstract(name, (matrices, k, n), 1, 1)
    return described.with_tiles(Tiles(*(None if p[0] is None else np.stack(p) for p in zip(*parts, strict=True)))), np.stack(floats)


def multiplied(x, floats, sizes):
    """What belongs to each row, in float32."""
    matrix = np.repeat(np.arange(len(sizes)), sizes)
    return np.einsum("mk,mkn->mn", x[: len(matrix)].astype(np.float32), floats[matrix].astype(x.dtype).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "dtype", "sizes"),
    [
        ("MXFP4", "bfloat16", [5, 0, 9, 1]),
        ("MXFP4", "float16", [0, 3]),
        ("Q8_0", "bfloat16", [2, 1]),
        ("Q4_1", "float16", [2, 1]),
        (None, "bfloat16", [0, 11, 2]),
    ],
)
def test_rows_are_multiplied_by_their_matrix(name, dtype, sizes):
    rng, k, n = np.random.default_rng(0), 192, 192
    x = rng.standard_normal((sum(sizes) + 2, k)).astype(dtype)  # two rows belong to none
    if name is None:
        w = floats = rng.standard_normal((len(sizes), k, n)).astype(dtype)
    else:
        w, floats = drawn_stack(rng, name, len(sizes), k, n)
    got = stack_product(
        x, (w,), (), np.array(sizes, np.int32), combine=One(), dtype="float32", cores=3, interpret=INTERPRET
    )  # fmt: skip
    want = multiplied(x, floats, sizes)
    np.testing.assert_allclose(got[: sum(sizes)], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
