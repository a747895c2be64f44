"""Mixtures of experts over the devices of a mesh: the same logits, in floats and quantised, and what is exchanged."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from twinmesh.engine.sharding.mesh import build_meshes, param_on, products_on, replicated
from twinmesh.engine.sharding.rules import EP
from twinmesh.engine.topology import Topology
from twinmesh.kernels_pallas.quantized import QuantizedArray, parameter
from twinmesh.models import expert_parallel
from twinmesh.models.config import AttentionSpec, ClampedGate, Experts, ModelConfig, Rope
from twinmesh.models.decoder import abstract_params, bind, dense_hidden
from twinmesh.models.expert_parallel import Parts, exchanged
from twinmesh.models.quantized import quantize

EXPERTS = Experts(4, 2, has_bias=True, clamped=ClampedGate(1.702, 2.0))
MODEL = ModelConfig(
    "gpt_oss", 48, 64, 128, 4, 4, 8, 1e-5, False, 64, (AttentionSpec(Rope(1e4)),) * 2, qkv_bias=True, output_bias=True,
    has_sinks=True, experts=EXPERTS,
)  # fmt: skip
IDS = np.arange(9, dtype=np.int32) * 5 % 48
STACKS = [f"layers.{layer}.mlp.{name}_proj" for layer in range(2) for name in ("gate", "up", "down")]


def weights(formats):
    random = np.random.default_rng(0)
    specs = abstract_params(MODEL, jnp.float32, formats).specs
    drawn = {path: random.standard_normal(spec.value.shape).astype(np.float32) / 4 for path, spec in specs.items()}
    return {
        path: quantize(drawn[path], spec.value) if isinstance(spec.value, QuantizedArray) else drawn[path]
        for path, spec in specs.items()
    }


def compiled(params, topology, formats):
    """The forward pass as the engine compiles it, and its arguments."""
    parsed = Topology.parse(topology)
    (mesh,) = build_meshes(parsed, jax.devices()[: parsed.num_devices])
    graphdef, specs = abstract_params(MODEL, jnp.float32, formats, products_on(mesh, "float"))
    placed = tuple(
        jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params[path], param_on(mesh, spec))
        for path, spec in specs.items()
    )

    @jax.jit
    def forward(params, ids):
        decoder = bind(graphdef, params)
        return decoder.logits(dense_hidden(decoder, ids))

    ids = jax.device_put(IDS, replicated(mesh))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return forward.lower(placed, ids).compile(), (placed, ids)


CASES = {None: ("tp2", "tp2ep2", "tp4ep2", "tp4ep4"), "Q8_0": ("tp1", "tp2"), "MXFP4": ("tp1", "tp4ep2")}


@pytest.mark.parametrize("kind", CASES)
def test_logits_equal_those_of_one_device_and_of_floats(kind):
    formats = {} if kind is None else dict.fromkeys(STACKS, kind)
    params = weights(formats)
    floats = {path: parameter(w) if isinstance(w, QuantizedArray) else w for path, w in params.items()}
    expected, arguments = compiled(floats, "both=1", {})
    expected = np.asarray(expected(*arguments))
    for degrees in CASES[kind]:
        step, arguments = compiled(params, f"both=1x{degrees}", formats)
        np.testing.assert_allclose(step(*arguments), expected, atol=1e-4)
        gate = arguments[0][list(params).index(STACKS[0])]
        first = jax.tree.leaves(gate)[0]
        assert first.addressable_shards[0].data.nbytes == first.nbytes // int(degrees[2])
        if degrees == "tp2":  # attention and experts, for each layer, and the lookup: none inside the loop over blocks
            loops = re.findall(r"all-reduce(?:-start)?\(", step.as_text())
            assert len(loops) == 2 * MODEL.num_layers + 1


def ragged_all_to_all(rows, room, starts, sizes, places, received, *, axis_name):
    """What `jax.lax.ragged_all_to_all` does, by gathering everything on every device."""
    rank = jax.lax.axis_index(axis_name)
    for source in range(jax.lax.axis_size(axis_name)):
        from_all = [jax.lax.all_gather(x, axis_name)[source] for x in (rows, starts, sizes, places)]
        its_rows, begin, size, place = from_all[0], *(x[rank] for x in from_all[1:])
        index = jnp.arange(its_rows.shape[0])
        to = jnp.where((index >= begin) & (index < begin + size), place + index - begin, room.shape[0])
        room = room.at[to].set(its_rows, mode="drop")
        received = received.at[source].set(jnp.where(received[source] == size, size, -(10**6)))
    return jnp.where(jnp.min(received) < 0, jnp.nan, room)


@pytest.mark.parametrize("form", ["dense", "ragged"])
@pytest.mark.parametrize("crowded", [False, True])
def test_rows_come_back_from_their_experts(monkeypatch, form, crowded):
    if form == "ragged":
        monkeypatch.setattr(expert_parallel, "runs_on_cpu", lambda: False)
        monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    mesh, parts = Mesh(np.array(jax.devices()[:4]), (EP,)), Parts(EP, 4, 8)
    random = np.random.default_rng(0)
    chosen = np.stack([random.permutation(8)[:3] for _ in range(20)]).astype(np.int32)
    if crowded:  # all to the last device, which every other one fills, but for a row of padding
        chosen[:, :2], chosen[3] = (6, 7), 8
    x = random.standard_normal((20, 5)).astype(np.float32)

    def share(x, chosen):
        def run(rows, experts):
            number = experts + 2 * jax.lax.axis_index(EP)
            return jnp.where(experts < 2, rows * (1 + number), jnp.nan)[:, None]

        return exchanged(x, chosen, parts, run)

    run = jax.shard_map(share, mesh=mesh, in_specs=PartitionSpec(EP), out_specs=PartitionSpec(EP), check_vma=False)
    found = np.asarray(jax.jit(run)(x, chosen))
    used = chosen < 8
    np.testing.assert_array_equal(found[used], (x[:, None] * np.float32(1 + chosen[..., None]))[used])
