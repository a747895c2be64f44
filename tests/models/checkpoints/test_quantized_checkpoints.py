"""Parameters that stay quantised: from GGUF files and through Orbax, the same values as dequantised, and damage."""

import json

import gguf as gguf_library
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loading import load_on_one_device
from helpers.quantized import MIXED, MODEL, kind_of, write_quantized
from helpers.tiny_files import write_tiny_gguf_of
from helpers.tiny_gguf import TinyLlama
from twinmesh.kernels_pallas.quantized import QuantizedArray, parameter
from twinmesh.models.checkpoints.gguf_file import GGUFFile
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.checkpoints.orbax_writer import write
from twinmesh.models.decoder import abstract_params
from twinmesh.models.errors import CheckpointError
from twinmesh.scripts.cli import main

OUT = "layers.1.attention.o_proj"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_quantized(tmp_path_factory.mktemp("quantised") / "tiny.gguf")


@pytest.fixture(scope="module")
def gguf(path):
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def converted(gguf, tmp_path_factory):
    directory = tmp_path_factory.mktemp("orbax") / "tiny"
    write(gguf, directory)
    return open_checkpoint(directory)


def load(checkpoint, formats=None, **options):
    return load_on_one_device(
        checkpoint, "float32", formats=checkpoint.formats if formats is None else formats, **options
    )


def same(found, expected):
    """Compare parameters by path, quantised ones by the floats that they stand for."""
    assert list(found) == list(expected)
    for path, ours in found.items():
        floats = [parameter(x) if isinstance(x, QuantizedArray) else x for x in (ours, expected[path])]
        np.testing.assert_array_equal(*floats, err_msg=path)


def test_a_gguf_file_names_the_format_of_every_matrix(gguf):
    found = gguf.formats
    assert len(found) == 2 * 7 + 1
    assert {path.rpartition(".")[2]: name for path, name in found.items() if "layers.0" in path} == {
        "q_proj": MIXED["attn_q"], "k_proj": MIXED["attn_k"], "v_proj": MIXED["attn_v"], "o_proj": MIXED["attn_output"],
        "gate_proj": MIXED["ffn_gate"], "up_proj": MIXED["ffn_up"], "down_proj": MIXED["ffn_down"],
    }  # fmt: skip
    assert found["embedding.weight"] == "Q8_0"


def test_what_stays_quantised_has_the_values_of_what_is_dequantised(gguf):
    kept = load(gguf)
    assert all(isinstance(kept[path], QuantizedArray) for path in gguf.formats)
    same(kept, load(gguf, {}))


def test_any_of_the_parameters_may_stay(gguf):
    mixed = load(gguf, {OUT: "Q4_K"})
    assert [path for path, value in mixed.items() if isinstance(value, QuantizedArray)] == [OUT]
    same(mixed, load(gguf, {}))


def test_they_take_less_memory(gguf):
    def size(params):
        return sum(x.nbytes for x in jax.tree.leaves(tuple(params.values())))

    assert size(load(gguf)) < 0.3 * size(load(gguf, {}))


def test_orbax_keeps_them_bit_for_bit(gguf, converted):
    assert (converted.formats, converted.dtype) == (gguf.formats, gguf.dtype)
    ours, theirs = load(converted), load(gguf)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_orbax_dequantises_them_where_that_is_asked_for(gguf, converted, tmp_path):
    for dtype in ("float32", "bfloat16"):
        same(load_on_one_device(converted, dtype), load_on_one_device(gguf, dtype))
    write(converted, tmp_path / "again")  # from Orbax to Orbax
    same(load(open_checkpoint(tmp_path / "again")), load(gguf))


def test_convert_keeps_them_unless_a_dtype_is_named(path, gguf, tmp_path, capsys):
    assert main(["convert", str(path), str(tmp_path / "kept")]) == 0
    assert open_checkpoint(tmp_path / "kept").formats == gguf.formats
    assert main(["convert", str(path), str(tmp_path / "wide"), "--dtype", "bfloat16"]) == 0
    wide = open_checkpoint(tmp_path / "wide")
    assert (wide.formats, wide.dtype) == ({}, jnp.bfloat16)
    size = [sum(file.stat().st_size for file in (tmp_path / name / "params").rglob("d/*")) for name in ("kept", "wide")]
    assert size[0] < 0.6 * size[1]


def test_a_checkpoint_of_the_format_before_is_read(tmp_path):
    write(open_checkpoint(write_quantized(tmp_path / "tiny.gguf", TinyLlama(), {})), tmp_path / "out")
    file = tmp_path / "out" / "twinmesh.json"
    content = json.loads(file.read_text())
    assert content.pop("formats") == {}
    file.write_text(json.dumps(content | {"format": 1}))
    assert open_checkpoint(tmp_path / "out").formats == {}
    load(open_checkpoint(tmp_path / "out"))


def claimed(converted, tmp_path, name, format_):
    """A copy of the checkpoint whose description gives a parameter another format."""
    write(converted, tmp_path / "out")
    file = tmp_path / "out" / "twinmesh.json"
    content = json.loads(file.read_text())
    content["formats"][name] = format_
    file.write_text(json.dumps(content))
    return tmp_path / "out"


def test_a_format_that_is_unknown_is_named(converted, tmp_path):
    directory = claimed(converted, tmp_path, OUT, "Q3_K")
    with pytest.raises(CheckpointError, match=r"names the format 'Q3_K', which this version does not know\.$"):
        open_checkpoint(directory)


@pytest.mark.parametrize("name", ["layers.9.attention.o_proj", "norm.weight", "", "layers.0.mlp", "head.bias"])
def test_a_format_of_what_is_no_matrix_is_named(converted, tmp_path, name):
    directory = claimed(converted, tmp_path, name, "Q8_0")
    with pytest.raises(
        CheckpointError, match=rf"names a format of '{name}', which no matrix of the model is called\.$"
    ):
        open_checkpoint(directory)


def test_a_format_that_does_not_fit_the_stored_arrays_is_named(converted, tmp_path):
    directory = claimed(converted, tmp_path, OUT, "Q6_K")
    with pytest.raises(CheckpointError, match=rf"{OUT}"):
        load(open_checkpoint(directory))


def test_a_scale_that_is_not_finite_is_named_with_its_row(tmp_path):
    path = write_quantized(tmp_path / "tiny.gguf", MODEL, {"ffn_up": "Q4_1"})
    info = GGUFFile(path).tensors["blk.1.ffn_up.weight"]
    row = MODEL.hidden // 32 * 20  # bytes
    with path.open("r+b") as file:
        file.seek(info.offset + 300 * row + 2)  # the smallest value of the row's first block
        file.write(np.array([np.nan], np.float16).tobytes())
    damaged = open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"tensor 'blk.1.ffn_up.weight' holds nan in row 300"):
        load(damaged)
    kept = load(damaged, allow_nonfinite=True)["layers.1.mlp.up_proj"]
    assert np.isnan(parameter(kept)).sum() == 32
    write(damaged, tmp_path / "out", allow_nonfinite=True)
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.mins' holds nan in row "):
        load(open_checkpoint(tmp_path / "out"))


def test_a_file_that_is_cut_short_meanwhile_is_one_sentence(tmp_path):
    path = write_quantized(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r"was changed while it was loaded"):
        load(checkpoint)


@pytest.mark.parametrize("name", sorted(set(MIXED.values())))
def test_every_format_may_be_everywhere(tmp_path, name):
    path = write_quantized(tmp_path / "tiny.gguf", MODEL, dict.fromkeys(MIXED, name))
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.formats.values()) == {name}
    specs = abstract_params(checkpoint.config, "float32").specs
    assert checkpoint.formats.keys() == {path for path, spec in specs.items() if len(spec.value.shape) > 1}
    same(load(checkpoint), load(checkpoint, {}))


def test_experts_stay_quantised_from_a_gguf_file_and_through_orbax(tmp_path):
    def pack(tensor, array):
        kind = kind_of("Q8_0")
        return (gguf_library.quants.quantize(array, kind), kind) if "exps.weight" in tensor else array

    checkpoint = open_checkpoint(write_tiny_gguf_of(tmp_path / "experts.gguf", "gpt_oss", pack=pack))
    assert set(checkpoint.formats.values()) == {"Q8_0"}
    assert len(checkpoint.formats) == 3 * 3
    read = []
    kept = load(checkpoint, report=read.append)
    assert kept["layers.2.mlp.down_proj"].stacked == 1
    assert sum(read) == checkpoint.stored_bytes
    same(kept, load(checkpoint, {}))
    write(checkpoint, tmp_path / "orbax")
    converted = open_checkpoint(tmp_path / "orbax")
    same(load(converted), kept)
    some = {path: name for path, name in converted.formats.items() if "layers.0" in path}
    same(load(converted, some), kept)
