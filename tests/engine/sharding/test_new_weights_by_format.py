"""New values for a parameter that stays quantised, in every format: what takes its place, and what is refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.core_engine import model_with_windows
from twinmesh.engine.sharding.mesh import build_meshes
from twinmesh.engine.sharding.weights import Placer
from twinmesh.engine.topology import Topology
from twinmesh.kernels_pallas.formats.layouts import LAYOUTS
from twinmesh.kernels_pallas.quantized import abstract, parameter
from twinmesh.models.quantized import quantize

PATH, SHAPE = "layers.0.mlp.down_proj", (256, 128)
# GGUF's, and of the others each kind with each group and each type of scales at least once.
FORMATS = [
    *(name for name in LAYOUTS if "-" not in name),
    "FP8-128-float32", "FP8-64-bfloat16", "INT8-128-float32", "INT8-32-float16", "UINT8-64-float16", "INT4-32-bfloat16",
    "INT4-128-float16", "UINT4-128-float16", "UINT4-64-float32",
]  # fmt: skip
CANNOT_BE_ROUNDED_TO = ("Q4_K", "Q6_K")


@pytest.fixture(scope="module")
def placer():
    (mesh,) = build_meshes(Topology.parse("both=1"), jax.devices("cpu")[:1])
    model = replace(model_with_windows(None), hidden_size=SHAPE[1], intermediate_size=SHAPE[0])
    return lambda name: Placer(model, jnp.dtype("float32"), mesh, {PATH: name})


def rounded(name):
    """A parameter in the format; of zeros in one that nothing here rounds to."""
    like = abstract(name, SHAPE, 1)
    if name in CANNOT_BE_ROUNDED_TO:
        return like.with_parts({part: np.zeros(one.shape, one.dtype) for part, one in like.parts()})
    return quantize(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32), like)


@pytest.mark.parametrize("name", FORMATS)
def test_one_of_the_same_format_takes_its_place_bit_for_bit(placer, name):
    one, given = placer(name), rounded(name)
    one.check({PATH: given})
    found = jax.tree.map(np.asarray, one.put(PATH, one.private_copy(PATH, given)))
    np.testing.assert_array_equal(parameter(found), parameter(given))


def with_scales(given, change):
    parts = dict(given.parts())
    return given.with_parts(parts | {"scales": change(parts["scales"])})


@pytest.mark.parametrize("name", FORMATS)
def test_all_else_is_refused_in_a_sentence_that_says_what_it_must_be(placer, name):
    one, given = placer(name), rounded(name)
    other = "INT8-64-bfloat16" if name != "INT8-64-bfloat16" else "MXFP4"
    for wrong, words in (
        (np.zeros(SHAPE, np.float32), rf"is float32\[256, 128\]: it must be {name}\[256, 128\], .*; round it with"),
        (rounded(other), rf"is {other}\[256, 128\]: it must be {name}\[256, 128\], as before\.$"),
        (abstract(name, (512, 128), 1), rf"is {name}\[512, 128\]: it must be {name}\[256, 128\]"),
        (with_scales(given, lambda part: part[:-1]), rf"{PATH}'\]\.scales is .*: it must be "),
        (with_scales(given, lambda part: part.astype(np.int64)), r"\.scales is int(32|64)\[.*: it must be "),
    ):
        with pytest.raises(ValueError, match=words) as refusal:
            one.check({PATH: wrong})
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", CANNOT_BE_ROUNDED_TO)
def test_what_nothing_rounds_to_here_is_said(name):
    with pytest.raises(ValueError, match=f"cannot be rounded to {name} here: .*quantization='none'"):
        quantize(np.zeros(SHAPE, np.float32), abstract(name, SHAPE, 1))
