"""Cache groups, what a page costs, and how a budget is divided between pools and staging."""

from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.config import EngineConfig, PoolSize
from twinmesh.engine.kv_dtypes import KVDtype
from twinmesh.engine.sharding.mesh import build_meshes
from twinmesh.engine.sizing.cache_groups import Group, groups
from twinmesh.engine.sizing.device_memory import Share
from twinmesh.engine.sizing.memory_needs import page_bytes, request_bytes
from twinmesh.engine.sizing.pools import in_steps, longest_that_fits, pool_that_fits
from twinmesh.engine.startup.memory import memory_for_kv
from twinmesh.engine.topology import Topology
from twinmesh.engine.worker.kv_cache import abstract_dense, abstract_state, fresh
from twinmesh.models.config import AttentionSpec, ModelConfig, Rope

FLOAT32 = KVDtype("float32", "float32")


def model(*windows):
    layers = tuple(AttentionSpec(Rope(1e4), window) for window in windows)
    return ModelConfig("llama", 10, 8, 8, 4, 2, 16, 1e-5, True, 512, layers)


def config(topology, length=64, windows=(None,), **changes):
    options = dict(page_size=16, max_num_seqs=2, decode_buckets=(2,), prefill_buckets=(16,)) | changes
    return EngineConfig(Topology.parse(topology), length, windows=windows, **options)


def pool(budget, topology, mesh=0, length=64, per_page=(100,), part=8, **changes):
    settings = config(topology, length, **changes)
    return pool_that_fits(budget, per_page, settings, settings.topology.meshes[mesh], part)


def test_layers_of_one_window_are_one_group_in_order_of_first_use():
    assert groups(model(None, None, None)) == (Group(None, (0, 1, 2)),)
    assert groups(model(32, None, 32, 8)) == (Group(32, (0, 2)), Group(None, (1,)), Group(8, (3,)))


def test_page_bytes_count_keys_and_values_of_each_groups_layers():
    one = 2 * 16 * 2 * 16
    assert page_bytes(model(None, None, None), 16, FLOAT32) == (3 * one * 4,)
    assert page_bytes(model(32, None, 32), 16, KVDtype("bfloat16", "bfloat16")) == (2 * one * 2, one * 2)


def test_a_state_has_a_pool_and_a_table_per_group():
    settings = config("both=1", windows=(32, None))
    (mesh,) = build_meshes(settings.topology)
    state = abstract_state(model(32, None, 32), settings, (5, 7), FLOAT32, mesh)
    dense = abstract_dense(model(32, None, 32), settings, mesh)
    assert dense.seen.shape == (2, 10)
    assert [cache.k.shape for cache in state.kv] == [(2, 5, 16, 2, 16), (1, 7, 16, 2, 16)]
    assert [table.shape for table in state.tables] == [(2, 4), (2, 4)]
    sizes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.tables, state.scalars, dense)))
    assert request_bytes(model(32, None, 32), settings) == sizes


def test_staging_is_set_aside_where_requests_leave_or_arrive():
    assert pool(1000, "both=1") == PoolSize((8,), (100,), 0)  # two slots of four pages need no more
    assert pool(1000, "prefill=1,decode=1", 0) == PoolSize((6,), (100,), 400)
    assert pool(1000, "prefill=1,decode=1", 1) == PoolSize((6,), (100,), 400)
    assert pool(1000, "both=2", 1) == PoolSize((6,), (100,), 400)
    assert pool(9000, "prefill=1,decode=1", 1) == PoolSize((8,), (100,), 1125)
    assert pool(90_000, "prefill=1,decode=1", 1) == PoolSize((8,), (100,), 3200)
    assert pool(9000, "prefill=1,decode=1", 1, part=16) == PoolSize((8,), (100,), 562)
    assert pool(90_000, "prefill=1,decode=1", 1, part=16) == PoolSize((8,), (100,), 3200)


def test_groups_get_pages_for_the_same_number_of_requests():
    """16 pages of the whole length; of a window of 16 with its chunk of 16, three."""
    settings = dict(length=256, windows=(None, 16), per_page=(100, 300), max_num_seqs=4, decode_buckets=(4,))
    assert pool(5000, "both=1", **settings) == PoolSize((32, 6), (100, 300), 0)
    assert pool(6000, "both=1", **settings) == PoolSize((38, 7), (100, 300), 0)
    assert pool(10**6, "both=1", **settings) == PoolSize((64, 12), (100, 300), 0)
    # One transfer: 16 pages of the first group, the two that the last window touches of the second.
    assert pool(5000, "prefill=1,decode=1", **settings).staging_bytes == 1600 + 600


@pytest.mark.parametrize(
    ("budget", "topology", "message"),
    [
        (399 << 20, "both=1", r"both mesh .* 399.00 MiB, and .* max_model_len=64 needs 4 pages of 100.00 MiB .* = 400"),
        (799 << 20, "prefill=1,decode=1", r"decode mesh .* 799.00 MiB, 400.00 MiB of them for hand-offs, and .* 400"),
    ],
)
def test_a_pool_too_small_for_one_request_is_refused_with_the_arithmetic(budget, topology, message):
    with pytest.raises(ValueError, match=message):
        pool(budget, topology, -1, per_page=(100 << 20,))


@pytest.mark.parametrize("topology", ["both=1", "prefill=1,decode=1"])
@pytest.mark.parametrize(("windows", "per_page"), [((None,), (100,)), ((None, 32), (100, 70))])
def test_the_longest_request_that_fits_is_one_that_a_pool_takes(topology, windows, per_page):
    settings = dict(windows=windows, per_page=per_page)
    longest = longest_that_fits(3000, per_page, config(topology, 10_000, windows), 8)
    assert longest % 16 == 0
    pool(3000, topology, -1, longest, **settings)
    with pytest.raises(ValueError, match="does not fit"):
        pool(3000, topology, -1, longest + 1, **settings)
    assert longest_that_fits(10**9, per_page, config(topology, 100, windows), 8) == 100
    assert longest_that_fits(0, per_page, config(topology, 100, windows), 8) == 16


class Device:
    """A GPU that reports its memory, or does not."""

    platform, device_kind = "gpu", "Test GPU"

    def __init__(self, reports=True):
        self._reports = reports

    def memory_stats(self):
        return {"bytes_limit": 10_000, "bytes_in_use": 4000} if self._reports else None


class Mesh:
    def __init__(self, *devices):
        self.devices, self.local_devices = np.array(devices), devices


def test_memory_is_what_is_left_on_the_devices_less_what_each_mesh_sets_aside():
    a, b, c, whole = Device(), Device(), Device(), Share(0.9)
    # 10,000 less 2 % and 4,000.
    assert memory_for_kv([Mesh(a), Mesh(b, c)], None, [500, 600], whole) == [5300, 10_400]
    assert memory_for_kv([Mesh(a), Mesh(a)], None, [500, 500], whole) == [2400, 2400]  # they share a device
    assert memory_for_kv([Mesh(a), Mesh(b, c)], 6000, [500, 500], whole) == [5300, 6000]
    assert memory_for_kv([Mesh(a)], None, [10**6], whole) == [0]
    # Three quarters of the card are 10,000: half of it is 6,667.
    assert memory_for_kv([Mesh(a)], None, [0], Share(0.75, asked=0.5)) == [2466]


def test_a_gpu_that_does_not_report_its_memory_needs_a_cap():
    mesh = Mesh(Device(reports=False))
    assert memory_for_kv([mesh], 5000, [500], Share(0.9)) == [5000]
    with pytest.raises(ValueError, match=r"^Test GPU does not report its memory, .* or give kv_cache_bytes\.$"):
        memory_for_kv([mesh], None, [500], Share(0.9))


def test_a_cap_is_the_budget_where_devices_do_not_report_their_memory():
    meshes = build_meshes(Topology.parse("prefill=1,decode=1"))
    assert memory_for_kv(meshes, 1 << 20, [500, 500], Share(0.75)) == [1 << 20, 1 << 20]
    assert all(0 < budget <= 2 << 30 for budget in memory_for_kv(meshes, None, [0, 0], Share(0.75)))


@given(st.integers(0, 1 << 40))
def test_a_cpus_budget_is_rounded_down_by_an_eighth_at_most(size):
    rounded = in_steps(size)
    assert 0.875 * size <= rounded <= size
    assert in_steps(rounded) == rounded
    assert {in_steps(size + more) for more in (0, size // 1000)} <= {rounded, in_steps(size + size // 1000)}


# ---- what a pool takes


def made(topology, pages):
    """Make a fresh state of the first mesh and its dense rows by a compiled program."""
    settings, described = config(topology), model(None)
    mesh = build_meshes(settings.topology)[0]
    state = abstract_state(described, settings, (pages,), FLOAT32, mesh)
    dense = abstract_dense(described, settings, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, (state, dense))
    return jax.jit(lambda: fresh(state, dense), out_shardings=shardings).lower().compile()()


def test_all_but_the_pools_is_zero():
    state, dense = made("both=1", 4)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves((state.tables, state.scalars, dense)))


@pytest.mark.parametrize("topology", ["both=1", "both=1xtp2"])
def test_a_small_pool_and_a_split_one_are_zero(topology):
    state, _ = made(topology, 4)
    assert not np.asarray(state.kv[0].k).any()


def anonymous_bytes():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what a process holds")
def test_a_pool_takes_memory_as_it_is_used():
    before = anonymous_bytes()
    state, _ = made("both=1", 65536)  # K and V of 134 MB each
    jax.block_until_ready(state)
    assert state.kv[0].k.nbytes == 1 << 27
    assert anonymous_bytes() - before < 1 << 26
    write = jax.jit(lambda pool: pool.at[:, 7].set(3.0), donate_argnums=0)
    address = state.kv[0].k.unsafe_buffer_pointer()
    pool = write(state.kv[0].k)
    assert pool.unsafe_buffer_pointer() == address  # in place
    assert anonymous_bytes() - before < 1 << 26
    assert np.asarray(pool[0, 7, 0, 0, 0]) == 3


def test_making_pools_again_and_again_gives_each_its_own_memory():
    states = [made("both=1", 20_000)[0] for _ in range(3)]
    places = {x.unsafe_buffer_pointer() for state in states for x in jax.tree.leaves(state.kv)}
    assert len(places) == 6
