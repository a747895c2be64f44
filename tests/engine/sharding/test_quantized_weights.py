"""Quantised parameters on meshes: divided along outputs and inputs, with repeated heads, and replaced."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.quantized import MODEL, write_quantized
from helpers.tiny_gguf import TinyLlama
from twinmesh.engine.sharding.mesh import build_meshes
from twinmesh.engine.sharding.weights import Placer, load_weights
from twinmesh.engine.startup.quantization import choose
from twinmesh.engine.topology import MeshSpec, Role, Topology
from twinmesh.kernels_pallas.quantized import QuantizedArray, abstract, parameter
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.checkpoints.orbax_writer import write
from twinmesh.models.quantized import quantize

F32 = jnp.dtype("float32")
UP, DOWN, QUERY = "layers.0.mlp.up_proj", "layers.0.mlp.down_proj", "layers.0.attention.q_proj"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sources")
    gguf = open_checkpoint(write_quantized(directory / "tiny.gguf"))
    write(gguf, directory / "orbax")
    return {"gguf": gguf, "orbax": open_checkpoint(directory / "orbax")}


def by_path(checkpoint, meshes, formats):
    paths = list(Placer(checkpoint.config, F32, meshes[0]).specs)
    weights = load_weights(checkpoint, F32, meshes, formats, progress=False)
    return [dict(zip(paths, params, strict=True)) for params in weights]


@pytest.mark.parametrize("source", ["gguf", "orbax"])
@pytest.mark.parametrize("topology", ["both=1", "both=1xtp2", "both=1xtp8", "prefill=1xtp2,decode=1xtp4"])
def test_every_mesh_has_the_parameters_of_one_that_dequantises(sources, source, topology):
    checkpoint, meshes = sources[source], build_meshes(Topology.parse(topology))
    specs = Topology.parse(topology).meshes
    kept = choose("keep", checkpoint.formats, checkpoint.config, "cpu", specs, "int8").kept
    assert kept == checkpoint.formats
    for found, expected in zip(by_path(checkpoint, meshes, kept), by_path(checkpoint, meshes, {}), strict=True):
        for path, array in expected.items():
            assert isinstance(found[path], QuantizedArray) == (path in kept)
            floats = parameter(found[path]) if path in kept else found[path]
            np.testing.assert_array_equal(floats, array, err_msg=path)


def test_outputs_and_inputs_are_divided(sources):
    (mesh,) = build_meshes(Topology.parse("both=1xtp4"))
    (params,) = by_path(sources["gguf"], [mesh], sources["gguf"].formats)

    def shapes(path):
        return {array.addressable_shards[1].data.shape for array in jax.tree.leaves(params[path])}

    assert shapes(UP) == {(512 // 16 // 4, 256 // 32, 256), (512 // 16 // 4, 256 // 32, 16)}
    assert shapes(DOWN) == {(256 // 16, 512 // 32 // 4, 384), (256 // 16, 512 // 16 // 4, 16)}
    assert shapes("embedding.weight") == {(18, 8, 512), (18, 8, 16)}  # it does not divide


def test_a_split_inside_a_block_dequantises_the_parameter_and_says_so(tmp_path):
    model = TinyLlama(hidden=64, inner=96, heads=4, kv_heads=2, head_dim=16)
    formats = {"ffn_down": "Q4_0", "ffn_up": "Q4_0", "attn_output": "Q8_0"}
    checkpoint = open_checkpoint(write_quantized(tmp_path / "tiny.gguf", model, formats))
    found = choose("keep", checkpoint.formats, checkpoint.config, "cpu", [MeshSpec(Role.BOTH, 2)], "int8")
    assert {path.rpartition(".")[2] for path in found.kept} == {"up_proj", "o_proj"}
    assert found.reasons == (
        "of down_proj, 48 inputs on each of 2 devices are no multiple of 32, which blocks have",
    )  # fmt: skip


def placer_of(sources, topology="both=1xtp2"):
    (mesh,) = build_meshes(Topology.parse(topology))
    return Placer(sources["gguf"].config, F32, mesh, sources["gguf"].formats)


def test_a_rounded_parameter_takes_the_place_of_one_of_its_format(sources):
    placer = placer_of(sources)
    new = np.random.default_rng(0).standard_normal(placer.specs[QUERY].value.shape).astype(np.float32)
    rounded = quantize(new, placer.specs[QUERY].value)
    placer.check({QUERY: rounded})
    placed = placer.put(QUERY, rounded)
    np.testing.assert_array_equal(parameter(placed), parameter(rounded))
    assert placed.values.addressable_shards[0].data.shape == (8, 8, 320)


def zeros(name):
    return quantize(np.zeros((256, 512), np.float32), abstract(name, (256, 512), 1))


def with_wide_scales(like):
    values, scales = (np.zeros(x.shape, x.dtype) for x in (like.values, like.scales))
    return like.with_parts({"values": values, "scales": scales.astype(np.float32)})


def with_mins(like):
    values, scales = (np.zeros(x.shape, x.dtype) for x in (like.values, like.scales))
    return like.with_parts({"values": values, "scales": scales, "mins": scales})


@pytest.mark.parametrize(
    ("path", "make", "words"),
    [
        (QUERY, lambda like: np.zeros(like.shape, np.float32), ["must be Q5_0[256, 16, 16]", "quantization='none'"]),
        (QUERY, lambda like: zeros("Q4_1"), ["is Q4_1[256, 512]", "must be Q5_0"]),
        (QUERY, with_wide_scales, [".scales is float32[16, 8, 16]", "must be float16[16, 8, 16]"]),
        (QUERY, with_mins, ["has values and scales and mins: it must have values and scales, as before"]),
        ("norm.weight", lambda like: zeros("Q8_0"), ["is Q8_0[256, 512]", "must be float32[256]"]),
    ],
)
def test_what_cannot_take_its_place_is_one_sentence(sources, path, make, words):
    placer = placer_of(sources)
    with pytest.raises(ValueError, match=re.escape(f"params[{path!r}]")) as caught:
        placer.check({path: make(placer.specs[path].value)})
    message = str(caught.value)
    assert message.count(". ") == 0
    for word in words:
        assert word in message, message


def test_the_tiny_model_divides_as_the_tests_need():
    assert (MODEL.hidden, MODEL.inner, MODEL.heads * MODEL.head_dim) == (256, 512, 256)
