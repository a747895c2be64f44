"""A model without an engine: its forward function against transformers, and its gradients against differences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twinmesh.models
from helpers.quantized import write_quantized
from helpers.tiny_families import TINY
from helpers.tiny_files import FIXTURES, expected, write_tiny_directory

# One for each thing that the decoder may have: experts of both kinds, sinks, windows, norms of heads, sandwich norms.
DIFFERENT = ["llama2", "gemma3", "mixtral", "qwen3_moe", "gpt_oss"]
COMMON = ("llama2", "mixtral")
SOME = [name if name in COMMON else pytest.param(name, marks=pytest.mark.long) for name in DIFFERENT]
POSITIONS = [0, 7, 39]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder, loaded = tmp_path_factory.mktemp("families"), {}

    def of(name):
        if name not in loaded:
            loaded[name] = twinmesh.models.load(write_tiny_directory(folder / name, name))
        return loaded[name]

    return of


def loss_of(model, tokens):
    def loss(params):
        logits = model.forward(params, tokens[:, :-1])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()

    return loss


def test_rows_of_a_batch_have_the_logits_of_transformers_whatever_is_beside_and_behind_them(load):
    model, case = load("gemma3"), expected("gemma3")
    ids = case["ids"]
    other = np.concatenate([ids[:20], np.zeros(len(ids) - 20, ids.dtype)])
    logits = jax.jit(model.forward)(model.params, jnp.asarray([other, ids]))
    np.testing.assert_allclose(logits[1], case["logits"], atol=1e-3)
    np.testing.assert_allclose(logits[0, :20], case["logits"][:20], atol=1e-3)


@pytest.mark.parametrize("name", SOME)
def test_hidden_states_are_those_of_transformers(load, name):
    model, ids = load(name), jnp.asarray(expected(name)["ids"])
    states = jax.jit(lambda params: model.hidden_states(params, ids, (0, 1, -1)))(model.params)
    wanted = np.load(FIXTURES / "hidden_states.npz")[name]
    np.testing.assert_allclose(states[:, jnp.asarray(POSITIONS)], wanted, atol=1e-3)


@pytest.mark.parametrize("name", SOME)
def test_gradients_are_the_slopes_of_the_loss(load, name):
    model = load(name)
    # Not at the fixture's tokens: where two experts' scores nearly meet, a difference would cross the step.
    tokens = jnp.asarray(np.random.RandomState(3).randint(5, 120, (2, 7)))
    loss = jax.jit(loss_of(model, tokens))
    gradient = jax.jit(jax.grad(loss_of(model, tokens)))(model.params)
    random = np.random.RandomState(4)
    one = {"embedding.weight", "norm.weight"} | {path for path in model.params if path.startswith("layers.1.")}
    for path in sorted(one):
        way = random.standard_normal(model.params[path].shape).astype(np.float32)
        way /= np.linalg.norm(way)

        def at(step, path=path, way=way):
            return float(loss(model.params | {path: model.params[path] + step * way}))

        slope = float(jnp.vdot(gradient[path], way))
        # Central differences in float32: of several widths the best, because rounding spoils narrow ones, and curvature
        # and steps between experts wide ones.
        found = [(at(width) - at(-width)) / (2 * width) for width in (0.02, 0.005)]
        assert min(abs(one - slope) for one in found) < 2e-3 + 0.03 * abs(slope), (path, slope, found)


def test_gradient_descent_by_optax_lowers_the_loss(load):
    import optax

    model = load("llama2")
    tokens = jnp.asarray(np.random.RandomState(3).randint(5, 120, (2, 9)))
    optimizer, loss = optax.adam(1e-2), loss_of(model, tokens)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    params, state, losses = model.params, optimizer.init(model.params), []
    for _ in range(5):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


def test_weights_of_quantised_files_and_other_dtypes_are_floats(tmp_path):
    model = twinmesh.models.load(write_quantized(tmp_path / "q.gguf"), "bfloat16")
    dtypes = {path: array.dtype for path, array in model.params.items()}
    assert {str(dtype) for path, dtype in dtypes.items() if "norm" in path} == {"float32"}
    assert {str(dtype) for path, dtype in dtypes.items() if "norm" not in path} == {"bfloat16"}
    logits = model.forward(model.params, jnp.arange(4))
    assert (logits.shape, logits.dtype) == ((4, model.config.vocab_size), jnp.float32)


def test_what_cannot_be_computed_is_refused(load):
    model = load("llama2")
    with pytest.raises(ValueError, match=r"dtype='int8' is not usable: give one of float32"):
        twinmesh.models.load("nothing", dtype="int8")
    with pytest.raises(ValueError, match=r"params lacks 'norm\.weight'"):
        model.forward({path: x for path, x in model.params.items() if path != "norm.weight"}, jnp.arange(3))
    with pytest.raises(ValueError, match=r"besides the model's own, 'z'"):
        model.forward({**model.params, "z": jnp.ones(1)}, jnp.arange(3))
    for tokens in (jnp.ones(3), jnp.zeros((1, 0), int), jnp.ones((1, 1, 1), int)):
        with pytest.raises(ValueError, match=r"give whole numbers \[B, T\]"):
            model.forward(model.params, tokens)
    count = model.config.num_layers
    for layers, says in [([count + 1], f"layers holds {count + 1}"), ([], "names none"), ([True], "layers holds True")]:
        with pytest.raises(ValueError, match=says):
            model.hidden_states(model.params, jnp.arange(3), layers)


def test_every_family_has_its_fixture_of_hidden_states():
    assert {name for name in np.load(FIXTURES / "hidden_states.npz") if not name.endswith("_mean")} == set(TINY)
