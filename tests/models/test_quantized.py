"""GGUF's blocks as a parameter: what it stands for, rows of tables, and rounding."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from helpers.quantized import FORMATS, dequantized, kind_of, random_blocks
from hypothesis import example, given, settings
from hypothesis.extra.numpy import arrays
from twinmesh.kernels_pallas.block_tiles import pack
from twinmesh.kernels_pallas.quantized import abstract, dequantize, parameter, take_rows
from twinmesh.models.quantized import quantize

ROWS, COLUMNS = 37, 512


def quantized(name, raw, shape=(ROWS, COLUMNS), inputs=0):
    return abstract(name, shape, inputs).with_tiles(pack(name, raw))


def on_device(w):
    return jax.tree.map(jnp.asarray, w)


@pytest.mark.parametrize("name", FORMATS)
def test_arrays_are_as_they_are_described(name):
    w = quantized(name, random_blocks(name, ROWS, COLUMNS, np.random.default_rng(0)))
    for (part, array), (_, like) in zip(w.parts(), abstract(name, w.shape, 0).parts(), strict=True):
        assert (array.shape, array.dtype) == (like.shape, like.dtype), part


@pytest.mark.parametrize("name", FORMATS)
def test_dequantised_it_is_what_the_gguf_library_gives_to_the_last_bit(name):
    block, size = GGML_QUANT_SIZES[kind_of(name)]
    run = jax.jit(dequantize)

    # Any bits: scales that are NaN, infinite or subnormal as well.
    @settings(max_examples=50, deadline=None)
    @given(arrays(np.uint8, (ROWS, COLUMNS // block * size)))
    @example(random_blocks(name, ROWS, COLUMNS, np.random.default_rng(0)))
    def check(raw):
        with np.errstate(all="ignore"):
            w = quantized(name, raw)
            expected = dequantized(name, raw)
            np.testing.assert_array_equal(dequantize(w)[:ROWS], expected)
        np.testing.assert_array_equal(run(on_device(w))[:ROWS], expected)

    check()


@pytest.mark.parametrize("name", FORMATS)
def test_a_projection_is_the_transpose_and_a_table_gives_its_rows(name):
    raw = random_blocks(name, ROWS, COLUMNS, np.random.default_rng(1))
    heads = quantized(name, raw, (4, COLUMNS // 4, ROWS), inputs=2)
    matrix = dequantize(heads)[:ROWS]
    assert heads.matrix == (ROWS, COLUMNS)
    np.testing.assert_array_equal(parameter(heads), matrix.T.reshape(heads.shape))
    table = on_device(quantized(name, raw))
    np.testing.assert_array_equal(parameter(table), matrix)
    rows = [3, 0, 35, 18, ROWS - 1]
    np.testing.assert_array_equal(jax.jit(take_rows)(table, jnp.array([*rows, 99])), matrix[[*rows, ROWS - 1]])


@pytest.mark.parametrize("name", ["Q8_0", "Q5_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("inputs", [0, 1])
def test_floats_are_rounded_as_the_gguf_library_does(name, inputs):
    weight = np.random.default_rng(2).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    shape = (COLUMNS, ROWS) if inputs else (ROWS, COLUMNS)
    rounded = quantize(weight.T if inputs else weight, abstract(name, shape, inputs))
    raw = gguf.quants.quantize(weight, kind_of(name))
    expected = dequantized(name, raw)
    np.testing.assert_array_equal(parameter(rounded), expected.T if inputs else expected)


def test_what_cannot_be_rounded_is_one_sentence():
    weight = np.zeros((ROWS, COLUMNS), np.float32)
    with pytest.raises(ValueError, match=r"cannot be rounded to Q4_K here: .* quantization='none'"):
        quantize(weight, abstract("Q4_K", weight.shape, 0))
    with pytest.raises(ValueError, match=r"array has shape \[37, 512\]: it must be \[512, 37\]\.$"):
        quantize(weight, abstract("Q8_0", (COLUMNS, ROWS), 1))


def test_a_stack_is_its_matrices_one_after_the_other():
    random = np.random.default_rng(2)
    stack = abstract("Q4_1", (3, 64, 24), inputs=1, stacked=1)
    floats = random.standard_normal(stack.shape).astype(np.float32)
    w = quantize(floats, stack)
    assert w.matrix == (24, 64)
    for (name, array), (_, like) in zip(w.parts(), stack.parts(), strict=True):
        assert (array.shape, array.dtype) == (like.shape, like.dtype), name
    whole = parameter(w)
    for index in range(3):
        one = quantize(floats[index], abstract("Q4_1", (64, 24), inputs=1))
        np.testing.assert_array_equal(parameter(w.matrix_at(index)), parameter(one))
        np.testing.assert_array_equal(whole[index], parameter(one))
    np.testing.assert_array_equal(jax.jit(parameter)(on_device(w)), whole)
