"""Weights packed as MXFP4, in Hugging Face's layout and in GGUF's: the same numbers, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from helpers.loading import load_on_one_device
from helpers.mxfp4 import VALUES, gguf_blocks
from helpers.tiny_files import write_packed_directory, write_tiny_directory, write_tiny_gguf_of
from twinmesh.kernels_pallas.quantized import parameter
from twinmesh.models.checkpoints.mxfp4 import MXFP4Files
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.checkpoints.safetensors import SafetensorsFiles
from twinmesh.models.errors import CheckpointError

LAYERS, BLOCKS = 3, "model.layers.1.mlp.experts.down_proj_blocks"


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    checkpoint = open_checkpoint(write_tiny_directory(tmp_path_factory.mktemp("floats") / "gpt_oss", "gpt_oss"))
    return load_on_one_device(checkpoint, jnp.float32)


def check_same(checkpoint, floats):
    read = []
    found = load_on_one_device(checkpoint, jnp.float32, report=read.append)
    for path, array in floats.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)
    assert sum(read) == checkpoint.stored_bytes


@pytest.mark.parametrize("shards", [1, 3])
def test_a_packed_directory_is_the_same_model_bit_for_bit(tmp_path, floats, shards):
    """With several files, blocks and scales of a weight are in two of them."""
    checkpoint = open_checkpoint(write_packed_directory(tmp_path / "gpt-oss", shards=shards))
    check_same(checkpoint, floats)
    assert checkpoint.dtype == jnp.float32


def test_a_gguf_file_with_packed_experts_is_the_same_model_bit_for_bit(tmp_path, floats):
    def pack(tensor, array):
        return (gguf_blocks(array), GGMLQuantizationType.MXFP4) if tensor.endswith("exps.weight") else array

    checkpoint = open_checkpoint(write_tiny_gguf_of(tmp_path / "gpt-oss.gguf", "gpt_oss", pack=pack))
    check_same(checkpoint, floats)
    assert set(checkpoint.formats.values()) == {"MXFP4"}


def test_packed_weights_may_stay_as_they_are(tmp_path, floats):
    checkpoint = open_checkpoint(write_packed_directory(tmp_path / "gpt-oss"))
    assert not checkpoint.dequantized
    assert list(checkpoint.formats.values()) == ["MXFP4"] * 3 * LAYERS
    read = []
    kept = load_on_one_device(checkpoint, jnp.float32, formats=checkpoint.formats, report=read.append)
    assert sum(read) == checkpoint.stored_bytes
    for path in checkpoint.formats:
        np.testing.assert_array_equal(jax.jit(parameter)(kept[path]), floats[path], err_msg=path)
    assert sum(kept[path].nbytes for path in checkpoint.formats) == 3 * LAYERS * 7 * 64 * 32 // 32 * 17


def test_every_code_at_every_exponent_is_what_it_stands_for(tmp_path):
    from safetensors.numpy import save_file

    codes = np.tile(np.arange(16, dtype=np.uint8), (255, 2))  # [exponents, 32]
    blocks = (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(255, 1, 16)
    save_file(
        {"w_blocks": blocks, "w_scales": np.arange(255, dtype=np.uint8).reshape(255, 1)}, tmp_path / "w.safetensors"
    )
    found = MXFP4Files(SafetensorsFiles([tmp_path / "w.safetensors"])).read_rows("w_blocks", 0, 253)
    expected = VALUES[codes[:253]] * np.exp2(np.arange(253) - 127.0)[:, None]
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_a_scale_of_255_is_refused_by_tensor_and_row(tmp_path):
    def change(weights):
        weights[BLOCKS.replace("blocks", "scales")][2, 5, 0] = 255

    checkpoint = open_checkpoint(write_packed_directory(tmp_path / "gpt-oss", change=change))
    with pytest.raises(CheckpointError, match=rf"{BLOCKS}' holds nan in row {2 * 64 + 5}, .* fetch the model again"):
        load_on_one_device(checkpoint, jnp.float32)
    with pytest.raises(CheckpointError, match=rf"{BLOCKS}' holds nan in row {2 * 64 + 5}, "):
        load_on_one_device(checkpoint, jnp.float32, formats=checkpoint.formats)


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop(BLOCKS.replace("blocks", "scales")),
        lambda weights: weights.update({BLOCKS: weights[BLOCKS].astype(np.int32)}),
        lambda weights: weights.update({BLOCKS: weights[BLOCKS][..., :8].copy()}),
        lambda weights: weights.update(
            {BLOCKS: np.zeros(16, np.uint8), BLOCKS.replace("blocks", "scales"): np.zeros((), np.uint8)}
        ),
    ],
    ids=["no scales", "no bytes", "half a block", "one block without an axis"],
)
def test_what_is_no_packed_weight_is_refused_by_name(tmp_path, change):
    path = write_packed_directory(tmp_path / "gpt-oss", change=change)
    with pytest.raises(CheckpointError, match=f"{BLOCKS}.*are no weight in MXFP4") as refusal:
        open_checkpoint(path)
    assert str(path) in str(refusal.value)
