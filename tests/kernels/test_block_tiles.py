"""The layout of quantised weights: what goes in comes out as the gguf package has it, to the last bit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.quantized import FORMATS, dequantized, draw_raw
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmesh.kernels_pallas import block_tiles
from twinmesh.kernels_pallas.block_tiles import LAYOUTS, Tiles


def on_device(tiles):
    return Tiles(*(None if part is None else jnp.asarray(part) for part in tiles))


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), outputs=st.integers(1, 50), blocks=st.integers(1, 3))
def test_dequantised_tiles_are_the_references_weights(name, seed, outputs, blocks):
    raw = draw_raw(name, outputs, 256 * blocks, np.random.default_rng(seed))
    found = block_tiles.dequantize(name, block_tiles.pack(name, raw))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[:outputs], dequantized(name, raw))
    assert not found[outputs:].any()


@pytest.mark.parametrize("name", FORMATS)
def test_jax_unpacks_what_numpy_packed(name):
    raw = draw_raw(name, 37, 512, np.random.default_rng(0))
    tiles = on_device(block_tiles.pack(name, raw))
    np.testing.assert_array_equal(block_tiles.dequantize(name, tiles)[:37], dequantized(name, raw))


@pytest.mark.parametrize("name", FORMATS)
def test_shapes_are_those_of_packed_arrays(name):
    tiles = block_tiles.pack(name, draw_raw(name, 37, 512, np.random.default_rng(0)))
    described = {part: (array.shape, array.dtype) for part, array in tiles._asdict().items() if array is not None}
    assert block_tiles.shapes(name, 37, 512) == described


@pytest.mark.parametrize("name", LAYOUTS)
def test_bits_of_a_weight_are_those_of_the_arrays(name):
    arrays = block_tiles.shapes(name, 16, 256).values()
    held = sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays)
    assert LAYOUTS[name].bits_per_weight * 16 * 256 == 8 * held


@pytest.mark.parametrize("name", FORMATS)
def test_tiles_and_blocks_can_be_cut(name):
    """As devices divide them: outputs along the first axis of every array, inputs along the second."""
    raw = draw_raw(name, 64, 512, np.random.default_rng(0))
    tiles, exact = block_tiles.pack(name, raw), dequantized(name, raw)
    lower = jax.tree.map(lambda part: part[2:], tiles)
    np.testing.assert_array_equal(block_tiles.dequantize(name, lower), exact[32:])
    right = jax.tree.map(lambda part: part[:, part.shape[1] // 2 :], tiles)
    np.testing.assert_array_equal(block_tiles.dequantize(name, right), exact[:, 256:])


@pytest.mark.parametrize("bits", sorted({layout.bits for layout in LAYOUTS.values()}))
def test_each_value_has_its_place(bits):
    """One value at a time: no two share bits, and none is lost."""
    for place in range(0, 512, 7):
        u = np.zeros((16, 32), np.uint8)
        u[place // 32, place % 32] = 2**bits - 1
        packed = block_tiles.pack_values(u, bits)
        assert packed.shape == (1, 1, 64 * bits)
        assert np.unpackbits(packed).sum() == bits
        np.testing.assert_array_equal(block_tiles.unpack_values(packed, bits), u)
