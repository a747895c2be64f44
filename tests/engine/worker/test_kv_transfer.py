"""Hand-off on arrays, between meshes of any sizes: bit for bit, in place, never through the host, nothing compiled."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.sampling.request_state import Scalars
from twinmesh.engine.sharding.mesh import replicated, sharding
from twinmesh.engine.sharding.rules import TP
from twinmesh.engine.startup.compilation import CompileCounter
from twinmesh.engine.topology import Topology, TopologyError
from twinmesh.engine.worker.kv_cache import KV_AXES, DeviceState, KVCache
from twinmesh.engine.worker.kv_transfer import (
    Route,
    abstract_staging,
    gather,
    padded,
    plan,
    scatter,
    send,
    staged_pages,
)

LAYERS, SIZE, DIM, SLOTS, WIDTH = (2, 1), 4, 8, 5, 6
POOLS = (7, 5)  # pages of the two cache groups
BUCKETS = (4, 1)
FROM, TO = ((2, 0, 6), (3,)), ((5, 1, 3), (4,))


def make_mesh(*devices):
    return Mesh(np.array([jax.devices()[i] for i in devices]), (TP,))


def make_state(seed, mesh, kv_heads, dtype=np.float32, pools=POOLS):
    """Random, the tails of pages NaN; with fewer heads than devices each head is there several times."""
    random, whole = np.random.default_rng(seed), replicated(mesh)

    def pool(layers, pages):
        values = random.standard_normal((layers, pages, SIZE, kv_heads, DIM)).astype(dtype)
        values[:, 2:4, 3:] = np.nan
        values = np.repeat(values, max(1, mesh.size // kv_heads), axis=3)
        return jax.device_put(values, sharding(mesh, KV_AXES))

    def rows(*shape, dtype=np.int32):
        return jax.device_put(random.integers(0, 100, (SLOTS, *shape)).astype(dtype), whole)

    kv = tuple(KVCache(pool(layers, pages), pool(layers, pages)) for layers, pages in zip(LAYERS, pools, strict=True))
    scalars = Scalars(rows(6, dtype=np.float32), rows(5))
    return DeviceState(kv=kv, tables=(rows(WIDTH), rows(WIDTH)), scalars=scalars)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def shardings(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def ints(mesh, *shapes):
    return tuple(jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated(mesh)) for shape in shapes)


def compile_pair(source, destination, route, before, after, buckets=BUCKETS):
    """The gather and the scatter of one route, as the engine compiles them."""
    shapes = [(bucket,) for bucket in buckets]
    leaving = abstract_staging(abstract(before), source, route, buckets)
    arriving = abstract_staging(abstract(after), destination, route, buckets)
    gathering = jax.jit(partial(gather, mesh=source, route=route), out_shardings=shardings(leaving))
    scattering = jax.jit(partial(scatter, mesh=destination), donate_argnums=0, out_shardings=shardings(after))
    tables = ints(destination, (WIDTH,), (WIDTH,))
    return (
        gathering.lower(abstract(before), ints(source, *shapes), *ints(source, ())).compile(),
        scattering.lower(
            abstract(after), arriving, ints(destination, *shapes), *ints(destination, ()), tables
        ).compile(),
    )  # fmt: skip


class Pair:
    """Two meshes, a state on each, and the programs between them."""

    def __init__(self, kv_heads, source, destination, dtype=np.float32):
        self.source, self.destination = source, destination
        self.route = plan(kv_heads, source.size, destination.size)
        self.before = make_state(0, source, kv_heads, dtype)
        old = make_state(1, destination, kv_heads, dtype)
        # On CPU an array may share its memory with numpy's, and then it is not donated.
        self.after, self.old = jax.tree.map(jnp.copy, old), jax.tree.map(np.asarray, old)
        self.gather, self.scatter = compile_pair(source, destination, self.route, self.before, self.after)

    def move(self, slot=3, new_slot=4):
        """The destination's state with FROM written to TO."""
        pages = tuple(map(padded, FROM, BUCKETS, POOLS))
        staging = self.gather(self.before, pages, np.int32(slot))
        self.sent = send(staging, self.source, self.destination, self.route)
        new_pages = tuple(map(padded, TO, BUCKETS, POOLS))
        tables = tuple(np.arange(WIDTH, dtype=np.int32) + 10 * group for group in range(2))
        self.after = self.scatter(self.after, self.sent, new_pages, np.int32(new_slot), tables)
        return self.after


def one_copy(x, kv_heads):
    """The model's own heads of a pool, as bits."""
    values = np.asarray(x)
    return values[..., :: values.shape[3] // kv_heads, :].view(f"u{values.dtype.itemsize}")


def check_pages(kv_heads, before, old, new):
    for group, (source_pages, pages) in enumerate(zip(FROM, TO, strict=True)):
        others = [page for page in range(POOLS[group]) if page not in pages]
        for source, was, now in zip(before.kv[group], old.kv[group], new.kv[group], strict=True):
            np.testing.assert_array_equal(
                one_copy(now, kv_heads)[:, list(pages)], one_copy(source, kv_heads)[:, list(source_pages)]
            )
            np.testing.assert_array_equal(one_copy(now, kv_heads)[:, others], one_copy(was, kv_heads)[:, others])


def check_copies(kv_heads, state):
    """Devices that share a head, and all devices of what is whole everywhere, hold the same."""
    for pool in jax.tree.leaves(state.kv):
        values = np.asarray(pool)
        copies = max(1, values.shape[3] // kv_heads)
        np.testing.assert_array_equal(values, np.repeat(values[..., ::copies, :], copies, axis=3))
    for x in jax.tree.leaves((state.tables, state.scalars)):
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, x.addressable_shards[0].data)


DEGREES = list(itertools.product([1, 2, 4], repeat=2))


@pytest.mark.parametrize(
    ("source_tp", "destination_tp", "kv_heads"),
    [(*tp, heads) for heads in (2, 4) for tp in DEGREES] + [(2, 4, 1), (4, 1, 1)],
)
def test_a_request_crosses_bit_for_bit_in_place_and_not_through_the_host(
    source_tp, destination_tp, kv_heads, host_reads
):
    source, destination = make_mesh(*range(source_tp)), make_mesh(*range(4, 4 + destination_tp))
    pair = Pair(kv_heads, source, destination)
    pointers = pool_pointers(pair.after)
    host_reads.clear()
    counter = CompileCounter()
    new = jax.block_until_ready(pair.move())
    counter.close()
    assert counter.count == 0
    assert host_reads == []
    assert pool_pointers(new) == pointers
    check_pages(kv_heads, pair.before, pair.old, new)
    check_copies(kv_heads, new)
    check_rows(pair.before, pair.old, new)


def pool_pointers(state):
    return [shard.data.unsafe_buffer_pointer() for x in jax.tree.leaves(state.kv) for shard in x.addressable_shards]


def check_rows(before, old, new):
    """Slot 3 of the source is slot 4 of the destination, with the tables that were given."""
    for source, was, now in zip(*map(jax.tree.leaves, (before.scalars, old.scalars, new.scalars)), strict=True):
        np.testing.assert_array_equal(now[4], source[3])
        np.testing.assert_array_equal(now[:4], was[:4])
    for group in range(2):
        np.testing.assert_array_equal(new.tables[group][4], np.arange(WIDTH) + 10 * group)
        np.testing.assert_array_equal(new.tables[group][:4], old.tables[group][:4])


def test_a_slot_past_the_last_moves_pages_only():
    pair = Pair(2, make_mesh(0, 1), make_mesh(4))
    new = pair.move(slot=SLOTS, new_slot=SLOTS)
    check_pages(2, pair.before, pair.old, new)
    jax.tree.map(np.testing.assert_array_equal, new.scalars, pair.old.scalars)
    jax.tree.map(np.testing.assert_array_equal, new.tables, pair.old.tables)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_sixteen_bits_cross_as_they_are(dtype):
    pair = Pair(4, make_mesh(0, 1), make_mesh(4, 5, 6, 7), dtype)
    check_pages(4, pair.before, pair.old, pair.move())


@pytest.mark.parametrize(
    ("source", "destination"),
    [((0, 1), (0, 1)), ((0, 1), (1, 0)), ((0, 1), (1, 2)), ((0,), (0,)), ((0, 1, 2, 3), (2, 3)), ((1,), (0, 1))],
)
def test_meshes_may_share_devices_in_any_order(source, destination, host_reads):
    pair = Pair(2, make_mesh(*source), make_mesh(*destination))
    host_reads.clear()
    counter = CompileCounter()
    new = jax.block_until_ready(pair.move())
    counter.close()
    assert (counter.count, host_reads) == (0, [])
    check_pages(2, pair.before, pair.old, new)
    check_rows(pair.before, pair.old, new)


def test_each_slice_is_sent_once_to_each_device_that_needs_it():
    pair = Pair(2, make_mesh(0, 1, 2, 3), make_mesh(4, 5))
    pair.move()
    (piece,) = pair.sent.kv[0]
    assert piece.k.shape == (LAYERS[0], BUCKETS[0], SIZE, 2, DIM)
    assert [shard.data.shape[3] for shard in piece.k.addressable_shards] == [1, 1]


@pytest.mark.parametrize("tp", [1, 2])
def test_programs_alias_the_pools_and_need_little_besides(tp):
    """Whatever the bucket: XLA CPU copies the target of a scatter of one row, and pools of one head."""
    source, destination = make_mesh(0), make_mesh(*range(4, 4 + tp))
    pools = (4000, 3000)
    before, after = make_state(0, source, 2), make_state(1, destination, 2, pools=pools)
    held = sum(x.nbytes for x in jax.tree.leaves(after.kv)) // tp
    _, program = compile_pair(source, destination, plan(2, 1, tp), before, after, buckets=(1, 1))
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 10


def test_a_host_read_is_seen_where_shards_do_not_match(host_reads):
    """The control of the tests above: unequal shardings send `device_put` through the host."""
    state = make_state(0, make_mesh(0, 1), 4)
    host_reads.clear()
    jax.block_until_ready(jax.device_put(state.kv[0].k, sharding(make_mesh(4, 5, 6, 7), KV_AXES)))
    assert state.kv[0].k.shape in host_reads


@pytest.mark.parametrize(
    ("heads", "source", "destination", "slices"),
    [(8, 2, 4, 4), (8, 8, 1, 8), (8, 1, 1, 1), (8, 16, 2, 8), (6, 2, 3, 6), (2, 4, 8, 2), (1, 1, 4, 1)],
)
def test_heads_are_cut_no_finer_than_both_sides_need(heads, source, destination, slices):
    route = plan(heads, source, destination)
    assert route == Route(heads, source, destination, slices)
    assert route.piece_heads * slices == heads
    for shard in range(destination):
        for piece in range(route.pieces_on(destination)):
            i, j = route.origin(shard, piece)
            assert 0 <= i < source
            assert 0 <= j < route.pieces_on(source)
            assert i * slices // source + j == shard * slices // destination + piece  # the same slice


def test_heads_that_cannot_be_cut_evenly_are_refused():
    with pytest.raises(TopologyError, match=r"8 key/value heads .* tp 2 to one of tp 3: use degrees"):
        plan(8, 2, 3)


def test_a_windowed_group_sends_no_more_than_its_window():
    config = EngineConfig(Topology.parse("prefill=1,decode=1"), 128, page_size=4, windows=(None, 10))
    assert [staged_pages(config, bucket) for bucket in (1, 4, 32)] == [(1, 1), (4, 4), (32, 4)]
