"""Channels' scales: measured by a probe, once for all meshes, whole heads wherever a mesh has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_mesh import tiny_config, tiny_model, tiny_plans
from twinmesh.engine.kv_dtypes import parse_kv_dtypes
from twinmesh.engine.worker.channel_scales import measure, probe, share
from twinmesh.engine.worker.compile_program import compile_program
from twinmesh.engine.worker.kv_cache import Scales
from twinmesh.engine.worker.mesh_worker import MeshWorker
from twinmesh.engine.worker.programs import Programs
from twinmesh.models.decoder import bind, dense_causal

MODEL = tiny_model(None, 5)


def workers(topology):
    """The meshes of an engine that stores int8, with the programs that pools and scales need."""
    config = tiny_config(topology, MODEL, kv=parse_kv_dtypes("int8", "float32"))
    made = []
    for plan, params in zip(*tiny_plans(config, MODEL), strict=True):
        programs = Programs(allocate=compile_program(plan, "allocate"))
        if plan.measures_scales:
            programs.scales = compile_program(plan, "scales")
        made.append(MeshWorker(plan, programs, params))
    return made


def channels(worker):
    """The channels of the mesh's pools: keys and values of each group."""
    return [np.asarray(side.channels) for pool in worker.state.kv for side in pool]


@pytest.fixture(scope="module")
def one():
    (worker,) = workers("both=1")
    return worker, worker.measure_scales()


def test_the_probe_is_spread_over_the_vocabulary():
    ids = probe(50_000)
    assert ids.min() >= 0
    assert ids.max() < 50_000
    assert np.diff(np.sort(ids)).max() < 2.7 * 50_000 / len(ids)
    assert set(probe(3)) == {0, 1, 2}


def test_no_number_of_the_probe_is_larger_than_its_channel(one):
    worker, scales = one
    seen, dense = [], dense_causal(MODEL)

    def attend(kv, layer, q, k, v, rotation, sink, rows):
        seen.append((rotation.apply(q, k)[1], v))
        return dense(None, layer, q, k, v, rotation, sink, rows)[0], kv

    ids = jnp.asarray(probe(MODEL.vocab_size))
    decoder = bind(worker.plan.params.graphdef, worker.params)
    decoder.hidden(ids, jnp.arange(len(ids), dtype=jnp.int32), attend, None, None)
    for (k, v), of_k, of_v in zip(seen, *scales, strict=True):
        pairs = np.abs(k).max(axis=0).reshape(*of_k.shape[:-1], 2, -1).max(axis=-2)
        np.testing.assert_allclose(of_k, np.tile(pairs, 2), rtol=1e-5)
        np.testing.assert_allclose(of_v, np.abs(v).max(axis=0), rtol=1e-5)


def test_heads_that_are_zero_or_overflow_have_scales(one):
    worker, _ = one
    for fill in (0.0, 1e30):
        params = tuple(jnp.full(x.shape, fill, x.dtype) for x in worker.params)
        scales = measure(bind(worker.plan.params.graphdef, params))
        for side in scales:
            assert np.isfinite(side).all()
            assert (np.asarray(side) > 0).all()


@pytest.mark.parametrize("topology", ["prefill=1xtp2,decode=1xtp4", "prefill=1xtp4,decode=1"])
def test_meshes_divided_otherwise_have_the_same_channels(one, topology):
    """Also with more devices than heads, each of which then has a whole head."""
    meshes = workers(topology)
    share(meshes)
    _, want = one
    for worker in meshes:
        times = worker.plan.mesh.size // MODEL.num_kv_heads or 1
        for group, layer in ((0, 0), (1, 1)):
            for side, of_one in zip(worker.state.kv[group], want, strict=True):
                np.testing.assert_allclose(side.channels[0], np.repeat(of_one[layer], times, axis=0), rtol=1e-4)
    first, second = ([side[:, :: side.shape[1] // MODEL.num_kv_heads] for side in channels(m)] for m in meshes)
    assert all(map(np.array_equal, first, second))


def test_a_lost_pool_gets_the_same_channels_again_and_new_parameters_others(one):
    worker, scales = one
    worker.use_scales(scales)
    before = channels(worker)
    worker.reset()
    assert all(map(np.array_equal, before, channels(worker)))
    old = worker.params
    worker.replace(jax.tree.map(lambda x: 2 * x, old))
    share([worker])
    assert not any(map(np.array_equal, before, channels(worker)))
    worker.replace(old)


def test_only_meshes_with_8_bit_pages_take_part():
    class Mesh:
        def __init__(self, has_scales):
            self.has_scales, self.used = has_scales, None

        def measure_scales(self):
            return Scales(self, self)

        def use_scales(self, scales):
            self.used = scales.k

    meshes = [Mesh(False), Mesh(True), Mesh(True)]
    share(meshes)
    assert [mesh.used for mesh in meshes] == [None, meshes[1], meshes[1]]
