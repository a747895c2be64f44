"""The decoder against transformers on a tiny model, its parameters as the engine sees them, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loading import load_on_one_device
from helpers.tiny_gguf import TinyLlama, write_tiny_gguf
from twinmesh.kernels_pallas.attention import Rotation
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.config import AttentionSpec, ModelConfig, Rope
from twinmesh.models.decoder import abstract_params, bind, dense_causal, dense_hidden


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_transformers(tmp_path, fixtures, dense_forward, tied):
    expected = np.load(fixtures / "tiny_llama_logits.npz")
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "tiny.gguf", TinyLlama(tied=tied)))
    found = dense_forward(checkpoint)(expected["ids"])
    np.testing.assert_allclose(found, expected["tied" if tied else "untied"], atol=1e-4, rtol=0)


def test_every_parameter_names_one_axis_per_dimension(tiny):
    specs = abstract_params(tiny.config, jnp.bfloat16).specs
    assert all(len(spec.axes) == len(spec.value.shape) for spec in specs.values())
    for path, spec in specs.items():
        assert spec.value.dtype == (jnp.float32 if "norm" in path else jnp.bfloat16), path
    assert specs["layers.1.attention.q_proj"].axes == ("embed", "q_heads", "head_dim")
    assert specs["layers.1.attention.q_proj"].value.shape == (72, 6, 16)
    assert "head.weight" not in specs


def test_axis_names_have_one_size_each(tiny):
    sizes = {}
    for spec in abstract_params(tiny.config, jnp.float32).specs.values():
        for name, size in zip(spec.axes, spec.value.shape, strict=True):
            assert sizes.setdefault(name, size) == size
    assert sizes == {"vocab": 275, "embed": 72, "q_heads": 6, "kv_heads": 2, "head_dim": 16, "mlp": 80}


def test_layers_are_in_numerical_order():
    layers = (AttentionSpec(Rope(1e4)),) * 12
    config = ModelConfig("llama", 8, 4, 4, 1, 1, 4, 1e-5, True, 16, layers)
    paths = [path for path in abstract_params(config, jnp.float32).specs if path.endswith("q_proj")]
    assert paths == [f"layers.{i}.attention.q_proj" for i in range(12)]


def test_loaded_parameters_match_their_description(tiny):
    for dtype in (jnp.float32, jnp.bfloat16):
        specs = abstract_params(tiny.config, dtype).specs
        params = load_on_one_device(tiny, dtype)
        assert list(params) == list(specs)
        for array, spec in zip(params.values(), specs.values(), strict=True):
            assert (array.shape, array.dtype) == (spec.value.shape, spec.value.dtype)


def test_padding_and_ids_past_the_table_are_finite(tiny, dense_forward):
    assert np.isfinite(dense_forward(tiny)([0, 0, 5, 10_000])).all()


def test_bfloat16_gives_float32_logits_near_the_exact_ones(tiny, dense_forward):
    ids = np.arange(16)
    with jax.numpy_dtype_promotion("strict"):
        rough, exact = dense_forward(tiny, jnp.bfloat16)(ids), dense_forward(tiny)(ids)
    assert rough.dtype == np.float32
    assert np.abs(rough - exact).mean() < 0.05 * exact.std()


def test_gradients_reach_every_parameter(tiny):
    graphdef, specs = abstract_params(tiny.config, jnp.float32)
    params = tuple(load_on_one_device(tiny, jnp.float32).values())
    ids = jnp.arange(8, dtype=jnp.int32)

    @jax.jit
    @jax.grad
    def gradient(params):
        decoder = bind(graphdef, params)
        logits = decoder.logits(dense_hidden(decoder, ids))
        return -jax.nn.log_softmax(logits)[jnp.arange(7), ids[1:]].mean()

    for path, leaf in zip(specs, gradient(params), strict=True):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


def test_dense_attention_honours_window_and_softcap():
    def attention(**spec):
        config = ModelConfig("llama", 8, 8, 4, 2, 1, 4, 1e-5, True, 16, (AttentionSpec(Rope(1e4), **spec),))
        return np.asarray(dense_causal(config)(None, 0, q, k, v, unturned, None, None)[0])

    random = np.random.RandomState(0)
    q, k, v = (jnp.asarray(random.standard_normal((5, h, 4)), jnp.float32) for h in (2, 1, 1))
    unturned = Rotation(jnp.ones((5, 2)), jnp.zeros((5, 2)))
    np.testing.assert_allclose(attention(window=1), np.repeat(v, 2, axis=1), atol=1e-6)
    capped = attention(softcap=1e-6)  # all scores equal: the mean of what is seen
    np.testing.assert_allclose(capped[4, 0], np.asarray(v)[:, 0].mean(0), atol=1e-5)
    np.testing.assert_allclose(attention(softcap=1e6), attention(), atol=1e-5)
