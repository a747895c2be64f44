"""Mixtures of experts against numpy in float64: routers, blocks of rows, experts, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from twinmesh.kernels_pallas.grouped import block_rows, group
from twinmesh.models.config import ClampedGate, Experts
from twinmesh.models.moe import Choice, ExpertWeights, Unit, choose, chosen_experts, every_expert, gated

T, E, F, X, K = 11, 6, 10, 7, 3
CLAMPED = ClampedGate(1.702, 0.5)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def weights(*, biases=True):
    shapes = [(X, E, F), (X, E, F), (X, F, E), *[(X, F)] * 2 * biases]
    return ExpertWeights(*(draw(*shape, seed=seed) for seed, shape in enumerate(shapes)))


def by_hand(x, w, chosen, shares, unit):
    """Loop over rows and their experts, in float64."""
    x, (gate_w, up_w, down_w, *biases) = np.float64(x), [None if a is None else np.float64(a) for a in w]
    out = np.zeros((len(x), down_w.shape[2]))
    for t, experts in enumerate(chosen):
        for share, e in zip(shares[t], experts, strict=True):
            gate, up = x[t] @ gate_w[e], x[t] @ up_w[e]
            if biases[0] is not None:
                gate, up = gate + biases[0][e], up + biases[1][e]
            if unit == "silu":
                hidden = gate / (1 + np.exp(-gate)) * up
            else:
                gate, up = np.minimum(gate, unit.limit), np.clip(up, -unit.limit, unit.limit)
                hidden = gate / (1 + np.exp(-unit.alpha * gate)) * (up + 1)
            out[t] += share * (hidden @ down_w[e])
    return out


def random_choice(rows, seed=0):
    random = np.random.default_rng(seed)
    chosen = np.stack([random.permutation(X)[:K] for _ in range(rows)]).astype(np.int32)
    return Choice(jnp.asarray(chosen), jnp.asarray(random.random((rows, K)), jnp.float32))


@pytest.mark.parametrize("is_normalised", [True, False])
def test_a_router_takes_the_best_and_of_equal_ones_the_first(is_normalised):
    scores = np.array(draw(T, X))
    scores[0], scores[1, 2:5] = 1.0, 9.0
    found = jax.jit(lambda s: choose(s, Experts(X, K, is_normalised)))(scores)
    values, index = jax.lax.top_k(jax.nn.softmax(scores), K)
    np.testing.assert_array_equal(found.experts, index)
    expected = values / values.sum(-1, keepdims=True) if is_normalised else values
    np.testing.assert_allclose(found.shares, expected, rtol=1e-6)


def test_a_router_of_nan_stays_in_range():
    found = jax.jit(lambda s: choose(s, Experts(X, K)))(jnp.full((2, X), jnp.nan))
    assert ((np.asarray(found.experts) >= 0) & (np.asarray(found.experts) < X)).all()


@settings(max_examples=20, deadline=None)
@given(arrays(np.int32, T, elements=dict(min_value=0, max_value=X - 1)))
def test_every_choice_has_a_place_of_its_own_in_a_block_of_its_expert(first):
    size = 4
    chosen = (first[:, None] + np.arange(K)) % X
    blocks = jax.tree.map(np.asarray, group_jitted(jnp.asarray(chosen, jnp.int32), size))
    block, offset = np.divmod(blocks.place, size)
    assert len(np.unique(blocks.place)) == T * K
    np.testing.assert_array_equal(blocks.expert[block], chosen)
    np.testing.assert_array_equal(blocks.rows[block, offset], np.repeat(np.arange(T)[:, None], K, axis=1))
    counts = np.bincount(chosen.reshape(-1), minlength=X)
    assert blocks.used == sum(-(-count // size) for count in counts) <= len(blocks.rows)
    assert (blocks.rows < T).sum() == T * K


group_jitted = jax.jit(lambda chosen, size: group(chosen, X, size), static_argnums=1)


def test_blocks_hold_about_what_an_expert_gets():
    assert [block_rows(rows, 4, 32) for rows in (1, 2, 16, 64, 256, 2048)] == [1, 2, 8, 8, 32, 64]
    assert block_rows(3, 2, 2) == 3  # no expert gets a row twice


@pytest.mark.parametrize(("unit", "biases"), [("silu", False), (CLAMPED, True)])
def test_experts_are_those_of_a_loop_in_numpy(unit, biases):
    w, choice = weights(biases=biases), random_choice(T)
    # All rows to the same three experts: several blocks of one expert, and experts without rows.
    crowded = Choice(jnp.tile(jnp.array([2, 0, 5], jnp.int32), (T, 1)), choice.shares)
    run = jax.jit(lambda x, c: (chosen_experts(x, w, c, Unit(unit)), every_expert(x, w, c, Unit(unit))))
    x = draw(T, E, seed=9)
    for case in (choice, crowded):
        for found in run(x, case):
            np.testing.assert_allclose(found, by_hand(x, w, *map(np.asarray, case), unit), rtol=1e-5, atol=1e-5)


def test_a_row_has_the_same_bits_beside_any_others():
    w = weights()
    run = jax.jit(lambda x, c: chosen_experts(x, w, c, Unit(CLAMPED)))
    x, choice = draw(T, E), random_choice(T)
    found = np.asarray(run(x, choice))
    order = np.random.default_rng(3).permutation(T)
    np.testing.assert_array_equal(run(x[order], Choice(choice.experts[order], choice.shares[order])), found[order])
    others = Choice(choice.experts.at[1:].set(random_choice(T, 5).experts[1:]), choice.shares)
    np.testing.assert_array_equal(run(np.concatenate([x[:1], draw(T - 1, E, seed=7)]), others)[0], found[0])


def test_gradients_are_those_of_every_expert():
    x, w, choice = draw(T, E), weights(), random_choice(T)

    def loss(mix):
        return lambda x, w, shares: jnp.sum(jnp.sin(mix(x, w, choice._replace(shares=shares), Unit(CLAMPED))))

    gradients = (jax.jit(jax.grad(loss(mix), argnums=(0, 1, 2))) for mix in (chosen_experts, every_expert))
    found, expected = (gradient(x, w, choice.shares) for gradient in gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))


def test_the_clamped_unit_stops_at_its_limits():
    gate, up = jnp.array([9.0, -9.0, 0.25]), jnp.array([-9.0, 9.0, 0.25])
    np.testing.assert_allclose(gated(gate, up, CLAMPED)[0], 0.5 / (1 + np.exp(-1.702 * 0.5)) * 0.5, rtol=1e-6)
    assert gated(gate, up, CLAMPED)[1] == pytest.approx(-9 / (1 + np.exp(1.702 * 9)) * 1.5, rel=1e-5)


@pytest.mark.parametrize(("count", "per_token"), [(4, 5), (4, 0)])
def test_more_experts_than_there_are_cannot_be_passed(count, per_token):
    with pytest.raises(ValueError, match=f"{per_token} experts per token of {count} are not possible"):
        Experts(count, per_token)
