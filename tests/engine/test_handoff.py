"""Hand-off on arrays: bit-exact, padding writes nothing, unused tails and their NaN do not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twinmesh.engine.config import EngineConfig, PoolSize, Topology
from twinmesh.engine.handoff import gather, padded, scatter, send
from twinmesh.engine.kv_cache import DeviceState, KVCache, RequestState, page_bytes, pool_that_fits
from twinmesh.engine.mesh import build_meshes
from twinmesh.engine.sampling import SamplingInputs
from twinmesh.models.config import AttentionSpec, ModelConfig

LAYERS, PAGES, SIZE, HEADS, DIM, SLOTS = 3, 7, 4, 2, 8, 5


def state(seed, device, dtype=np.float32):
    random = np.random.default_rng(seed)
    k, v = (random.standard_normal((LAYERS, PAGES, SIZE, HEADS, DIM)).astype(dtype) for _ in range(2))
    k[:, 2, 3:], v[:, 2, 3:] = np.nan, np.nan
    ids = random.integers(0, 100, SLOTS)
    sampling = SamplingInputs(
        random.random(SLOTS, np.float32), random.random(SLOTS, np.float32), ids.astype(np.int32), ids.astype(np.uint32)
    )
    return jax.device_put(DeviceState(KVCache(k, v), RequestState(ids.astype(np.int32), sampling)), device)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_pages_and_state_cross_bit_for_bit_and_nothing_else_changes(dtype):
    source_mesh, target_mesh = build_meshes(Topology.parse("prefill=1,decode=1"))
    source = state(0, source_mesh.devices.flat[0], dtype)
    target = state(1, target_mesh.devices.flat[0], dtype)
    from_pages, to_pages = (2, 0, 6), (5, 1, 3)
    staging = gather(source, padded(from_pages, 4, PAGES), np.int32(3))
    moved = send(staging, target_mesh)
    assert moved.kv.k.devices() == {target_mesh.devices.flat[0]}
    after = scatter(target, moved, padded(to_pages, 4, PAGES), np.int32(4))
    for before, new, old in zip(source.kv, after.kv, target.kv, strict=True):
        before, new, old = (np.asarray(x).view(f"u{x.dtype.itemsize}") for x in (before, new, old))
        np.testing.assert_array_equal(new[:, list(to_pages)], before[:, list(from_pages)])
        others = [0, 2, 4, 6]
        np.testing.assert_array_equal(new[:, others], old[:, others])
    rows = zip(*map(jax.tree.leaves, (source.requests, after.requests, target.requests)), strict=True)
    for before, new, old in rows:
        assert np.asarray(new)[4] == np.asarray(before)[3]
        np.testing.assert_array_equal(new[:4], old[:4])


MODEL = ModelConfig("llama", 10, 8, 8, 4, 2, 16, 1e-5, True, 512, (AttentionSpec(1e4),) * 3)


def config(topology, length):
    return EngineConfig(Topology.parse(topology), length, page_size=16, max_num_seqs=2, decode_buckets=(2,))


def test_page_bytes_count_keys_and_values_of_all_layers():
    assert page_bytes(MODEL, 16, jnp.dtype("float32")) == 2 * 3 * 16 * 2 * 16 * 4
    assert page_bytes(MODEL, 16, jnp.dtype("bfloat16")) == 2 * 3 * 16 * 2 * 16 * 2


def pool(budget, topology, mesh, length=64):
    settings = config(topology, length)
    return pool_that_fits(budget, 100, settings, settings.topology.meshes[mesh])


def test_staging_is_set_aside_where_requests_leave_or_arrive():
    assert pool(1000, "both=1", 0) == PoolSize(8, 0)  # two slots of four pages need no more
    assert pool(1000, "prefill=1,decode=1", 0) == PoolSize(6, 4)
    assert pool(1000, "prefill=1,decode=1", 1) == PoolSize(6, 4)
    assert pool(9000, "prefill=1,decode=1", 1) == PoolSize(8, 11)
    assert pool(90_000, "prefill=1,decode=1", 1) == PoolSize(8, 32)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("both=1", r"both mesh .* 3 pages .* max_model_len=64 needs 4"),
        ("decode=1,prefill=1", r"decode mesh .* 7 pages .* 4 of them for hand-offs, .* max_model_len=64 needs 4"),
    ],
)
def test_a_pool_too_small_for_one_request_is_refused_with_the_arithmetic(topology, message):
    with pytest.raises(ValueError, match=message):
        pool(399 if topology == "both=1" else 799, topology, -1)
