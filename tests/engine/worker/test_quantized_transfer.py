"""Hand-offs of 8-bit KV: scales move with their pages, floats are converted before they leave, windows alone move."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.kv_dtypes import KVDtype, KVDtypes
from twinmesh.engine.sampling.request_state import Scalars
from twinmesh.engine.sharding.mesh import sharding
from twinmesh.engine.sharding.rules import TP
from twinmesh.engine.sizing.cache_groups import groups
from twinmesh.engine.topology import Topology
from twinmesh.engine.worker.kv_cache import CHANNEL_AXES, DeviceState, KVCache, abstract_state
from twinmesh.engine.worker.kv_transfer import abstract_staging, gather, plan, scatter, send, staged_pages
from twinmesh.kernels_pallas.pages import QuantizedPages, dequantize
from twinmesh.models.config import AttentionSpec, ModelConfig, Rope

# Two groups: layer 0 sees everything, layers 1 and 2 see 8 tokens.
SPECS = (AttentionSpec(Rope(1e4)), *(AttentionSpec(Rope(1e4), window=8),) * 2)
MODEL = ModelConfig("llama", 50, 24, 32, 4, 2, 64, 1e-5, True, 128, SPECS)
SIZE, PAGES, BUCKET = 4, (9, 7), 8
FLOAT, INT8 = KVDtype("bfloat16", "bfloat16"), KVDtype("int8", "int8")


def make_mesh(*devices):
    return Mesh(np.array([jax.devices()[i] for i in devices]), (TP,))


def config(kv):
    return EngineConfig(
        Topology.parse("prefill=1,decode=1"), max_model_len=32, page_size=SIZE, dtype="bfloat16", kv=kv,
        max_num_seqs=3, decode_buckets=(3,), windows=(None, 8),
    )  # fmt: skip


def make_state(kv, mesh, seed):
    """Random pools; scales between 0.5 and 1.5."""
    rng, settings = np.random.default_rng(seed), config(KVDtypes(kv, kv))

    def fill(x):
        draw = rng.integers(-127, 128, x.shape) if x.dtype == jnp.int8 else rng.random(x.shape) + 0.5
        return jax.device_put(draw.astype(x.dtype), x.sharding)

    state = abstract_state(MODEL, settings, PAGES, kv, mesh)
    whole = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), state)
    return whole._replace(kv=jax.tree.map(fill, state.kv))


def channels(mesh):
    """Channels' scales of both groups, in powers of two."""
    one = np.exp2(np.arange(2 * 64).reshape(2, 64) % 3).astype(np.float32)
    put = partial(jax.device_put, device=sharding(mesh, CHANNEL_AXES))
    return tuple(KVCache(*(put(np.stack([one] * len(g.layers))),) * 2) for g in groups(MODEL))


def move(state, source, destination, stored=None):
    """What arrives of pages 5, 0, 2 of each group, and the staging."""
    route, buckets = plan(2, source.size, destination.size), (BUCKET, 3)
    ids = tuple(np.resize(np.int32([5, 0, 2]), bucket) for bucket in buckets)
    scales = None if stored is None else channels(source)
    leaving = jax.jit(partial(gather, mesh=source, route=route, stored=stored))
    staging = leaving(state, ids, np.int32(1), scales)
    described = abstract_staging(state, source, route, buckets, stored)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), staging) == jax.tree.map(lambda x: (x.shape, x.dtype), described)
    sent = send(staging, source, destination, route)
    empty = jax.tree.map(jnp.zeros_like, make_state(stored or INT8, destination, 1))
    places = tuple(np.resize(np.int32([1, 4, 3] + [n] * 5), bucket) for bucket, n in zip(buckets, PAGES, strict=True))
    tables = tuple(np.zeros(8, np.int32) for _ in PAGES)
    return jax.jit(partial(scatter, mesh=destination))(empty, sent, places, np.int32(0), tables), sent


@pytest.mark.parametrize(("source", "destination"), [((0,), (1,)), ((0, 1), (2,)), ((0,), (1, 2))])
def test_numbers_and_their_tokens_scales_arrive_bit_for_bit(source, destination):
    source, destination = make_mesh(*source), make_mesh(*destination)
    before = make_state(INT8, source, 0)
    after, _ = move(before, source, destination)
    for old, new in zip(before.kv, after.kv, strict=True):
        for was, now in zip(old, new, strict=True):
            np.testing.assert_array_equal(np.asarray(now.values)[:, [1, 4, 3]], np.asarray(was.values)[:, [5, 0, 2]])
            np.testing.assert_array_equal(np.asarray(now.tokens)[:, [1, 4, 3]], np.asarray(was.tokens)[:, [5, 0, 2]])
            assert not np.asarray(now.values)[:, [0, 2, 5, 6]].any()
            assert not np.asarray(now.channels).any()  # those of the destination stay


@pytest.mark.parametrize("stored", [INT8, KVDtype("int8", "fp8")])
@pytest.mark.parametrize(("source", "destination"), [((0,), (1,)), ((0,), (1, 2))])
def test_floats_are_converted_where_they_leave(source, destination, stored):
    source, destination = make_mesh(*source), make_mesh(*destination)
    before = make_state(FLOAT, source, 0)
    after, sent = move(before, source, destination, stored)
    assert {x.dtype.name for x in jax.tree.leaves(sent.kv)} <= {"int8", "float8_e4m3fn", "float32"}
    for old, new, scales in zip(before.kv, after.kv, channels(destination), strict=True):
        for was, now, channel in zip(old, new, scales, strict=True):
            wide = [np.asarray(x) for x in (now.values, jnp.swapaxes(now.tokens, -1, -2), channel)]
            found = dequantize(*map(jnp.asarray, wide[:2]), jnp.asarray(wide[2])[:, None, None])[:, [1, 4, 3]]
            exact = 1 / 127 if now.values.dtype == jnp.int8 else 2.0**-4
            np.testing.assert_allclose(found, np.asarray(was, np.float32)[:, [5, 0, 2]], atol=1.5 * 4 * exact)


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_8_bits_halve_what_is_sent_and_a_group_with_a_window_sends_its_window():
    source, destination = make_mesh(0), make_mesh(1)
    state = make_state(FLOAT, source, 0)
    _, sent = move(state, source, destination, INT8)
    of_floats = abstract_staging(state, source, plan(2, 1, 1), (BUCKET, 3))
    floats = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(of_floats.kv))
    assert nbytes(sent.kv) == floats * (64 + 4) // (2 * 64)  # a scale of 4 bytes for every 64 numbers
    settings = config(None)
    assert staged_pages(settings, settings.handoff_buckets[-1]) == (8, 3)  # 8 tokens, wherever a page begins
    assert [x.k.shape[1] for (x,) in of_floats.kv] == [8, 3]


def test_a_state_knows_how_its_mesh_stores_keys_and_values():
    settings = config(KVDtypes(FLOAT, KVDtype("int8", "fp8")))
    prefill, decode = (
        abstract_state(MODEL, settings, PAGES, settings.kv_on(spec), make_mesh(0)) for spec in settings.topology.meshes
    )
    assert isinstance(prefill, DeviceState)
    assert isinstance(prefill.scalars, Scalars)
    assert prefill.kv[0].k.dtype == jnp.bfloat16
    assert isinstance(decode.kv[0].k, QuantizedPages)
    assert [x.dtype.name for x in decode.kv[1]] == ["int8", "float8_e4m3fn"]
    assert decode.kv[1].v.tokens.shape == (2, PAGES[1], 2, SIZE)
