"""Meshes over the devices, and how arrays lie on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from twinmesh.engine.sharding.mesh import build_meshes, param_sharding, replicate_logits, replicated, sharding
from twinmesh.engine.sharding.rules import TP
from twinmesh.engine.topology import Topology, TopologyError
from twinmesh.models.decoder import ParamSpec


def make_mesh(tp):
    return Mesh(np.array(jax.devices()[:tp]), (TP,))


def indices(meshes):
    return [[device.id for device in mesh.devices.flat] for mesh in meshes]


def test_meshes_take_the_devices_in_order_and_share_none():
    assert indices(build_meshes(Topology.parse("prefill=2xtp2,decode=1xtp4"))) == [[0, 1], [2, 3], [4, 5, 6, 7]]


def test_named_devices_may_be_in_any_order_and_serve_several_meshes():
    a, b, c = jax.devices()[:3]
    topology = Topology.parse("prefill=1xtp2,decode=1xtp2")
    assert indices(build_meshes(topology, [c, a, a, b])) == [[2, 0], [0, 1]]


def test_a_device_twice_in_one_mesh_is_refused():
    a, b = jax.devices()[:2]
    with pytest.raises(TopologyError, match=r"decode mesh at 2 to 3 a device twice: .* must all differ"):
        build_meshes(Topology.parse("prefill=1xtp2,decode=1xtp2"), [a, b, b, b])


@pytest.mark.parametrize("count", [3, 5])
def test_a_list_of_another_length_is_refused(count):
    with pytest.raises(TopologyError, match=rf"needs 4 devices: devices= lists {count}"):
        build_meshes(Topology.parse("prefill=1xtp2,decode=1xtp2"), jax.devices()[:count])


def test_heads_columns_and_vocabulary_are_split_and_nothing_else():
    axes = ("vocab", "q_heads", "kv_heads", "mlp", "embed", "head_dim", None)
    for axis in axes:
        split = axis in axes[:4]
        assert sharding(make_mesh(2), (None, axis)).spec == PartitionSpec(None, TP if split else None)


def test_a_vocabulary_that_does_not_divide_lies_whole_on_every_device():
    def spec(size):
        return ParamSpec(jax.ShapeDtypeStruct((size, 8), jnp.float32), ("vocab", "embed"))

    assert param_sharding(make_mesh(4), spec(12)).spec == PartitionSpec(TP, None)
    assert param_sharding(make_mesh(4), spec(14)).spec == PartitionSpec(None, None)
    assert param_sharding(make_mesh(1), spec(14)).is_equivalent_to(replicated(make_mesh(1)), 2)


@pytest.mark.parametrize("vocabulary", [16, 15])
def test_logits_become_whole_and_keep_their_values(vocabulary):
    mesh, values = make_mesh(2), np.random.default_rng(0).standard_normal((3, vocabulary))
    whole = jax.jit(lambda x: replicate_logits(x, mesh))(values)
    assert whole.sharding.is_equivalent_to(replicated(mesh), 2)
    np.testing.assert_array_equal(whole, values.astype(np.float32))


@pytest.mark.parametrize("devices", [[None], ["cpu"], [0], [jax.devices()[0].id], ["cpu:0"]])
def test_what_is_no_device_is_refused(devices):
    with pytest.raises(TopologyError, match=r"^devices=\[.*\] are not JAX's: give some of jax\.devices\(\)\.$"):
        build_meshes(Topology.parse("both=1"), devices)
