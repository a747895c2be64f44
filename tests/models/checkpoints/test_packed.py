"""Hugging Face's quantised checkpoints: the model in floats bit for bit, transformers' logits, and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loading import load_on_one_device
from helpers.packed import FORMATS
from helpers.tiny_files import write_packed, write_tiny_directory
from twinmesh.kernels_pallas.quantized import QuantizedArray, parameter
from twinmesh.models.checkpoints.open import open_checkpoint

MATRICES = 2 * 7


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    checkpoint = open_checkpoint(write_tiny_directory(tmp_path_factory.mktemp("floats") / "packed", "packed"))
    return load_on_one_device(checkpoint, jnp.float32)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Format -> its directory, written once."""
    folder, found = tmp_path_factory.mktemp("packed"), {}

    def get(name):
        if name not in found:
            found[name] = write_packed(folder / name.replace(" ", "-"), name)
        return found[name]

    return get


def same(found, floats):
    for path, array in floats.items():
        value = found[path]
        ours = parameter(jax.tree.map(np.asarray, value)) if isinstance(value, QuantizedArray) else value
        np.testing.assert_array_equal(ours, array, err_msg=path)


@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_directory_is_the_model_in_floats_bit_for_bit(directories, floats, name):
    checkpoint = open_checkpoint(directories(name))
    assert checkpoint.method == FORMATS[name][1]["quant_method"]
    read = []
    same(load_on_one_device(checkpoint, jnp.float32, report=read.append), floats)
    assert sum(read) == checkpoint.stored_bytes


@pytest.mark.parametrize("name", FORMATS)
def test_what_stays_packed_is_the_same_and_takes_about_the_bytes_of_the_file(directories, floats, name):
    checkpoint, pattern = open_checkpoint(directories(name)), FORMATS[name][2]
    assert len(checkpoint.formats) == (MATRICES if pattern else 0)
    assert all(re.fullmatch(pattern, layout) for layout in checkpoint.formats.values())
    assert len(checkpoint.dequantized) == MATRICES - len(checkpoint.formats)
    read = []
    kept = load_on_one_device(checkpoint, jnp.float32, formats=checkpoint.formats, report=read.append)
    same(kept, floats)
    assert sum(read) == checkpoint.stored_bytes
    on_device = sum(kept[path].nbytes for path in checkpoint.formats)
    in_file = checkpoint.stored_bytes - sum(x.nbytes for path, x in floats.items() if path not in checkpoint.formats)
    if pattern:
        assert on_device <= 1.15 * in_file
