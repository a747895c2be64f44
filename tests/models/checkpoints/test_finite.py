"""Weights that are not finite are refused with tensor and row, from every kind of file, unless they are allowed."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from helpers.loading import load_on_one_device
from helpers.tiny_directory import write_tiny_llama_directory
from helpers.tiny_files import write_tiny_directory
from helpers.tiny_gguf import TinyLlama, write_tiny_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from twinmesh import LLM
from twinmesh.engine.sharding.weights import load_weights
from twinmesh.engine.startup import build
from twinmesh.models.checkpoints import streaming
from twinmesh.models.checkpoints.finite import is_finite
from twinmesh.models.checkpoints.gguf_file import GGUFFile
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.checkpoints.orbax_writer import write
from twinmesh.models.errors import CheckpointError
from twinmesh.scripts.cli import main

WEIGHTS = TinyLlama().weights()
NAN, INF = float("nan"), float("inf")
FLOATS = [np.float32, np.float16, ml_dtypes.bfloat16]


def refuses(checkpoint, dtype, *words):
    with pytest.raises(CheckpointError) as caught:
        load_on_one_device(checkpoint, dtype)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def with_value(name, row, value, column=0):
    """A weight with one value changed."""
    changed = WEIGHTS[name].copy()
    changed[row if changed.ndim == 1 else (row, column)] = value
    return changed


@pytest.mark.parametrize("kind", FLOATS)
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_the_test_of_bits_is_the_test_of_values(kind, data):
    width = np.dtype(kind).itemsize
    bits = data.draw(arrays(f"u{width}", (3, 5), elements=st.integers(0, 256**width - 1)))
    assert is_finite(bits.view(kind)) == np.isfinite(bits.view(kind).astype(np.float32)).all()
    assert is_finite(np.zeros((0, 5), kind))


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
def test_each_value_that_is_not_finite_is_found_alone(kind, value):
    values = np.full((4, 7), np.finfo(np.float16).max, np.float32).astype(kind)
    assert is_finite(values)
    assert is_finite(-values)
    values[3, 6] = value
    assert not is_finite(values)


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "tensor", "row", "value"),
    [
        ("model.embed_tokens.weight", "token_embd.weight", 274, NAN),
        ("model.norm.weight", "output_norm.weight", 71, INF),
        ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight", 5, -INF),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight", 71, NAN),
        ("model.layers.1.mlp.gate_proj.weight", "blk.1.ffn_gate.weight", 0, INF),
        ("model.layers.1.input_layernorm.weight", "blk.1.attn_norm.weight", 3, NAN),
    ],
)
def test_tensor_and_row_are_named(tmp_path, monkeypatch, name, tensor, row, value, wanted):
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 2000)  # a few rows
    changed = with_value(name, row, value)
    file = open_checkpoint(write_tiny_gguf(tmp_path / "tiny.gguf", tensors={tensor: changed}))
    directory = open_checkpoint(write_tiny_llama_directory(tmp_path / "tiny", tensors={name: changed}))
    refuses(file, wanted, "tiny.gguf", repr(tensor), f"{value:g} in row {row},", "allow_nonfinite")
    refuses(directory, wanted, "model.safetensors", repr(name), f"{value:g} in row {row},", "--allow-nonfinite")
    for checkpoint in (file, directory):
        loaded = load_on_one_device(checkpoint, wanted, allow_nonfinite=True)
        assert sum(np.sum(~np.isfinite(np.asarray(array, np.float32))) for array in loaded.values()) == 1


@pytest.mark.parametrize("stored", FLOATS)
def test_rows_of_queries_are_those_of_the_file_in_every_stored_type(tmp_path, stored):
    """GGUF files have the rows of queries and keys in another order than the decoder."""
    name, tensor = "model.layers.0.self_attn.k_proj.weight", "blk.0.attn_k.weight"
    changed = with_value(name, 17, NAN).astype(stored)
    directory = write_tiny_llama_directory(tmp_path / "tiny", dtype=stored, tensors={name: changed})
    refuses(open_checkpoint(directory), "float32", repr(name), "row 17,")
    is_bfloat16 = stored is ml_dtypes.bfloat16
    raw = (changed.view(np.uint8), GGMLQuantizationType.BF16) if is_bfloat16 else changed
    file = open_checkpoint(write_tiny_gguf(tmp_path / "tiny.gguf", tensors={tensor: raw}))
    refuses(file, "bfloat16", repr(tensor), "row 17,")


def test_rows_of_fused_tensors_are_those_of_the_file(tmp_path):
    path = write_tiny_directory(tmp_path / "phi3", "phi3")
    name, weights = "model.layers.1.self_attn.qkv_proj.weight", load_file(path / "model.safetensors")
    last = weights[name].shape[0] - 1
    weights[name][last, 1] = INF
    save_file(weights, path / "model.safetensors")
    refuses(open_checkpoint(path), "float32", repr(name), f"row {last},")


@pytest.mark.parametrize(
    ("value", "dtype", "is_held"),
    [
        (1e5, "float16", False),
        (65504.0, "float16", True),
        (-7e4, "float16", False),
        (3.4e38, "bfloat16", False),  # rounds to infinity
        (3.38e38, "bfloat16", True),
        (3.4e38, "float32", True),
    ],
)
def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path, value, dtype, is_held):
    name = "model.layers.1.mlp.up_proj.weight"
    path = write_tiny_llama_directory(tmp_path / "tiny", tensors={name: with_value(name, 9, value)})
    if is_held:
        load_on_one_device(open_checkpoint(path), dtype)
    else:
        refuses(open_checkpoint(path), dtype, repr(name), "row 9,", f"{dtype} cannot hold")


# ---- quantised tensors

WIDE = TinyLlama(hidden=128, inner=192, tied=False)
BLOCK = {"Q8_0": 34, "Q4_0": 18, "MXFP4": 17, "NVFP4": 36}


def quantised(name, kind, at=None, to=()):
    """A weight of `WIDE` as the bytes of `kind`, the bytes from `at` (block, byte) replaced; and its type."""
    weight, kind = WIDE.weights()[name], GGMLQuantizationType[kind]
    if kind.name == "NVFP4":  # the library does not write it
        raw = np.full((weight.shape[0], weight.shape[1] // 64 * 36), 0x24, np.uint8)
    else:
        raw = quantize(weight, kind)
    if at is not None:
        block, byte = at
        raw.reshape(-1, BLOCK[kind.name])[block, byte : byte + len(to)] = to
    return raw, kind


def half(value):
    return np.float16(value).tobytes()


V, DOWN = "model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "kind", "block", "to", "row"),
    [
        (V, "blk.0.attn_v.weight", "MXFP4", 0, b"\xff", 0),
        (V, "blk.0.attn_v.weight", "MXFP4", 127, b"\xff", 31),
        (DOWN, "blk.1.ffn_down.weight", "MXFP4", 6 * 100 + 5, b"\xff", 100),
        (V, "blk.0.attn_v.weight", "Q8_0", 4 * 7 + 2, half(INF), 7),
        (V, "blk.0.attn_v.weight", "Q8_0", 4 * 9, half(NAN), 9),
        (DOWN, "blk.1.ffn_down.weight", "Q4_0", 6 * 3, half(-INF), 3),
    ],
)
def test_scales_that_are_not_finite_are_refused(tmp_path, name, tensor, kind, block, to, row):
    changed = quantised(name, kind, (block, 0), list(to))
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "tiny.gguf", WIDE, tensors={tensor: changed}))
    refuses(checkpoint, "float32", repr(tensor), f"in row {row},", "no finite number")
    loaded = load_on_one_device(checkpoint, "float32", allow_nonfinite=True)
    assert sum(int(jnp.sum(~jnp.isfinite(array))) for array in loaded.values()) >= 1


def test_large_scales_are_numbers(tmp_path):
    changed = quantised(V, "MXFP4", (5, 0), [252])
    path = write_tiny_gguf(tmp_path / "tiny.gguf", WIDE, tensors={"blk.0.attn_v.weight": changed})
    rows = GGUFFile(path).read_rows("blk.0.attn_v.weight", 0, 32)
    assert np.isfinite(rows).all()
    assert np.abs(rows).max() >= 2.0 ** (252 - 127)


# ---- a second scale


def one(value):
    return np.array([value], np.float32)


@pytest.mark.parametrize("kind", ["NVFP4", "Q8_0", None])
@pytest.mark.parametrize("scale", [0.5, -3.0, 1.0])
def test_the_second_scale_multiplies_the_weight(tmp_path, kind, scale):
    # llama.cpp b11739: the logits of the file whose weight was multiplied beforehand.
    name, weight = "blk.0.attn_v.weight", WIDE.weights()[V]
    stored = weight if kind is None else quantised(V, kind)
    plain = open_checkpoint(write_tiny_gguf(tmp_path / "plain.gguf", WIDE, tensors={name: stored}))
    more = {name: stored, "blk.0.attn_v.scale": one(scale), "blk.0.attn_v.input_scale": one(7.0)}
    scaled = open_checkpoint(write_tiny_gguf(tmp_path / "scaled.gguf", WIDE, tensors=more))
    expected, found = (load_on_one_device(checkpoint, "float32") for checkpoint in (plain, scaled))
    expected["layers.0.attention.v_proj"] *= np.float32(scale)
    for path, array in found.items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


def test_the_head_may_have_a_second_scale(tmp_path):
    weight = WIDE.weights()["lm_head.weight"]
    path = write_tiny_gguf(tmp_path / "tiny.gguf", WIDE, tensors={"output.scale": one(2.0)})
    np.testing.assert_array_equal(load_on_one_device(open_checkpoint(path), "float32")["head.weight"], 2 * weight)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"token_embd.scale": one(1.0)}, ["'token_embd.scale'", "not implemented"]),
        ({"blk.0.attn_norm.scale": one(1.0)}, ["'blk.0.attn_norm.scale'", "not implemented"]),
        ({"blk.7.attn_v.scale": one(1.0)}, ["'blk.7.attn_v.scale'", "not implemented"]),
        ({"blk.0.attn_v.scale": np.ones(2, np.float32)}, ["'blk.0.attn_v.scale'", "(2,)", "(1,)"]),
    ],
)
def test_other_scales_are_refused_by_name(tmp_path, tensors, words):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(write_tiny_gguf(tmp_path / "tiny.gguf", WIDE, tensors=tensors))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_second_scale_that_is_not_finite_is_refused(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", WIDE, tensors={"blk.0.attn_v.scale": one(NAN)})
    refuses(open_checkpoint(path), "float32", "'blk.0.attn_v.weight'", "row 0,")


# ---- Orbax, and who passes the option on


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A directory with one value that is not finite."""
    name = "model.layers.0.mlp.down_proj.weight"
    path = tmp_path_factory.mktemp("broken") / "tiny"
    return write_tiny_llama_directory(path, tensors={name: with_value(name, 3, INF, column=50)})


@pytest.fixture(scope="module")
def broken_orbax(broken, tmp_path_factory):
    path = tmp_path_factory.mktemp("orbax") / "out"
    write(open_checkpoint(broken), path, allow_nonfinite=True)
    return path


def test_converting_refuses_and_leaves_nothing(broken, tmp_path):
    with pytest.raises(CheckpointError, match=r"down_proj\.weight' holds inf in row 3,"):
        write(open_checkpoint(broken), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_converts_them_where_it_is_asked_to(broken, tmp_path, capsys):
    assert main(["convert", str(broken), str(tmp_path / "out")]) == 2
    assert "row 3" in capsys.readouterr().err
    assert main(["convert", str(broken), str(tmp_path / "out"), "--allow-nonfinite"]) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_orbax_checkpoint_is_checked_as_well(broken_orbax, dtype):
    checkpoint = open_checkpoint(broken_orbax)  # its parameter is the transpose: [80, 72]
    refuses(checkpoint, dtype, "params", "'layers.0.mlp.down_proj'", "inf in row 50,")
    loaded = load_on_one_device(checkpoint, dtype, allow_nonfinite=True)
    assert int(jnp.sum(~jnp.isfinite(loaded["layers.0.mlp.down_proj"]))) == 1


def test_rows_of_shards_are_those_of_the_whole(broken_orbax):
    mesh = Mesh(np.array(jax.devices()[:4]), ("tp",))
    for spec in (PartitionSpec("tp", None), PartitionSpec(None, "tp"), PartitionSpec()):
        place = jax.ShapeDtypeStruct((80, 72), jnp.float32, sharding=NamedSharding(mesh, spec))
        with pytest.raises(CheckpointError, match="inf in row 50,"):
            list(open_checkpoint(broken_orbax).load({"layers.0.mlp.down_proj": (place,)}))


def test_loading_weights_takes_the_option(broken):
    checkpoint, mesh = open_checkpoint(broken), Mesh(np.array(jax.devices()[:1]), ("tp",))
    with pytest.raises(CheckpointError, match="row 3,"):
        load_weights(checkpoint, jnp.dtype("float32"), [mesh], progress=False)
    (params,) = load_weights(checkpoint, jnp.dtype("float32"), [mesh], progress=False, allow_nonfinite=True)
    assert sum(int(jnp.sum(~jnp.isfinite(array))) for array in params) == 1


def test_an_engine_refuses_them_unless_it_is_asked_not_to(broken, monkeypatch):
    with pytest.raises(CheckpointError, match="row 3,"):
        LLM(broken, max_model_len=64)

    def load(*args, allow_nonfinite, **options):
        raise ValueError(f"allowed: {allow_nonfinite}")

    monkeypatch.setattr(build, "load_weights", load)
    with pytest.raises(ValueError, match="allowed: True"):
        LLM(broken, max_model_len=64, allow_nonfinite=True)
