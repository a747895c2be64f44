"""Distribution, exact sets, and independence of rows from each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twinmesh.engine import sampling
from twinmesh.engine.sampling import SamplingInputs, sample

VOCABULARY = 1000
jitted = jax.jit(sample)


def inputs(rows, temperature=1.0, top_p=1.0, top_k=0, seed=None):
    seed = np.arange(rows) if seed is None else seed
    columns = (temperature, np.float32), (top_p, np.float32), (top_k, np.int32), (seed, np.uint32)
    return SamplingInputs(*(jnp.asarray(np.broadcast_to(x, rows).astype(dtype)) for x, dtype in columns))


def draws(logits, count=2048, first=0, **parameters):
    """Tokens of `count` rows with the same logits and parameters, seeds 0, 1, ..."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return np.asarray(jitted(rows, inputs(count, **parameters), jnp.full(count, first, jnp.int32)))


def gaussian_logits(rows, scale=3.0, seed=0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal((rows, VOCABULARY)), jnp.float32)


def nucleus(logits, temperature=1.0, top_p=1.0, top_k=0):
    """The allowed ids and their probabilities, in float64."""
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)[order]
    if top_k:
        order, weights = order[:top_k], weights[:top_k]
    probabilities = weights / weights.sum()
    kept = 1 + int(np.sum(np.cumsum(probabilities) < top_p)) if top_p < 1 else len(order)
    return order[:kept], probabilities[:kept] / probabilities[:kept].sum()


def assert_distribution(tokens, ids, probabilities):
    """Chi-square over the expected counts of at least 5, within 5 standard deviations; nothing outside `ids`."""
    assert np.isin(tokens, ids).all()
    expected = len(tokens) * probabilities
    often = expected >= 5
    counts = np.array([np.sum(tokens == i) for i in ids[often]])
    statistic = np.sum((counts - expected[often]) ** 2 / expected[often])
    assert statistic < often.sum() + 5 * np.sqrt(2 * often.sum())


REGIMES = {
    "plain": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.6},
    "top_k then top_p": {"top_k": 20, "top_p": 0.7},
    "top_k over the bound": {"top_k": 100, "temperature": 4.0},
    "top_k over the bound then top_p": {"top_k": 300, "top_p": 0.9, "temperature": 4.0},
    "top_p over the bound": {"top_p": 0.8, "temperature": 4.0},
}


@pytest.mark.parametrize("parameters", REGIMES.values(), ids=REGIMES.keys())
def test_draws_follow_the_distribution(parameters):
    logits = np.asarray(gaussian_logits(1)[0])
    assert_distribution(draws(logits, **parameters), *nucleus(logits, **parameters))


@pytest.mark.parametrize("parameters", [REGIMES["top_k"], REGIMES["top_p"], REGIMES["top_k then top_p"]], ids=str)
def test_every_allowed_token_can_be_drawn(parameters):
    logits = np.asarray(gaussian_logits(1, scale=2.0)[0])
    logits = np.where(np.argsort(np.argsort(-logits)) < 12, 0.1 * logits, -20.0)
    ids, _ = nucleus(logits, **parameters)
    assert set(draws(logits, **parameters)) == set(ids)


def test_greedy_is_argmax_and_takes_the_lowest_of_equals():
    logits = np.array(gaussian_logits(32))
    logits[3, [900, 17, 400]] = 50.0
    tokens = jitted(logits, inputs(32, temperature=0.0), jnp.zeros(32, jnp.int32))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    mixed = jitted(logits, inputs(32, temperature=np.arange(32) % 2), jnp.zeros(32, jnp.int32))
    np.testing.assert_array_equal(mixed[::2], logits.argmax(-1)[::2])


@pytest.mark.parametrize("parameters", [{"top_p": 1e-6}, {"top_k": 1}, {"temperature": 1e-6}, {"temperature": 1e-42}])
def test_the_narrowest_sampling_is_argmax(parameters):
    logits = gaussian_logits(32)
    tokens = jitted(logits, inputs(32, **parameters), jnp.zeros(32, jnp.int32))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("parameters", [{}, {"top_k": 999}, {"top_k": 5000}, {"top_p": 0.999999}])
def test_a_huge_temperature_is_uniform(parameters):
    tokens = draws(np.asarray(gaussian_logits(1)[0]), temperature=1e30, **parameters)
    counts, _ = np.histogram(tokens, bins=8, range=(0, VOCABULARY))
    assert len(set(tokens)) > 800
    assert np.abs(counts - 256).max() < 5 * 16


@pytest.mark.parametrize("parameters", [{}, {"top_p": 0.99}, {"top_k": 40}, {"temperature": 1e30, "top_p": 0.99}])
def test_forbidden_tokens_are_never_drawn(parameters):
    logits = np.full(VOCABULARY, -np.inf, np.float32)
    logits[[5, 300, 999]] = [1.0, 0.5, 0.0]
    assert set(draws(logits, **parameters)) == {5, 300, 999}


def everything(rows, rng):
    """Parameters that mix all regimes."""
    return {
        "temperature": rng.choice([0.0, 0.7, 1.0, 5.0], rows),
        "top_p": rng.choice([0.3, 0.95, 1.0], rows),
        "top_k": rng.choice([0, 5, 64, 200], rows),
        "seed": rng.integers(0, 2**32, rows),
    }


def test_a_row_does_not_depend_on_its_neighbours_or_its_index():
    rng = np.random.default_rng(1)
    logits, parameters = gaussian_logits(32), everything(32, rng)
    position = rng.integers(0, 4096, 32).astype(np.int32)
    want = np.asarray(jitted(logits, inputs(32, **parameters), position))
    order = rng.permutation(32)
    moved = {name: value[order] for name, value in parameters.items()}
    np.testing.assert_array_equal(jitted(logits[order], inputs(32, **moved), position[order]), want[order])
    for row in range(0, 32, 3):
        others = everything(32, rng)
        neighbours = np.array(gaussian_logits(32, seed=row + 2))
        neighbours[row] = logits[row]
        for name, value in others.items():
            value[row] = parameters[name][row]
        assert jitted(neighbours, inputs(32, **others), position)[row] == want[row]


def test_a_row_alone_equals_the_row_among_greedy_ones():
    """What the batch lets skip changes nothing: each row alone is stochastic."""
    parameters = everything(32, np.random.default_rng(1))
    logits, position = gaussian_logits(32), jnp.arange(32, dtype=jnp.int32)
    want = np.asarray(jitted(logits, inputs(32, **parameters), position))
    for row in range(32):
        alone = {**parameters, "temperature": np.where(np.arange(32) == row, parameters["temperature"], 0.0)}
        assert jitted(logits, inputs(32, **alone), position)[row] == want[row]


def test_the_sorted_fallback_draws_what_the_bounded_path_draws(monkeypatch):
    logits, position = gaussian_logits(32, scale=5.0), jnp.arange(32, dtype=jnp.int32)
    mixed = inputs(32, top_p=np.linspace(0.1, 0.95, 32), top_k=np.arange(32) % 9)
    want = jitted(logits, mixed, position)
    monkeypatch.setattr(sampling, "_BOUND", 1)
    np.testing.assert_array_equal(jax.jit(lambda *a: sample(*a))(logits, mixed, position), want)


def test_seed_and_position_are_the_whole_key():
    logits = jnp.zeros((32, VOCABULARY))
    first = np.asarray(jitted(logits, inputs(32, seed=7), jnp.full(32, 3, jnp.int32)))
    by_position = np.asarray(jitted(logits, inputs(32, seed=7), jnp.arange(32, dtype=jnp.int32)))
    by_seed = np.asarray(jitted(logits, inputs(32, seed=2**32 - 32 + np.arange(32)), jnp.full(32, 3, jnp.int32)))
    assert len(set(first.tolist())) == 1
    assert by_position[3] == first[0]
    assert len(set(by_position.tolist())) > 25
    assert len(set(by_seed.tolist())) > 25


@pytest.mark.parametrize("vocabulary", [3, 257])
def test_small_and_odd_vocabularies(vocabulary):
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((32, vocabulary)), jnp.float32)
    mixed = inputs(32, top_p=np.resize([0.5, 1.0], 32), top_k=np.resize([0, 2, 400], 32))
    tokens = np.asarray(jitted(logits, mixed, jnp.zeros(32, jnp.int32)))
    assert ((tokens >= 0) & (tokens < vocabulary)).all()
    greedy = jitted(logits, inputs(32, temperature=0.0), jnp.zeros(32, jnp.int32))
    np.testing.assert_array_equal(greedy, logits.argmax(-1))


def test_it_traces_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        jax.jit(lambda *a: sample(*a)).trace(gaussian_logits(2), inputs(2), jnp.zeros(2, jnp.int32))
