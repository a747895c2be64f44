"""Rounding to formats that are not GGUF's: nearest numbers, the scale's rule, zeros, and what `convert` writes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.loading import load_on_one_device
from helpers.mxfp4 import VALUES
from helpers.tiny_files import write_packed, write_tiny_directory
from twinmesh.kernels_pallas.quantized import QuantizedArray, abstract, parameter
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.quantized import quantize
from twinmesh.scripts.cli import main

ROWS, COLUMNS = 20, 256


def rounded(name, weights):
    return parameter(quantize(weights, abstract(name, weights.shape, 0)))


def weights(seed=0):
    random = np.random.default_rng(seed)
    return (random.standard_normal((ROWS, COLUMNS)) * np.exp(random.uniform(-9, 9, (ROWS, 1)))).astype(np.float32)


@pytest.mark.parametrize("name", ["FP8-128-float32", "INT8-64-float32", "MXFP4", "INT4-32-float16"])
def test_zeros_and_what_is_held_already_stay(name):
    some = rounded(name, np.random.default_rng(1).standard_normal((ROWS, COLUMNS)).astype(np.float32))
    some[3] = 0
    np.testing.assert_array_equal(rounded(name, np.zeros_like(some)), np.zeros_like(some))
    np.testing.assert_allclose(rounded(name, some), some, rtol=1e-6)


def test_int8_has_the_scale_of_the_largest_of_an_output():
    w = weights()
    scales = np.abs(w).max(1, keepdims=True) / np.float32(127)
    np.testing.assert_allclose(rounded("INT8-128-float32", w), np.rint(w / scales) * scales, rtol=1e-6)


def test_fp8_has_the_scale_of_the_largest_of_an_output():
    w = weights()
    scales = np.abs(w).max(1, keepdims=True) / np.float32(448)
    nearest = (w / scales).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_allclose(rounded("FP8-32-float32", w), nearest * scales, rtol=1e-6)


def test_mxfp4_has_the_exponent_of_the_largest_less_two_and_nearest_numbers():
    """By OCP Microscaling Formats 1.0; in float64, with ties to the even code."""
    w = weights()
    w[0, :32] = [
        0.25,
        0.75,
        1.25,
        1.75,
        2.5,
        3.5,
        5.0,
        7.9,
        *[-x for x in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.9)],
    ] * 2
    blocks = w.astype(np.float64).reshape(ROWS, -1, 32)
    powers = np.exp2(np.floor(np.log2(np.abs(blocks).max(-1, keepdims=True))) - 2)
    distance = np.abs(blocks[..., None] / powers[..., None] - VALUES)
    distance[..., 1::2] += 1e-12  # odd codes lose
    expected = VALUES[distance.argmin(-1)] * powers
    np.testing.assert_array_equal(rounded("MXFP4", w), expected.reshape(w.shape))
    assert rounded("MXFP4", w)[0, :8].tolist() == [0, 1, 1, 2, 2, 4, 4, 6]


@pytest.mark.parametrize(("name", "bits", "group"), [("UINT4-64-float16", 4, 64), ("UINT8-128-float32", 8, 128)])
def test_zero_points_hold_the_range_of_a_group(name, bits, group):
    w = weights() + 0.5
    w[4] = np.abs(w[4])
    by_group = w.reshape(ROWS, -1, group)
    steps = (np.maximum(by_group.max(-1), 0) - np.minimum(by_group.min(-1), 0)) / (2**bits - 1)
    error = np.abs(rounded(name, w) - w).reshape(by_group.shape).max(-1)
    assert (error <= 1.01 * steps).all()


@pytest.mark.parametrize(("name", "kind"), [("fp8", "FP8"), ("mxfp4", "MXFP4")])
def test_convert_rounds_the_projections_of_experts_too(tmp_path, capsys, name, kind):
    source = write_tiny_directory(tmp_path / "source", "gpt_oss")
    assert main(["convert", str(source), str(tmp_path / "out"), "--quantize", name]) == 0
    capsys.readouterr()
    checkpoint, floats = open_checkpoint(tmp_path / "out"), load_on_one_device(open_checkpoint(source), jnp.float32)
    assert checkpoint.method == name
    names = {path.rpartition(".")[2] for path in checkpoint.formats}
    assert (
        {"gate_proj", "up_proj", "down_proj"}
        <= names
        <= {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    )
    kept = load_on_one_device(checkpoint, jnp.float32, formats=checkpoint.formats)
    for path, array in floats.items():
        if path.startswith(("layers.1.", "layers.2.")):
            continue
        found = kept[path]
        if not isinstance(found, QuantizedArray):
            np.testing.assert_array_equal(found, array)
            continue
        assert found.format.startswith(kind)
        like = jax.tree.map(np.asarray, found)
        np.testing.assert_array_equal(parameter(like), parameter(quantize(np.asarray(array), like)))


def test_what_is_quantised_already_is_not_rounded_again_unless_a_dtype_is_named(tmp_path, capsys):
    source = write_packed(tmp_path / "source", "awq")
    assert main(["convert", str(source), str(tmp_path / "out"), "--quantize", "int8"]) == 2
    assert "source cannot be rounded to int8: its projections are quantised already" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "out"), "--quantize", "int8", "--dtype", "bfloat16"]) == 0
    checkpoint = open_checkpoint(tmp_path / "out")
    assert {name.partition("-")[0] for name in checkpoint.formats.values()} == {"INT8"}
    assert checkpoint.dtype == jnp.bfloat16
