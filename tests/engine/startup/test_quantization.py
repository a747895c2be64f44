"""Which weights stay quantised, and the line that says so."""

from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from helpers.quantized import MIXED, write_quantized
from twinmesh.engine.kv_dtypes import parse_kv_dtypes, same_everywhere
from twinmesh.engine.startup import quantization
from twinmesh.engine.startup.quantization import choose, cpu_kernels, dequantized_line, file_lines, start_line
from twinmesh.engine.topology import MeshSpec, Role, Topology
from twinmesh.kernels_pallas.cpu import calls
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.checkpoints.streaming import Packed
from twinmesh.models.families.known import known_model

FLOATS = (jnp.dtype("float32"), jnp.dtype("float32"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    formats = {"ffn_up": "Q4_1", "ffn_down": "Q8_0", "token_embd": "Q8_0"}
    return open_checkpoint(write_quantized(tmp_path_factory.mktemp("tiny") / "tiny.gguf", formats=formats))


def chosen(checkpoint, asked, kernels, monkeypatch, topology="both=1"):
    monkeypatch.setattr(quantization, "kernel_for", lambda platform, name, kind=None: kernels.get(name))
    meshes = Topology.parse(topology).meshes
    return choose(asked, checkpoint.formats, checkpoint.config, "cpu", meshes, "int8")


BOTH = {"Q8_0": "AVX", "Q4_1": "AVX"}


@pytest.mark.parametrize(
    ("asked", "kernels", "kept", "line"),
    [
        (
            "auto",
            BOTH,
            ("Q8_0", "Q4_1"),
            "weights: 3 Q8_0 (AVX), 2 Q4_1 (AVX), all else",
        ),
        ("auto", {"Q8_0": "AVX"}, ("Q8_0",), "2 Q4_1 dequantised to bfloat16: no kernel multiplies by Q4_1 here"),
        ("auto", {}, (), "3 Q8_0 and 2 Q4_1 dequantised to bfloat16: no kernel multiplies by Q4_1 and Q8_0 here"),
        ("keep", {}, ("Q8_0", "Q4_1"), "3 Q8_0 (XLA, a part at a time as floats), 2 Q4_1 (XLA"),
        ("none", BOTH, (), "3 Q8_0 and 2 Q4_1 dequantised to bfloat16: quantization='none'"),
    ],
)
def test_what_stays_and_what_the_line_says(checkpoint, monkeypatch, asked, kernels, kept, line):
    found = chosen(checkpoint, asked, kernels, monkeypatch)
    assert found.formats == kept
    assert line in start_line(found, "bfloat16")
    _, activations = start_line(found, "bfloat16").split("; activations and KV: ")
    assert activations.startswith("bfloat16, rounded to int8 where") == bool(kernels and asked != "none")


def test_products_of_floats_are_compiled_ahead_where_a_matrix_is_of_floats(tmp_path, monkeypatch):
    path = write_quantized(tmp_path / "tiny.gguf", formats=dict.fromkeys(MIXED, "Q8_0"))
    checkpoint = open_checkpoint(path)
    model = replace(checkpoint.config, qkv_bias=True)
    monkeypatch.setattr(calls, "kernels_of", lambda dtype, pages, head_dim, *, has_matrices: [*pages, has_matrices])
    for asked, names in (("auto", [FLOATS, False, "blocks:0:1"]), ("none", [FLOATS, True])):
        found = chosen(checkpoint, asked, {"Q8_0": "AVX"}, monkeypatch)
        assert cpu_kernels(model, "float32", replace(found, activations="int16"), same_everywhere("float32")) == names


def test_the_cost_of_dequantising_is_said_in_bytes(checkpoint, monkeypatch):
    model = replace(checkpoint.config, hidden_size=8192, intermediate_size=16384)
    stored = dict.fromkeys(("layers.0.mlp.up_proj", "layers.1.mlp.up_proj"), "Q8_0")
    line = start_line(choose("none", stored, model, "cpu", [MeshSpec(Role.BOTH)], "int8"), "float32")
    assert "2 Q8_0 dequantised to float32: quantization='none'; 285 MB become 1,074 MB, all else" in line


def test_a_model_of_floats_has_a_line_too(tiny_path, monkeypatch):
    found = chosen(open_checkpoint(tiny_path), "auto", {}, monkeypatch)
    assert start_line(found, "float32") == "weights: all float32; activations and KV: float32"
    stored = parse_kv_dtypes("prefill=auto,decode=int8/fp8", "float32")
    assert start_line(found, "float32", stored) == (
        "weights: all float32; activations: float32; KV: prefill=float32,decode=int8/fp8, "
        "with a scale for each token and head of 8-bit numbers"
    )


def test_what_cannot_stay_is_said_with_its_cost_in_bytes(checkpoint):
    paths = ("layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "layers.0.mlp.down_proj")
    packed = {path: Packed(name, 40_000_000) for path, name in zip(paths, ("MXFP4", "MXFP4", "Q5_K"), strict=True)}
    model = replace(checkpoint.config, hidden_size=8192, intermediate_size=16384)
    assert dequantized_line(packed, model, jnp.dtype(jnp.bfloat16)) == (
        "weights: 2 MXFP4 and 1 Q5_K dequantised to bfloat16 as they are loaded: no product takes them as they are; "
        "120 MB of the files become 805 MB"
    )


def test_what_files_hold_in_vain_is_said_where_they_hold_it():
    files = SimpleNamespace(dequantized={}, method="fp8", rounds_activations=False, has_kv_scales=False)
    assert list(file_lines(files, jnp.dtype(jnp.float32))) == []
    files.rounds_activations = files.has_kv_scales = True
    activations, scales = file_lines(files, jnp.dtype(jnp.float32))
    assert activations.startswith("weights: fp8 would have activations quantised as well; they are not")
    assert scales.startswith("KV: the checkpoint's own scales of keys and values (k_scale, v_scale) are not needed")


def test_experts_that_a_mesh_would_cut_are_said_with_the_topology_that_has_them_whole():
    model, formats = known_model("gpt-oss-20b")
    cut, whole = (choose("keep", formats, model, "cpu", [MeshSpec(Role.BOTH, 4, ep=ep)], "int8") for ep in (1, 4))
    assert cut.reasons[-1].startswith("of down_proj, ")
    assert cut.reasons[-1].endswith(" (xtp4ep4 divides whole experts)")
    assert whole.kept == formats
