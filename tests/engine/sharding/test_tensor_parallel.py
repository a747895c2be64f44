"""Tensor parallelism: which degrees a model allows, the same logits on any of them, and what the devices exchange."""

import re
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from twinmesh.engine.sharding.mesh import param_sharding, replicate_logits, replicated, sharding
from twinmesh.engine.sharding.rules import TP
from twinmesh.engine.sharding.tensor_parallel import expand
from twinmesh.engine.sizing.cache_groups import groups
from twinmesh.engine.sizing.heads import check_tp, model_on
from twinmesh.engine.topology import MeshSpec, Role, TopologyError
from twinmesh.engine.worker.kv_cache import KV_AXES, KVCache
from twinmesh.engine.worker.paged_attention import PagedAttention, PrefillRows, StepRows
from twinmesh.models.config import AttentionSpec, Experts, ModelConfig, Rope
from twinmesh.models.decoder import abstract_params, bind, dense_hidden

LAYERS = (AttentionSpec(Rope(1e4)), AttentionSpec(Rope(1e4), window=5, softcap=2.0))
MODEL = ModelConfig("llama", 64, 24, 32, 8, 2, 8, 1e-5, False, 128, LAYERS)
TOKENS, PAGES, SIZE = 12, 600, 4


def weights(model):
    random = np.random.default_rng(0)
    specs = abstract_params(model, jnp.float32).specs
    return {path: random.standard_normal(spec.value.shape).astype(np.float32) / 3 for path, spec in specs.items()}


IDS = np.random.default_rng(1).integers(0, 60, TOKENS).astype(np.int32)


def dense_logits(model):
    graphdef, specs = abstract_params(model, jnp.float32)
    params = weights(model)

    @jax.jit
    def forward(params):
        decoder = bind(graphdef, params)
        return decoder.logits(dense_hidden(decoder, IDS))

    return np.asarray(forward(tuple(params[path] for path in specs)))


def mesh_of(tp):
    return Mesh(np.array(jax.devices()[:tp]), (TP,))


def prefill(model, tp):
    """One prompt through pages on `tp` devices: the jitted step, and its arguments."""
    mesh, own = mesh_of(tp), model_on(model, tp)
    graphdef, specs = abstract_params(own, jnp.float32)
    params = weights(model)
    placed = tuple(
        jax.device_put(expand(params[path], spec.axes, model, tp), param_sharding(mesh, spec))
        for path, spec in specs.items()
    )
    lies = sharding(mesh, KV_AXES)

    def pool(group):
        shape = (len(group.layers), PAGES, SIZE, own.num_kv_heads, own.head_dim)
        return KVCache(*(jax.jit(lambda: jnp.full(shape, jnp.nan), out_shardings=lies)() for _ in range(2)))

    def step(params, kv, ids):
        decoder, positions = bind(graphdef, params), jnp.arange(TOKENS, dtype=jnp.int32)
        table = jnp.array([[3, 1, 6, PAGES]], jnp.int32)
        slots = table[0, positions // SIZE] * SIZE + positions % SIZE
        rows = PrefillRows((table,) * 2, jnp.array([TOKENS], jnp.int32), jnp.array([0, TOKENS], jnp.int32))
        attend, rows = PagedAttention(mesh, own), StepRows((slots,) * 2, prefill=rows)
        hidden, kv = decoder.hidden(ids, positions, attend, kv, rows)
        return kv, replicate_logits(decoder.logits(hidden), mesh)

    kv, whole = tuple(map(pool, groups(model))), replicated(mesh)
    out = (jax.tree.map(lambda x: x.sharding, kv), whole)
    return jax.jit(step, donate_argnums=1, out_shardings=out), (placed, kv, jax.device_put(IDS, whole))


def compiled(model, tp):
    """The same compiled as the engine does it, which says that products are split over devices."""
    step, arguments = prefill(model, tp)
    with jax.sharding.use_abstract_mesh(mesh_of(tp).abstract_mesh):
        return step.lower(*arguments).compile(), arguments


@pytest.mark.parametrize(("tp", "vocabulary"), [(1, 64), (2, 64), (4, 64), (4, 61)])
def test_logits_equal_those_of_one_device_and_plain_attention(tp, vocabulary):
    """Two key/value heads: on four devices each is there twice. A vocabulary of 61 is not split."""
    model = replace(MODEL, vocab_size=vocabulary, tie_embeddings=vocabulary == 61)
    step, arguments = compiled(model, tp)
    np.testing.assert_allclose(step(*arguments)[1], dense_logits(model), atol=3e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_devices_exchange_two_sums_a_layer_one_for_the_lookup_and_the_logits(tied):
    model = replace(MODEL, tie_embeddings=tied)
    step, _ = compiled(model, 2)
    text = step.as_text()
    exchanges = re.findall(r"= (\S+) (all-[a-z]+|reduce-scatter|collective-[a-z]+)(?:-start)?\(", text)
    assert Counter(name for _, name in exchanges) == {"all-reduce": 2 * len(LAYERS) + 1, "all-gather": 1}
    shapes = {name: re.sub(r"\{.*", "", shape) for shape, name in exchanges}
    assert shapes == {"all-reduce": f"f32[{TOKENS},24]", "all-gather": f"f32[{TOKENS},64]"}


@pytest.mark.parametrize("tp", [1, 2])
def test_pools_are_written_in_place(tp):
    """Even where a device has a single head: XLA CPU likes to copy those."""
    step, arguments = compiled(MODEL, tp)
    held = sum(x.nbytes for x in jax.tree.leaves(arguments[1])) // tp
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes == held
    assert memory.temp_size_in_bytes < held / 4


def test_one_device_has_nothing_to_do_with_shards():
    step, arguments = prefill(MODEL, 1)
    text = str(step.trace(*arguments).jaxpr)
    assert "shard_map" not in text
    assert "sharding_constraint" not in text


@pytest.mark.parametrize(
    ("heads", "kv_heads", "inner", "fits"),
    [(8, 2, 32, {1, 2, 4, 8}), (9, 3, 36, {1, 3, 9}), (12, 4, 24, {1, 2, 4, 12}), (8, 8, 20, {1, 2, 4})],
)
def test_degrees_that_do_not_fit_are_refused(heads, kv_heads, inner, fits):
    model = replace(MODEL, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=inner)
    for tp in range(1, 17):
        spec = MeshSpec(Role.DECODE, tp)
        if tp in fits:
            check_tp(model, spec)
        else:
            with pytest.raises(TopologyError, match=f"decode mesh has tp {tp} and .*: use one of tp 1, "):
                check_tp(model, spec)


@pytest.mark.parametrize(
    ("tp", "inner", "message"),
    [
        (3, 32, "8 query heads do not divide by 3"),
        (8, 20, "20 MLP columns do not divide by 8: use one of tp 1, 2, 4"),
    ],
)
def test_a_refusal_names_what_does_not_divide(tp, inner, message):
    with pytest.raises(TopologyError, match=message):
        check_tp(replace(MODEL, intermediate_size=inner), MeshSpec(Role.PREFILL, tp))


@pytest.mark.parametrize(
    ("tp", "ep", "experts", "message"),
    [
        (4, 4, 6, "the prefill mesh has ep 4 and the model's 6 experts do not divide by 4: use one of ep 1, 2"),
        (2, 2, None, "has ep 2 and the model has no experts: leave ep out"),
        (8, 4, 4, "5 MLP columns do not divide by 2: use one of tp 4"),
        (4, 4, 4, None),
    ],
)
def test_experts_that_ep_does_not_divide_are_refused(tp, ep, experts, message):
    model = replace(MODEL, experts=None if experts is None else Experts(experts, 2), intermediate_size=5)
    if message is None:  # whole experts: their columns need not divide
        check_tp(model, MeshSpec(Role.PREFILL, tp, ep=ep))
        return
    with pytest.raises(TopologyError, match=message):
        check_tp(model, MeshSpec(Role.PREFILL, tp, ep=ep))


def test_heads_between_the_two_divisibilities_are_refused():
    with pytest.raises(TopologyError, match="4 key/value heads neither divide by 6 nor 6 by them"):
        check_tp(replace(MODEL, num_heads=12, num_kv_heads=4, intermediate_size=24), MeshSpec(Role.PREFILL, 6))


def test_only_key_and_value_heads_are_repeated_each_in_its_place():
    model = model_on(MODEL, 8)
    assert (model.num_kv_heads, model.num_heads) == (8, 8)
    assert model_on(MODEL, 2) == MODEL
    values = np.arange(2 * 2 * 3).reshape(2, 2, 3)
    axes = ("embed", "kv_heads", "head_dim")
    np.testing.assert_array_equal(expand(values, axes, MODEL, 4), values[:, [0, 0, 1, 1]])
    part = expand(values, axes, MODEL, 4, (slice(1, 2), slice(1, 3), slice(None)))
    np.testing.assert_array_equal(part, values[1:2, [0, 1]])
    assert expand(values, axes, MODEL, 2) is values
    assert expand(values, ("embed", "q_heads", "head_dim"), MODEL, 4) is values
