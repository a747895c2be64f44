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
from twinmesh.kernels_pallas.grouped_matmul import grouped_matmul, item_rows, list_work
from twinmesh.kernels_pallas.quantized import abstract

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


class Gated(NamedTuple):
    def __call__(self, gate, up):
        return gate * jax.nn.sigmoid(gate) * up


def drawn_stack(rng, name, matrices, k, n):
    """A quantised stack of drawn values, scales and smallest values, and its matrices [X, k, n] in float32."""
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
    return described.with_tiles(
        Tiles(*(None if p[0] is None else np.stack(p) for p in zip(*parts, strict=True)))
    ), np.stack(floats)


def multiplied(x, floats, sizes):
    """What belongs to each row, in float32."""
    matrix = np.repeat(np.arange(len(sizes)), sizes)
    return np.einsum(
        "mk,mkn->mn", x[: len(matrix)].astype(np.float32), floats[matrix].astype(x.dtype).astype(np.float32)
    )


def on_interpreter(x, stacks, sizes, biases=(), combine=None, dtype="float32", cores=3):
    return grouped_matmul(
        x, stacks, biases, np.array(sizes, np.int32), combine=combine, dtype=dtype, cores=cores, interpret=INTERPRET
    )  # fmt: skip


def check(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got[: len(want)], want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize(
    ("name", "dtype", "sizes", "k"),
    [
        ("MXFP4", "bfloat16", [5, 0, 9], 160),
        pytest.param("Q8_0", "float16", [0, 3], 64, marks=pytest.mark.long),
        (None, "bfloat16", [0, 11], 320),
    ],
)
def test_rows_are_multiplied_by_their_matrix(name, dtype, sizes, k):
    """More than twice 64 outputs for two consumers, matrices without rows, rows without a matrix."""
    rng, n = np.random.default_rng(0), 192 if name is None else 176
    x = rng.standard_normal((sum(sizes) + 2, k)).astype(dtype)
    if name is None:
        w = floats = rng.standard_normal((len(sizes), k, n)).astype(dtype)
    else:
        w, floats = drawn_stack(rng, name, len(sizes), k, n)
    check(on_interpreter(x, (w,), sizes), multiplied(x, floats, sizes))


def test_two_stacks_are_combined_with_their_biases():
    rng, k, n, sizes = np.random.default_rng(1), 64, 64, [2, 1]
    x = rng.standard_normal((3, k)).astype("bfloat16")
    (gate, gate_floats), (up, up_floats) = (drawn_stack(rng, "MXFP4", 2, k, n) for _ in range(2))
    biases = tuple(rng.standard_normal((2, n)).astype("bfloat16") for _ in range(2))
    got = on_interpreter(x, (gate, up), sizes, biases, Gated(), "bfloat16", cores=1)
    of_rows = [bias[np.repeat([0, 1], sizes)].astype(np.float32) for bias in biases]
    sums = [multiplied(x, w, sizes) + bias for w, bias in zip((gate_floats, up_floats), of_rows, strict=True)]
    check(np.asarray(got, np.float32), np.asarray(Gated()(*sums)), 2**-8)


def test_products_of_few_pieces_are_cut_along_the_inputs():
    rng, k, n = np.random.default_rng(3), 160, 80
    x = rng.standard_normal((3, k)).astype("bfloat16")
    w, floats = drawn_stack(rng, "MXFP4", 1, k, n)
    check(on_interpreter(x, (w,), [3], cores=6), multiplied(x, floats, [3]))
    traced = grouped_matmul.trace(x, (w,), (), np.array([3], np.int32), dtype=jnp.float32, cores=6)
    assert "f32[5,3,128]" in str(traced.jaxpr)  # five parts of twice 64 outputs


def test_a_matrix_of_more_rows_than_an_item_is_multiplied_by_all_of_them():
    """Of two consumers' four times 64 outputs each the last two lie past the end."""
    rng, k, n, sizes = np.random.default_rng(2), 64, 128, [0, 200]
    x = rng.standard_normal((200, k)).astype("bfloat16")
    w = rng.standard_normal((2, k, n)).astype("bfloat16")
    check(on_interpreter(x, (w,), sizes), multiplied(x, w, sizes))


def test_no_rows_are_no_work():
    w = np.ones((2, 64, 64), "bfloat16")
    assert on_interpreter(np.ones((4, 64), "bfloat16"), (w,), [0, 0], cores=1).shape == (4, 64)


def test_items_have_powers_of_two_rows_which_copies_are_cut_into():
    assert [item_rows(*case) for case in ((1, 1), (4, 32), (100, 1), (128, 32), (512, 128), (32768, 32))] == [
        8, 8, 128, 8, 8, 128
    ]  # fmt: skip


@pytest.mark.parametrize("sizes", [[3, 0, 17, 8], [0, 0, 0, 0], [28, 0, 0, 0]])
def test_the_list_of_work_covers_each_row_once(sizes):
    rows, count = 28, item_rows(28, 4)
    items, used, source = (np.asarray(part) for part in list_work(jnp.array(sizes, jnp.int32), rows, count))
    found = []
    for matrix, lies, first, own in items[: used[0]]:
        assert lies % 8 == 0
        assert own <= count
        assert lies + count <= len(source)
        np.testing.assert_array_equal(source[lies : lies + own], np.arange(first, first + own))
        found += [(matrix, row) for row in range(first, first + own)]
    matrices = np.repeat(np.arange(4), sizes)
    assert found == list(zip(matrices, range(sum(sizes)), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 96, "name": None}, "96 inputs.*64 or more in multiples of 64, and multiples of 64"),
        ({"n": 48}, "48 outputs.*64 or more in multiples of 16, and multiples of 32"),
        ({"name": "Q6_K", "k": 256}, "Weights are Q6_K: .* takes MXFP4"),
        ({"dtype": "float32"}, "Activations are float32"),
    ],
)
def test_what_the_kernel_does_not_take_is_said(change, message):
    case = {"k": 64, "n": 64, "name": "MXFP4", "dtype": "bfloat16"} | change
    x = jax.ShapeDtypeStruct((4, case["k"]), case["dtype"])
    shape = (2, case["k"], case["n"])
    w = jax.ShapeDtypeStruct(shape, x.dtype) if case["name"] is None else abstract(case["name"], shape, 1, 1)
    with pytest.raises(ValueError, match=message):
        grouped_matmul.trace(x, (w,), (), jax.ShapeDtypeStruct((2,), jnp.int32), dtype=x.dtype, cores=132)
