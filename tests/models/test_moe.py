"""Mixtures of experts against numpy in float64: routers, blocks of rows, experts, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from twinmesh.kernels_pallas import grouped
from twinmesh.kernels_pallas.matmul import Products
from twinmesh.kernels_pallas.quantized import abstract, parameter
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


@pytest.mark.parametrize("compared", [0, T * K])
@settings(max_examples=10, deadline=None)
@given(arrays(np.int32, T, elements=dict(min_value=0, max_value=X - 1)))
def test_every_choice_has_a_place_in_the_order_of_experts(compared, first):
    chosen = (first[:, None] + np.arange(K)) % X
    chosen[first == 1] = X  # padding: none
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "MOST_COMPARED", compared)
        found = jax.tree.map(np.asarray, GROUPS[compared > 0](jnp.asarray(chosen, jnp.int32)))
    order = np.argsort(chosen.reshape(-1), kind="stable")
    np.testing.assert_array_equal(found.rows, order // K)
    np.testing.assert_array_equal(found.experts, chosen.reshape(-1)[order])
    np.testing.assert_array_equal(found.sizes, np.bincount(chosen.reshape(-1), minlength=X + 1)[:X])
    np.testing.assert_array_equal(found.places.reshape(-1)[order], np.arange(T * K))


GROUPS = [jax.jit(lambda chosen, way=way: grouped.group(chosen, X)) for way in range(2)]


def test_blocks_hold_about_what_an_expert_gets():
    assert [grouped.block_rows(4 * rows, 32) for rows in (1, 2, 16, 64, 256, 2048)] == [4, 8, 8, 8, 32, 64]


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "MXFP4", "Q4_1"])
def test_rows_are_multiplied_by_the_matrix_of_their_group(monkeypatch, kind, has_kernels):
    if not has_kernels:
        monkeypatch.setattr(grouped, "is_on_one_cpu", lambda: False)
    monkeypatch.setattr(grouped, "FEWEST_ROWS", 2)
    sizes = np.array([0, 9, 0, 1, 5, 0], np.int32)
    x, w = draw(17, 64), draw(6, 64, 40, seed=1)
    if kind in ("MXFP4", "Q4_1"):
        w = random_stack(kind, (6, 64, 40))
        exact = np.stack([parameter(w.matrix_at(index)) for index in range(6)])
        w = jax.tree.map(jnp.asarray, w)
    else:
        x, w = x.astype(kind), w.astype(kind)
        exact = np.asarray(w, np.float64)
    run = jax.jit(lambda x, w, sizes: grouped.grouped_matmul(x, w, sizes, products=PRODUCTS, dtype=jnp.float32))
    found, used = np.asarray(run(x, w, sizes)), sizes.sum()
    expected = np.einsum("mk,mkn->mn", np.asarray(x, np.float64)[:used], exact[np.repeat(np.arange(6), sizes)])
    np.testing.assert_allclose(found[:used], expected, rtol=1e-4, atol=1e-3)
    (alone,) = run(x[4:5], w, np.eye(6, dtype=np.int32)[1])
    if has_kernels:
        np.testing.assert_array_equal(alone, found[4])


PRODUCTS = Products("float")


def random_stack(kind, shape):
    """Draw a quantised stack of projections: any bytes, and scales of about 1."""
    random, like = np.random.default_rng(2), abstract(kind, shape, 1, 1)

    def part(described):
        if described.dtype != np.uint8:
            return random.random(described.shape).astype(described.dtype)
        return random.integers(0, 256, described.shape, np.uint8)

    parts = {name: part(described) for name, described in like.parts()}
    if kind == "MXFP4":
        parts["scales"] = random.integers(125, 129, parts["scales"].shape, np.uint8)
    return like.with_parts(parts)


def test_padding_chooses_no_expert():
    w, choice = weights(), random_choice(T)
    padded = choice._replace(experts=choice.experts.at[4:].set(X))
    run = jax.jit(lambda x, c: chosen_experts(x, w, c, Unit(CLAMPED)))
    found = np.asarray(run(draw(T, E), padded))
    np.testing.assert_array_equal(found[:4], np.asarray(run(draw(T, E), choice))[:4])
    assert (found[4:] == 0).all()


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
