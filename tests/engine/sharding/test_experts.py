"""Mixtures of experts over the devices of a mesh: the same logits, in floats and quantised, and what is exchanged."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from twinmesh.engine.sharding.mesh import param_on, products_on, replicated
from twinmesh.engine.sharding.rules import TP
from twinmesh.kernels_pallas.quantized import QuantizedArray, parameter
from twinmesh.models.config import AttentionSpec, ClampedGate, Experts, ModelConfig, Rope
from twinmesh.models.decoder import abstract_params, bind, dense_hidden
from twinmesh.models.quantized import quantize

EXPERTS = Experts(5, 2, has_bias=True, clamped=ClampedGate(1.702, 2.0))
MODEL = ModelConfig(
    "gpt_oss", 48, 64, 128, 4, 2, 8, 1e-5, False, 64, (AttentionSpec(Rope(1e4)),) * 2, qkv_bias=True, output_bias=True,
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


def compiled(params, tp, formats):
    """The forward pass as the engine compiles it, and its arguments."""
    mesh = Mesh(np.array(jax.devices()[:tp]), (TP,))
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


@pytest.mark.parametrize("kind", [None, "Q8_0", "MXFP4"])
def test_logits_equal_those_of_one_device_and_of_floats(kind):
    formats = {} if kind is None else dict.fromkeys(STACKS, kind)
    params = weights(formats)
    floats = {path: parameter(w) if isinstance(w, QuantizedArray) else w for path, w in params.items()}
    expected, arguments = compiled(floats, 1, {})
    expected = np.asarray(expected(*arguments))
    for tp in (1, 2):
        step, arguments = compiled(params, tp, formats)
        np.testing.assert_allclose(step(*arguments), expected, atol=1e-4)
        gate = arguments[0][list(params).index(STACKS[0])]
        first = jax.tree.leaves(gate)[0]
        assert first.addressable_shards[0].data.nbytes == first.nbytes // tp
        if tp == 2:  # attention and experts, for each layer, and the lookup: none inside the loop over blocks
            loops = re.findall(r"all-reduce(?:-start)?\(", step.as_text())
            assert len(loops) == 2 * MODEL.num_layers + 1
