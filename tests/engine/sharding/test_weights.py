"""The same parameters on the meshes from every kind of checkpoint, whatever the degree of tensor parallelism."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_directory import write_tiny_llama_directory
from helpers.tiny_gguf import TinyLlama, write_tiny_gguf
from twinmesh.engine.sharding.mesh import build_meshes
from twinmesh.engine.sharding.weights import Placer, load_weights
from twinmesh.engine.topology import Topology
from twinmesh.models.checkpoints import orbax_writer
from twinmesh.models.checkpoints.open import open_checkpoint

MODEL = TinyLlama(heads=8, kv_heads=2, tied=False)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sources")
    hugging_face = open_checkpoint(write_tiny_llama_directory(directory / "hf", MODEL, shards=2))
    orbax_writer.write(hugging_face, directory / "orbax")
    gguf = open_checkpoint(write_tiny_gguf(directory / "tiny.gguf", MODEL))
    return {"gguf": gguf, "hugging_face": hugging_face, "orbax": open_checkpoint(directory / "orbax")}


@pytest.mark.parametrize("source", ["hugging_face", "orbax"])
@pytest.mark.parametrize("topology", ["both=1", "both=1xtp4", "prefill=1xtp2,decode=1xtp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_source_gives_each_mesh_the_same(checkpoints, source, topology, dtype):
    meshes = build_meshes(Topology.parse(topology))
    expected = load_weights(checkpoints["gguf"], jnp.dtype(dtype), meshes, progress=False)
    found = load_weights(checkpoints[source], jnp.dtype(dtype), meshes, progress=False)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (ours.sharding, ours.dtype) == (theirs.sharding, theirs.dtype)
        np.testing.assert_array_equal(ours, theirs)


def test_a_parameter_with_repeated_heads_comes_whole_to_one_device(checkpoints):
    (mesh,) = build_meshes(Topology.parse("both=1xtp4"))
    placer = Placer(checkpoints["gguf"].config, jnp.dtype("float32"), mesh)
    for path in placer.specs:
        devices = placer.wanted(path).sharding.device_set
        assert len(devices) == (1 if path.endswith(("k_proj", "v_proj")) else 4), path
