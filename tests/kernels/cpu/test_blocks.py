"""Products with quantised weights against float64: formats, awkward sizes, drawn contents, bits, other CPUs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.quantized import FORMATS, dequantized, draw_raw
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from twinmesh.kernels_pallas import block_tiles
from twinmesh.kernels_pallas.block_tiles import LAYOUTS, Tiles
from twinmesh.kernels_pallas.cpu import blocks, frames, loader
from twinmesh.kernels_pallas.cpu.blocks_check import check_blocks, random_tiles
from twinmesh.kernels_pallas.cpu.blocks_records import NUMBER_BYTES, room_bytes
from twinmesh.kernels_pallas.cpu.levels import LEVELS, Level

pytestmark = pytest.mark.skipif(loader.toolchain() is None, reason="no CPU kernels here")
# Each is another kernel, which takes seconds to compile. Of 16 bits, activations meet all formats; of 8, or as floats,
# formats that go each way through the code.
WAYS = [(name, "int16") for name in FORMATS]
WAYS += [(name, "int8") for name in ("Q8_0", "Q4_1", "Q6_K")] + [(name, "float") for name in ("Q5_0", "Q4_1", "Q6_K")]
MORE_WAYS = [(name, "int8") for name in ("Q5_0", "Q4_0", "Q4_K")]
LARGEST = {"int8": 127, "int16": 127 * 256}
BITS_ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 33, 64)


@functools.partial(jax.jit, static_argnames=("name", "outputs", "dtype", "activations"))
def multiply(x, w, name, outputs, dtype="float32", activations="int8"):
    product = blocks.product(x, w, name, outputs, dtype=dtype, activations=activations)
    assert product is not None
    return product


def weights(name, outputs, inputs, seed=0):
    raw = draw_raw(name, outputs, inputs, np.random.default_rng(seed))
    packed = block_tiles.pack(name, raw)
    return Tiles(*(None if part is None else jnp.asarray(part) for part in packed)), dequantized(name, raw)


def rows(count, inputs, dtype="float32", seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, inputs)), dtype)


def rounded(x, most):
    """Round activations as the kernel does: integers up to `most` by blocks of 32, and a scale."""
    by_block = np.asarray(x, np.float32).reshape(x.shape[0], -1, 32)
    largest = np.abs(by_block).max(-1, keepdims=True)
    inverse = np.divide(np.float32(most), largest, out=np.zeros_like(largest), where=largest > 0)
    q = np.rint(by_block * inverse).astype(np.float64)
    return (q * (largest * np.float32(1 / most))).reshape(x.shape)


def check(found, x, w, activations="int8"):
    """Compare with float64. Both factors are those that the kernel multiplies, so only its sums in float32 differ."""
    x = rounded(x, LARGEST[activations]) if activations in LARGEST else np.asarray(x, np.float64)
    size = np.abs(x) @ np.abs(w.T.astype(np.float64))
    # Min and value of a weight may cancel, and are summed apart.
    bound = 2.0**-23 * x.shape[1] ** 0.5 * (8 * size + 8 * np.abs(x).sum(1, keepdims=True) * np.abs(w).max())
    assert (np.abs(np.asarray(found, np.float64) - x @ w.T.astype(np.float64)) <= bound + 1e-30).all()


SIZES = [(1, 576), (3, 1), (7, 15), (8, 16), (13, 83), (70, 33)]


@pytest.mark.parametrize(("name", "activations"), WAYS)
@pytest.mark.parametrize(("count", "outputs"), SIZES)
def test_any_size_is_right(name, activations, count, outputs):
    w, exact = weights(name, outputs, 512)
    for dtype in ("float32", "bfloat16"):
        x = rows(count, 512, dtype)
        check(multiply(x, w, name, outputs, activations=activations), x, exact, activations)


@pytest.mark.parametrize(("name", "activations"), [way for way in WAYS if way[1] in LARGEST])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_contents_are_right(name, activations, data):
    """Any bytes are blocks of some weights, and inputs may be of very different sizes, zeros among them."""
    w, exact = weights(name, 35, 256, seed=data.draw(st.integers(0, 2**31)))
    sizes = st.sampled_from([0.0, -0.0, 1e-12, 1.0, -3.0, 1e12])
    x = rows(5, 256) * np.array(data.draw(st.lists(sizes, min_size=256, max_size=256)), np.float32)
    check(multiply(x, w, name, 35, activations=activations), x, exact, activations)


@pytest.mark.parametrize(("name", "activations"), WAYS)
def test_a_rows_bits_are_its_own(name, activations):
    w, _ = weights(name, 83, 512)
    x = rows(130, 512)
    every = np.asarray(multiply(x, w, name, 83, activations=activations))
    for count in BITS_ROWS:
        for first in (0, 130 - count):
            found = multiply(x[first : first + count], w, name, 83, activations=activations)
            np.testing.assert_array_equal(found, every[first : first + count])


@pytest.mark.long
@pytest.mark.parametrize(("name", "activations"), MORE_WAYS)
def test_other_formats_of_8_bits_are_right_and_a_rows_bits_its_own(name, activations):
    for count, outputs in SIZES:
        test_any_size_is_right(name, activations, count, outputs)
    test_any_contents_are_right(name, activations)
    test_a_rows_bits_are_its_own(name, activations)


# Each kind of groups of several blocks, with scales of every type; those of the tests of engines, which so share them.
GROUPED = [
    ("FP8-128-float32", "int16"), ("UINT4-128-float16", "int16"), ("INT8-128-float16", "int16"),
    ("INT4-128-bfloat16", "int16"), pytest.param("INT8-64-bfloat16", "int8", marks=pytest.mark.long),
]  # fmt: skip


@pytest.mark.parametrize(("name", "activations"), GROUPED)
def test_groups_of_several_blocks_are_right_and_a_rows_bits_its_own(name, activations):
    packed = random_tiles(np.random.default_rng(3), LAYOUTS[name], 83, 512)
    w, exact = jax.tree.map(jnp.asarray, packed), block_tiles.dequantize(name, packed)[:83]
    x = rows(19, 512)
    every = np.asarray(multiply(x, w, name, 83, activations=activations))
    check(every, x, exact, "float" if name.startswith("FP8") else activations)
    for count in (1, 3, 8):
        found = multiply(x[-count:], w, name, 83, activations=activations)
        np.testing.assert_array_equal(found, every[-count:])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("name", "activations"), [("Q8_0", "int8"), ("Q6_K", "int16"), ("Q5_0", "float")])
def test_a_row_that_is_not_finite_stays_alone(name, value, activations):
    w, _ = weights(name, 40, 256)
    x = rows(9, 256)
    every = np.asarray(multiply(x, w, name, 40, activations=activations))
    found = np.asarray(multiply(x.at[4, 3].set(value), w, name, 40, activations=activations))
    assert not np.isfinite(found[4]).any()
    np.testing.assert_array_equal(np.delete(found, 4, 0), np.delete(every, 4, 0))


def test_a_bfloat16_result_is_the_float32_one_rounded():
    w, _ = weights("Q8_0", 83, 512)
    x = rows(11, 512)
    np.testing.assert_array_equal(
        multiply(x, w, "Q8_0", 83, dtype="bfloat16"), multiply(x, w, "Q8_0", 83).astype("bfloat16")
    )


def test_float16_is_widened_and_rounded():
    w, _ = weights("Q4_1", 83, 512)
    x = rows(11, 512, "float16")
    want = multiply(x.astype("float32"), w, "Q4_1", 83)
    np.testing.assert_array_equal(multiply(x, w, "Q4_1", 83), want)
    np.testing.assert_array_equal(multiply(x, w, "Q4_1", 83, dtype="float16"), want.astype("float16"))


def test_zeros_give_zeros():
    w, _ = weights("Q4_1", 20, 256)
    assert not np.asarray(multiply(jnp.zeros((2, 256)), w, "Q4_1", 20)).any()


def test_parts_of_the_inputs_and_of_the_outputs_add_up_to_the_whole():
    """Weights are divided over two devices either way."""
    w, _ = weights("Q6_K", 64, 512)
    x = rows(3, 512)
    want = np.asarray(multiply(x, w, "Q6_K", 64))
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    by_outputs = jax.shard_map(
        lambda x, w: multiply(x, w, "Q6_K", 32), mesh=mesh, check_vma=False,
        in_specs=(PartitionSpec(), PartitionSpec("tp")), out_specs=PartitionSpec(None, "tp"),
    )  # fmt: skip
    np.testing.assert_array_equal(jax.jit(by_outputs)(x, w), want)
    by_inputs = jax.shard_map(
        lambda x, w: jax.lax.psum(multiply(x, w, "Q6_K", 64), "tp"), mesh=mesh, check_vma=False,
        in_specs=(PartitionSpec(None, "tp"), PartitionSpec(None, "tp")), out_specs=PartitionSpec(),
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(by_inputs)(x, w), want, atol=1e-4 * np.abs(want).max())


def test_shapes_that_do_not_fit_are_refused():
    w, _ = weights("Q4_1", 40, 256)
    with pytest.raises(ValueError, match="3 tiles of 16 outputs and 8 blocks of 32 inputs"):
        multiply(rows(2, 128), w, "Q4_1", 40)
    with pytest.raises(ValueError, match="there are 49 outputs"):
        multiply(rows(2, 256), w, "Q4_1", 49)


def test_what_the_kernel_does_not_take_is_xlas():
    w, _ = weights("Q4_0", 40, 256)
    for x, dtype in ((jnp.zeros((2, 256), int), "float32"), (rows(2, 256), "int8"), (rows(0, 256), "float32")):
        assert blocks.product(x, w, "Q4_0", 40, dtype=dtype, activations="int8") is None


# Four lanes, as NEON has them, in code that any machine can run.
_PLAIN = Level("neon", "x86_64", "x86-64-v3", "", frozenset(), 4, 16)


def _cases():
    """List levels below this CPU's with formats that go each way through their code, and the plain code."""
    tools = loader.toolchain()
    if tools is None:
        return []
    every = {"avx512": ["Q8_0"], "avx2": ["Q8_0", "Q5_0", "Q6_K"]}
    below = [level for level in LEVELS if level.machine == tools.level.machine and level.needs < tools.level.needs]
    cases = [(level, every[level.name], kind) for level in below if level.name in every for kind in LARGEST]
    cases += [(_PLAIN, ["Q8_0"], "int8"), (_PLAIN, ["Q4_1"], "int16")]
    return [pytest.param(*case, id=f"{case[0].name}-{case[0].lanes}-{case[2]}") for case in cases]


@pytest.mark.parametrize(("level", "names", "activations"), _cases())
def test_lesser_cpus_compute_the_same_bits(level, names, activations):
    """Integer sums are exact, and the rest is the same arithmetic: only the instructions differ."""
    kind = list(NUMBER_BYTES).index(activations)
    for name, code in zip(names, compiled(level, names, kind), strict=True):
        number = list(LAYOUTS).index(name)
        call = functools.partial(frames.call, loader.load_object(code))
        assert check_blocks(call, level, number, kind)
        w, _ = weights(name, 37, 512)
        x = np.asarray(rows(13, 512))
        found = np.full((13, 37), np.nan, np.float32)
        room = np.zeros(room_bytes(13, 512, LAYOUTS[name], activations), np.uint8)
        call([x, *(np.asarray(part) for part in w if part is not None)], [found, room], [4, 4])
        np.testing.assert_array_equal(found, multiply(jnp.asarray(x), w, name, 37, activations=activations))


def compiled(level, names, kind):
    numbers = [list(LAYOUTS).index(name) for name in names]
    if level is not _PLAIN:
        return loader.compile_in_child(level, *(f"blocks:{number}:{kind}" for number in numbers))
    from twinmesh.kernels_pallas.cpu.build import compile_kernel

    return [compile_kernel("blocks", level, (number, kind)) for number in numbers]


def test_a_self_test_finds_a_kernel_that_is_wrong():
    def call(arguments, results, attributes):
        results[0][...] = 0

    assert not check_blocks(call, dataclasses.replace(_PLAIN), 0, 0)


@pytest.mark.parametrize("name", FORMATS)
def test_16_bits_are_nearly_as_exact_as_floats(name):
    """Products are off by 2**-16 of a block's largest activation at most, and the largest values overflow nothing."""
    w, exact = weights(name, 33, 1024)
    for x in (rows(9, 1024), jnp.ones((2, 1024)), -jnp.ones((2, 1024))):
        found = np.asarray(multiply(x, w, name, 33, activations="int16"), np.float64)
        error = np.abs(found - np.asarray(x, np.float64) @ exact.T.astype(np.float64))
        assert error.max() <= 1e-4 * (np.abs(np.asarray(x)) @ np.abs(exact.T)).max()


def test_16_bits_overflow_nothing():
    """All values and all activations of a block are the largest, of one sign or of both by turns."""
    for name in FORMATS:
        form = LAYOUTS[name]
        for u in (0, 2**form.bits - 1):
            scales = np.ones((16, 64 // form.group), form.scale_dtype)
            mins = block_tiles.pack_scales(0 * scales) if form.has_mins else None
            values = block_tiles.pack_values(np.full((16, 64), u, np.uint8), form.bits)
            w = Tiles(values, block_tiles.pack_scales(scales), mins)
            for sign in (1.0, -1.0):
                found = multiply(jnp.full((8, 64), sign), w, name, 16, activations="int16")
                np.testing.assert_allclose(found, np.full((8, 16), 64 * sign * (u - form.zero)), rtol=1e-6)
