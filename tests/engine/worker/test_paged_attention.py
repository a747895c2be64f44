"""The engine's attention over cache groups: each layer in its own pages, decode rows and chunks in one call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.kv_dtypes import parse_kv_dtypes
from twinmesh.engine.sharding.mesh import sharding
from twinmesh.engine.sharding.rules import TP
from twinmesh.engine.sizing.cache_groups import groups
from twinmesh.engine.topology import Topology
from twinmesh.engine.worker.kv_cache import KV_AXES, KVCache, abstract_state, jax_dtype
from twinmesh.engine.worker.paged_attention import DecodeRows, PagedAttention, PrefillRows, StepRows
from twinmesh.kernels_pallas.attention import Rotation
from twinmesh.kernels_pallas.pages import dequantize, quantize
from twinmesh.models.config import AttentionSpec, ModelConfig, Rope
from twinmesh.models.decoder import dense_causal

# Groups: layers 0 and 2 see everything, layer 1 sees 5 tokens.
SPECS = (AttentionSpec(Rope(1e4)), AttentionSpec(Rope(1e4), window=5), AttentionSpec(Rope(1e4), softcap=2.0))
DIM = 16  # a length that the kernels of every CPU take; the tests of kernels have it too, and so build the same ones
MODEL = ModelConfig("llama", 50, 24, 32, 4, 2, DIM, 1e-5, True, 128, SPECS)
PAGES, SIZE, LENGTH = (9, 6), 4, 11
# Slots past the pools of all layers, of which the groups have two and one.
NOWHERE = (2 * 9 * SIZE, 6 * SIZE)


def make_mesh(tp):
    return Mesh(np.array(jax.devices()[:tp]), (TP,))


def empty(mesh):
    def pool(group, pages):
        nan = np.full((len(group.layers), pages, SIZE, MODEL.num_kv_heads, MODEL.head_dim), np.nan, np.float32)
        return jax.device_put(nan, sharding(mesh, KV_AXES))

    return tuple(KVCache(pool(g, n), pool(g, n)) for g, n in zip(groups(MODEL), PAGES, strict=True))


def draw(seed=0):
    """q, k, v of one sequence for each layer."""
    random = np.random.default_rng(seed)
    heads = (MODEL.num_heads, MODEL.num_kv_heads, MODEL.num_kv_heads)
    return [[random.standard_normal((LENGTH, h, DIM)).astype(np.float32) for h in heads] for _ in SPECS]


def unturned(tokens):
    """The rotation by no angle."""
    return Rotation(jnp.ones((tokens, DIM // 2)), jnp.zeros((tokens, DIM // 2)))


def dense(sequence):
    attend = dense_causal(MODEL)
    return [np.asarray(attend(None, i, *qkv, unturned(LENGTH), None, None)[0]) for i, qkv in enumerate(sequence)]


# One row of page ids per group; what the window has left behind is garbage.
TABLES = (np.array([[4, 0, 7, 9]], np.int32), np.array([[3, 5, 1, 77]], np.int32))
OTHERS = (np.array([[1, 2, 3, 9]], np.int32), np.array([[0, 2, 4, 77]], np.int32))


def slots(tables, start, stop):
    positions = np.arange(start, stop)
    return tuple(np.int32(table[0, positions // SIZE] * SIZE + positions % SIZE) for table in tables)


def chunk(tables, stop, length):
    return PrefillRows(tables, np.array([stop], np.int32), np.array([0, length], np.int32))


def run(mesh, kv, sequences, slots, sink=None, **rows):
    """All layers over packed tokens: the pools afterwards, and each layer's result."""

    @jax.jit
    def step(kv, layers, slots, rows):
        attend, out = PagedAttention(mesh, MODEL), []
        for layer, qkv in enumerate(layers):
            attended, kv = attend(kv, layer, *qkv, unturned(len(qkv[0])), sink, StepRows(slots, **rows))
            out.append(attended)
        return kv, out

    return step(kv, sequences, slots, rows)


def part(sequence, start, stop):
    return [[x[start:stop] for x in qkv] for qkv in sequence]


def joined(*sequences):
    return [[np.concatenate(x) for x in zip(*qkv, strict=True)] for qkv in zip(*sequences, strict=True)]


@pytest.mark.parametrize("tp", [1, 2])
def test_every_layer_attends_over_its_own_pages_with_its_own_window(tp):
    mesh, sequence = make_mesh(tp), draw()
    kv = empty(mesh)
    for start, stop in ((0, 6), (6, LENGTH)):
        rows = chunk(TABLES, stop, stop - start)
        kv, found = run(mesh, kv, part(sequence, start, stop), slots(TABLES, start, stop), prefill=rows)
        for layer, (got, want) in enumerate(zip(found, dense(sequence), strict=True)):
            np.testing.assert_allclose(got, want[start:stop], atol=2e-6, err_msg=f"layer {layer}")


@pytest.mark.parametrize("tp", [1, 2])
def test_decode_rows_and_a_chunk_in_one_call_give_what_they_give_alone(tp):
    mesh, decoding, prefilling = make_mesh(tp), draw(0), draw(1)
    before = LENGTH - 1
    kv, _ = run(
        mesh, empty(mesh), part(decoding, 0, before), slots(TABLES, 0, before),
        prefill=chunk(TABLES, before, before),
    )  # fmt: skip
    # The window of the next token begins in page 1: page 0 of the windowed group is somebody else's by now.
    left = (TABLES[0], np.array([[77, 5, 1, 77]], np.int32))
    own, others = slots(left, before, LENGTH), slots(OTHERS, 0, LENGTH)
    padding = [np.int32([slot]) for slot in NOWHERE]
    empty_row = part(draw(2), 0, 1)
    _, found = run(
        mesh, kv, joined(part(decoding, before, LENGTH), empty_row, prefilling),
        tuple(np.concatenate(parts) for parts in zip(own, padding, others, strict=True)),
        decode=DecodeRows(tuple(np.repeat(table, 2, axis=0) for table in left), np.int32([LENGTH, 0])),
        prefill=chunk(OTHERS, LENGTH, LENGTH),
    )  # fmt: skip
    for got, first, second in zip(found, dense(decoding), dense(prefilling), strict=True):
        np.testing.assert_allclose(got[0], first[-1], atol=2e-6)
        assert not np.any(got[1])
        np.testing.assert_allclose(got[2:], second, atol=2e-6)


def in_8_bits(mesh, kv):
    """Empty pools of the dtypes that an engine has for this `kv_cache_dtype`, with channels' scales of 1."""
    config = EngineConfig(Topology.parse("both=1"), max_model_len=16, page_size=SIZE, windows=(None, 5))
    state = abstract_state(MODEL, config, PAGES, parse_kv_dtypes(kv, "float32").decode, mesh)
    return jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding), state.kv)


@pytest.mark.parametrize(("kv", "tp"), [("float32", 1), ("int8", 1), ("int8/fp8", 2)])
def test_sinks_count_in_chunks_and_in_decode_rows_however_keys_and_values_are_stored(kv, tp):
    mesh, sequence = make_mesh(tp), draw()
    sink, before, dtypes = np.linspace(-1, 2, 4).astype(np.float32), LENGTH - 1, parse_kv_dtypes(kv, "float32").decode
    pools, prompt = in_8_bits(mesh, kv), chunk(TABLES, before, before)
    pools, chunks = run(mesh, pools, part(sequence, 0, before), slots(TABLES, 0, before), sink, prefill=prompt)
    rows = DecodeRows(TABLES, np.int32([LENGTH]))
    _, last = run(mesh, pools, part(sequence, before, LENGTH), slots(TABLES, before, LENGTH), sink, decode=rows)

    def kept(x, name):
        dtype = jax_dtype(name)
        return jnp.asarray(x) if dtype.itemsize > 1 else dequantize(*quantize(x, jnp.ones((2, DIM)), dtype), 1.0)

    for layer, (q, k, v) in enumerate(sequence):
        read = q, kept(k, dtypes.k), kept(v, dtypes.v)
        want = np.asarray(dense_causal(MODEL)(None, layer, *read, unturned(LENGTH), jnp.asarray(sink), None)[0])
        np.testing.assert_allclose(np.concatenate([chunks[layer], last[layer]]), want, atol=3e-6, err_msg=f"{layer}")


def test_padding_writes_to_no_page_of_any_layer():
    mesh, sequence = make_mesh(1), draw()
    padding = tuple(np.full(LENGTH, slot, np.int32) for slot in NOWHERE)
    kv, _ = run(mesh, empty(mesh), sequence, padding, prefill=chunk(TABLES, 0, 0))
    assert all(np.isnan(pool).all() for pool in jax.tree.leaves(kv))


def test_a_token_is_written_once_in_each_layer():
    mesh, sequence = make_mesh(2), draw()
    kv, _ = run(mesh, empty(mesh), part(sequence, 0, 1), slots(TABLES, 0, 1), prefill=chunk(TABLES, 1, 1))
    for group, pool, table in zip(groups(MODEL), kv, TABLES, strict=True):
        for index, layer in enumerate(group.layers):
            for array, values in zip(pool, sequence[layer][1:], strict=True):
                np.testing.assert_array_equal(np.asarray(array)[index, table[0, 0], 0], values[0])
        assert all(np.isfinite(array).sum() == len(group.layers) * 2 * DIM for array in pool)


def test_types_of_sixteen_bits_stay_what_they_are():
    mesh = make_mesh(1)
    kv = jax.tree.map(lambda x: x.astype(jnp.bfloat16), empty(mesh))
    sequence = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), draw())
    with jax.numpy_dtype_promotion("strict"):
        kv, found = run(mesh, kv, sequence, slots(TABLES, 0, LENGTH), prefill=chunk(TABLES, LENGTH, LENGTH))
    assert {x.dtype for x in jax.tree.leaves((kv, found))} == {jnp.dtype(jnp.bfloat16)}
