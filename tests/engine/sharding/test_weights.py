"""The same parameters on the meshes from every kind of checkpoint, whatever the degree of tensor parallelism."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_directory import write_tiny_llama_directory
from helpers.tiny_gguf import TinyLlama, write_aligned_gguf, write_tiny_gguf
from twinmesh.engine.sharding.mesh import build_meshes
from twinmesh.engine.sharding.weights import Held, Placer, held, load_weights, replace
from twinmesh.engine.topology import Topology
from twinmesh.models.checkpoints import orbax_writer, streaming
from twinmesh.models.checkpoints.host_memory import FileMaps, aligned_empty
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


# ---- one copy for all CPU meshes


def places(params):
    """Return the address of each shard of each array."""
    return [[shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards] for array in params]


@pytest.mark.parametrize("source", ["gguf", "hugging_face", "orbax"])
@pytest.mark.parametrize("topology", ["prefill=1,decode=1", "prefill=2,decode=2", "prefill=1xtp2,decode=2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_meshes_of_one_cpu_device_hold_the_same_bytes(checkpoints, source, topology, dtype):
    meshes = build_meshes(Topology.parse(topology))
    loaded = load_weights(checkpoints[source], jnp.dtype(dtype), meshes, progress=False)
    alone = [params for params, mesh in zip(loaded, meshes, strict=True) if mesh.size == 1]
    assert all(places(params) == places(alone[0]) for params in alone)
    for mesh, params in zip(meshes, loaded, strict=True):
        assert {device for array in params for device in array.sharding.device_set} == set(mesh.devices.flat)
    one = sum(array.nbytes for array in alone[0])
    assert held(alone, None) == Held(mapped=0, copied=one, spared=(len(alone) - 1) * one)


def test_meshes_that_split_their_weights_have_them_for_themselves(checkpoints):
    meshes = build_meshes(Topology.parse("prefill=1xtp2,decode=1"))
    split, whole = load_weights(checkpoints["gguf"], jnp.dtype("float32"), meshes, progress=False)
    specs = Placer(checkpoints["gguf"].config, jnp.dtype("float32"), meshes[0]).specs
    index = list(specs).index("layers.0.mlp.up_proj")
    (shards, (address,)) = places(split)[index], places(whole)[index]
    assert len(set(shards)) == 2
    assert address not in shards


def test_mapped_files_are_shared_as_well_and_counted_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "FEWEST_MAPPED_BYTES", 0)
    meshes, maps = build_meshes(Topology.parse("prefill=1,decode=1")), FileMaps()
    checkpoint = open_checkpoint(write_aligned_gguf(tmp_path / "tiny.gguf", MODEL))
    loaded = load_weights(checkpoint, jnp.dtype("float32"), meshes, progress=False, maps=maps)
    total = sum(array.nbytes for array in loaded[0])
    found = held(loaded, maps)
    assert found.mapped > 0
    assert found.mapped + found.copied == found.spared == total
    assert places(loaded[0]) == places(loaded[1])
    assert "mapped from the file" in str(found)
    assert "shared between meshes" in str(found)


def test_without_maps_nothing_is_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "FEWEST_MAPPED_BYTES", 0)
    meshes = build_meshes(Topology.parse("both=1"))
    checkpoint = open_checkpoint(write_aligned_gguf(tmp_path / "tiny.gguf", MODEL))
    loaded = load_weights(checkpoint, jnp.dtype("float32"), meshes, progress=False)
    assert held(loaded, FileMaps()) == Held(0, sum(array.nbytes for array in loaded[0]), 0)
    assert str(held(loaded, None)).endswith("copied")


# ---- new parameters

NAME = "layers.1.mlp.down_proj"


@pytest.fixture
def engine(checkpoints):
    """Placers and parameters of two meshes, and what the parameter `NAME` is."""
    meshes = build_meshes(Topology.parse("prefill=1,decode=1"))
    loaded = load_weights(checkpoints["gguf"], jnp.dtype("float32"), meshes, progress=False)
    placers = [Placer(checkpoints["gguf"].config, jnp.dtype("float32"), mesh) for mesh in meshes]
    index = list(placers[0].specs).index(NAME)
    return placers, [list(params) for params in loaded], index


def of_numpy(values):
    return values


def of_aligned_numpy(values):
    array = aligned_empty(values.shape, values.dtype)
    array[...] = values
    return array


def of_numpy_in_another_order(values):
    return np.asfortranarray(values)


def on_device(number):
    return lambda values: jax.device_put(jnp.array(values), jax.devices()[number])


@pytest.mark.parametrize(
    "make", [of_numpy, of_aligned_numpy, of_numpy_in_another_order, on_device(0), on_device(1), on_device(5)]
)
def test_new_parameters_are_one_private_copy_on_all_meshes(engine, make):
    placers, params, index = engine
    values = np.random.default_rng(0).standard_normal(params[0][index].shape).astype(np.float32)
    given = make(values.copy())
    replace(placers, params, {NAME: given})
    if isinstance(given, np.ndarray):
        given[...] = 0
    else:
        given.delete()
    assert places(params[0]) == places(params[1])
    for mesh in params:
        np.testing.assert_array_equal(mesh[index], values)


def test_donating_what_was_given_or_what_a_mesh_holds_changes_no_mesh(engine):
    placers, params, index = engine
    given = jnp.ones(params[0][index].shape)
    replace(placers, params, {NAME: given})
    double = jax.jit(lambda x: 2 * x, donate_argnums=0)
    double(given).block_until_ready()
    with_first = params[0][index]
    double(with_first).block_until_ready()  # no step does this; the other mesh would still be right
    np.testing.assert_array_equal(params[1][index], np.ones(given.shape))


def test_each_parameter_is_replaced_everywhere_before_the_next(engine):
    placers, params, _ = engine
    order = []

    class Watched(list):
        def __setitem__(self, index, array):
            order.append(index)
            super().__setitem__(index, array)

    watched = [Watched(mesh) for mesh in params]
    replace(placers, watched, {path: np.zeros(spec.value.shape, np.float32) for path, spec in placers[0].specs.items()})
    assert order == [index for index in range(len(params[0])) for _ in watched]
